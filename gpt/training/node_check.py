"""Checks every node before training, in about a second.

Each rank measures its device and its node, and rank 0 compares. A node is bad when it lacks a device, is
short of memory or disk, or differs from the others: a slow device, a wrong clock, other versions. A problem
that all nodes share is not a bad node; preflight looks for those.
"""

import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from gpt.distributed.world import World, barrier, from_first, gather
from gpt.model.hardware import accelerator, is_cpu, synchronize
from gpt.run.heartbeat import wait_for_ranks
from gpt.run.host_memory import available_bytes

LARGEST_CLOCK_OFFSET_S = 60.0  # metrics and logs are ordered by time; Kerberos gives up at 300 s
SMALLEST_MEMORY_BYTES = 1 << 30
SMALLEST_SCRATCH_BYTES = 128 << 20  # torch and NCCL write files there
SMALLEST_FREE_GPU_FRACTION = 0.9  # with less, another process is using the GPU
# The slowest speed allowed, as a fraction of the fastest rank's. Other processes may share CPU cores, not
# GPUs.
SLOWEST_GPU_FRACTION, SLOWEST_CPU_FRACTION = 0.7, 0.1
_PACKAGES = ("torch", "deepspeed", "numpy")
_GPU_ALL_REDUCE_BYTES, _CPU_ALL_REDUCE_BYTES = 64 << 20, 4 << 20


@dataclass(frozen=True)
class RankReport:
    """What one rank measured on its node."""

    node: str
    rank: int
    problem: str | None
    flops_per_second: float
    clock_s: float
    memory_bytes: int
    scratch_bytes: int
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class NodeFindings:
    """The bad nodes with their reasons, the slowest rank and the speed of a small all-reduce."""

    bad: dict[str, str]
    slowest_flops_per_second: float
    all_reduce_bytes_per_second: float


def check_nodes(world: World, folder: Path, host: str) -> NodeFindings:
    """Check all nodes; every rank gets the same findings. Collective; takes about a second.

    `folder` must be on a file system that all nodes share: its clock decides which node's clock is wrong.
    """
    barrier(world)
    clock_s = time.time()
    file_clock_s = _file_clock_s(folder) if world.is_first else 0.0
    reports = gather(world, _measure(world, host, clock_s))
    slowest_fraction = SLOWEST_CPU_FRACTION if is_cpu(world.device) else SLOWEST_GPU_FRACTION
    bad = from_first(world, compare(reports, slowest_fraction, file_clock_s) if world.is_first else {})
    slowest = min(report.flops_per_second for report in reports)
    return NodeFindings(bad, slowest, 0.0 if bad else _all_reduce_speed(world))


def compare(reports: Sequence[RankReport], slowest_fraction: float, file_clock_s: float) -> dict[str, str]:
    """Node → why it is bad.

    A rank that is slower than `slowest_fraction` of the fastest one makes its node bad.
    `file_clock_s` is the time of the shared file system. It is the reference unless no node agrees with it;
    then the median of the nodes is.
    """
    bad: dict[str, str] = {}
    fastest = max(report.flops_per_second for report in reports)
    clocks = [report.clock_s for report in reports]
    is_file_clock_right = any(abs(clock - file_clock_s) <= LARGEST_CLOCK_OFFSET_S for clock in clocks)
    clock_s = file_clock_s if is_file_clock_right else median(clocks)
    usual = Counter(report.versions for report in reports).most_common(1)[0][0]
    for report in reports:
        offset_s = report.clock_s - clock_s
        others = [f"{name} {version}" for name, version in report.versions if (name, version) not in usual]
        reason = report.problem
        if reason is None and report.flops_per_second < slowest_fraction * fastest:
            reason = (
                f"rank {report.rank} multiplies matrices at {report.flops_per_second / 1e9:.0f} GFLOP/s, "
                f"the fastest rank at {fastest / 1e9:.0f} GFLOP/s"
            )
        elif reason is None and abs(offset_s) > LARGEST_CLOCK_OFFSET_S:
            reason = f"its clock differs by {offset_s:+.0f} s from the others'"
        elif reason is None and others:
            reason = f"it has {', '.join(others)}; the others have {', '.join(map(' '.join, usual))}"
        elif reason is None and report.memory_bytes < SMALLEST_MEMORY_BYTES:
            reason = f"only {report.memory_bytes >> 20} MiB of memory are free"
        elif reason is None and report.scratch_bytes < SMALLEST_SCRATCH_BYTES:
            reason = f"only {report.scratch_bytes >> 20} MiB are free in {tempfile.gettempdir()}"
        if reason is not None:
            bad.setdefault(report.node, reason)
    return bad


def _file_clock_s(folder: Path) -> float:
    path = folder / "clock"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


def _measure(world: World, host: str, clock_s: float) -> RankReport:
    problem, speed = world.device_problem, 0.0
    if problem is None:
        try:
            speed = _matmul_speed(world.device)
            problem = _shared_gpu(world.device)
        except RuntimeError as error:  # the device is present and does not work
            problem = f"{world.device}: {str(error).splitlines()[0]}"
    versions = [("python", platform.python_version())]
    versions += [(name, metadata.version(name)) for name in _PACKAGES]
    return RankReport(
        node=host,
        rank=world.rank,
        problem=problem,
        flops_per_second=speed,
        clock_s=clock_s,
        memory_bytes=available_bytes(),
        scratch_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        versions=tuple(versions),
    )


def _matmul_speed(device: torch.device) -> float:
    """The best speed of a few products of square matrices, in FLOP/s."""
    is_gpu = accelerator(device) is not None
    width, dtype = (8192, torch.bfloat16) if is_gpu else (512, torch.float32)
    a = torch.ones(width, width, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product = a @ a
        synchronize(device)
        times.append(time.perf_counter() - started)
    if float(product[-1, -1]) != width:
        raise RuntimeError(f"a product of matrices of ones gives {float(product[-1, -1])} instead of {width}")
    return 2 * width**3 / min(times)


def _shared_gpu(device: torch.device) -> str | None:
    if (gpu := accelerator(device)) is None:
        return None
    free, whole = gpu.free_bytes(device)
    if free >= SMALLEST_FREE_GPU_FRACTION * whole:
        return None
    return f"{device} has {free >> 20} of {whole >> 20} MiB free: another process is using it"


def _all_reduce_speed(world: World) -> float:
    """The best speed of three small all-reduces over all ranks, in bytes a second."""
    size = _CPU_ALL_REDUCE_BYTES if is_cpu(world.device) else _GPU_ALL_REDUCE_BYTES
    values = torch.ones(size // 4, device=world.device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        wait_for_ranks(dist.all_reduce, values)
        synchronize(world.device)
        times.append(time.perf_counter() - started)
    return size / min(times)
