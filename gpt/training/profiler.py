"""`profile = "10:12"`: records these steps of rank 0 with torch's profiler, as a trace for Perfetto."""

import gzip
from typing import Any

import torch

from gpt.config.run import RunConfig
from gpt.distributed.world import World
from gpt.model.hardware import synchronize
from gpt.run.run_dir import RunDir


class Profile:
    """Traces the steps that the config names, on rank 0."""

    def __init__(self, run: RunConfig, run_dir: RunDir, world: World) -> None:
        self._steps = run.profiled_steps if world.is_first else range(0)
        self._run_dir, self._device = run_dir, world.device
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Start the trace when `step` is the first one to profile."""
        if self._steps and step == self._steps[0]:
            self._profiler = torch.profiler.profile(record_shapes=True, with_stack=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Write the trace when `step` is the last one to profile."""
        if self._profiler is None or step < self._steps[-1]:
            return
        synchronize(self._device)
        self._profiler.stop()
        name = f"steps-{self._steps[0]}-{self._steps[-1]}.json"
        self._run_dir.profiles.mkdir(exist_ok=True)
        plain = self._run_dir.profiles / f".{name}"
        self._profiler.export_chrome_trace(str(plain))
        packed = self._run_dir.profiles / f".{name}.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=3))
        packed.rename(self._run_dir.profiles / f"{name}.gz")
        plain.unlink()
        self._profiler = None
