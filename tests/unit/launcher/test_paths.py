"""How paths that users type are stored, and where a run directory can be."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from launcher.paths import absolute, moved_folder_problem, new_folder_problem


def test_a_path_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("elsewhere")
    assert absolute("link/x") == tmp_path / "link" / "x"
    assert absolute("~/x") == tmp_path / "x"
    assert absolute("link/../x") == tmp_path / "x"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a\0b", r"--out a\x00b: it has the control character \x00."),
        ("a\udcffb", r"--out a\udcffb: it has the byte 0xff, which is not UTF-8."),
        ("x" * 256, f"--out {'x' * 120}… (256 characters): its part"),
        ("~nobody-of-that-name/x", "--out ~nobody-of-that-name/x: Could not determine home directory."),
    ],
)
def test_a_path_that_no_file_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        absolute(path, "--out")
    assert str(error.value).startswith(words)


def test_the_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path = a\\nb: it has the control character"):
        absolute("a\nb", "data.path")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("%j", "cannot have '%': Slurm and submitit replace it"),
        ("100%", "cannot have '%'"),
        ("a:b", "cannot have ':': it separates the folders in PYTHONPATH"),
        ("a?b", "cannot have '?': it ends the path in the URI of MLflow's database"),
        ("a\\b", "cannot have '\\\\': Slurm reads it as an escape"),
        ("/a" * 2000, "the path has 4000 bytes, and the files of a run need up to 255 more"),
        ("dangling/run", "is a link to nowhere, which leads nowhere. Remove or mend the link."),
        ("loop", "is a link to loop, which leads nowhere."),
        ("file/run", "is a file, so nothing can be created below it."),
        ("/proc/run", "/proc is on a file system that holds no files of users."),
    ],
)
def test_a_run_directory_is_not_created_where_a_run_cannot_live(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert words in (new_folder_problem(tmp_path / name) or "")


def test_a_run_continues_where_its_directory_was_moved_unless_other_code_would_run(tmp_path: Path) -> None:
    for name in ("a:b", "%j", "%4t", "100%%"):
        assert "a run directory's path cannot have" in (moved_folder_problem(tmp_path / name) or "")
    for name in ("100%", "a#b", "a?b"):
        assert moved_folder_problem(tmp_path / name / "run") is None


def test_ordinary_names_of_run_directories_pass(tmp_path: Path) -> None:
    for name in ("0001_peak_lr=3e-4", "my run, 2", "über-läufe", "a+b@c"):
        assert new_folder_problem(tmp_path / name / "run") is None
