"""The format of a checkpoint on disk: the index, the rank files and their checksums. Torch-free.

    step-00001200/
        rank-00000.safetensors   the fp32 state that this rank owns, followed by its chunk checksums
        checkpoint.json          the index, written last; renaming the folder into place is the commit

A rank file is an ordinary safetensors file. Its tensors are `GROUP.STATE` (flat fp32: the part of the
group's state that this rank owns) and, last, `chunk_checksums` (uint64): xxh3-64 of each CHUNK_BYTES between
the header and this table. The index holds the xxh3-128 of header and table, and its own checksum. Every byte
of the folder is therefore covered, while the index grows with parameters + ranks only.

Nothing here uses pickle. Nothing that is read can lead to a path outside the folder or to an allocation
larger than the file.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO, RawIOBase
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import Field, ValidationError, field_validator, model_validator

from data_pipeline.config_file import Section
from data_pipeline.errors import CheckpointError
from data_pipeline.sampling.skip_list import Ranges, SkipList
from gpt.checkpoint.layout import PLACEMENTS, GroupLayout, Kind
from gpt.checkpoint.patience import Unreadable, patiently

CHUNK_BYTES = 4 << 20  # large enough for streaming reads, small enough to locate a bad byte
CHECKSUM = "xxh3"
CHUNK_TABLE = "chunk_checksums"
INDEX_NAME = "checkpoint.json"
PIN_NAME = "pinned"
INDEX_LIMIT_BYTES = 1 << 28  # a million parameters and ranks; the index is read whole, so it needs a bound
MOST_GROUPS = 4096  # each rank file has tensors for each group; an optimizer has a handful
COMMITTED = re.compile(r"step-(\d{8,})")

Size = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ParameterEntry(Section):
    """The place of a parameter in the flat state of its group."""

    name: str
    shape: Annotated[tuple[Size, ...], Field(max_length=8)]
    group: Name
    offset: Size

    @property
    def numel(self) -> int:
        """The number of elements of the parameter."""
        return prod(self.shape)


class GroupEntry(Section):
    """One optimizer group. Its flat state is the concatenation of its parameters.

    The layout "flat" cuts that into parts of `partition_numel`, one for each rank.
    """

    name: Name
    numel: Size
    partition_numel: Annotated[Size, Field(ge=1)]
    states: tuple[Name, ...]
    hyperparameters: dict[str, float | int | bool | tuple[float, ...] | None]


class FileEntry(Section):
    """One rank file: its size, and the checksum of its header and chunk table."""

    name: Name
    size: Size
    checksum: str


class CheckpointIndex(Section):
    """The content of checkpoint.json."""

    format_version: Literal[1] = 1
    step: Size
    attempt: Size
    world_size: Annotated[int, Field(ge=1)]
    stage: Literal[1, 2, 3]
    layout: Kind = "flat"  # how the state is placed on the ranks: a key of layout.PLACEMENTS
    optimizer_steps: Size
    skipped: tuple[tuple[Size, Size], ...] = ()
    scalars: dict[Name, float] = Field(default_factory=dict)
    parameters: tuple[ParameterEntry, ...]
    groups: Annotated[tuple[GroupEntry, ...], Field(max_length=MOST_GROUPS)]
    data_fingerprint: str
    config_fingerprint: str
    versions: dict[str, str]
    checksum_algorithm: Literal["xxh3"] = "xxh3"
    chunk_bytes: Annotated[int, Field(ge=4, multiple_of=4)] = CHUNK_BYTES
    files: tuple[FileEntry, ...]

    @field_validator("skipped")
    @classmethod
    def _are_ranges(cls, skipped: Ranges) -> Ranges:
        return SkipList(skipped).ranges

    @field_validator("layout")
    @classmethod
    def _is_known(cls, layout: Kind) -> Kind:
        if layout not in PLACEMENTS:
            raise ValueError(f"{layout!r} is not one of {', '.join(PLACEMENTS)}")
        return layout

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if len({group.name for group in self.groups}) < len(self.groups):
            raise ValueError("two groups have the same name")
        if not {entry.group for entry in self.parameters} <= {group.name for group in self.groups}:
            raise ValueError("a parameter is in a group that is not listed")
        members = self._members()
        for group in self.groups:
            starts = accumulate((entry.numel for entry in members[group.name]), initial=0)
            if [entry.offset for entry in members[group.name]] + [group.numel] != list(starts):
                raise ValueError(f"the parameters of group {group.name} have gaps or overlap")
        _ = self.layouts  # building them raises ValueError for a group that its parts do not hold
        return self

    @cached_property
    def layouts(self) -> dict[str, GroupLayout]:
        """How each group's state is placed on the ranks, by the name of the group."""
        members = self._members()
        return {
            group.name: GroupLayout(
                self.layout,
                self.world_size,
                [entry.shape for entry in members[group.name]],
                group.partition_numel,
            )
            for group in self.groups
        }

    def _members(self) -> dict[str, list[ParameterEntry]]:
        """The parameters of each group, in order."""
        members: dict[str, list[ParameterEntry]] = {group.name: [] for group in self.groups}
        for entry in self.parameters:
            members[entry.group].append(entry)
        return members

    def at_step(
        self, step: int, *, optimizer_steps: int, scalars: Mapping[str, float], skipped: Ranges
    ) -> "CheckpointIndex":
        """The index of the same run at another step."""
        changes = {
            "step": step,
            "optimizer_steps": optimizer_steps,
            "scalars": dict(scalars),
            "skipped": skipped,
        }
        return self._with(changes)

    def with_files(self, files: tuple[FileEntry, ...]) -> "CheckpointIndex":
        """This index with its rank files, which are known last."""
        return self._with({"files": files})

    def for_new_run(
        self, *, data_fingerprint: str, config_fingerprint: str, skipped: Ranges
    ) -> "CheckpointIndex":
        """The index of the same state as the first checkpoint of another run."""
        changes = {
            "attempt": 0,
            "data_fingerprint": data_fingerprint,
            "config_fingerprint": config_fingerprint,
            "skipped": skipped,
        }
        return self._with(changes)

    def _with(self, changes: Mapping[str, object]) -> "CheckpointIndex":
        fields = {name: getattr(self, name) for name in CheckpointIndex.model_fields}
        return CheckpointIndex.model_validate({**fields, **changes})

    def dumps(self) -> bytes:
        """The bytes of checkpoint.json, with their own checksum as the last key."""
        content = self.model_dump(mode="json")
        return _canonical({**content, "checksum": _index_checksum(content)})


