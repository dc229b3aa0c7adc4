"""How the weights are updated: the tables [optimizer] and [schedule]. Torch-free."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config_file import Section
from gpt.config.model import Count, Fraction

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (Kingma & Ba 2014; Loshchilov & Hutter 2019), with Muon where wanted."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for the matrices inside the blocks, AdamW for embeddings, norms and head; "
        "its updates are scaled to the size of AdamW's, so that one peak_lr serves both.",
    )
    peak_lr: float = Field(default=6e-4, gt=0, description="Learning rate at the end of the warmup.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="Decay of the two moments.")
    momentum: Decay = Field(default=0.95, description="muon: decay of the momentum (Nesterov's).")
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
