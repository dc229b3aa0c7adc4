"""What a run reads, and how many tokens of it make a step: the tables [data] and [batch]. Torch-free."""

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
        ge=0, description="Share of the training tokens, relative to the other sources; 0 for later only."
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Read it so often at most; from then on the other sources take its share. Default: no "
        "limit.",
    )


class MixtureStage(Section):
    """The weights of a mixture from some point of the training on."""

    from_tokens: Count | None = Field(
        default=None, description="Tokens of training after which these weights hold; or give from_progress."
    )
    from_progress: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the run's tokens after which these weights hold. Becomes from_tokens at "
        "launch, so that training longer does not move it.",
    )
    weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        description="Weight of each source of the mixture, in its order; 0 leaves one out."
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if (self.from_tokens is None) == (self.from_progress is None):
            raise ValueError("data.schedule: each stage needs exactly one of from_tokens and from_progress.")
        return self

    def tokens(self, total: int) -> int:
        """After how many of the run's `total` tokens the stage begins."""
        return self.from_tokens or int((self.from_progress or 0) * total)


class DataConfig(Section):
    """What the run reads."""

    path: Path | None = Field(default=None, description="Data directory made by `outlast prepare`.")
    mixture: tuple[Source, ...] = Field(default=(), description="Several data directories with weights.")
    schedule: tuple[MixtureStage, ...] = Field(
        default=(), description="Other weights of the mixture from some point of the training on, in order."
    )
    document_mask: bool = Field(
        default=True, description="Attention stays inside documents; a document's first token is not scored."
    )
    packing: Literal["stream", "best-fit"] = Field(
        default="stream",
        description="stream cuts the documents, end to end, into windows; best-fit packs them whole into "
        "rows and cuts few (arXiv:2404.10830).",
    )
    max_epochs: float | None = Field(
        default=None,
        gt=0,
        description="Stop with an error before a source is read more often. Default: no limit.",
    )
    skip: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="Ranges [first, stop) of sequence numbers that are passed over, such as those of a loss "
        "spike. A run may gain some on resume, from the resumed step on.",
    )
    verify: Literal["sizes", "full"] = Field(
        default="sizes",
        description="What is checked before a launch: sizes and headers of all files, or every byte of them; "
        "small data sets are checked whole always.",
    )

    changed_from: tuple[str, ...] = Field(
        default=(),
        description="Fingerprints of other data that checkpoints of this run may come from; "
        "`outlast resume --allow-change data` adds to them.",
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data directories, one or several."""
        return self.mixture or (Source(path=self.path or Path(), weight=1.0),)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (not self.mixture):
            raise ValueError(
                "data: exactly one of data.path and data.mixture is needed, for example "
                'path = "data/fineweb". `outlast prepare` makes a data directory from raw text.'
            )
        if not any(source.weight for source in self.sources):
            raise ValueError("data.mixture: every weight is 0; at least one source must be read.")
        for number, stage in enumerate(self.schedule):
            if len(stage.weights) != len(self.sources) or not sum(stage.weights):
                raise ValueError(
                    f"data.schedule.{number}.weights = {list(stage.weights)}: one weight for each of the "
                    f"{len(self.sources)} sources of data.mixture is needed, and not all of them 0."
                )
        for first, stop in self.skip:
            if not 0 <= first < stop:
                raise ValueError(f"data.skip: [{first}, {stop}] is no range: it needs 0 <= first < stop.")
        return self


class BatchStage(Section):
    """Some steps of a batch ramp."""

    steps: Count = Field(description="Steps of this size.")
    global_batch_tokens: Count = Field(description="Tokens of each of these steps.")


class BatchConfig(Section):
    """How many tokens make a step, and how they are cut."""

    global_batch_tokens: Count = Field(
        default=524_288, description="Tokens of one optimizer step, after the warmup if there is one."
    )
    micro_batch: Count = Field(default=8, description="Sequences that one process computes at a time.")
    warmup: tuple[BatchStage, ...] = Field(
        default=(), description="Smaller batches at the beginning of the run, stage after stage."
    )

    @property
    def sizes(self) -> BatchSizes:
        """Tokens of each optimizer step, all ranks."""
        stages = [(stage.steps, stage.global_batch_tokens) for stage in self.warmup]
        return BatchSizes(self.global_batch_tokens, stages)

    @model_validator(mode="after")
    def _ramp_leads_to_the_batch(self) -> Self:
        for number, stage in enumerate(self.warmup):
            if stage.global_batch_tokens > self.global_batch_tokens:
                raise ValueError(
                    f"batch.warmup.{number}.global_batch_tokens = {stage.global_batch_tokens} is more than "
                    f"batch.global_batch_tokens = {self.global_batch_tokens}, which the warmup leads to."
                )
        return self
