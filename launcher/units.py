"""Numbers as people read them (bytes, durations, counts), and texts that were not written by us."""

import unicodedata

_CENTURIES_S = 1e10


def size(count: float) -> str:
    """Bytes with a binary unit: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: 1:02:03. A negative number, from a clock that was set back, is 0:00.

    Centuries, which only a wrong number or a wrong clock can give, are a dash.
    """
    if not seconds < _CENTURIES_S:
        return "–"
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def counted(count: int, noun: str) -> str:
    """A number with a noun whose plural ends in s: 1 file, 2,000 files."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def printable(text: str) -> str:
    """`text` without what a terminal would obey or refuse: control characters and surrogates as escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        else character
        for character in text
    )


def one_line(text: str, longest: int = 300) -> str:
    """`text` as one line: printable, its own lines joined, and cut when it is longer than `longest`."""
    line = printable("; ".join(part.strip() for part in text.splitlines() if part.strip()))
    return line if len(line) <= longest else f"{line[:longest]}…"


def processes(count: int) -> str:
    """A number of processes, with the noun in singular or plural."""
    return f"{count} process" if count == 1 else f"{count} processes"
