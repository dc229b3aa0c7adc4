"""What the processes share of the training: the tables [zero] and [parallel]. Torch-free."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config_file import Section
from gpt.config.model import Count

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
