import gzip
import os
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources.documents import DocumentReader
from data_pipeline.sources.files import describe_ignored, find_files
from data_pipeline.sources.spans import Span
from tests.unit.data_pipeline.support import json_lines, write_jsonl


def test_files_of_folders_and_globs_come_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt", "a/3.jsonl.gz", "b/.hidden.txt", "b/.git/x.txt", "b/notes.pdf"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files, ignored = find_files([tmp_path / "raw"])
    assert [file.name for file in files] == ["raw/a/3.jsonl.gz", "raw/b/1.txt", "raw/b/2.jsonl"]
    assert ignored == [f"{tmp_path}/raw/b/notes.pdf"]
    files, ignored = find_files([str(tmp_path / "raw/*/*.jsonl*")])
    assert [file.name for file in files] == ["a/3.jsonl.gz", "b/2.jsonl"]
    assert ignored == []


def test_every_source_without_a_supported_file_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    sources = ["missing.jsonl", "notes.pdf", "empty", "*.parquet", "a.txt", "./a.txt"]
    with pytest.raises(ConfigError) as error:
        find_files([str(tmp_path / source) for source in sources])
    supported = (
        "(supported: .jsonl, .ndjson, .json, .txt, .csv, .tsv, .parquet, .arrow; all but .parquet and .arrow "
        "also with .gz, .zst, .xz, .bz2)"
    )
    assert [problem.removeprefix(f"{tmp_path}/") for problem in error.value.problems] == [
        "missing.jsonl: no such file or folder",
        f"notes.pdf: this kind of file is not supported {supported}",
        f"empty: the folder contains no supported file {supported}",
        "*.parquet: no file matches",
        "a.txt is named by two sources; name it once",
    ]


def _names(*sources: Path | str) -> list[str]:
    return [file.name for file in find_files([str(source) for source in sources])[0]]


def _problems(*sources: Path | str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        find_files([str(source) for source in sources])
    return error.value.problems


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    for name in ("raw/a/1.jsonl", "elsewhere/2.jsonl"):
        write_jsonl(tmp_path / name, ["text"])
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "a" / "loop").symlink_to(tmp_path / "raw")
    assert _names(tmp_path / "raw") == ["raw/a/1.jsonl", "raw/again/2.jsonl"]
    assert len(_names(f"{tmp_path}/raw/**/*.jsonl")) == 2
    assert _problems(tmp_path / "elsewhere", tmp_path / "raw" / "linked") == [
        f"{tmp_path}/raw/linked/2.jsonl is named by two sources; name it once"
    ]


def test_folders_that_a_glob_matches_are_read(tmp_path: Path) -> None:
    for name in ("s/b.jsonl", "s/sub/a.jsonl", "spark/x.jsonl/part-0.jsonl"):
        write_jsonl(tmp_path / name, ["text"])
    assert _names(f"{tmp_path}/s/*") == ["b.jsonl", "sub/a.jsonl"]
    assert _names(f"{tmp_path}/s/**") == ["b.jsonl", "sub/a.jsonl"]
    assert _names(f"{tmp_path}/spark/*.jsonl") == ["x.jsonl/part-0.jsonl"]


def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "raw" / "a.jsonl", ["text"])
    (tmp_path / "raw" / "private").mkdir()
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if path.name == "private":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list any folder
    assert _problems(tmp_path / "raw") == [
        f"{tmp_path}/raw/private: the folder cannot be read: Permission denied"
    ]


def test_a_link_is_read_by_its_own_name(tmp_path: Path) -> None:
    """Caches of the Hugging Face hub link each name to a blob named by its hash; two names may share one."""
    write_jsonl(tmp_path / "blobs" / "0123abcd", ["text"])
    (tmp_path / "snapshot").mkdir()
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / "snapshot" / name).symlink_to("../blobs/0123abcd")
    first, second = find_files([tmp_path / "snapshot"])[0]
    assert (first.kind, second.kind) == ("lines", "text")
    assert first.location == str(tmp_path / "snapshot" / "a.jsonl")


