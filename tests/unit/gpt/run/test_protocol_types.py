"""The types of the protocol: their values are on disk and in shell scripts, so they are a contract."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    OutlastError,
)
from gpt.config.run import DivergenceConfig, LaunchConfig
from gpt.run.attempts import Superseded
from gpt.run.environment import Variable, WorkerEnvironment
from gpt.run.events import Event, read_events, record_event
from gpt.run.exit_codes import ExitCode, exit_code_of
from gpt.run.failure_policy import POLICIES, TRIGGERS, Action, Trigger, action_on
from gpt.run.records import Job, JobOutcome, Owner, Result, StopRequest


def test_event_names_are_unique_and_in_snake_case() -> None:
    values = [event.value for event in Event]
    assert len(values) == len(set(values)) == len(Event.__members__)
    assert all(value == value.lower() and value.replace("_", "").isalpha() for value in values)


def test_events_are_read_back_by_name(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    record_event(path, Event.RESUMED, step=4)
    record_event(path, Event.FINISHED)
    assert [line["event"] for line in read_events(path)] == ["resumed", "finished"]
    assert [line["step"] for line in read_events(path, Event.RESUMED)] == [4]


def test_exit_codes_keep_their_values_and_each_has_a_meaning() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 75, 93]
    assert len({code.meaning for code in ExitCode}) == len(ExitCode)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("x"), ExitCode.DO_NOT_RESTART),
        (Superseded(3), ExitCode.DO_NOT_RESTART),
        (ConfigError("x"), ExitCode.BAD_INPUT),
        (DataError("x"), ExitCode.BAD_INPUT),
        (LaunchError("x"), ExitCode.BAD_INPUT),
        (OutlastError("x"), ExitCode.FAILED),
    ],
)
def test_each_error_has_its_exit_code(error: OutlastError, code: ExitCode) -> None:
    assert exit_code_of(error) is code


def test_every_variable_has_a_name_of_ours_and_a_meaning() -> None:
    assert all(name.value.startswith("OUTLAST_") for name in Variable)
    assert all(name.meaning.endswith(".") for name in Variable)


def test_worker_environment_reads_back_what_it_writes() -> None:
    told = WorkerEnvironment("slurm-7", 2, 5, True, 1, "node1", 8, "socket")
    assert WorkerEnvironment.read(told.variables()) == told
    assert WorkerEnvironment.read({}) == WorkerEnvironment()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"exit_code": 75', "not readable as JSON"),
        ("[75]", "holds list, not an object"),
        ('{"exit_code": 76, "cause": ""}', r"exit_code: .*remove the file"),
        ('{"exit_code": 75}', "cause: Field required"),
    ],
)
def test_garbled_record_is_an_error_that_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "result.json"
    assert Result.read(path) is None
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"(?s)result\.json.*{message}"):
        Result.read(path)
    assert Result.read_or_none(path) is None


def test_records_ignore_unknown_keys_and_keep_their_keys_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"
    Owner(attempt=3, job="slurm-1", job_run=2).write(path)
    content = json.loads(path.read_text())
    assert content["turn"] == 2
    path.write_text(json.dumps({**content, "of_a_newer_version": 1}))
    owner = Owner.read(path)
    assert owner is not None
    assert (owner.attempt, owner.job, owner.job_run) == (3, "slurm-1", 2)


def test_empty_stop_request_has_the_defaults(tmp_path: Path) -> None:
    StopRequest(reason="maintenance", requeue=True).write(tmp_path / "stop")
    assert StopRequest.read(tmp_path / "stop") == StopRequest(reason="maintenance", requeue=True)
    (tmp_path / "stop").write_text("")
    assert StopRequest.read_or_none(tmp_path / "stop") is None


def test_outcome_and_job_keep_their_keys_on_disk() -> None:
    assert set(JobOutcome.model_fields) == {"exit_code", "cause", "attempt", "is_cancelled"}
    assert set(Job.model_fields) == {
        "submission", "executor", "job_id", "host", "pid", "process", "run_inode", "submitted_at"
    }  # fmt: skip


def test_every_trigger_has_a_policy_and_every_exit_code_a_trigger() -> None:
    assert set(POLICIES) == set(Trigger)
    assert set(TRIGGERS) == set(ExitCode)
    fields = {"launch": LaunchConfig.model_fields, "divergence": DivergenceConfig.model_fields}
    assert all(policy.limit in (None, *fields[policy.table]) for policy in POLICIES.values())


def test_limit_and_scheduler_decide_what_follows_a_failure() -> None:
    limits = LaunchConfig(max_failures=3)
    failed, hung = Trigger.ATTEMPT_FAILED, Trigger.HUNG_AT_START
    assert [action_on(failed, count=n, limits=limits) for n in (1, 2, 3)] == [
        Action.RESTART_WORKERS, Action.RESTART_WORKERS, Action.END
    ]  # fmt: skip
    assert action_on(hung, count=3, limits=limits) is Action.END_JOB_RUN
    assert action_on(Trigger.JOB_RUN_FAILED, limits=limits) is Action.REQUEUE
    assert action_on(Trigger.JOB_RUN_FAILED, limits=limits, can_requeue=False) is Action.END
    assert action_on(Trigger.NODE_FAILED_CHECK, can_requeue=False) is Action.END
    assert action_on(Trigger.STOPPED_BY_PERSON) is Action.END
