"""Dry steps of many settings: no host wait of ours, the collectives of a golden file, and the planned memory.

After a change that is meant to change the collectives, write the file anew and look at its difference:

    python -m tests.unit.gpt.dry_run.test_dry_step
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpt.config.run import RunConfig
from gpt.run.dry_step import Collective, DryStep, HostWait
from launcher.preflight.memory import memory
from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "fixtures" / "collectives.json"
CONTEXT = 2048

# (stage, world size, micro-batches, ranks that share a sequence, recompute, precision)
SETTINGS: list[tuple[Any, ...]] = [
    (1, 1, 1, 1, "none"),
    (1, 8, 1, 2, "none"),
    (1, 8, 4, 1, "none"),
    (1, 512, 1, 1, "full"),
    (2, 1, 4, 1, "none"),
    (2, 8, 1, 1, "full"),
    (2, 8, 4, 2, "selective"),
    (2, 512, 1, 1, "none"),
    (3, 1, 1, 1, "none"),
    (3, 8, 4, 1, "none"),
    (3, 8, 1, 2, "full"),
    (3, 512, 1, 1, "selective"),
    (3, 8, 1, 1, "none", "fp16"),
]
NAMES = [
    "stage {}, {} ranks, {} micro-batches, {} a sequence, recompute {}, {}".format(*s, "bf16")
    for s in SETTINGS
]


def config(
    stage: int, world: int, micro_batches: int, sequence: int, recompute: str, precision: str = "bf16"
) -> RunConfig:
    """A network of three layers of a 1B model, so that sizes are real and few kernels are dispatched."""
    model = {"n_layers": 3, "d_model": 2048, "n_heads": 16, "context": CONTEXT, "vocab_size": 32000}
    return RunConfig.model_validate(
        {
            "name": "dry",
            "precision": precision,
            "model": {**model, "recompute": recompute},
            "data": {"path": "none"},
            "batch": {"global_batch_tokens": micro_batches * world // sequence * CONTEXT, "micro_batch": 1},
            "schedule": {"total_steps": 1},
            "zero": {"stage": stage},
            "parallel": {"sequence": sequence},
        }
    )


def run_all() -> dict[str, DryStep]:
    """The dry step of every setting, all in one child process."""
    requests = [
        {
            "run": config(*setting).model_dump(mode="json"),
            "world_size": setting[1],
            "local_size": min(8, setting[1]),
            "capability": [9, 0],
        }
        for setting in SETTINGS
    ]
    done = subprocess.run(
        [sys.executable, "-m", "gpt.trace"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    steps = [DryStep.from_json(json.loads(line)) for line in done.stdout.splitlines()]
    return dict(zip(NAMES, steps, strict=True))


def golden(step: DryStep) -> dict[str, Any]:
    """What the golden file keeps of a step; lines of DeepSpeed's waits without their numbers."""
    waits: Counter[str] = Counter()
    for wait in step.host_waits:
        place, _, function = wait.line.partition(" ")
        waits[f"{place.rpartition(':')[0]} {function}: {wait.reason}"] += wait.count
    return {
        "collectives": [[c.operation, c.ranks, c.bytes, c.count] for c in step.collectives],
        "host_waits": dict(waits),
    }


@pytest.fixture(scope="module")
def steps() -> dict[str, DryStep]:
    return run_all()


def test_our_code_never_makes_the_host_wait_inside_a_step(steps: dict[str, DryStep]) -> None:
    for name, step in steps.items():
        assert [wait for wait in step.host_waits if wait.is_ours] == [], name


def test_deepspeed_reads_one_number_a_step(steps: dict[str, DryStep]) -> None:
    """It is the gradient's norm, which it compares with infinity. Stage 3 in fp16 also reads its overflow."""
    for name, step in steps.items():
        read = [wait for wait in step.host_waits if wait.reason == "reads a number"]
        assert sum(wait.count for wait in read) <= (2 if "fp16" in name else 1), name
        known = ("is_invalid_grad_norm", "has_overflow") if "fp16" in name else ("is_invalid_grad_norm",)
        assert all(wait.line.endswith(known) for wait in read), name
        assert not [wait for wait in step.host_waits if wait.reason.startswith("copies")], name


def test_collectives_and_host_waits_are_those_of_the_golden_file(steps: dict[str, DryStep]) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {name: golden(step) for name, step in steps.items()} == expected


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_planned_memory_is_what_the_step_allocates(
    setting: tuple[Any, ...], steps: dict[str, DryStep]
) -> None:
    step, planned = steps[NAMES[SETTINGS.index(setting)]], memory(config(*setting), setting[1])
    assert step.weights == pytest.approx(planned.weights, rel=0.01)
    assert step.optimizer == pytest.approx(planned.optimizer, rel=0.01)
    # At stage 1 with one micro-batch the first rank holds more than the last, and the plan is for the first.
    least = 0.92 if setting[0] == 1 else 0.95
    assert least * planned.peak < step.peak < 1.05 * planned.peak


def test_report_survives_its_way_through_json() -> None:
    wait, collective = HostWait("a.py:1 f", "reads a number", True, 2), Collective("all-gather", 8, 64, 3)
    step = DryStep(1, 2, 3, 4, 5, "forward", 6, (collective,), (wait,), (16, 24))
    assert DryStep.from_json(json.loads(json.dumps(step.as_json()))) == step
    assert collective.traffic == 3 * 64 * 7 / 8
    assert Collective("all-reduce", 8, 64).traffic == 2 * 64 * 7 / 8
    assert Collective("all-reduce", 1, 64).traffic == 0


if __name__ == "__main__":
    content = {name: golden(step) for name, step in run_all().items()}
    Path(GOLDEN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
