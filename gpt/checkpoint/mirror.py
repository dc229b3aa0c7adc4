"""A second place for a run and its checkpoints: a folder or an object store, through fsspec. Torch-free.

    MIRROR/RUN/config.json, cluster.json, provenance.json, metrics.jsonl, events.jsonl
    MIRROR/RUN/checkpoints/step-00001200/rank-00000.safetensors …, checkpoint.json (last)

That is a run directory without the code and the attempts. The index is written last and deleted first, so
that a checkpoint is there whole or not at all; what is fetched is checked byte by byte before it counts.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.durable import fsync_folder
from data_pipeline.errors import LaunchError, OutlastError
from data_pipeline.remote import find_store, in_words, is_remote
from gpt.checkpoint.format import COMMITTED, INDEX_NAME, PIN_NAME, step_name, verify
from gpt.checkpoint.writer import Pace, set_aside
from gpt.run import record
from gpt.run.json_file import read_json
from gpt.run.run_dir import REWOUND_PREFIX, UNCOMMITTED_PREFIX, RunDir

_PIECE_BYTES = 1 << 20  # of a copy that is held back


class MirrorError(LaunchError):
    """A mirror that does not take or give what it was asked for; the run itself goes on."""


class Mirror:
    """What stands at `place`, the mirrored run directory: a folder or a URL."""

    def __init__(self, place: str) -> None:
        """Raises ConfigError where fsspec has no store for it, MirrorError where that cannot be asked."""
        self.place = place.rstrip("/")
        with self._asking():
            self._store, self._root = find_store(
                self.place, **({} if is_remote(place) else {"auto_mkdir": True})
            )

    @classmethod
    def of(cls, run_dir: RunDir, place: str) -> "Mirror":
        """The mirror of `run_dir` below `place`, checkpoint.mirror of its config."""
        return cls(f"{place.rstrip('/')}/{run_dir.path.absolute().name}")

    def has_bucket(self) -> bool:
        """Whether what holds it is there: of an object store the bucket."""
        bucket = self._root.partition("/")[0]
        with self._asking():
            return not bucket or bool(self._store.exists(bucket))

    def run_id(self) -> str | None:
        """The id of the run that is mirrored there, None where there is none."""
        path = f"{self._root}/{RunDir(Path()).provenance.name}"
        with self._asking():
            if not self._store.exists(path):
                return None
            return str(json.loads(self._store.cat_file(path)).get("run_id"))

    def check_owner(self, run_dir: RunDir) -> None:
        """Raise MirrorError where another run than `run_dir` is mirrored there."""
        ours, theirs = (read_json(run_dir.provenance) or {}).get("run_id"), self.run_id()
        if theirs not in (None, ours):
            raise MirrorError(f"{self.place} is the mirror of another run ({theirs})")

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there whole, in order."""
        with self._asking():
            self._store.invalidate_cache()
            indexes = self._store.glob(f"{self._root}/checkpoints/*/{INDEX_NAME}")
        matches = (COMMITTED.fullmatch(Path(path).parent.name) for path in indexes)
        return sorted(int(match[1]) for match in matches if match)

    def has(self, step: int, folder: Path) -> bool:
        """Whether this very checkpoint of `step`, that in `folder`, is there with each file in its size."""
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
        """Copy the checkpoint in `folder`, as fast as the store takes it or `pace` lets it; its bytes."""
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
        # In pieces of our own: a store's put_file sends as much at once as it likes.
        with path.open("rb") as file, self._store.open(place, "wb") as copy:
            while piece := file.read(_PIECE_BYTES):
                copy.write(piece)
                pace.advance(len(piece))

    def put_run(self, run_dir: RunDir) -> None:
        """Copy what a run needs besides a checkpoint to go on elsewhere."""
        with self._asking():
            for path in _run_files(run_dir):
                if path.exists():
                    self._store.put_file(str(path), f"{self._root}/{path.name}")

    def delete(self, step: int) -> None:
        """Delete what is there of a checkpoint, first what makes it one."""
        with self._asking():
            if not self._store.isdir(self._path(step)):
                return
            names = [Path(path).name for path in self._store.ls(self._path(step), detail=False, refresh=True)]
            for name in sorted(names, key=lambda name: name != INDEX_NAME):
                self._store.rm_file(self._path(step, name))
            if self._store.isdir(self._path(step)):  # object stores have no empty folders
                self._store.rmdir(self._path(step))

    def set_aside(self, step: int, mark: str) -> None:
        """Take a checkpoint there out of the line: its index gets another name, with `mark` before it."""
        with self._asking():
            index = self._path(step, INDEX_NAME)
            self._store.pipe_file(self._path(step, f"{mark}{INDEX_NAME}"), self._store.cat_file(index))
            self._store.rm_file(index)

    def set_later_aside(self, step: int) -> None:
        """Take what is there after `step` out of the line: the run goes on from `step` another time."""
        mark = f"{REWOUND_PREFIX}{int(time.time())}-"
        for number in self.steps():
            if number > step:
                self.set_aside(number, mark)

    def set_pin(self, step: int, *, is_pinned: bool) -> None:
        """Have a checkpoint there stay whatever retention says, or not."""
        path = self._path(step, PIN_NAME)
        with self._asking():
            if is_pinned:
                self._store.pipe_file(path, b"")
            elif self._store.exists(path):
                self._store.rm_file(path)

    def is_pinned(self, step: int) -> bool:
        """Whether a checkpoint there stays whatever retention says."""
        with self._asking():
            return bool(self._store.exists(self._path(step, PIN_NAME)))

    def fetch(self, step: int, checkpoints: Path) -> None:
        """Bring a checkpoint into the folder `checkpoints`; one of that step that is there is put aside.

        Raises MirrorError where a byte of it is bad.
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
                record.sync(file)
            fsync_folder(temporary)
            final = checkpoints / step_name(step)
            if final.exists():
                set_aside(final)
            temporary.rename(final)
            fsync_folder(checkpoints)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def fetch_newest(self, checkpoints: Path, say: Callable[[str], None], newer_than: int = -1) -> int | None:
        """Bring the newest intact checkpoint after step `newer_than` into `checkpoints`; its step, or None.

        `say` hears which ones are passed over, and why.
        """
        for step in reversed(self.steps()):
            if step <= newer_than:
                return None
            try:
                self.fetch(step, checkpoints)
            except MirrorError as error:
                say(str(error))
                continue
            return step
        return None

    def fetch_run(self, run_dir: RunDir, say: Callable[[str], None]) -> int | None:
        """Make `run_dir` the run that is mirrored there, with its newest intact checkpoint; its step.

        Raises MirrorError where there is no run.
        """
        with self._asking():
            if not self._store.exists(f"{self._root}/{run_dir.config.name}"):
                raise MirrorError(f"{self.place} is no mirror of a run: it has no {run_dir.config.name}.")
        temporary = RunDir(run_dir.path.with_name(f".{run_dir.path.name}.fetched"))
        shutil.rmtree(temporary.path, ignore_errors=True)
        temporary.checkpoints.mkdir(parents=True)
        temporary.attempts.mkdir()
        try:
            step = self.fetch_newest(temporary.checkpoints, say)
            with self._asking():
                for path in _run_files(temporary):
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
        """Turn whatever a store raises into a MirrorError: their libraries share no base class."""
        try:
            yield
        except OutlastError:
            raise
        except Exception as error:
            raise MirrorError(f"the mirror {self.place}: {in_words(error)}") from error


def _run_files(run_dir: RunDir) -> tuple[Path, ...]:
    # The config last: what has one is a run.
    return run_dir.cluster, run_dir.provenance, run_dir.events, run_dir.metrics, run_dir.config
