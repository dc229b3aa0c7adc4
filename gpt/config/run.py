"""RunConfig: everything that decides the numbers of a run, and where its outputs go.

A run is a pure function of (config, data manifest, step), so whatever changes a number stands here, in the
tables that it is made of, and nowhere else. Torch-free: the launcher reads it on login nodes. What the data
decides (the vocabulary) and what a default derives (d_ff) is filled in by `resolve` before the run directory
is written.
"""

import itertools
from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Section
from data_pipeline.sampling.batch_schedule import BatchSizes
from gpt.config.data import BatchConfig, DataConfig, MixtureStage
from gpt.config.model import Count, ModelConfig, nearest_multiple
from gpt.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt.config.parallel import ParallelConfig, ZeroConfig


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: Count | None = Field(
        default=None,
        description="Steps between checkpoints. Default: 500, unless every_minutes or interval is given; of "
        "several the first that is due counts.",
    )
    every_minutes: float | None = Field(default=None, gt=0, description="Minutes between checkpoints.")
    interval: Literal["auto"] | None = Field(
        default=None,
        description="auto: as often as costs least (Young 1974, Daly 2006), from the measured stall of a "
        "save and the failures of this run.",
    )
    max_lost_minutes: float = Field(
        default=60.0, gt=0, description="With interval = auto: most minutes of work that a failure may cost."
    )
    keep_last: int = Field(default=3, ge=2, description="Newest committed checkpoints to keep.")
    keep_every: Count | None = Field(
        default=None, description="Steps of which one checkpoint each is kept for ever: the first of them."
    )
    keep_best: int = Field(
        default=0, ge=0, description="Checkpoints with the lowest validation loss to keep besides."
    )
    asynchronous: bool = Field(
        default=True,
        description="Copy the state to host memory and write it while training goes on; false, or too little "
        "host memory: training waits for the disk.",
    )
    max_mb_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Most that each process writes, and then reads back, in MB a second, while training goes "
        "on; and most that is copied to the mirror. Default: no limit.",
    )

    mirror: str | None = Field(
        default=None,
        description="A second place for checkpoints: a folder, or a URL such as s3://bucket/runs. Each is "
        "copied below it once it is committed, and `outlast resume` takes it from there. Default: none.",
    )

    @field_validator("mirror")
    @classmethod
    def _empty_is_none(cls, mirror: str | None) -> str | None:
        return mirror or None

    @model_validator(mode="before")
    @classmethod
    def _has_an_interval(cls, fields: Any) -> Any:
        given = ("every_steps", "every_minutes", "interval")
        if isinstance(fields, dict) and all(fields.get(name) is None for name in given):
            return {**fields, "every_steps": 500}
        return fields


class EvaluationConfig(Section):
    """The loss on the validation split."""

    every_steps: Count = Field(default=500, description="Steps between evaluations.")
    tokens: Count = Field(default=1_048_576, description="Tokens of the split's beginning that are scored.")


class TrackingConfig(Section):
    """The record's mirror in MLflow."""

    enabled: bool = Field(default=True, description="Mirror the record in MLflow.")
    uri: str | None = Field(
        default=None, description="MLflow server. Default: an SQLite file beside the run directory."
    )
    experiment: str = Field(default="outlast", description="MLflow experiment.")
    parent: str | None = Field(
        default=None, description="Id of the MLflow run under which this one stands; a sweep sets it."
    )


