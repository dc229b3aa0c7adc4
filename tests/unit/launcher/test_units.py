"""Bytes and durations as people read them."""

import pytest

from launcher.units import counted, duration, one_line, printable, size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_have_binary_units(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (3600, "1:00:00"),
        (90_061, "25:01:01"),
        (-5, "0:00"),
        (1e300, "–"),
        (float("inf"), "–"),
        (float("nan"), "–"),
    ],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_noun_agrees_with_its_number() -> None:
    assert [counted(number, "file") for number in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]


def test_a_text_of_others_does_not_command_the_terminal() -> None:
    assert printable("a\x1b[31m\udcff\nb\tü") == "a\\x1b[31m\\udcff\nb\tü"
    assert one_line("  first\r\n\n second  ") == "first; second"
    assert one_line("x" * 11, 10) == "x" * 10 + "…"
