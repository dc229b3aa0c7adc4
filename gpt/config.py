"""RunConfig: everything that decides the numbers of a run, and where its outputs go.

A run is a pure function of (config, data manifest, step), so whatever changes a number stands here and
nowhere else. Torch-free: the launcher reads it on login nodes. What the data decides (the vocabulary)
and what a default derives (d_ff) is filled in by `resolve` before the run directory is written.
"""

import itertools
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.batch_sizes import BatchSizes
from data_pipeline.config_file import Section
from gpt.model_config import Count, ModelConfig, nearest_multiple

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


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


class OptimizerConfig(Section):
    """AdamW (Kingma & Ba 2014; Loshchilov & Hutter 2019), with Muon where wanted."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for the matrices inside the blocks, AdamW for embeddings, norms and head; "
        "its updates are scaled to the size of AdamW's, so that one peak_lr serves both.",
    )
    peak_lr: float = Field(default=6e-4, gt=0, description="Learning rate at the end of the warmup.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="Decay of the two moments.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="muon: decay of the momentum (Nesterov's)."
    )
    second_moment_init: Literal["zero", "gradient"] = Field(
        default="zero",
        description="gradient: the second moment starts at the squared first gradient (GI-Adam, "
        "arXiv:2406.09405), which lowers the first rates by itself.",
    )
    moments: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Dtype of the moments; bf16 saves 4 bytes a parameter over the ranks."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled decay of matrices; norms and biases have none."
    )
    grad_clip: float = Field(default=1.0, gt=0, description="Largest global gradient norm.")

    @model_validator(mode="after")
    def _moments_move(self) -> Self:
        # What a step adds to the second moment, a share 1 - β2 of it, is lost below half a step of bf16's 8
        # bits, 2^-9 of it; at 0.99 five times that is left.
        if self.moments == "bf16" and self.betas[1] > 0.99:
            raise ValueError(
                f"optimizer.moments = 'bf16' with betas[1] = {self.betas[1]:g}: a step would not change the "
                "second moment in its 8 bits. Use betas[1] of at most 0.99, or moments = 'fp32'."
            )
        return self


class ScheduleConfig(Section):
    """Learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        default="cosine",
        description="Shape after the warmup; inverse_sqrt is Vaswani's (2017), wsd stays at the peak until "
        "the last decay_steps, which `outlast launch --from` can begin at any checkpoint.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warmup to the peak.")
    warmup: Literal["linear", "auto"] = Field(
        default="linear",
        description="auto: the warmup starts at the largest rate at which the first update does not raise "
        "the loss, instead of at 0, and ends so much earlier (arXiv:2406.09405); found at the first start.",
    )
    decay_steps: int = Field(default=0, ge=0, description="wsd: steps of the decay at the end of the run.")
    decay: Literal["sqrt", "linear"] = Field(
        default="sqrt", description="wsd: the decay falls as 1 - √t or as a line."
    )
    total_steps: Count | None = Field(default=None, description="Steps of the run; or give total_tokens.")
    total_tokens: Count | None = Field(
        default=None, description="Tokens of the run, rounded up to whole steps; or give total_steps."
    )
    final_lr_fraction: Fraction = Field(
        default=0.1, description="Last learning rate over the peak; constant and inverse_sqrt have none."
    )

    @model_validator(mode="after")
    def _one_total(self) -> Self:
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ValueError(
                "schedule: exactly one of schedule.total_steps and schedule.total_tokens is needed."
            )
        return self

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        if self.name == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError(
                "schedule.name = 'inverse_sqrt' falls from the end of the warmup on and needs "
                "schedule.warmup_steps of at least 1; Vaswani et al. used 4000."
            )
        if self.warmup == "auto" and not self.warmup_steps:
            raise ValueError(
                "schedule.warmup = 'auto' shortens a warmup; set schedule.warmup_steps, its full length."
            )
        if self.decay_steps and self.name != "wsd":
            raise ValueError(
                f"schedule.decay_steps = {self.decay_steps} has no effect where schedule.name = "
                f"{self.name!r}. Remove it, or set schedule.name = 'wsd'."
            )
        return self


