"""RunConfig: everything that decides the numbers of a run, and where its outputs go.

A run is a pure function of (config, data manifest, step), so everything that changes a number is a field here
or in one of the tables. The module does not import torch, because the launcher reads configs on login nodes.
`resolve` fills in what depends on the data (the vocabulary) or on other fields (d_ff) before the run
directory is written.
"""

import itertools
from math import ceil
from typing import Annotated, Any, Literal, Self, TypedDict, Unpack

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Section
from data_pipeline.sampling.batch_schedule import BatchSizes
from gpt.config.data import BatchConfig, DataConfig
from gpt.config.model import Count, ModelConfig, nearest_multiple
from gpt.config.optimizer import OptimizerConfig, ScheduleConfig
from gpt.config.parallel import ParallelConfig, ZeroConfig


class CheckpointConfig(Section):
    """When checkpoints are saved and which of them are kept."""

    every_steps: Count | None = Field(
        default=None,
        description="Steps between checkpoints. Default: 500, unless every_minutes or interval is given. "
        "When several of these fields are given, a checkpoint is saved as soon as one of them asks for it.",
    )
    every_minutes: float | None = Field(default=None, gt=0, description="Minutes between checkpoints.")
    interval: Literal["auto"] | None = Field(
        default=None,
        description="auto: choose the interval that costs the least time (arXiv:2410.18124), from the "
        "measured stall of a save and the failures of this run.",
    )
    max_lost_minutes: float = Field(
        default=60.0,
        gt=0,
        description="With interval = auto: the most minutes of work that a failure may cost.",
    )
    keep_last: int = Field(
        default=3, ge=2, description="How many of the newest committed checkpoints are kept."
    )
    keep_every: Count | None = Field(
        default=None,
        description="Keep one checkpoint for ever from every so many steps: the first one. Default: none.",
    )
    keep_best: int = Field(
        default=0, ge=0, description="How many checkpoints with the lowest validation loss are kept as well."
    )
    asynchronous: bool = Field(
        default=True,
        description="Copy the state to host memory and write it while training continues. When false, or "
        "when host memory is too small for the copy, training waits for the disk.",
    )
    max_mb_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Limit in MB/s at which each process writes a checkpoint and reads it back while "
        "training continues, and at which checkpoints are copied to the mirror. Default: no limit.",
    )
    mirror: str | None = Field(
        default=None,
        description="A second place for checkpoints: a folder, or a URL such as s3://bucket/runs. Each "
        "checkpoint is copied there once it is committed, and `outlast resume` fetches it from there when it "
        "is missing here. Default: none.",
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
    """How the loss on the validation split is measured."""

    every_steps: Count = Field(default=500, description="Steps between evaluations.")
    tokens: Count = Field(
        default=1_048_576, description="How many tokens at the start of the validation split are scored."
    )


class TrackingConfig(Section):
    """Where metrics are sent besides metrics.jsonl."""

    enabled: bool = Field(default=True, description="Send the metrics to MLflow.")
    uri: str | None = Field(
        default=None,
        description="URI of the MLflow server. Default: an SQLite file in the folder that holds the run "
        "directory.",
    )
    experiment: str = Field(default="outlast", description="Name of the MLflow experiment.")
    parent: str | None = Field(
        default=None, description="Id of the parent run in MLflow; `outlast sweep` sets it."
    )


# Longer than any step, and short enough for a wait of gloo's, which counts milliseconds in 32 bits.
_LONGEST_TIMEOUT_S = 1_000_000.0


class DivergenceConfig(Section):
    """When a run that no longer learns ends by itself."""

    max_skipped_in_a_row: Count = Field(
        default=100,
        description="Updates left out in a row, because the gradient was not finite, after which the run "
        "ends (exit code 93). fp16 leaves out up to about 20 while it looks for its loss scale.",
    )


class LaunchConfig(Section):
    """How failures and hangs are detected and how often the run is restarted."""

    max_restarts: int = Field(
        default=100, ge=0, description="How often torchrun may restart the workers within one job run."
    )
    max_failures: Count = Field(
        default=3,
        description="Attempts in a row without a new checkpoint before the run gives up (exit code 93).",
    )
    node_check: bool = Field(
        default=True,
        description="Check every node before training (devices, speed, clock, versions, memory). On Slurm, a "
        "node that fails is listed in bad_nodes.jsonl and the job is requeued without it.",
    )
    hang_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=_LONGEST_TIMEOUT_S,
        description="Restart the workers after this many seconds without a step, an evaluation or a save.",
    )
    start_timeout_s: float = Field(
        default=900.0,
        gt=0,
        le=_LONGEST_TIMEOUT_S,
        description="Restart the workers when a phase of the start takes longer than this many seconds: "
        "imports, loading a checkpoint, the first step with its compilation. Must be less than "
        "collective_timeout_s.",
    )
    collective_timeout_s: float = Field(
        default=1200.0,
        gt=0,
        le=_LONGEST_TIMEOUT_S,
        description="Seconds that a rank waits for the others in a collective. Must be more than "
        "hang_timeout_s, so that a hang is reported with its cause before the collective fails.",
    )

    @model_validator(mode="after")
    def _hangs_are_explained_first(self) -> Self:
        for name in ("hang_timeout_s", "start_timeout_s"):
            if getattr(self, name) >= self.collective_timeout_s:
                raise ValueError(
                    f"launch.{name} = {getattr(self, name):g} must be less than "
                    f"launch.collective_timeout_s = {self.collective_timeout_s:g}, after which the other "
                    "ranks fail with an error of their own. Raise launch.collective_timeout_s too."
                )
        return self


