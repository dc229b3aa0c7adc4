"""A look at every node before training: what would cost hours later is found in a second now.

Each rank measures its device and its node; rank 0 compares. A node is bad when it lacks a device, cannot hold
what a run needs, or stands out from the others: a slow device, another clock, other versions. What all nodes
share is not a node's fault, and is left to preflight.
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

from gpt.distributed.world import World, from_first, gather

LARGEST_CLOCK_OFFSET_S = 60.0  # tokens, metrics and logs are ordered by time; Kerberos gives up at 300 s
SMALLEST_MEMORY_BYTES = 1 << 30
SMALLEST_SCRATCH_BYTES = 128 << 20  # torch and NCCL put files there
SMALLEST_FREE_GPU_FRACTION = 0.9  # less: a process of somebody else is on it
# Of the fastest rank's speed. Cores are shared by what else runs on a node, GPUs are not.
SLOWEST_FRACTION = {"cuda": 0.7, "cpu": 0.1}
_PACKAGES = ("torch", "deepspeed", "numpy")
_ALL_REDUCE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}


@dataclass(frozen=True)
class Report:
    """What one rank found on its node; speeds in floating-point operations a second."""

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
    """Bad nodes with the reason, and the speed of a small all-reduce in bytes a second."""

    bad: dict[str, str]
    slowest_flops_per_second: float
    all_reduce_bytes_per_second: float


def check_nodes(world: World, folder: Path, host: str) -> NodeFindings:
    """Look at all nodes; the same findings on every rank. Collective; about a second.

    `folder` lies on the file system that all nodes share: its clock judges between two nodes.
    """
    dist.barrier(group=world.control)
    clock_s = time.time()
    judge_s = _file_clock_s(folder) if world.is_first else 0.0
    reports = gather(world, _look(world, host, clock_s))
    bad = from_first(world, compare(reports, world.device.type, judge_s) if world.is_first else {})
    slowest = min(report.flops_per_second for report in reports)
    return NodeFindings(bad, slowest, 0.0 if bad else _all_reduce_speed(world))


def compare(reports: Sequence[Report], device_type: str, judge_s: float) -> dict[str, str]:
    """Node → why it is bad. `judge_s` is the shared file system's time, which counts if any node has it."""
    bad: dict[str, str] = {}
    fastest = max(report.flops_per_second for report in reports)
    clocks = [report.clock_s for report in reports]
    is_judge_right = any(abs(clock - judge_s) <= LARGEST_CLOCK_OFFSET_S for clock in clocks)
    clock_s = judge_s if is_judge_right else median(clocks)
    usual = Counter(report.versions for report in reports).most_common(1)[0][0]
    for report in reports:
        offset_s = report.clock_s - clock_s
        others = [f"{name} {version}" for name, version in report.versions if (name, version) not in usual]
        reason = report.problem
        if reason is None and report.flops_per_second < SLOWEST_FRACTION[device_type] * fastest:
            reason = (
                f"rank {report.rank} multiplies matrices at {report.flops_per_second / 1e9:.0f} GFLOP/s, "
                f"the fastest at {fastest / 1e9:.0f}"
            )
        elif reason is None and abs(offset_s) > LARGEST_CLOCK_OFFSET_S:
            reason = f"its clock is {offset_s:+.0f} s from the others'"
        elif reason is None and others:
            reason = f"it has {', '.join(others)}; the others: {', '.join(' '.join(pair) for pair in usual)}"
        elif reason is None and report.memory_bytes < SMALLEST_MEMORY_BYTES:
            reason = f"{report.memory_bytes >> 20} MiB of memory are free"
        elif reason is None and report.scratch_bytes < SMALLEST_SCRATCH_BYTES:
            reason = f"{report.scratch_bytes >> 20} MiB are free in {tempfile.gettempdir()}"
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


def _look(world: World, host: str, clock_s: float) -> Report:
    problem, speed = world.device_problem, 0.0
    if problem is None:
        try:
            speed = _matmul_speed(world.device)
            problem = _crowd(world.device)
        except RuntimeError as error:  # a device that is there and does not work
            problem = f"{world.device}: {str(error).splitlines()[0]}"
    versions = [("python", platform.python_version())]
    versions += [(name, metadata.version(name)) for name in _PACKAGES]
    return Report(
        node=host,
        rank=world.rank,
        problem=problem,
        flops_per_second=speed,
        clock_s=clock_s,
        memory_bytes=_available_memory_bytes(),
        scratch_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        versions=tuple(versions),
    )


def _matmul_speed(device: torch.device) -> float:
    """The best of a few products of square matrices, in FLOP/s."""
    is_gpu = device.type == "cuda"
    width, dtype = (8192, torch.bfloat16) if is_gpu else (512, torch.float32)
    a = torch.ones(width, width, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product = a @ a
        if is_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    if float(product[-1, -1]) != width:
        raise RuntimeError(f"a product of ones is {float(product[-1, -1])} and not {width}")
    return 2 * width**3 / min(times)


def _crowd(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    free, whole = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if free >= SMALLEST_FREE_GPU_FRACTION * whole:
        return None
    return f"{device} has {free >> 20} of {whole >> 20} MiB free: another process is on it"


def _available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return SMALLEST_MEMORY_BYTES


def _all_reduce_speed(world: World) -> float:
    """Bytes a second of a small all-reduce over all ranks, the best of three."""
    size = _ALL_REDUCE_BYTES[world.device.type]
    values = torch.ones(size // 4, device=world.device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        dist.all_reduce(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - started)
    return size / min(times)
