"""The [data] and [batch] tables: what a run reads and how many tokens make a step. Torch-free."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config_file import Section
from data_pipeline.sampling.batch_schedule import BatchSizes
from gpt.config.model import Count


class Source(Section):
    """One data directory of a mixture."""

    path: Path = Field(description="Data directory made by `outlast prepare`.")
    weight: float = Field(
        ge=0,
        description="Share of the training tokens, relative to the other sources. 0 leaves the source out "
        "until a stage of data.schedule gives it a weight.",
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Read the source at most this often; after that, the other sources take its share. "
        "Default: no limit.",
    )


class MixtureStage(Section):
    """New weights of a mixture from some point of the training onwards."""

    from_tokens: Count | None = Field(
        default=None,
        description="Training tokens after which these weights apply. Alternative: from_progress.",
    )
    from_progress: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Fraction of the run's tokens after which these weights apply. `outlast launch` converts "
        "it to from_tokens, so training longer does not move the stage.",
    )
    weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        description="Weight of each source, in the order of data.mixture; 0 leaves the source out."
    )

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.from_tokens is None) == (self.from_progress is None):
            raise ValueError("data.schedule: each stage needs exactly one of from_tokens and from_progress.")
        return self

    def tokens(self, total: int) -> int:
        """The number of training tokens after which the stage starts, in a run of `total` tokens."""
        return self.from_tokens or int((self.from_progress or 0) * total)


class DataConfig(Section):
    """The data that the run reads."""

    path: Path | None = Field(default=None, description="Data directory made by `outlast prepare`.")
    mixture: tuple[Source, ...] = Field(
        default=(), description="Several data directories, each with a weight."
    )
    schedule: tuple[MixtureStage, ...] = Field(
        default=(), description="Stages with new weights for the mixture, in the order of training."
    )
    document_mask: bool = Field(
        default=True,
        description="Restrict attention to tokens of the same document, and do not score the first "
        "token of a document.",
    )
    packing: Literal["stream", "best-fit"] = Field(
        default="stream",
        description="stream: concatenate the documents and cut them into windows. best-fit: pack whole "
        "documents into rows, so that few are cut (arXiv:2404.10830).",
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Stop with an error before a source is read more often than this. Default: no limit.",
    )
    skip: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="Ranges [first, stop) of sequence numbers to skip, for example those of a loss spike. "
        "`outlast resume` may add ranges after the resumed step.",
    )
    verify: Literal["sizes", "full"] = Field(
        default="sizes",
        description="What is checked before a launch. sizes: sizes and headers of all files. full: every "
        "byte. Small data sets are always checked in full.",
    )
    changed_from: tuple[str, ...] = Field(
        default=(),
        description="Fingerprints of earlier data sets that checkpoints of this run may have been trained "
        "on. `outlast resume --allow-change data` adds to this list.",
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data directories: those of the mixture, or the single `path`."""
        return self.mixture or (Source(path=self.path or Path(), weight=1.0),)

    def with_schedule_in_tokens(self, total: int) -> "DataConfig":
        """This table with every stage of `schedule` fixed to a number of the run's `total` tokens."""
        schedule = tuple(
            MixtureStage(from_tokens=stage.tokens(total), weights=stage.weights) for stage in self.schedule
        )
        return DataConfig.model_validate({**dict(self), "schedule": schedule})

    def accepting(self, fingerprint: str) -> "DataConfig":
        """This table for a run whose checkpoints may also come from the data with `fingerprint`."""
        return DataConfig.model_validate({**dict(self), "changed_from": (*self.changed_from, fingerprint)})

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (not self.mixture):
            raise ValueError(
                "data: give exactly one of data.path and data.mixture, for example "
                'path = "data/fineweb". `outlast prepare` makes a data directory from raw text.'
            )
        if not any(source.weight for source in self.sources):
            raise ValueError("data.mixture: every weight is 0. Give at least one source a weight above 0.")
        for number, stage in enumerate(self.schedule):
            if len(stage.weights) != len(self.sources) or not sum(stage.weights):
                raise ValueError(
                    f"data.schedule.{number}.weights = {list(stage.weights)}: give one weight for each of "
                    f"the {len(self.sources)} sources of data.mixture, at least one of them above 0."
                )
        for first, stop in self.skip:
            if not 0 <= first < stop:
                raise ValueError(f"data.skip: [{first}, {stop}] is not a range; it needs 0 <= first < stop.")
        return self


class BatchStage(Section):
    """One stage of the batch warmup."""

    steps: Count = Field(description="How many steps the stage lasts.")
    global_batch_tokens: Count = Field(description="Tokens per optimizer step in this stage.")


class BatchConfig(Section):
    """How many tokens make an optimizer step, and how they are split."""

    global_batch_tokens: Count = Field(
        default=524_288, description="Tokens per optimizer step, after the batch warmup if there is one."
    )
    micro_batch: Count = Field(
        default=8, description="Sequences that one process computes at a time (per micro-batch)."
    )
    warmup: tuple[BatchStage, ...] = Field(
        default=(), description="Stages with smaller batches at the start of the run, in order."
    )

    @property
    def sizes(self) -> BatchSizes:
        """Tokens of each optimizer step over all ranks."""
        stages = [(stage.steps, stage.global_batch_tokens) for stage in self.warmup]
        return BatchSizes(self.global_batch_tokens, stages)

    def with_micro_batch(self, sequences: int) -> "BatchConfig":
        """The same optimizer step, computed `sequences` at a time."""
        return BatchConfig(
            global_batch_tokens=self.global_batch_tokens, micro_batch=sequences, warmup=self.warmup
        )

    @model_validator(mode="after")
    def _ramp_leads_to_the_batch(self) -> Self:
        for number, stage in enumerate(self.warmup):
            if stage.global_batch_tokens > self.global_batch_tokens:
                raise ValueError(
                    f"batch.warmup.{number}.global_batch_tokens = {stage.global_batch_tokens} is more than "
                    f"batch.global_batch_tokens = {self.global_batch_tokens}, at which the warmup ends."
                )
        return self