@dataclass(frozen=True)
class BadBytes:
    """A place in a file whose content is not what was written."""

    path: Path
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: byte {self.offset}: {self.reason}"


class Corrupt(CheckpointError):
    """A checkpoint that does not verify; `bad` is the place."""

    def __init__(self, bad: BadBytes) -> None:
        self.bad = bad
        super().__init__(str(bad))

    def __reduce__(self) -> tuple[type["Corrupt"], tuple[BadBytes]]:
        return Corrupt, (self.bad,)


def step_name(step: int) -> str:
    """The folder name of a committed checkpoint."""
    return f"step-{step:08d}"


def rank_name(rank: int) -> str:
    """The file name of one rank's state."""
    return f"rank-{rank:05d}.safetensors"


def committed(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and folder of every committed checkpoint, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [(_step_of(entry), entry) for entry in checkpoints.iterdir()]
    return sorted((step, entry) for step, entry in found if step is not None and entry.is_dir())


def _step_of(folder: Path) -> int | None:
    """The step in the name of a committed checkpoint's folder; None for any other name."""
    match = COMMITTED.fullmatch(folder.name)
    return int(match[1]) if match and folder.name == step_name(int(match[1])) else None


def is_pinned(folder: Path) -> bool:
    """Whether a committed checkpoint is pinned: retention never deletes it."""
    return (folder / PIN_NAME).exists()


def read_index(folder: Path) -> CheckpointIndex:
    """The index of the checkpoint in `folder`. Raises Corrupt if a byte of it has changed, or Unreadable."""
    path = folder / INDEX_NAME
    try:
        if (size := patiently(path, path.stat).st_size) > INDEX_LIMIT_BYTES:
            raise Corrupt(
                BadBytes(path, INDEX_LIMIT_BYTES, f"has {size} bytes, which is more than any index has")
            )
        raw = patiently(path, path.read_bytes)
    except OSError as error:
        raise Corrupt(BadBytes(path, 0, _why(error))) from None
    try:
        content = json.loads(raw)
        checksum = content.pop("checksum")
        if not _has_own_checksum(raw, str(checksum)):
            raise Corrupt(BadBytes(path, 0, "the index does not match its own checksum"))
        index = CheckpointIndex.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "index"
        raise Corrupt(BadBytes(path, 0, f"not a readable index: {where}: {first['msg'][:200]}")) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Corrupt(BadBytes(path, 0, f"not a readable index: {reason}")) from None
    names = [entry.name for entry in index.files]
    if len(names) != index.world_size or names != [rank_name(rank) for rank in range(len(names))]:
        raise Corrupt(BadBytes(path, 0, f"does not list the files of {index.world_size} ranks"))
    if (step := _step_of(folder)) is not None and step != index.step:
        raise Corrupt(
            BadBytes(path, 0, f"is the checkpoint of step {index.step}, in a folder for step {step}")
        )
    return index


@dataclass(frozen=True)
class RankFrame:
    """The verified frame of a rank file: the offsets of its tensors and the checksums of its chunks."""

    tensors: dict[str, tuple[int, int]]
    data_start: int
    data_end: int
    chunk_bytes: int
    chunk_checksums: tuple[int, ...]

    def chunk(self, number: int) -> tuple[int, int]:
        """First byte and end byte of chunk `number` in the file."""
        start = self.data_start + number * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.data_end)


