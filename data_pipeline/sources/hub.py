"""Hugging Face data sets, from the hub or from a local folder, as sources of documents.

A data set is split by rows, and a streamed one by the files that it streams (`datasets` calls them shards).
So any process can read a part, and read it again after a crash. The package `datasets` does all the reading;
this module asks it for one column of a range.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from data_pipeline.config_file import Section
from data_pipeline.errors import ConfigError
from data_pipeline.remote import in_words

_ROWS_A_READ = 1024
_SAVED = ("state.json", "dataset_dict.json")  # the files that `save_to_disk` writes


class HubDataset(Section):
    """One [[datasets]] table of DATA.toml: a data set that the package `datasets` loads."""

    name: str = Field(min_length=1, description="Name on the Hugging Face hub, or a local folder.")
    config: str | None = Field(default=None, description="Configuration (subset) of the data set.")
    split: str = Field(default="train", min_length=1, description="Split, for example train or train[:10%].")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the hub. Default: its main branch."
    )
    text_field: str | None = Field(
        default=None,
        min_length=1,
        description="Column that contains the text. Default: text_field of DATA.toml.",
    )
    streaming: bool = Field(
        default=False,
        description="Read over the network while encoding and keep no copy on disk. Work is then split by "
        "the data set's files and no finer.",
    )

    @property
    def label(self) -> str:
        """Everything that determines the rows, in one line."""
        config = f" {self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.name}{revision}{config} {self.split}{' (streamed)' if self.streaming else ''}"


@dataclass(frozen=True)
class RowSource:
    """A loaded data set of `units` rows, or a streamed one of `units` shards.

    `size_bytes` is the size of its rows in memory, or 0 if that is unknown.
    """

    name: str
    size_bytes: int
    units: int
    fingerprint: str
    is_streamed: bool
    text_field: str
    dataset: Any = field(compare=False, repr=False)

    @property
    def identity(self) -> tuple[str, ...]:
        """Values that change when the rows do."""
        return (self.name, self.fingerprint, self.text_field)

    @property
    def unit(self) -> str:
        """The name of a unit."""
        return "shards" if self.is_streamed else "rows"

    def values(self, start: int, stop: int) -> Iterator[Any]:
        """Yields the text column of the units [start, stop) as Arrow scalars.

        Passes on what `datasets` raises: OSError and its own errors if a file or the network fails, and
        KeyError if a streamed data set has no such column.
        """
        for part in self._parts(start, stop):
            for table in part.with_format("arrow").iter(_ROWS_A_READ):
                yield from table[self.text_field]

    def _parts(self, start: int, stop: int) -> Iterator[Any]:
        if self.is_streamed:
            for index in range(start, stop):
                yield self.dataset.shard(self.units, index)
        else:
            yield self.dataset.select_columns([self.text_field]).select(range(start, stop))


def open_dataset(wanted: HubDataset, text_field: str) -> RowSource:
    """The data set `wanted`; it is downloaded unless it is streamed.

    Raises ConfigError, with the message of `datasets`, if the data set, its split or its column is missing.
    """
    column = wanted.text_field or text_field
    try:
        dataset, fingerprint, size_bytes = _streamed(wanted) if wanted.streaming else _loaded(wanted)
    except Exception as error:  # from any of the libraries that `datasets` uses
        # For a file that it cannot read, the message of `datasets` says only that an error occurred.
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ConfigError(f"datasets: {wanted.label} cannot be loaded: {in_words(cause)}") from error
    if dataset.features is not None and column not in dataset.features:
        raise ConfigError(
            f"datasets: {wanted.label} has no column {column!r}; it has {', '.join(dataset.features)}. "
            f"Set text_field to one of them"
        )
    units = dataset.num_shards if wanted.streaming else len(dataset)
    return RowSource(wanted.label, size_bytes, units, fingerprint, wanted.streaming, column, dataset)


def _loaded(wanted: HubDataset) -> tuple[Any, str, int]:
    import datasets

    if _is_saved(wanted):
        return _load_saved(wanted)
    dataset: Any = datasets.load_dataset(
        wanted.name, wanted.config, split=wanted.split, revision=wanted.revision
    )
    return dataset, str(dataset._fingerprint), int(dataset.data.nbytes)


def _is_saved(wanted: HubDataset) -> bool:
    """Whether the data set is a folder that `save_to_disk` wrote."""
    return any((Path(wanted.name) / name).exists() for name in _SAVED)


def _load_saved(wanted: HubDataset) -> tuple[Any, str, int]:
    """The rows of the wanted split of a saved data set. Raises ValueError for what such a folder lacks."""
    import datasets

    for setting, value in (("config", wanted.config), ("revision", wanted.revision)):
        if value is not None:
            raise ValueError(f"a folder of save_to_disk has no {setting}; leave {setting} = {value!r} out")
    try:
        saved: Any = datasets.load_from_disk(wanted.name)
    except IndexError:  # the data set has no file
        raise ValueError("the saved data set is empty") from None
    if isinstance(saved, datasets.DatasetDict):
        splits = dict(saved)
    else:
        # `train` is the default of the setting, so it means the only split unless the user wrote it.
        is_default = "split" not in wanted.model_fields_set
        splits = {"train" if is_default or saved.split is None else str(saved.split): saved}
    parts = []
    for part in wanted.split.split("+"):
        name = part.strip().partition("[")[0]
        if name not in splits:
            raise ValueError(f"no split {name!r}; it has {', '.join(splits)}")
        instruction = datasets.ReadInstruction.from_spec(part.strip())
        for rows in instruction.to_absolute({name: len(splits[name])}):
            parts.append((name, rows.from_ or 0, len(splits[name]) if rows.to is None else rows.to))
    if parts == [(wanted.split, 0, len(splits[parts[0][0]]))]:
        dataset, fingerprint = splits[wanted.split], str(splits[wanted.split]._fingerprint)
    else:
        ranges = [(str(splits[name]._fingerprint), start, stop) for name, start, stop in parts]
        fingerprint = hashlib.sha256(json.dumps(ranges).encode()).hexdigest()[:32]
        dataset = datasets.concatenate_datasets(
            [splits[name].select(range(start, stop)) for name, start, stop in parts]
        )
    if not len(dataset):
        raise ValueError(f"split {wanted.split!r} has no rows")
    return dataset, fingerprint, int(dataset.data.nbytes)


def _streamed(wanted: HubDataset) -> tuple[Any, str, int]:
    import datasets

    if _is_saved(wanted):
        raise ValueError("a folder of save_to_disk cannot be streamed; leave streaming out")
    builder = datasets.load_dataset_builder(wanted.name, wanted.config, revision=wanted.revision)
    dataset = builder.as_streaming_dataset(split=wanted.split)
    # A stream has no fingerprint, so its files and their modification times or ETags identify it.
    files = builder.config.data_files or {}
    origins = {str(split): [str(origin) for origin in files[split].origin_metadata] for split in files}
    known = json.dumps([wanted.label, builder.hash, origins])
    split = (builder.info.splits or {}).get(wanted.split)
    return dataset, hashlib.sha256(known.encode()).hexdigest()[:32], int(split.num_bytes) if split else 0
