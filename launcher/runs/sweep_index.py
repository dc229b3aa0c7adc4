"""SWEEP_DIR/sweep.json: which runs a sweep consists of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_pipeline.config_file import Section, validate
from gpt.run.json_file import read_json
from gpt.run.run_dir import RunDir


class SweepPoint(Section):
    """One run of a sweep: the name of its folder, and the values of the fields that the sweep varies."""

    folder: Annotated[str, Field(pattern=r"^[^/.\x00][^/\x00]*$")]
    fields: dict[str, Any]


class SweepIndex(Section):
    """The content of sweep.json: the runs in the order of the grid."""

    at_once: int | None = None
    points: tuple[SweepPoint, ...]


def read_sweep(folder: Path) -> SweepIndex | None:
    """The index of the sweep in `folder`, or None if there is no sweep. Raises ConfigError."""
    path = RunDir(folder).sweep
    content = read_json(path)
    return None if content is None else validate(SweepIndex, content, str(path))


def sweep_runs(folder: Path) -> list[RunDir] | None:
    """The runs of the sweep in `folder`, in the order of its grid, or None if there is no sweep."""
    index = read_sweep(folder)
    return None if index is None else [RunDir(folder / point.folder) for point in index.points]