def test_a_link_to_another_named_file_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "a.jsonl", ["text"])
    (tmp_path / "raw" / "b.jsonl").symlink_to("a.jsonl")
    assert _problems(tmp_path / "raw") == [
        f"{tmp_path}/raw/b.jsonl is a link to {tmp_path}/raw/a.jsonl, which is named too"
    ]


def test_links_without_a_file_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "b.jsonl").symlink_to("b.jsonl")
    for source in ([tmp_path], [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]):
        dangling, loop = _problems(*source)
        assert dangling.startswith(f"{tmp_path}/a.jsonl is a link to gone.jsonl, which leads to no file")
        assert loop.startswith(f"{tmp_path}/b.jsonl is a link to b.jsonl, which leads to no file")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.jsonl")
    (problem,) = _problems(tmp_path)
    assert problem.startswith(f"{tmp_path}/b.jsonl is not a regular file (a pipe, a socket or a device)")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).touch()
    (problem,) = _problems(tmp_path)
    assert problem.encode().startswith(f"{tmp_path}/caf\\xe9.jsonl: its name is not valid UTF-8".encode())


def test_names_with_brackets_are_literal_where_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "data[1]" / "a[x].jsonl", ["text"])
    write_jsonl(tmp_path / "data1" / "b.jsonl", ["text"])
    assert _names(tmp_path / "data[1]") == ["data[1]/a[x].jsonl"]
    assert _names(tmp_path / "data[1]" / "a[x].jsonl") == ["a[x].jsonl"]
    assert _names(f"{tmp_path}/data[1]/*.jsonl") == ["a[x].jsonl"]
    assert _names(f"{tmp_path}/data[0-9]/*.jsonl") == ["data1/b.jsonl"]
    assert [file.name for file in find_files([f"file://{tmp_path}/data[1]/a[x].jsonl"])[0]] == ["a[x].jsonl"]
    monkeypatch.chdir(tmp_path)
    assert _names("data[1]/*.jsonl", "*/b.jsonl") == ["a[x].jsonl", "data1/b.jsonl"]


def test_pointers_and_saved_data_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    pointer, saved = _problems(tmp_path / "a.jsonl", tmp_path / "saved")
    assert (
        pointer
        == f"{tmp_path}/a.jsonl is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"
    )
    assert "was written by save_to_disk of the package datasets: name it in a [[datasets]] table" in saved


def test_ignored_files_are_named(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.docx", "dataset_infos.json", "c.jsonl", "d.1", "e.2", "f.3"):
        (tmp_path / name).touch()
    files, ignored = find_files([tmp_path])
    assert [file.name for file in files] == [f"{tmp_path.name}/c.jsonl"]
    shown = ", ".join(
        f"{tmp_path}/{name}" for name in ("a.pdf", "b.docx", "d.1", "dataset_infos.json", "e.2")
    )
    assert describe_ignored(ignored) == (
        f"ignoring 6 files of unsupported kinds in the folders: {shown} and 1 more"
    )


@pytest.mark.parametrize("change", ["append", "cut", "empty", "replace", "remove"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, change: str, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = json_lines(*(f"document {n}" for n in range(100)))
    path.write_bytes(gzip.compress(content) if suffix else content)
    (file,), _ = find_files([path])

    def alter() -> None:
        raw = path.read_bytes()
        if change == "append":
            path.write_bytes(raw + raw)
        elif change == "cut":
            os.truncate(path, len(raw) // 2)
        elif change == "empty":
            os.truncate(path, 0)
        elif change == "remove":
            path.unlink()
        else:  # the same size and time, and another text
            state = path.stat()
            new = tmp_path / "new"
            new.write_bytes(raw[::-1])
            os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
            new.rename(path)

    reader = DocumentReader(Span(file, 0, file.size_bytes), "text")
    documents = iter(reader)
    next(documents)
    alter()
    with pytest.raises(
        DataError, match=r"a\.jsonl.*: it (changed while it was being prepared|cannot be read)"
    ):
        list(documents)
    if change != "replace":
        with pytest.raises(DataError, match=r"a\.jsonl.*: it (changed|cannot be read)"):
            list(DocumentReader(Span(file, 0, file.size_bytes), "text"))
