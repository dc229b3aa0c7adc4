"""Every command refuses a path that no file can have, whichever of its parameters holds it."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from launcher.cli import commands, run
from tests.unit.launcher.cli.test_cli import leaves

BAD = ("a\0b", "a\udcffb", "x" * 300, "loop", "loop/x", "dangling/x", "file/x", "~nobody-of-that-name/x")
# What fills the other parameters, so that the bad one is reached.
OTHERS = {
    "data": "data", "hf_dir": "empty", "kind": "run", "out": "new", "run": "tiny", "run_dir": "new",
    "source": "file", "sources": "no.jsonl", "tokenizer": "outlast-4k",
    "vocab_size": "300", "folder": "empty", "first": "new", "second": "new", "step": "1",
}  # fmt: skip
NEEDED = {
    "prepare": ("tokenizer", "out")
}  # options without which the command says only that they are missing


def path_parameters() -> Iterator[tuple[str, str]]:
    """Each command and parameter that takes a text, except the demo, which asks for nothing else."""
    for name, command in leaves(commands):
        for parameter in command.params:
            if parameter.type.name in ("text", "path", "file", "directory") and name != "demo":
                yield name, str(parameter.name)


def arguments_with(name: str, parameter: str, value: str) -> list[str]:
    """The words of a command whose `parameter` has `value`."""
    command = dict(leaves(commands))[name]
    words = name.split()
    for each in command.params:
        named = str(each.name)
        if named != parameter and not (each.required or named in NEEDED.get(name, ())):
            continue
        text = value if named == parameter else OTHERS[named]
        text = f"data.path={text}" if named == "overrides" else text
        words += [text] if isinstance(each, click.Argument) else [each.opts[0], text]
    return words


@pytest.mark.parametrize(("name", "parameter"), list(path_parameters()))
def test_bad_paths_are_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    parameter: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTLAST_RUNS", str(tmp_path / "runs"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for bad in BAD:
        assert run(arguments_with(name, parameter, bad)) == 2, bad
        assert capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_set_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "In the beginning"}\n')
    assert run(["prepare", "a.jsonl", "--tokenizer", "outlast-4k", "--out", "/proc/x"]) == 2
    assert capsys.readouterr().err == (
        "error: --out /proc/x: /proc is on a file system that holds no files of users. Name another place.\n"
    )
