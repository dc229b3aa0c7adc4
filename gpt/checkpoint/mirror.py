"""A second place for a run and its checkpoints: a folder or an object store, through fsspec. Torch-free.

    MIRROR/RUN/config.json, encoding.json, cluster.json, provenance.json, metrics.jsonl, events.jsonl
    MIRROR/RUN/checkpoints/step-00001200/rank-00000.safetensors …, checkpoint.json (last)

That is a run directory without the code and the attempts. The index is written last and deleted first, so a
checkpoint is complete or does not count. Every byte that is fetched is verified before the checkpoint counts.
"""

import glob
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.durable import fsync_file, fsync_folder, rename_durably
from data_pipeline.errors import LaunchError, OutlastError
from data_pipeline.remote import find_store, in_words, is_remote
from gpt.checkpoint.format import COMMITTED, INDEX_NAME, PIN_NAME, step_name, verify
from gpt.checkpoint.removal import reject
from gpt.checkpoint.writer import Pace
from gpt.run.json_file import read_json
from gpt.run.run_dir import REWOUND_PREFIX, UNCOMMITTED_PREFIX, RunDir

_BLOCK_BYTES = 1 << 20  # a copy with a speed limit waits after each block


class MirrorError(LaunchError):
    """A mirror that refuses or fails. The run itself continues."""


