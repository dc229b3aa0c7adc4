"""The table of attention kernels: what each requires, in the order in which `auto` prefers them. Torch-free.

To add a kernel, add its row to ATTENTION_KERNELS here and its function to gpt.model.attention.KERNELS. The
requirements are here and not with the functions because a config that no kernel can compute is refused on
the login node, where torch is not imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GpuRequirement:
    """The GPU and the package that a kernel needs."""

    capabilities: tuple[int, ...]  # major numbers of CUDA's compute capability
    hardware: str  # the same for people
    module: str  # has the kernel; gpt.model.attention knows by what name
    package: str
    missing_head_widths: Mapping[int, range] = field(default_factory=dict)  # by compute capability
    nondeterministic_head_widths: Mapping[int, range] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel; `None` means no limit."""

    name: str
    has_softcap: bool = True
    has_dropout: bool = True
    head_width_multiple: int = 1
    head_width_max: int | None = None
    dtypes: tuple[str, ...] | None = None
    gpu: GpuRequirement | None = None

    def unsupported(self, *, head_width: int, softcap: float | None, dropout: float) -> str | None:
        """What the kernel lacks for such a model on any device, or None."""
        if softcap and not self.has_softcap:
            return f"it has no soft-cap, and model.attention_softcap = {softcap:g}"
        if dropout and not self.has_dropout:
            return f"it has no dropout, and model.dropout = {dropout:g}"
        most = self.head_width_max
        if head_width % self.head_width_multiple or (most is not None and head_width > most):
            limit = f" up to {most}" if most is not None else ""
            return (
                f"it needs a head width that is a multiple of {self.head_width_multiple}{limit}, "
                f"and it is {head_width}"
            )
        return None


# FlashAttention's READMEs: 2 runs on Ampere and newer GPUs; 3 is for Hopper; 4 has a backward pass on Hopper
# and Blackwell only, there without head widths between 128 and 256. The backward passes of 3 and 4 refuse
# `deterministic` for wide heads and on compute capability 12.
ATTENTION_KERNELS: list[KernelSpec] = [
    KernelSpec(
        "flash-4",
        has_dropout=False,
        head_width_multiple=8,
        head_width_max=256,
        dtypes=("bf16", "fp16"),
        gpu=GpuRequirement(
            capabilities=(9, 10, 12),
            hardware="Hopper or Blackwell",
            module="flash_attn.cute",
            package="flash-attn-4",
            missing_head_widths={10: range(129, 256), 12: range(129, 256)},
            nondeterministic_head_widths={12: range(1, 257)},
        ),
    ),
    KernelSpec(
        "flash-3",
        has_dropout=False,
        head_width_multiple=8,
        head_width_max=256,
        dtypes=("bf16", "fp16"),
        gpu=GpuRequirement(
            capabilities=(9,),
            hardware="Hopper (H100, H200)",
            module="flash_attn_3.flash_attn_interface",
            package="flash-attn's hopper/",
            nondeterministic_head_widths={9: range(193, 257)},
        ),
    ),
    KernelSpec(
        "flash-2",
        head_width_multiple=8,
        head_width_max=256,
        dtypes=("bf16", "fp16"),
        gpu=GpuRequirement(
            capabilities=(8, 9, 10, 12),
            hardware="Ampere (A100) or newer",
            module="flash_attn",
            package="flash-attn",
        ),
    ),
    KernelSpec(
        "varlen",
        has_softcap=False,
        has_dropout=False,
        head_width_multiple=8,
        head_width_max=256,
        dtypes=("bf16", "fp16"),
        gpu=GpuRequirement(
            capabilities=(8, 9, 10, 12),
            hardware="Ampere (A100) or newer",
            module="torch.nn.attention.varlen",
            package="torch 2.13 or newer",
        ),
    ),
    KernelSpec("sdpa", has_softcap=False),
    KernelSpec("reference"),
]
"""The first kernel that can run is the one that `auto` chooses."""


def kernel_spec(name: str) -> KernelSpec | None:
    """The row of the kernel `name`; None where there is none."""
    return next((kernel for kernel in ATTENTION_KERNELS if kernel.name == name), None)
