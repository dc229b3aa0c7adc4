"""What a dry step means on a cluster: its memory beside the plan, and its communication beside its computing.

Pure functions of config, cluster and dry step.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from gpt.model.flops import PEAK_FLOPS_PER_SECOND, flops_per_token
from gpt.run.dry_step import Collective, DryStep
from launcher.cluster import ClusterConfig
from launcher.preflight.memory import memory
from launcher.units import size

# GB/s in one direction: of a GPU to the others of its node, and of a node to the others. NVIDIA's data sheets
# of DGX A100 (NVLink 3, eight ports of 200 Gb/s), DGX H100 and H200 (NVLink 4, eight of 400 Gb/s) and
# DGX B200 (NVLink 5, eight of 400 Gb/s).
LINKS_GB_PER_S = {
    "a100": (300.0, 200.0),
    "h100": (450.0, 400.0),
    "h200": (450.0, 400.0),
    "b200": (900.0, 400.0),
}
_CAPABILITIES = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}


@dataclass(frozen=True)
class Links:
    """How fast the GPUs of a cluster talk, in GB/s, and where the numbers are from."""

    link_gb_per_s: float
    network_gb_per_s: float
    source: str

    def seconds(self, collective: Collective, local_size: int) -> float:
        """The time of `collective` at full speed, without latency.

        A ring through several nodes crosses each node's network once, so it runs at the speed of the network
        or of the GPUs' links, whichever is slower.
        """
        speed = self.link_gb_per_s
        if collective.ranks > local_size:
            speed = min(speed, self.network_gb_per_s)
        return collective.traffic / (speed * 1e9)


def request_of(config: RunConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """What `python -m gpt.trace` is asked. Raises ConfigError for a cluster without GPUs."""
    if not cluster.gpus_per_node:
        raise ConfigError(
            "--trace describes a step on GPUs, and the cluster has gpus_per_node = 0. Name a cluster with "
            "GPUs, such as slurm-h100."
        )
    return {
        "run": config.model_dump(mode="json"),
        "world_size": cluster.world_size,
        "local_size": cluster.processes,
        "capability": _CAPABILITIES.get(_family(cluster), (9, 0)),
    }


def links_of(cluster: ClusterConfig) -> Links | None:
    """The cluster's links: its own fields, else the defaults of its accelerator; None if one is unknown."""
    own = cluster.link_gb_per_s, cluster.network_gb_per_s
    default = LINKS_GB_PER_S.get(_family(cluster), (None, None))
    link, network = (mine or other for mine, other in zip(own, default, strict=True))
    if link is None or network is None:
        return None
    source = "of the cluster file" if all(own) else f"of NVIDIA's servers with {cluster.accelerator}"
    return Links(link, network, source if all(own) or not any(own) else f"of the cluster file and {source}")


def compute_seconds(config: RunConfig, cluster: ClusterConfig, mfu: float) -> float | None:
    """The time of a step's arithmetic at the fraction `mfu` of the peak; None for an unknown accelerator."""
    if cluster.accelerator is None:
        return None
    flops = float(flops_per_token(config.model)) * config.batch.global_batch_tokens
    peak = PEAK_FLOPS_PER_SECOND[_family(cluster).upper()][config.precision]
    return flops / (peak * mfu * cluster.world_size)


def trace_json(step: DryStep, config: RunConfig, cluster: ClusterConfig, mfu: float) -> dict[str, Any]:
    """The dry step with the times of its parts, as one JSON object."""
    links = links_of(cluster)
    seconds = [None if links is None else links.seconds(c, cluster.processes) for c in step.collectives]
    return {
        **step.as_json(),
        "links": None if links is None else asdict(links),
        "communication_seconds": None if links is None else sum(filter(None, seconds)),
        "compute_seconds": compute_seconds(config, cluster, mfu),
    }


def trace_lines(step: DryStep, config: RunConfig, cluster: ClusterConfig, mfu: float) -> Iterator[str]:
    """The dry step for people."""
    planned = memory(config, cluster.world_size)
    depths = " and ".join(map(str, step.depths))
    how = f"a line through {depths} layers" if depths else "all layers"
    yield f"one step of rank 0 of {cluster.world_size}, run without GPUs ({how}):"
    yield ""
    yield f"{'memory per rank':<32}{'dry step':>12}{'plan':>12}"
    for name in ("weights", "optimizer", "activations", "peak"):
        found, expected = getattr(step, name), getattr(planned, name)
        note = f"  in {step.peak_phase}" if name == "peak" else ""
        yield f"  {name:<30}{size(found):>12}{size(expected):>12}{note}"
    yield ""
    links = links_of(cluster)
    yield f"{'collective':<18}{'ranks':>7}{'times':>8}{'each':>12}{'sent':>12}{'seconds':>10}"
    for collective in step.collectives:
        seconds = "" if links is None else f"{links.seconds(collective, cluster.processes):.4f}"
        each, sent = size(collective.bytes), size(round(collective.traffic))
        name = f"  {collective.operation:<16}{collective.ranks:>7}{collective.count:>8,}"
        yield f"{name}{each:>12}{sent:>12}{seconds:>10}"
    yield ""
    yield from _time_lines(step, config, cluster, mfu)
    yield ""
    yield "host waits in a step" + ("" if step.host_waits else ": none")
    for wait in step.host_waits:
        yield f"  {wait.count:>4} x {wait.line} ({wait.reason})"


def _time_lines(step: DryStep, config: RunConfig, cluster: ClusterConfig, mfu: float) -> Iterator[str]:
    links, computing = links_of(cluster), compute_seconds(config, cluster, mfu)
    if links is None:
        yield "communication: set link_gb_per_s and network_gb_per_s in the cluster file for its time"
    else:
        total = sum(links.seconds(collective, cluster.processes) for collective in step.collectives)
        yield (
            f"communication: {total:.3f} s a step at {links.link_gb_per_s:g} GB/s in a node and "
            f"{links.network_gb_per_s:g} GB/s between nodes ({links.source}), without latency"
        )
    if computing is not None:
        yield f"computing:     {computing:.3f} s a step at {mfu:.0%} MFU; what overlaps is not known"


def _family(cluster: ClusterConfig) -> str:
    return (cluster.accelerator or "").partition("-")[0]