class Mirror:
    """The mirrored run directory at `place`, a folder or a URL."""

    def __init__(self, place: str) -> None:
        """Raises ConfigError when fsspec has no store for the URL, MirrorError when the store fails."""
        self.place = place.rstrip("/")
        with self._asking():
            self._store, self._root = find_store(
                self.place, **({} if is_remote(place) else {"auto_mkdir": True})
            )

    @classmethod
    def of(cls, run_dir: RunDir, place: str) -> "Mirror":
        """The mirror of `run_dir` in `place`, which is checkpoint.mirror of its config."""
        return cls(f"{place.rstrip('/')}/{run_dir.path.absolute().name}")

    def has_bucket(self) -> bool:
        """Whether the bucket of an object store exists; True for a folder."""
        bucket = self._root.partition("/")[0]
        with self._asking():
            return not bucket or bool(self._store.exists(bucket))

    def run_id(self) -> str | None:
        """The id of the mirrored run; None when nothing is mirrored there."""
        path = f"{self._root}/{RunDir(Path()).provenance.name}"
        with self._asking():
            if not self._store.exists(path):
                return None
            return str(json.loads(self._store.cat_file(path)).get("run_id"))

    def check_owner(self, run_dir: RunDir) -> None:
        """Raise MirrorError when another run than `run_dir` is mirrored there."""
        ours, theirs = (read_json(run_dir.provenance) or {}).get("run_id"), self.run_id()
        if theirs not in (None, ours):
            raise MirrorError(f"{self.place} is the mirror of another run ({theirs})")

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints at the mirror, in order."""
        with self._asking():
            self._store.invalidate_cache()
            indexes = self._store.glob(f"{glob.escape(self._root)}/checkpoints/*/{INDEX_NAME}")
        matches = (COMMITTED.fullmatch(Path(path).parent.name) for path in indexes)
        return sorted(int(match[1]) for match in matches if match)

    def has(self, step: int, folder: Path) -> bool:
        """Whether the mirror holds the checkpoint in `folder`: the same index and file sizes."""
        index = (folder / INDEX_NAME).read_bytes()
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != PIN_NAME}
        with self._asking():
            path = self._path(step, INDEX_NAME)
            if not self._store.exists(path) or self._store.cat_file(path) != index:
                return False
            listed = self._store.ls(self._path(step), detail=True, refresh=True)
        theirs = {Path(entry["name"]).name: entry["size"] for entry in listed}
        return sizes.items() <= theirs.items()

    def put(self, step: int, folder: Path, pace: Pace | None = None) -> int:
        """Copy the checkpoint in `folder`, no faster than `pace` allows; the number of bytes."""
        self.delete(step)
        files = sorted(path for path in folder.iterdir() if path.name not in (INDEX_NAME, PIN_NAME))
        with self._asking():
            for path in [*files, folder / INDEX_NAME]:
                if pace is None:
                    self._store.put_file(str(path), self._path(step, path.name))
                else:
                    self._put_slowly(path, self._path(step, path.name), pace)
        return sum(path.stat().st_size for path in files)

    def _put_slowly(self, path: Path, place: str, pace: Pace) -> None:
        # A store's put_file sends as much at once as it likes, so blocks are sent one by one.
        with path.open("rb") as file, self._store.open(place, "wb") as copy:
            while block := file.read(_BLOCK_BYTES):
                copy.write(block)
                pace.advance(len(block))

    def put_run(self, run_dir: RunDir) -> None:
        """Copy what a run needs, besides a checkpoint, to continue on another machine."""
        with self._asking():
            for path in _run_files(run_dir):
                if path.exists():
                    self._store.put_file(str(path), f"{self._root}/{path.name}")

    def delete(self, step: int) -> None:
        """Delete a checkpoint at the mirror, the index first."""
        with self._asking():
            if not self._store.isdir(self._path(step)):
                return
            names = [Path(path).name for path in self._store.ls(self._path(step), detail=False, refresh=True)]
            for name in sorted(names, key=lambda name: name != INDEX_NAME):
                self._store.rm_file(self._path(step, name))
            if self._store.isdir(self._path(step)):  # object stores have no empty folders
                self._store.rmdir(self._path(step))

    def rewind(self, step: int) -> None:
        """Rename the index of every checkpoint later than `step`, so that it no longer counts.

        The run continues from `step` and will save those steps again.
        """
        prefix = f"{REWOUND_PREFIX}{int(time.time())}-"
        for later in (number for number in self.steps() if number > step):
            with self._asking():
                index = self._path(later, INDEX_NAME)
                self._store.pipe_file(self._path(later, f"{prefix}{INDEX_NAME}"), self._store.cat_file(index))
                self._store.rm_file(index)

    def set_pin(self, step: int, *, is_pinned: bool) -> None:
        """Pin or unpin a checkpoint at the mirror."""
        path = self._path(step, PIN_NAME)
        with self._asking():
            if is_pinned:
                self._store.pipe_file(path, b"")
            elif self._store.exists(path):
                self._store.rm_file(path)

    def is_pinned(self, step: int) -> bool:
        """Whether a checkpoint at the mirror is pinned: retention never deletes it."""
        with self._asking():
            return bool(self._store.exists(self._path(step, PIN_NAME)))

    def fetch(self, step: int, checkpoints: Path) -> None:
        """Fetch a checkpoint into the folder `checkpoints`; one of the same step there is rejected.

        Raises MirrorError when a byte of it is corrupt.
        """
        temporary = checkpoints / f"{UNCOMMITTED_PREFIX}fetched-{step_name(step)}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            with self._asking():
                for path in self._store.ls(self._path(step), detail=False, refresh=True):
                    self._store.get_file(path, str(temporary / Path(path).name))
            for bad in verify(temporary):
                raise MirrorError(
                    f"{self._path(step, bad.path.name)} at the mirror: byte {bad.offset}: {bad.reason}"
                )
            for file in temporary.iterdir():
                with file.open("rb") as content:
                    fsync_file(content)
            fsync_folder(temporary)
            final = checkpoints / step_name(step)
            if final.exists():
                reject(final)
            rename_durably(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def fetch_newest(
        self, checkpoints: Path, report: Callable[[str], None], newer_than: int = -1
    ) -> int | None:
        """Fetch the newest intact checkpoint after step `newer_than` into `checkpoints`; its step, or None.

        `report` receives a line about each checkpoint that is skipped.
        """
        for step in reversed(self.steps()):
            if step <= newer_than:
                return None
            try:
                self.fetch(step, checkpoints)
            except MirrorError as error:
                report(str(error))
                continue
            return step
        return None

    def cluster(self) -> dict[str, Any]:
        """The cluster.json of the mirrored run. Raises MirrorError when no run is mirrored there."""
        layout = RunDir(Path(self._root))
        with self._asking():
            if not self._store.exists(str(layout.config)):
                raise MirrorError(f"{self.place} is no mirror of a run: it has no {layout.config.name}.")
            if not self._store.exists(str(layout.cluster)):
                return {}
            content = json.loads(self._store.cat_file(str(layout.cluster)))
        if not isinstance(content, dict):
            raise MirrorError(f"{self.place}: {layout.cluster.name} is no JSON object")
        return content

    def fetch_run(
        self, run_dir: RunDir, report: Callable[[str], None], left_out: Collection[Path] = ()
    ) -> int | None:
        """Create `run_dir` from the mirrored run and its newest intact checkpoint; that step, or None.

        Files of the run directory that are `left_out` are not fetched.
        """
        temporary = RunDir(run_dir.path.with_name(f".{run_dir.path.name}.fetched"))
        shutil.rmtree(temporary.path, ignore_errors=True)
        temporary.checkpoints.mkdir(parents=True)
        temporary.attempts.mkdir()
        try:
            step = self.fetch_newest(temporary.checkpoints, report)
            with self._asking():
                for path in _run_files(temporary):
                    if path.name in [other.name for other in left_out]:
                        continue
                    if self._store.exists(f"{self._root}/{path.name}"):
                        self._store.get_file(f"{self._root}/{path.name}", str(path))
            temporary.path.rename(run_dir.path)
        finally:
            shutil.rmtree(temporary.path, ignore_errors=True)
        return step

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/checkpoints/{step_name(step)}{'/' if name else ''}{name}"

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn any exception of a store into a MirrorError: their libraries share no base class."""
        try:
            yield
        except OutlastError:
            raise
        except Exception as error:
            raise MirrorError(f"the mirror {self.place}: {in_words(error)}") from error


def _run_files(run_dir: RunDir) -> tuple[Path, ...]:
    # The config is last: a folder with a config is a run.
    files = run_dir.encoding, run_dir.cluster, run_dir.provenance, run_dir.events, run_dir.metrics
    return *files, run_dir.config