def rank_tensors(index: CheckpointIndex, rank: int) -> dict[str, int]:
    """Name and number of elements of each tensor in the file of `rank`, in the order of the file."""
    tensors = {}
    for group in index.groups:
        numel = index.layouts[group.name].owned_numel(rank)
        tensors.update({f"{group.name}.{state}": numel for state in group.states})
    return tensors


def rank_header(tensors: Mapping[str, int], chunk_bytes: int = CHUNK_BYTES) -> tuple[bytes, int, int]:
    """Length prefix and header of a rank file, the number of bytes of its state, and of its chunks."""
    entries: dict[str, Any] = {"__metadata__": {"chunk_bytes": str(chunk_bytes), "checksum": CHECKSUM}}
    end = 0
    for name, numel in tensors.items():
        entries[name] = {"dtype": "F32", "shape": [numel], "data_offsets": [end, end + 4 * numel]}
        end += 4 * numel
    chunks = -(-end // chunk_bytes)
    table = [end, end + 8 * chunks]
    entries[CHUNK_TABLE] = {"dtype": "U64", "shape": [chunks], "data_offsets": table}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)
    return struct.pack("<Q", len(header)) + header, end, chunks


def read_rank_frame(folder: Path, index: CheckpointIndex, rank: int) -> RankFrame:
    """The frame of a rank's file, verified against the index. Reads header and table only. Raises Corrupt."""
    entry = index.files[rank]
    _check_size(folder / entry.name, entry.size)
    return read_frame(folder / entry.name, entry, rank_tensors(index, rank), index.chunk_bytes)


def _check_size(path: Path, size: int) -> None:
    """Raise Corrupt unless the file has `size` bytes: this is cheap, and what a header should be is not.

    Raises Unreadable like `read_index`.
    """
    try:
        found = patiently(path, path.stat).st_size
    except OSError as error:
        raise Corrupt(BadBytes(path, 0, _why(error))) from None
    if found != size:
        raise Corrupt(BadBytes(path, min(found, size), f"has {found} bytes instead of {size}"))


def read_frame(path: Path, entry: FileEntry, tensors: Mapping[str, int], chunk_bytes: int) -> RankFrame:
    """The frame of a rank file with `tensors`, verified against its entry. Raises Corrupt or Unreadable."""
    header, data_bytes, chunks = rank_header(tensors, chunk_bytes)
    expected_size = len(header) + data_bytes + 8 * chunks
    try:
        size = patiently(path, path.stat).st_size
        if size != entry.size or size != expected_size:
            at = min(size, expected_size)
            raise Corrupt(BadBytes(path, at, f"has {size} bytes instead of {expected_size}"))

        def read() -> tuple[bytes, bytes]:
            with path.open("rb") as file:
                start = file.read(len(header))
                file.seek(len(header) + data_bytes)
                return start, file.read(8 * chunks)

        found, table = patiently(path, read)
    except OSError as error:
        raise Corrupt(BadBytes(path, 0, _why(error))) from None
    if found != header:
        at = next((i for i, (a, b) in enumerate(zip(found, header, strict=False)) if a != b), 0)
        raise Corrupt(BadBytes(path, at, "the header is not as written"))
    if frame_checksum(header, table) != entry.checksum:
        raise Corrupt(BadBytes(path, len(header) + data_bytes, "the chunk checksums are not as written"))
    offsets = {}
    start = len(header)
    for name, numel in tensors.items():
        offsets[name] = (start, start + 4 * numel)
        start += 4 * numel
    checksums = struct.unpack(f"<{chunks}Q", table)
    return RankFrame(offsets, len(header), len(header) + data_bytes, chunk_bytes, checksums)


