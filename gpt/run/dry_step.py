"""What a dry step reports: the contract between `python -m gpt.trace` and its callers. Torch-free."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one step. `bytes` are those of the largest buffer of one of them on one rank."""

    operation: str
    ranks: int
    bytes: int
    count: int = 1

    @property
    def traffic(self) -> float:
        """Bytes that each rank sends in all of them, in a ring.

        An all-reduce is a reduce-scatter and an all-gather (Patarasu & Yuan 2009, section 3).
        """
        passes = 2 if self.operation == "all-reduce" else 1
        return self.count * passes * self.bytes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class HostWait:
    """A line at which the host waits for the device, and how often in one step."""

    line: str
    reason: str
    is_ours: bool
    count: int = 1


@dataclass(frozen=True)
class DryStep:
    """One optimizer step of rank 0. Memory is in bytes.

    `kept` is all that lives between two steps, `peak` the most that lives at a time.
    """

    weights: int
    optimizer: int
    kept: int
    activations: int
    peak: int
    peak_phase: str
    kernels: int
    collectives: tuple[Collective, ...]
    host_waits: tuple[HostWait, ...]
    depths: tuple[int, ...] = ()  # the numbers of layers that were run, where the network is deeper

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The report that `as_json` wrote."""
        waits = tuple(HostWait(**wait) for wait in content["host_waits"])
        collectives = tuple(Collective(**collective) for collective in content["collectives"])
        return cls(
            **{**content, "host_waits": waits, "collectives": collectives, "depths": tuple(content["depths"])}
        )
