"""The code for GPUs, on a stand-in for one that writes down what is asked of it."""

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.distributed.world import join
from gpt.model import attention
from gpt.model.hardware import ACCELERATORS, synchronize
from gpt.run.environment import WorkerEnvironment
from gpt.training.metrics import DeferredScalars

GPU = torch.device("meta", 0)


class StandIn:
    """One GPU of Hopper's generation, whose events are reached one millisecond after another."""

    backend = "gloo"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def use(self, device: torch.device) -> None:
        self.asked.append(f"use {device}")

    def synchronize(self, device: torch.device) -> None:
        self.asked.append(f"synchronize {device}")

    def event(self, *, is_timed: bool = False) -> Any:
        return EventOf(self, is_timed=is_timed)

    def pinned(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.asked.append(f"pin {numel}")
        return torch.empty(numel, dtype=dtype)

    def compute_capability(self, device: torch.device) -> tuple[int, int] | None:  # noqa: ARG002
        return (9, 0)

    def product(self, device: torch.device) -> str:  # noqa: ARG002
        return "stand-in"

    def free_bytes(self, device: torch.device) -> tuple[int, int]:  # noqa: ARG002
        return (1, 1)


class EventOf:
    def __init__(self, gpu: StandIn, *, is_timed: bool) -> None:
        self.gpu, self.is_timed, self.milliseconds = gpu, is_timed, -1

    def record(self) -> None:
        self.gpu.asked.append("record")
        self.milliseconds = self.gpu.asked.count("record")

    def synchronize(self) -> None:
        assert self.milliseconds >= 0
        self.gpu.asked.append("wait")

    def elapsed_time(self, end: "EventOf") -> float:
        assert self.is_timed and end.is_timed
        return end.milliseconds - self.milliseconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(ACCELERATORS, GPU.type, stand_in)
    return stand_in


def test_numbers_of_a_step_are_copied_behind_an_event(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tensor without memory can be stacked but not copied.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, _, non_blocking: self.fill_(5.0 * non_blocking))
    numbers = DeferredScalars({"loss": torch.zeros((), device=GPU), "norm": torch.zeros((), device=GPU)})
    assert gpu.asked == ["pin 2", "record"]
    assert numbers.read() == {"loss": 5.0, "norm": 5.0} and gpu.asked[2:] == ["wait"]


def test_device_is_asked_to_finish_and_the_processor_is_not(gpu: StandIn) -> None:
    synchronize(torch.device("cpu"))
    synchronize(GPU)
    assert gpu.asked == ["synchronize meta:0"]


def test_kernel_is_chosen_by_what_the_device_can_do(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_installed", lambda module: module == "flash_attn")
    model = ModelConfig.model_validate({"d_model": 128, "n_heads": 2, "vocab_size": 64})
    assert attention.choose(model, GPU, torch.bfloat16)[0] == "flash-2"
    monkeypatch.setattr(gpu, "compute_capability", lambda _: (7, 0))
    assert attention.choose(model, GPU, torch.bfloat16)[0] == "sdpa"
    named = model.model_copy(update={"attention": "flash-2"})
    with pytest.raises(ConfigError, match=r"this GPU has compute capability 7\.0"):
        attention.choose(named, GPU, torch.bfloat16)


@pytest.mark.parametrize(("gpus", "device"), [(1, "meta:0"), (0, "cpu"), (None, "meta:0")])
def test_ranks_join_on_the_device_that_the_cluster_file_asks_for(
    gpus: int | None, device: str, gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address, port = free.getsockname()
    places = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    world = join(30.0, environment=WorkerEnvironment(gpus_per_node=gpus), gpu=GPU.type)
    dist.destroy_process_group()
    assert str(world.device) == device and world.device_problem is None
    assert gpu.asked == ([] if device == "cpu" else [f"use {device}"])
