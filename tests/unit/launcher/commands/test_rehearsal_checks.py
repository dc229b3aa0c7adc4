"""What a rehearsal compares."""

from pathlib import Path
from typing import get_args

import pytest

from data_pipeline.config_file import validate
from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.events import Event, record_event
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.fault_injector import FaultInjector
from launcher.commands.rehearsal_checks import LOSS_TOLERANCE, Check, compare
from launcher.commands.rehearse import shortened
from launcher.preflight.check import examine
from launcher.request import Request
from launcher.runs.recipes import run_tables


def test_short_run_has_every_stage_of_the_long_one() -> None:
    sources = [{"path": "/a", "weight": 1.0}, {"path": "/b", "weight": 1.0}]
    stages = [{"from_tokens": 10**9, "weights": [1, 2]}, {"from_progress": 0.9, "weights": [0, 1]}]
    warmup = [{"steps": 500, "global_batch_tokens": 8192}, {"steps": 900, "global_batch_tokens": 16384}]
    tables = {
        "name": "x",
        "data": {"mixture": sources, "schedule": stages},
        "batch": {"global_batch_tokens": 32768, "micro_batch": 1, "warmup": warmup},
        "schedule": {"name": "wsd", "warmup_steps": 2000, "decay_steps": 5000, "total_tokens": 10**10},
        "checkpoint": {"every_steps": 1000, "mirror": "/mirror"},
    }
    validate(RunConfig, tables, "x")
    short = validate(RunConfig, shortened(tables, 8), "short")
    assert (short.schedule.warmup_steps, short.schedule.decay_steps, short.total_steps) == (6, 2, 8)
    assert [stage.steps for stage in short.batch.warmup] == [2, 2]
    assert [stage.from_progress for stage in short.data.schedule] == [1 / 3, 2 / 3]
    assert short.checkpoint.every_steps == 2
    assert short.checkpoint.mirror is None


def test_every_precision_has_a_loss_tolerance() -> None:
    assert set(LOSS_TOLERANCE) == set(get_args(RunConfig.model_fields["precision"].annotation))


@pytest.fixture
def request_of_fp16(data: Path) -> Request:
    tables, source = run_tables("tiny", [f"data.path={data}", "precision=fp16"])
    return examine(tables, source, ClusterConfig(kind="local"), None)


def write_run(folder: Path, losses: list[float], *, worlds: tuple[int, ...], skipped: int | None) -> RunDir:
    """A record of one step for each of `losses`; from step 3 on by the last of `worlds`."""
    folder.mkdir()
    run = RunDir(folder)
    for number, world in enumerate(worlds, 1):
        record_event(run.events, Event.ATTEMPT_STARTED, attempt=number, world_size=world)
        if number > 1:
            record_event(run.events, Event.RESUMED, attempt=number, step=2)
    for step, loss in enumerate(losses, 1):
        record.append(run.metrics, step=step, **{"train/loss": loss, "data/digest": float(step)})
    if skipped is not None:
        record_event(run.events, Event.UPDATE_SKIPPED, step=skipped, reason="non-finite gradient")
    return run


def loss_check(tmp_path: Path, request: Request, losses: list[float], skipped: int | None) -> Check:
    first = write_run(tmp_path / "first", [9.0, 8.0, 7.0, 6.0, 5.0], worlds=(2,), skipped=None)
    second = write_run(tmp_path / "second", losses, worlds=(2, 1), skipped=skipped)
    fault = FaultInjector(lambda: "a worker", steps_after_save=1)
    return compare(first, second, request, fault)[-1]


def test_losses_at_another_world_size_must_agree_within_the_tolerance(
    tmp_path: Path, request_of_fp16: Request
) -> None:
    off = LOSS_TOLERANCE["fp16"] / 2
    good = loss_check(tmp_path, request_of_fp16, [9.0, 8.0, 7.0, 6.0, 5.0 + off], None)
    assert (good.is_good, good.name) == (True, "losses equal within 0.0025 on 1 process")
    (tmp_path / "again").mkdir()
    bad = loss_check(tmp_path / "again", request_of_fp16, [9.0, 8.0, 7.0, 6.0, 5.0 + 4 * off], None)
    assert not bad.is_good


def test_losses_are_compared_only_up_to_an_update_that_one_run_skipped(
    tmp_path: Path, request_of_fp16: Request
) -> None:
    check = loss_check(tmp_path, request_of_fp16, [9.0, 8.0, 7.0, 6.0, 6.0], 4)
    assert check.is_good
    assert check.seen == "largest difference 0, steps 3–4; only one run skipped the update of step 4"


def test_losses_that_are_not_finite_are_compared(tmp_path: Path, request_of_fp16: Request) -> None:
    nan = float("nan")
    for name, losses, is_good in (("a", [9.0, 8.0, nan], True), ("b", [9.0, 8.0, 7.0], False)):
        first = write_run(tmp_path / f"{name}1", [9.0, 8.0, nan], worlds=(2,), skipped=None)
        second = write_run(tmp_path / f"{name}2", losses, worlds=(2, 1), skipped=None)
        fault = FaultInjector(lambda: "a worker", steps_after_save=1)
        assert compare(first, second, request_of_fp16, fault)[-1].is_good == is_good