class LaunchConfig(Section):
    """How the run is kept alive."""

    max_restarts: int = Field(
        default=100, ge=0, description="Restarts of the workers in one job, by torchrun."
    )
    max_failures: Count = Field(
        default=3,
        description="Attempts in a row without a new checkpoint before the run gives up (exit code 93).",
    )
    node_check: bool = Field(
        default=True,
        description="Look at every node before training (devices, speed, clock, versions, memory); in Slurm "
        "a bad one is named in bad_nodes.jsonl, and the job goes on without it.",
    )
    hang_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds without a step, an evaluation or a save after which the workers are restarted.",
    )
    start_timeout_s: float = Field(
        default=900.0,
        gt=0,
        description="The same for each phase of a start: imports, reading a checkpoint, the first step with "
        "what it compiles. Less than collective_timeout_s too.",
    )
    collective_timeout_s: float = Field(
        default=1200.0,
        gt=0,
        description="Seconds a rank waits for the others in a collective; more than hang_timeout_s, so that "
        "a hang is explained before it is an error.",
    )

    @model_validator(mode="after")
    def _hangs_are_explained_first(self) -> Self:
        for name in ("hang_timeout_s", "start_timeout_s"):
            if getattr(self, name) >= self.collective_timeout_s:
                raise ValueError(
                    f"launch.{name} = {getattr(self, name):g} must be below launch.collective_timeout_s = "
                    f"{self.collective_timeout_s:g}, at which the others end with an error of their own. "
                    "Raise that one too."
                )
        return self


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Names the run directory and the MLflow run: letters, digits, '.', '_', '-'."
    )
    seed: int = Field(
        default=1234, ge=0, lt=2**63, description="Of the initial weights and the order of the data."
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16",
        description="Of parameters and activations; master weights are fp32 always. fp16 trains with a "
        "dynamic loss scale.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the blocks and the loss (torch.compile): faster steps after a first one that "
        "takes a minute or more. Numbers differ from those without in rounding, and in what dropout draws.",
    )
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = Field(
        default=None,
        description="FIRST:LAST, steps of rank 0 that torch's profiler traces into profile/ and the tracked "
        "run.",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    zero: ZeroConfig = ZeroConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step after the warmup, all ranks."""
        return self.batch.global_batch_tokens // self.model.context

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of each optimizer step, all ranks."""
        return self.batch.sizes.over(self.model.context)

    @property
    def stages(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Each stage of data.schedule: from which sequence number on, and the weights of the sources."""
        total, context = self.batch.sizes.until(self.total_steps), self.model.context
        return tuple((stage.tokens(total) // context, stage.weights) for stage in self.data.schedule)

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names."""
        first, _, last = (self.profile or "1:0").partition(":")
        return range(int(first), int(last) + 1)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.schedule.total_steps is not None:
            return self.schedule.total_steps
        assert self.schedule.total_tokens is not None
        return self.batch.sizes.steps_for(self.schedule.total_tokens)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches of one rank in one step after the warmup (gradient accumulation)."""
        parts = max(1, world_size // self.parallel.sequence)
        return self.global_batch // (self.batch.micro_batch * parts)

    def batch_problem(self, world_size: int) -> str | None:
        """Why the global batch cannot be cut for `world_size` processes, and what can be."""
        shared = self.parallel.sequence
        if world_size % shared:
            return (
                f"parallel.sequence = {shared} does not divide the {world_size} processes; use a multiple of "
                f"{shared}, or another parallel.sequence."
            )
        parts = world_size // shared
        unit = self.batch.micro_batch * self.model.context * parts
        sharing = "" if shared == 1 else f" / {shared} that share sequences"
        sizes = {"batch.global_batch_tokens": self.batch.global_batch_tokens}
        for number, stage in enumerate(self.batch.warmup):
            sizes[f"batch.warmup.{number}.global_batch_tokens"] = stage.global_batch_tokens
        for name, tokens in sizes.items():
            if tokens % unit:
                return (
                    f"{name} = {tokens} is not a multiple of micro_batch {self.batch.micro_batch} × context "
                    f"{self.model.context} × {world_size} processes{sharing} = {unit}. "
                    f"Nearest: {nearest_multiple(tokens, unit)}.{self._other_cuts(parts)}"
                )
        return None

    def _other_cuts(self, parts: int) -> str:
        """The nearest process counts and the largest micro-batch that cut the batch as it is, in words."""
        batches = [self.batch.global_batch_tokens, *(s.global_batch_tokens for s in self.batch.warmup)]

        def cuts(micro_batch: int, parts: int) -> bool:
            return not any(tokens % (micro_batch * self.model.context * parts) for tokens in batches)

        micro_batch = self.batch.micro_batch
        most = self.global_batch // micro_batch
        fewer = next((n for n in range(min(parts, most), 0, -1) if cuts(micro_batch, n)), None)
        more = next((n for n in range(parts, most + 1) if cuts(micro_batch, n)), None)
        smaller = next((m for m in range(min(micro_batch, self.global_batch), 0, -1) if cuts(m, parts)), None)
        counts = " or ".join(str(n * self.parallel.sequence) for n in (fewer, more) if n is not None)
        ways = [f"{counts} processes"] * bool(counts)
        ways += [f"batch.micro_batch = {smaller}"] * (smaller is not None)
        return f" As it is it can be cut with {', or '.join(ways)}." if ways else ""

    def zero_problem(self, processes_per_node: int, *, has_gpu: bool) -> str | None:
        """Why `zero` cannot run on nodes with so many processes."""
        zero = self.zero
        if zero.is_plus_plus and not has_gpu:
            return "zero: quantized_weights, quantized_gradients and secondary_shards (ZeRO++) need GPUs."
        if processes_per_node % zero.secondary_shards:
            return (
                f"zero.secondary_shards = {zero.secondary_shards} does not divide the {processes_per_node} "
                f"processes of a node. Nearest: {processes_per_node}."
            )
        return None

    @model_validator(mode="after")
    def _dtypes_fit(self) -> Self:
        if self.precision == "fp32" and self.zero.quantized_weights:
            raise ValueError(
                "zero.quantized_weights gathers 16-bit weights in 8 bits; precision is 'fp32'. Use 'bf16'."
            )
        optimizer = self.optimizer
        if not optimizer.spec.supports_mup and self.model.initialization == "mup":
            raise ValueError(
                "model.initialization = 'mup' sets the rates of AdamW by the width; optimizer.name = "
                f"{optimizer.name!r} has no such rates. Use one of them."
            )
        if optimizer.spec.needs_whole_matrices and self.zero.offload_optimizer == "cpu":
            raise ValueError(
                f"optimizer.name = {optimizer.name!r} needs whole matrices where the collectives are; with "
                "zero.offload_optimizer = 'cpu' they are on the host. Use 'adamw', or no offload."
            )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> Self:
        shared, model = self.parallel.sequence, self.model
        possible = [
            size
            for size in range(1, model.n_heads + 1)
            if model.n_heads % size == model.context % size == 0
            and 0 in (model.kv_heads % size, size % model.kv_heads)
        ]
        if shared not in possible:
            raise ValueError(
                f"parallel.sequence = {shared} must divide model.n_heads = {model.n_heads} and model.context "
                f"= {model.context}, and divide model.n_kv_heads = {model.kv_heads} or be a multiple of it. "
                f"These do: {', '.join(map(str, possible))}."
            )
        return self

    @model_validator(mode="after")
    def _recompute_fits(self) -> Self:
        if self.compile and self.model.recompute == "selective":
            raise ValueError(
                "compile = true with model.recompute = 'selective': matrix products are not seen inside "
                "compiled blocks. Use 'none' or 'full'."
            )
        return self

    @model_validator(mode="after")
    def _profile_is_a_range(self) -> Self:
        if self.profile is not None and not self.profiled_steps:
            raise ValueError(f"profile = {self.profile!r} ends before it begins; write FIRST:LAST.")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.schedule.warmup_steps > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} is more than the run's "
                f"{self.total_steps} steps."
            )
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} and schedule.decay_steps = "
                f"{self.schedule.decay_steps} are more than the run's {self.total_steps} steps."
            )
        return self

    @model_validator(mode="after")
    def _stages_rise(self) -> Self:
        starts = [0, *(start for start, _ in self.stages)]
        if any(later <= start for start, later in itertools.pairwise(starts)):
            raise ValueError(
                f"data.schedule: the stages begin at sequences {starts[1:]}; each must begin after the one "
                "before, and the first after the start of the run."
            )
        return self

    def resolve(self, vocab_size: int) -> "RunConfig":
        """This config with what the data decides filled in (`vocab_size` ids, padded), and what the length
        of the run does.
        """
        multiple = self.model.vocab_multiple
        rows = self.model.vocab_size or ceil(vocab_size / multiple) * multiple
        model = self.model.model_copy(
            update={"vocab_size": rows, "d_ff": self.model.ffn_width, "n_kv_heads": self.model.kv_heads}
        )
        total = self.batch.sizes.until(self.total_steps)
        schedule = tuple(
            MixtureStage(from_tokens=stage.tokens(total), weights=stage.weights)
            for stage in self.data.schedule
        )
        data = self.data.model_copy(update={"schedule": schedule})
        return self.model_copy(update={"model": model, "data": data})