def read_chunk(file: RawIOBase, path: Path, layout: RankFrame, number: int, target: memoryview) -> None:
    """Read chunk `number` of an open rank file into `target`, of its size. Raises Corrupt or OSError."""
    start, end = layout.chunk(number)
    file.seek(start)
    count = file.readinto(target)
    if count != end - start or chunk_checksum(target) != layout.chunk_checksums[number]:
        raise Corrupt(BadBytes(path, start, f"checksum of bytes {start} to {end} differs"))


def verify(folder: Path) -> Iterator[BadBytes]:
    """Read every byte of a checkpoint and compare checksums; one BadBytes for each corrupt chunk or frame."""
    try:
        index = read_index(folder)
    except Corrupt as error:
        yield error.bad
        return
    except Unreadable as error:
        yield BadBytes(folder / INDEX_NAME, 0, str(error.__cause__))
        return
    for rank in range(index.world_size):
        yield from verify_rank(folder, index, rank)


def verify_rank(folder: Path, index: CheckpointIndex, rank: int) -> Iterator[BadBytes]:
    """Read every byte of one rank's file and compare checksums."""
    entry = index.files[rank]
    try:
        _check_size(folder / entry.name, entry.size)
    except Corrupt as error:
        yield error.bad
        return
    except Unreadable as error:
        yield BadBytes(folder / entry.name, 0, str(error.__cause__))
        return
    yield from verify_file(folder / entry.name, entry, rank_tensors(index, rank), index.chunk_bytes)


def verify_file(
    path: Path,
    entry: FileEntry,
    tensors: Mapping[str, int],
    chunk_bytes: int,
    advance: Callable[[int], object] = lambda _: None,
    open_file: Callable[[Path], RawIOBase] = FileIO,
) -> Iterator[BadBytes]:
    """Read every byte of a rank file with `tensors`; `advance` is called with the size of each chunk.

    A place that cannot be read is reported like one whose content has changed.
    """
    try:
        layout = read_frame(path, entry, tensors, chunk_bytes)
    except Corrupt as error:
        yield error.bad
        return
    except Unreadable as error:
        yield BadBytes(path, 0, str(error.__cause__))
        return
    buffer = memoryview(bytearray(min(chunk_bytes, layout.data_end - layout.data_start)))
    with open_file(path) as file:
        for number in range(len(layout.chunk_checksums)):
            start, end = layout.chunk(number)
            try:
                read_chunk(file, path, layout, number, buffer[: end - start])
                advance(end - start)
            except Corrupt as error:
                yield error.bad
            except OSError as error:
                yield BadBytes(path, start, _why(error))


def _why(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))


def chunk_checksum(content: bytes | memoryview) -> int:
    """xxh3-64 of one chunk."""
    return xxhash.xxh3_64_intdigest(content)


def frame_checksum(header: bytes, table: bytes) -> str:
    """xxh3-128 of a rank file's header and chunk table."""
    return xxhash.xxh3_128_hexdigest(header + table)


def _has_own_checksum(raw: bytes, checksum: str) -> bool:
    """Whether `raw` is as `CheckpointIndex.dumps` wrote it, without writing it again."""
    tail = f',\n "checksum": "{checksum}"\n}}\n'.encode()
    return raw.endswith(tail) and xxhash.xxh3_128_hexdigest(raw[: -len(tail)] + b"\n}\n") == checksum


def _index_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_canonical(content))


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=False, ensure_ascii=True).encode() + b"\n"