class Tables(TypedDict, total=False):
    """The tables of a run config, for `RunConfig.with_tables`."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    zero: ZeroConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    launch: LaunchConfig
    divergence: DivergenceConfig


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = Field(
        description="Names the run directory and the MLflow run: letters, digits, '.', '_', '-'."
    )
    seed: int = Field(
        default=1234, ge=0, lt=2**63, description="Seeds the initial weights and the data order."
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16",
        description="Data type of parameters and activations. Master weights are always fp32. fp16 trains "
        "with a dynamic loss scale.",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Compile the blocks and the loss with torch.compile; auto does so on GPUs, unless "
        "model.recompute is selective or a node has no compiler. Steps are faster, but the first one "
        "takes a minute or more. Rounding and the random numbers of dropout differ from an uncompiled run.",
    )
    deterministic: bool = Field(
        default=False,
        description="Compute with algorithms that give the same bits each time, so that a run on GPUs also "
        "continues bit for bit. Steps on GPUs are slower. CPUs always do.",
    )
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = Field(
        default=None,
        description="FIRST:LAST, the steps that torch's profiler traces on rank 0. The trace is written to "
        "profile/ and attached to the MLflow run.",
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
    divergence: DivergenceConfig = DivergenceConfig()

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step over all ranks, after the batch warmup."""
        return self.batch.global_batch_tokens // self.model.context

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of each optimizer step over all ranks."""
        return self.batch.sizes.over(self.model.context)

    @property
    def stages(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Each stage of data.schedule: its first sequence number and the weights of the sources."""
        total, context = self.batch.sizes.until(self.total_steps), self.model.context
        return tuple((stage.tokens(total) // context, stage.weights) for stage in self.data.schedule)

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names."""
        first, _, last = (self.profile or "1:0").partition(":")
        return range(int(first), int(last) + 1)

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        if self.schedule.total_steps is not None:
            return self.schedule.total_steps
        assert self.schedule.total_tokens is not None
        return self.batch.sizes.steps_for(self.schedule.total_tokens)

    def compiles(self, *, has_gpu: bool) -> bool:
        """Whether the network is to be compiled."""
        if self.compile == "auto":
            return has_gpu and self.model.recompute != "selective"
        return self.compile

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches that a rank accumulates per step, after the batch warmup."""
        parts = max(1, world_size // self.parallel.sequence)
        return self.global_batch // (self.batch.micro_batch * parts)

    def batch_problem(self, world_size: int) -> str | None:
        """Why the global batch cannot be split over `world_size` processes, and what would work instead."""
        shared = self.parallel.sequence
        if world_size % shared:
            return (
                f"parallel.sequence = {shared} does not divide the {world_size} processes. Use a multiple of "
                f"{shared} processes, or another parallel.sequence."
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
        """The nearest process counts and the largest micro-batch that split this batch, as a sentence."""
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
        return f" This batch can be split with {', or '.join(ways)}." if ways else ""

    def zero_problem(self, processes_per_node: int, *, has_gpu: bool) -> str | None:
        """Why the [zero] table cannot run on nodes with `processes_per_node` processes."""
        zero = self.zero
        if zero.is_quantized and not has_gpu:
            return "zero: quantized_weights and quantized_gradients (ZeRO++) need GPUs."
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
                "zero.quantized_weights gathers 16-bit weights in 8 bits, but precision is 'fp32'. "
                "Use 'bf16'."
            )
        if self.zero.reduce_dtype not in ("fp32", self.precision):
            raise ValueError(
                f"zero.reduce_dtype = {self.zero.reduce_dtype!r} is neither 'fp32' nor precision = "
                f"{self.precision!r}. Use one of them."
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
        if self.compile is True and self.model.recompute == "selective":
            raise ValueError(
                "model.recompute = 'selective' does not work with compile = true, because it cannot see the "
                "matrix products inside compiled blocks. Use 'none' or 'full'."
            )
        return self

    @model_validator(mode="after")
    def _profile_is_a_range(self) -> Self:
        if self.profile is not None and not self.profiled_steps:
            raise ValueError(f"profile = {self.profile!r} ends before it starts. Write FIRST:LAST.")
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
                f"data.schedule: the stages start at sequences {starts[1:]}. Each must start after the one "
                "before it, and the first one after the start of the run."
            )
        return self

    def resolve(self, vocab_size: int) -> "RunConfig":
        """This config with every derived default filled in.

        `vocab_size` is the number of ids in the data. The vocabulary is padded to a multiple, and the stages
        of data.schedule are fixed to a number of tokens.
        """
        multiple = self.model.vocab_multiple
        derived = {
            "vocab_size": self.model.vocab_size or ceil(vocab_size / multiple) * multiple,
            "d_ff": self.model.ffn_width,
            "n_kv_heads": self.model.kv_heads,
        }
        return self.with_tables(
            model=ModelConfig.model_validate({**dict(self.model), **derived}),
            data=self.data.with_schedule_in_tokens(self.batch.sizes.until(self.total_steps)),
        )

    def accepting_data(self, fingerprint: str) -> "RunConfig":
        """This config for a run whose checkpoints may also come from the data with `fingerprint`."""
        return self.with_tables(data=self.data.accepting(fingerprint))

    def with_tables(self, **tables: Unpack[Tables]) -> "RunConfig":
        """This config with other `tables`. Raises ValidationError when they do not fit together."""
        return RunConfig.model_validate({**dict(self), **tables})
