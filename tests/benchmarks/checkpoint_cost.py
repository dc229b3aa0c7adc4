"""What a checkpoint costs, ours beside DeepSpeed's and torch's own; torchrun runs it in two processes.

`checkpoint_cost.py CONFIG FOLDER OUT`: JSON from rank 0: seconds of a memcpy of the same bytes, and for each
system how long it held the steps up, the steps while it wrote, bytes on disk, seconds to load. Each reading
is the slowest rank's. Files are loaded from the disk where the system allows it.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from gpt.config.run import RunConfig
from gpt.distributed.world import join, total
from gpt.distributed.zero.build import build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import Documents
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving.restore import load_newest
from gpt.saving.saver import Saver
from gpt.training.step import train_step

SAVES = 3
run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
folder, out = Path(sys.argv[2]), Path(sys.argv[3])
world = join(600)
of_dcp = dist.new_group(backend="gloo")  # its thread takes part in collectives while the steps go on
torch.set_num_threads(1)  # two ranks on two cores
run_dir = RunDir(folder / "ours")
if world.is_first:
    run_dir.attempt(1).path.mkdir(parents=True)
engine = Engine(build_model(run, world), run, world)
saver = Saver(
    run_dir,
    engine,
    world,
    attempt=1,
    data_fingerprint="d",
    heartbeat=Heartbeat(),
    stop=StopFlag(),
)

B, T = run.batch.micro_batch, run.model.context
tokens = torch.randint(
    0, run.model.vocabulary, (B, T + 1), generator=torch.Generator().manual_seed(world.rank)
)
documents = Documents.from_ends((torch.arange(1, B + 1, dtype=torch.int32) * T).numpy(), world.device)
inputs = [(tokens[:, :-1], tokens[:, 1:], documents)]


def slowest(seconds: float) -> float:
    """The slowest rank's reading."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=world.control)
    return float(value)


def timed(action: Callable[[], Any]) -> float:
    """Seconds of `action`, begun by all ranks together."""
    dist.barrier(group=world.control)
    started = time.perf_counter()
    action()
    return slowest(time.perf_counter() - started)


def step() -> None:
    train_step(engine, inputs, 1e-4, float(world.size * B * T))


def steps_until(is_done: Callable[[], bool]) -> list[float]:
    """Seconds of each whole step until every rank `is_done`."""
    seconds: list[float] = []
    while True:
        (left,) = total(world, not is_done())
        if not left:
            return seconds
        seconds.append(timed(step))


def forget(path: Path) -> None:
    """Take files out of the page cache."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure(save: Callable[[int], Callable[[], bool]], load: Callable[[], Any], path: Path) -> dict[str, Any]:
    """One system: `save(n)` gives what tells whether the n-th save is on disk."""
    stalls, during, between = [], [], []
    for number in range(1, SAVES + 1):
        step()
        is_done: list[Callable[[], bool]] = []
        stalls.append(timed(lambda n=number, box=is_done: box.append(save(n))))  # type: ignore[misc]
        during += (meanwhile := steps_until(is_done[0]))
        # As many that nothing is written beside: the machine's own pace drifts.
        between += [timed(step) for _ in meanwhile]
    newest = max(path.glob("step-*"))
    forget(newest)
    found = {
        "stall_s": statistics.median(stalls),
        "first_stall_s": stalls[0],
        "steps_while_writing_s": during,
        "steps_between_s": between,
        "bytes": size(newest),
        "load_s": timed(load),
        "load_from_memory_s": timed(load),
    }
    if world.is_first:
        print(path.name, found, flush=True)
    return found


def ours(number: int) -> Callable[[], bool]:
    saver.save(number, ())

    def is_done() -> bool:
        saver.advance(*total(world, *saver.report()))
        return saver.in_flight is None

    return is_done


def deepspeeds(number: int) -> Callable[[], bool]:
    engine._engine.save_checkpoint(str(folder / "deepspeed"), tag=f"step-{number}", save_latest=False)
    return lambda: True


def torchs(number: int) -> Callable[[], bool]:
    state = {f"rank-{world.rank}.{part.group}.{part.state}": part.tensor for part in engine.state()}
    future: Any = dcp.async_save(
        state, checkpoint_id=str(folder / "dcp" / f"step-{number}"), process_group=of_dcp
    )
    return lambda: bool(future.done())


def load_torchs() -> None:
    state = {f"rank-{world.rank}.{part.group}.{part.state}": part.tensor for part in engine.state()}
    dcp.load(state, checkpoint_id=str(folder / "dcp" / f"step-{SAVES}"), process_group=of_dcp)


def read_safetensors() -> None:
    path = run_dir.checkpoints / f"step-{SAVES:08d}" / f"rank-{world.rank:05d}.safetensors"
    for tensor in load_file(path).values():
        tensor.clone()  # until then it is only mapped


if world.is_first:
    for name in ("deepspeed", "dcp"):
        (folder / name).mkdir()
for _ in range(3):
    step()
pairs = [(part.tensor, torch.zeros_like(part.tensor)) for part in engine.state()]
copies = [timed(lambda: [target.copy_(source) for source, target in pairs]) for _ in range(5)]
pairs.clear()
result: dict[str, Any] = {
    "parameters": sum(entry.numel for entry in engine.parameters),
    "memcpy_s": statistics.median(copies),
    "ours": measure(
        ours, lambda: load_newest(run_dir, engine, world, "d", is_begun=True), run_dir.checkpoints
    ),
}
forget(run_dir.checkpoints)
result["read_safetensors_s"] = timed(read_safetensors)
shutil.rmtree(run_dir.checkpoints, ignore_errors=True)
result["deepspeed"] = measure(
    deepspeeds,
    lambda: engine._engine.load_checkpoint(str(folder / "deepspeed"), tag=f"step-{SAVES}"),
    folder / "deepspeed",
)
shutil.rmtree(folder / "deepspeed", ignore_errors=True)
result["dcp"] = measure(torchs, load_torchs, folder / "dcp")
if world.is_first:
    out.write_text(json.dumps(result))
dist.barrier(group=world.control)
os._exit(0)  # DCP's threads are in no hurry
