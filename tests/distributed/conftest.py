"""Real runs of several processes, with torchrun, DeepSpeed and gloo, on a part of the packaged corpus."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config_file import validate
from data_pipeline.dataset.manifest import read_manifest
from gpt.checkpoint.format import committed
from gpt.checkpoint.reader import CheckpointReader
from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.environment import Variable
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import RunDir
from tests.distributed.data import small_data_set
from tests.distributed.warm_torchrun import Agent, start_torchrun, worker_name

CONTEXT = 32


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data_set(tmp_path_factory.mktemp("data") / "kjv")


@dataclass
class Run:
    """A run directory that torchrun and the workers use, without a launcher."""

    dir: RunDir

    def configure(self, **overrides: Any) -> None:
        tables = read_json(self.dir.config)
        assert tables is not None
        write_json(self.dir.config, _with_fields(tables, overrides))

    def start(
        self,
        processes: int = 2,
        max_restarts: int = 0,
        failpoints: Sequence[str] = (),
        program: Sequence[str] = ("-m", "gpt.train"),
        cold: bool = False,
    ) -> Agent:
        """Start torchrun on this machine. Each generation of its workers has one of the `failpoints`.

        `cold` starts new interpreters, as the launcher does.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", Variable.FAILPOINTS: ",".join(failpoints)}
        arguments = [f"--max-restarts={max_restarts}", *program, str(self.dir.path)]
        return start_torchrun(processes, arguments, environment, self.dir.path / "torchrun.log", cold)

    def train(
        self, processes: int = 2, program: Sequence[str] = ("-m", "gpt.train"), cold: bool = False
    ) -> dict[str, Any]:
        """Train to the end and return the result of the newest attempt."""
        agent = self.start(processes, program=program, cold=cold)
        try:
            agent.wait(timeout=180)
        finally:
            agent.kill()
        return self.result()

    def result(self) -> dict[str, Any]:
        newest = self.dir.attempt_numbers()[-1]
        result = read_json(self.dir.attempt(newest).result)
        assert result is not None, self.logs()
        return result

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        self.wait(lambda: ((record.last(self.dir.metrics) or {"step": 0})["step"]) >= step, timeout_s)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s\n{self.logs()}"
            time.sleep(0.02)

    def kill_worker(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.owner()["workers"][rank]["pid"], number)

    def owner(self) -> dict[str, Any]:
        """OWNER.json of the newest attempt."""
        owner = read_json(self.dir.attempt(self.dir.attempt_numbers()[-1]).owner)
        assert owner is not None
        return owner

    def living_workers(self) -> list[int]:
        """The process ids of this run's workers in any attempt, without the agent."""
        pattern = f"gpt.train\0{self.dir.path}\0"
        forked = worker_name(["-m", "gpt.train", str(self.dir.path)])
        return [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if (line := _text(entry / "cmdline"))  # empty for a process that has ended
            if (pattern in line and "torch.distributed.run" not in line)
            or _text(entry / "comm").strip() == forked
        ]

    def metrics(self) -> list[dict[str, Any]]:
        return list(record.read(self.dir.metrics))

    def losses(self) -> list[float]:
        lines = self.metrics()
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["train/loss"] for line in lines]

    def events(self, name: str) -> list[Mapping[str, Any]]:
        return [line for line in record.read(self.dir.events) if line["event"] == name]

    def steps(self) -> list[int]:
        return [step for step, _ in committed(self.dir.checkpoints)]

    def state(self, step: int) -> dict[str, np.ndarray]:
        """Every state of every group in a checkpoint, without padding."""
        reader = CheckpointReader(dict(committed(self.dir.checkpoints))[step])
        return {
            f"{group.name}.{state}": reader.read(group.name, state, 0, group.numel)
            for group in reader.index.groups
            for state in group.states
        }

    def logs(self) -> str:
        files = [self.dir.path / "torchrun.log", *sorted(self.dir.attempts.glob("*/*/*.log"))]
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def same_state(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def make_run(folder: Path, data_dir: Path, **overrides: Any) -> Run:
    """A run directory of a tiny model; the keyword `table__key` sets a field of the config."""
    tables: dict[str, Any] = {
        "name": "tiny",
        "precision": "fp32",
        "model": {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "context": CONTEXT},
        "data": {"path": str(data_dir)},
        "batch": {"global_batch_tokens": 8 * CONTEXT, "micro_batch": 4},
        "optimizer": {"peak_lr": 3e-3},
        "schedule": {"total_steps": 8, "warmup_steps": 2},
        "zero": {"stage": 1},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"every_steps": 4, "tokens": 20 * CONTEXT},
        "tracking": {"enabled": False},
        "launch": {"hang_timeout_s": 30, "start_timeout_s": 30, "collective_timeout_s": 60},
    }
    run = Run(RunDir(folder))
    run.dir.checkpoints.mkdir(parents=True)
    config = validate(RunConfig, _with_fields(tables, overrides), "test")
    config = config.resolve(read_manifest(data_dir).encoding.vocab_size)
    write_json(run.dir.config, config.model_dump(mode="json"))
    return run


@pytest.fixture
def new_run(tmp_path: Path, data_dir: Path) -> Iterator[Callable[..., Run]]:
    """`make_run` in this test's folder; workers that still run at the end are killed."""
    made: list[Run] = []

    def make(**overrides: Any) -> Run:
        made.append(make_run(tmp_path / f"run-{len(made)}", data_dir, **overrides))
        return made[-1]

    yield make
    for run in made:
        for pid in run.living_workers():
            os.kill(pid, signal.SIGKILL)


def _with_fields(tables: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in fields.items():
        table, _, key = name.partition("__")
        if key:
            tables.setdefault(table, {})[key] = value
        else:
            tables[table] = value
    return tables
