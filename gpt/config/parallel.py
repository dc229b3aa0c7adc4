"""How the processes share the work: the tables [zero] and [parallel]. Torch-free."""

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
        description="Stage 1 shards the optimizer's state over the ranks, stage 2 also the gradients, and "
        "stage 3 also the weights.",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        default="none",
        description="With cpu, master weights and moments stay in host memory and are updated there "
        "(ZeRO-Offload, arXiv:2101.06840).",
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        default="none",
        description="With cpu, the shards of the weights stay in host memory (ZeRO-Infinity, "
        "arXiv:2104.07857). Needs stage 3.",
    )
    reduce_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Data type in which gradients are summed over the ranks: fp32, or that of precision, "
        "which halves the traffic and rounds every sum. Stage 1 reduces once a step, stages 2 and 3 once a "
        "micro-batch.",
    )
    bucket_numel: Count | None = Field(
        default=None,
        description="Number of gradient elements to reduce at a time. Default: those of one block, but "
        "at least 2^24.",
    )
    prefetch_numel: Count | None = Field(
        default=None,
        description="Number of weight elements that are gathered ahead of use. Default: those of one block. "
        "Needs stage 3.",
    )
    whole_below_numel: Count | None = Field(
        default=None,
        description="Parameters with at most this many elements stay whole on every rank. Default: norms and "
        "biases. Needs stage 3.",
    )
    quantized_weights: bool = Field(
        default=False,
        description="Experimental: gathers weights in 8 bits (qwZ of ZeRO++, arXiv:2306.10209). Needs stage "
        "3 on GPUs.",
    )
    quantized_gradients: bool = Field(
        default=False,
        description="Experimental: reduces gradients in 4 bits by an all-to-all (qgZ of ZeRO++). Needs stage "
        "3 on GPUs.",
    )
    secondary_shards: Count = Field(
        default=1,
        description="Number of processes that together keep one more copy of the weights for the backward "
        "pass (hpZ of ZeRO++), usually those of a node. 1 keeps no copy. Needs stage 3.",
    )

    @field_validator("stage", mode="before")
    @classmethod
    def _not_zero(cls, stage: object) -> object:
        if stage == 0:
            raise ValueError(
                "zero.stage = 0 is not offered: DeepSpeed then trains bf16 with another optimizer, whose "
                "losses drift from those of the other stages. Use 1, which also works with a single process."
            )
        return stage

    @property
    def is_quantized(self) -> bool:
        """Whether weights or gradients are quantized for communication."""
        return self.quantized_weights or self.quantized_gradients

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
    """How the ranks share the work on each sequence."""

    sequence: Count = Field(
        default=1,
        description="Number of neighbouring processes that share each sequence, for contexts that are too "
        "long for one process (DeepSpeed Ulysses, arXiv:2309.14509). They should be on one node.",
    )
