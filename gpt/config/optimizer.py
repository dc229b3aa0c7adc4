"""How the weights are updated: the tables [optimizer] and [schedule]. Torch-free."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Section
from gpt.config.model import Count, Fraction
from gpt.config.optimizer_spec import OPTIMIZERS, OptimizerSpec

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (Kingma & Ba 2014; Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) with AdamW."""

    name: str = Field(
        default="adamw",
        json_schema_extra={"enum": [*OPTIMIZERS]},
        description="Optimizer. muon updates the matrices inside the blocks by Muon, and embeddings, norms "
        "and head by AdamW; it scales Muon's updates to the size of AdamW's, so one peak_lr serves both.",
    )
    peak_lr: float = Field(default=6e-4, gt=0, description="Learning rate after the warmup.")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.95), description="AdamW: decay rates of the first and the second moment."
    )
    momentum: Decay = Field(default=0.95, description="Muon: decay rate of the (Nesterov) momentum.")
    second_moment_init: Literal["zero", "gradient"] = Field(
        default="zero",
        description="Initial second moment. gradient starts it at the squared first gradient (GI-Adam, "
        "arXiv:2406.09405), which acts as an automatic warmup.",
    )
    moments: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Dtype of the moments. bf16 saves AdamW 4 bytes a parameter, Muon 2.",
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW: added to the root of the second moment.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay of matrices; norms and biases have none."
    )
    grad_clip: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")

    @property
    def spec(self) -> OptimizerSpec:
        """The optimizer's row in the table."""
        return OPTIMIZERS[self.name]

    @property
    def moment_bytes(self) -> int:
        """Bytes of one element of a moment."""
        return 2 if self.moments == "bf16" else 4

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(
                f"optimizer.name = {name!r} is not an optimizer. Known: {', '.join(OPTIMIZERS)}."
            )
        return name

    @model_validator(mode="after")
    def _moments_move(self) -> Self:
        # A step changes the second moment by a share 1 - β2. bf16 has 8 bits, so it loses a change below
        # 2^-9 of the value; at β2 = 0.99 the change is five times that.
        if self.moments == "bf16" and "betas" in self.spec.fields and self.betas[1] > 0.99:
            raise ValueError(
                f"optimizer.moments = 'bf16' with betas[1] = {self.betas[1]:g}: bf16 is too coarse for the "
                "second moment to change in a step. Use betas[1] of at most 0.99, or moments = 'fp32'."
            )
        return self


class ScheduleConfig(Section):
    """The learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        default="cosine",
        description="Shape after the warmup. inverse_sqrt is that of Vaswani et al. (2017). wsd stays at the "
        "peak until the last decay_steps; `outlast launch --from` can start that decay at any checkpoint.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warmup to the peak.")
    warmup: Literal["linear", "auto"] = Field(
        default="linear",
        description="linear starts the warmup at rate 0. auto starts it at the largest rate at which "
        "the first update does not raise the loss, so it ends earlier (arXiv:2406.09405).",
    )
    decay_steps: int = Field(default=0, ge=0, description="wsd: steps of the decay at the end of the run.")
    decay: Literal["sqrt", "linear"] = Field(
        default="sqrt", description="wsd: the rate decays as 1 - √t, or linearly."
    )
    total_steps: Count | None = Field(default=None, description="Steps of the run. Set this or total_tokens.")
    total_tokens: Count | None = Field(
        default=None, description="Tokens of the run, rounded up to whole steps. Set this or total_steps."
    )
    final_lr_fraction: Fraction = Field(
        default=0.1, description="Last learning rate over the peak. constant and inverse_sqrt ignore it."
    )

    @model_validator(mode="after")
    def _one_total(self) -> Self:
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ValueError("schedule: set exactly one of schedule.total_steps and schedule.total_tokens.")
        return self

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        if self.name == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError(
                "schedule.name = 'inverse_sqrt' decays from the end of the warmup and needs "
                "schedule.warmup_steps of at least 1; Vaswani et al. used 4000."
            )
        if self.warmup == "auto" and not self.warmup_steps:
            raise ValueError(
                "schedule.warmup = 'auto' shortens a warmup; set schedule.warmup_steps, its full length."
            )
        if self.decay_steps and self.name != "wsd":
            raise ValueError(
                f"schedule.decay_steps = {self.decay_steps} has no effect with schedule.name = "
                f"{self.name!r}. Remove it, or set schedule.name = 'wsd'."
            )
        return self
