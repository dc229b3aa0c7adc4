"""Ranks meet although one of them has a sick device, and know which one."""

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import LaunchError
from gpt.distributed.world import agree, gather, join
from gpt.model.hardware import ACCELERATORS
from gpt.run.environment import WorkerEnvironment
from tests.unit.gpt.model.test_hardware import StandIn

ERROR = "CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"


class Sick(StandIn):
    """Devices of which the second one cannot be made current. Their collectives need all devices."""

    backend = "nccl"  # raises where torch has no CUDA, as here

    def count(self) -> int:
        return 2

    def use(self, device: torch.device) -> None:
        if device.index == 1:
            raise RuntimeError(ERROR)


def meet(rank: int, port: int) -> None:
    ACCELERATORS["meta"] = Sick()
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    world = join(60.0, environment=WorkerEnvironment(gpus_per_node=2), gpu="meta")
    assert dist.get_backend() == "gloo" and str(world.device) == f"meta:{rank}"
    problem = "meta:1: CUDA error: uncorrectable ECC error encountered"
    assert gather(world, world.device_problem) == [None, problem]
    with pytest.raises(LaunchError, match=f"^rank 1: {problem}$"):
        agree(world, world.require_device)
    dist.barrier(group=world.control)
    os._exit(0)


def test_ranks_meet_over_gloo_and_name_the_sick_device() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # it imports torch once for all
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    ranks = [context.Process(target=meet, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
