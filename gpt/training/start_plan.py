"""What an attempt opens, builds and resumes, as pure functions.

gpt.training.setup carries the plans out. The first plan needs the config alone; the second one also needs the
checkpoint that was loaded, since a corrupt one is skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.sampling.skip_list import Ranges
from gpt.config.run import RunConfig
from gpt.run.environment import WorkerEnvironment


@dataclass(frozen=True)
class BuildPlan:
    """How the data is opened and the network is built."""

    sources: tuple[tuple[Path, float], ...]  # each folder with its weight in the mixture
    draws_weights: bool  # else a checkpoint's replace them
    compiles: bool
    has_whole_rows: bool  # each row is one document for attention, so that compiled parts may be larger

    @classmethod
    def of(cls, run: RunConfig, *, has_checkpoint: bool, has_gpu: bool = False) -> "BuildPlan":
        """The plan for `run`; `has_checkpoint` says whether the run has or had one."""
        return cls(
            sources=tuple((source.path, source.weight) for source in run.data.sources),
            draws_weights=not has_checkpoint,
            compiles=run.compiles(has_gpu=has_gpu),
            has_whole_rows=not run.data.document_mask,
        )


@dataclass(frozen=True)
class ResumePlan:
    """Where training continues."""

    start: int  # completed steps
    last: int
    skips: tuple[tuple[Ranges, int], ...]  # sequences to skip, each with the step from which on
    searches_warmup: bool
    pause_at: int | None = None
    stop_at: int | None = None

    @classmethod
    def of(cls, run: RunConfig, *, step: int = 0, skipped: Ranges = ()) -> "ResumePlan":
        """The plan for `run` from the checkpoint of `step`, whose run has `skipped` some sequences."""
        return cls(
            start=step,
            last=run.total_steps,
            skips=((skipped, 0), (run.data.skip, step)),
            searches_warmup=run.schedule.warmup == "auto" and step == 0,
        )

    def rehearsed(self, environment: WorkerEnvironment) -> "ResumePlan":
        """This plan with the interruptions that a rehearsal asks for: a pause first, then a stop."""
        if self.start == 0:
            return replace(self, pause_at=environment.pause_at)
        return replace(self, stop_at=environment.stop_at)

    @property
    def first(self) -> int:
        """The first step that this attempt takes."""
        return self.start + 1


def lost_work(
    start: int, reached: Mapping[str, Any] | None, kept: Mapping[str, Any] | None, now: float
) -> dict[str, float] | None:
    """The steps and seconds since the checkpoint of `start`; None in a fresh run.

    `reached` is the last line of metrics.jsonl, and `kept` the last one up to `start`. `repeated_s` is the
    time of the steps that are computed again, `lost_s` the time until now; 0 if the clock was set back.
    """
    line = kept or reached
    if reached is None or line is None:
        return None
    ends = (min(now, reached["time"]), now)
    repeated_s, lost_s = (round(max(0.0, end - line["time"]), 1) for end in ends)
    return {"lost_steps": max(0, reached["step"] - start), "lost_s": lost_s, "repeated_s": repeated_s}


def is_evaluation_missing(start: int, every_steps: int, line: Mapping[str, Any]) -> bool:
    """Whether the evaluation due at step `start` is missing in its `line`, because a stop cut it short."""
    return line.get("step") == start and "val/loss" not in line and start % every_steps == 0