_STAGE_3_ONLY = (
    "offload_parameters",
    "prefetch_numel",
    "whole_below_numel",
    "quantized_weights",
    "quantized_gradients",
    "secondary_shards",
)


class ZeroConfig(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020)."""

    stage: Literal[1, 2, 3] = Field(
        default=1,
        description="1 shards the optimizer's state over the ranks, 2 the gradients too, 3 the weights too.",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        default="none",
        description="cpu: master weights and moments live in the host's memory and are updated there "
        "(ZeRO-Offload, arXiv:2101.06840).",
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        default="none",
        description="cpu, stage 3 only: the weights' shards live in the host's memory (arXiv:2104.07857).",
    )
    bucket_numel: Count | None = Field(
        default=None,
        description="Elements of the gradient that are reduced at a time. Default: those of a block, 2^24 at "
        "least.",
    )
    prefetch_numel: Count | None = Field(
        default=None,
        description="Stage 3: elements of the weights that are gathered ahead. Default: those of a block.",
    )
    whole_below_numel: Count | None = Field(
        default=None,
        description="Stage 3: parameters with no more elements stay whole on every rank. Default: norms and "
        "biases.",
    )
    quantized_weights: bool = Field(
        default=False,
        description="ZeRO++ (arXiv:2306.10209), stage 3 on GPUs: weights are gathered in 8 bits (qwZ).",
    )
    quantized_gradients: bool = Field(
        default=False,
        description="ZeRO++, stage 3 on GPUs: gradients are reduced in 4 bits, by an all-to-all (qgZ).",
    )
    secondary_shards: Count = Field(
        default=1,
        description="ZeRO++, stage 3 on GPUs: each group of this many processes, those of a node, keeps a "
        "copy of the weights for the backward pass (hpZ). 1: no copies.",
    )

    @field_validator("stage", mode="before")
    @classmethod
    def _not_zero(cls, stage: object) -> object:
        if stage == 0:
            raise ValueError(
                "zero.stage = 0 is not offered: DeepSpeed then trains bf16 with another optimizer, whose "
                "losses drift from those of the other stages. Use 1, which serves a single process too."
            )
        return stage

    @property
    def is_plus_plus(self) -> bool:
        """Whether any part of ZeRO++ is on."""
        return self.quantized_weights or self.quantized_gradients or self.secondary_shards > 1

    @model_validator(mode="after")
    def _stage_3_only(self) -> Self:
        if self.stage == 3:
            return self
        for name in _STAGE_3_ONLY:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"zero.{name} = {value!r} needs zero.stage = 3, which shards the weights; it is "
                    f"{self.stage}."
                )
        return self


class ParallelConfig(Section):
    """What the ranks share beside the optimizer's state, the gradients and the weights."""

    sequence: Count = Field(
        default=1,
        description="Neighbouring processes that share each sequence, for contexts too long for one "
        "(DeepSpeed Ulysses, arXiv:2309.14509). At best those of one node.",
    )


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
        "on. Default: no limit.",
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
        default=3, description="Attempts in a row without a new checkpoint before the run gives up (exit 93)."
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
    collective_timeout_s: float = Field(
        default=1200.0,
        gt=0,
        description="Seconds a rank waits for the others in a collective; more than hang_timeout_s, so that "
        "a hang is explained before it is an error.",
    )


class RunConfig(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Names the run directory and the MLflow run: letters, digits, '.', '_', '-'."
    )
    seed: int = Field(default=1234, ge=0, description="Of the initial weights and the order of the data.")
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
        smaller = next((m for m in range(micro_batch, 0, -1) if cuts(m, parts)), None)
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
        if self.optimizer.name == "muon" and self.model.initialization == "mup":
            raise ValueError(
                "model.initialization = 'mup' sets the rates of AdamW by the width; optimizer.name = 'muon' "
                "has its own rule for that. Use one of them."
            )
        if self.optimizer.name == "muon" and self.zero.offload_optimizer == "cpu":
            raise ValueError(
                "optimizer.name = 'muon' needs whole matrices where the collectives are; with "
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
