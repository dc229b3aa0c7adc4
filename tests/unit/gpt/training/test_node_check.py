"""Which nodes the check before training calls bad, and why."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from gpt.distributed.world import World
from gpt.training import node_check
from gpt.training.node_check import SLOWEST_GPU_FRACTION, RankReport, check_nodes, compare
from tests.unit.gpt.saving.support import join

GOOD = RankReport(
    node="a",
    rank=0,
    problem=None,
    flops_per_second=100e9,
    clock_s=5000.0,
    memory_bytes=8 << 30,
    scratch_bytes=8 << 30,
    versions=(("torch", "2.13.0"),),
)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process alone."""
    yield join(tmp_path / "meeting", 0, 1)
    dist.destroy_process_group()


def test_node_whose_control_group_leaves_no_memory_is_bad(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's MemAvailable describes the machine, but the job may only use what its cgroup leaves."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemAvailable: {64 << 20} kB\n")
    (proc / "self" / "cgroup").write_text("0::/job\n")
    (cgroups / "job").mkdir(parents=True)
    (cgroups / "job" / "memory.max").write_text(str(1 << 30))
    (cgroups / "job" / "memory.current").write_text(str(768 << 20))
    (cgroups / "job" / "memory.stat").write_text("inactive_file 0\n")
    available_bytes = node_check.available_bytes
    monkeypatch.setattr(node_check, "available_bytes", lambda: available_bytes(proc, cgroups))
    assert check_nodes(alone, tmp_path, "a").bad == {"a": "only 256 MiB of memory are free"}


def test_good_node_passes(alone: World, tmp_path: Path) -> None:
    found = check_nodes(alone, tmp_path, "a")
    assert found.bad == {}
    assert found.slowest_flops_per_second > 0 and found.all_reduce_bytes_per_second > 0
    assert list(tmp_path.glob("clock")) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"problem": "cuda:0: an error"}, "cuda:0: an error"),
        ({"flops_per_second": 60e9}, "rank 1 multiplies matrices at 60 GFLOP/s, the fastest rank at 100"),
        ({"clock_s": 4900.0}, "its clock differs by -100 s from the others'"),
        ({"versions": (("torch", "2.12.0"),)}, "it has torch 2.12.0; the others have torch 2.13.0"),
        ({"memory_bytes": 512 << 20}, "only 512 MiB of memory are free"),
        ({"scratch_bytes": 100 << 20}, "only 100 MiB are free in "),
    ],
)
def test_node_that_differs_from_the_others_is_bad(fields: dict[str, object], reason: str) -> None:
    other = replace(GOOD, node="b", rank=1, **fields)  # type: ignore[arg-type]
    bad = compare([GOOD, other, replace(GOOD, node="c", rank=2)], SLOWEST_GPU_FRACTION, 5000.0)
    assert bad.keys() == {"b"}
    assert bad["b"].startswith(reason)


def test_median_clock_decides_when_no_node_agrees_with_the_file_system() -> None:
    late = replace(GOOD, node="b", rank=1, clock_s=9000.0)
    reports = [GOOD, late, replace(GOOD, node="c", rank=2)]
    assert compare(reports, SLOWEST_GPU_FRACTION, time.time()).keys() == {"b"}
