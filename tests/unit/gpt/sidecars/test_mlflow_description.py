"""What MLflow shows of a run besides its points."""

from pathlib import Path

import pytest

from gpt.run.events import Event, record_event
from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir
from gpt.sidecars.mlflow import MlflowRun
from tests.unit.gpt.sidecars.support import config


@pytest.mark.parametrize(("exit_code", "status"), [(0, "FINISHED"), (75, "FINISHED"), (93, "FAILED")])
def test_mlflow_status_is_how_the_run_ended(run_dir: RunDir, exit_code: int, status: str) -> None:
    run_dir.attempt(1).path.mkdir(parents=True)
    write_json(run_dir.attempt(1).result, {"exit_code": exit_code, "cause": "so it was"})
    mirror = MlflowRun(run_dir, config())
    mirror.close()
    run = mirror.client.get_run(mirror.run_id)
    assert run.info.status == status
    assert run.data.tags["outlast.cause"] == "so it was"


@pytest.mark.parametrize(
    ("outcome", "stop", "word", "status"),
    [
        ({"exit_code": 75}, None, "stopped", "FINISHED"),
        ({"exit_code": 75, "is_cancelled": True}, None, "cancelled", "KILLED"),
        ({"exit_code": 1}, {"now": True}, "killed", "KILLED"),
        ({"exit_code": 1}, None, "failed", "FAILED"),
        (None, None, "requeued", "SCHEDULED"),
    ],
)
def test_the_ending_of_a_job_is_its_outcome(
    run_dir: RunDir,
    outcome: dict[str, object] | None,
    stop: dict[str, object] | None,
    word: str,
    status: str,
) -> None:
    run_dir.submission(1).path.mkdir(parents=True)
    record_event(run_dir.events, Event.JOB_RUN_STARTED)
    if outcome is not None:
        write_json(run_dir.submission(1).outcome, {"cause": "so it was", "attempt": None, **outcome})
    else:
        record_event(run_dir.events, Event.REQUEUED)
    if stop is not None:
        write_json(run_dir.stop, stop)
    mirror = MlflowRun(run_dir, config())
    mirror.close()
    run = mirror.client.get_run(mirror.run_id)
    assert (run.data.tags["outlast.ending"], run.info.status) == (word, status)


def test_changes_of_the_config_are_tags_and_every_attempt_has_its_config(run_dir: RunDir) -> None:
    run_dir.attempt(1).path.mkdir(parents=True)
    record_event(run_dir.events, Event.ATTEMPT_STARTED, attempt=1, world_size=2)
    first = MlflowRun(run_dir, config())
    first.send()
    changes = {"optimizer.peak_lr": [0.001, 0.0005], "data.skip": [None, [[1, 2]]]}
    record_event(run_dir.events, Event.CONFIG_CHANGED, changes=changes)
    record_event(run_dir.events, Event.ATTEMPT_STARTED, attempt=2, world_size=4)
    record_event(run_dir.events, Event.RESUMED, step=120)
    run_dir.attempt(2).path.mkdir()
    write_json(run_dir.config, {"changed": True})
    mirror = MlflowRun(run_dir, config())
    mirror.send()
    tags = mirror.client.get_run(mirror.run_id).data.tags
    assert tags["outlast.changed.optimizer.peak_lr"] == "step 120: 0.001 → 0.0005"
    assert tags["outlast.changed.data.skip"] == "step 120: unset → [[1, 2]]"
    assert "optimizer.peak_lr: step 120: 0.001 → 0.0005" in tags["outlast.changes"]
    assert (tags["outlast.world_size"], tags["outlast.attempts"]) == ("4", "2")
    assert (tags["outlast.name"], tags["outlast.data"]) == ("tiny", "corpus")
    assert int(tags["outlast.parameters"]) > 1e6
    files = {file.path for file in mirror.client.list_artifacts(mirror.run_id, "config")}
    assert files == {"config/attempt-0001.json", "config/attempt-0002.json"}
    experiment = mirror.client.get_experiment(mirror.client.get_run(mirror.run_id).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_files_lie_beside_the_database_and_move_with_it(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_dir.profiles.mkdir()
    (run_dir.profiles / "steps-3-4.json.gz").write_bytes(b"trace")
    mirror = MlflowRun(run_dir, config())
    mirror.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    folder = run_dir.path.parent
    assert len(list((folder / "mlflow-artifacts").rglob("steps-3-4.json.gz"))) == 1
    moved = RunDir(folder.rename(tmp_path / "moved") / run_dir.path.name)
    again = MlflowRun(moved, config())
    assert again.run_id == mirror.run_id
    local = again.client.download_artifacts(again.run_id, "profile/steps-3-4.json.gz", str(tmp_path))
    assert Path(local).read_bytes() == b"trace"
    assert not folder.exists()


def test_a_file_that_cannot_be_attached_leaves_no_run_running(run_dir: RunDir) -> None:
    (run_dir.path.parent / "mlflow-artifacts").write_text("in the way")
    run_dir.profiles.mkdir()
    (run_dir.profiles / "steps-3-4.json.gz").write_bytes(b"trace")
    run_dir.attempt(1).path.mkdir(parents=True)
    write_json(run_dir.attempt(1).result, {"exit_code": 0, "cause": "done"})
    mirror = MlflowRun(run_dir, config())
    mirror.send()
    assert mirror.warning is not None and mirror.warning.startswith("the config could not be attached")
    mirror.close()
    assert mirror.client.get_run(mirror.run_id).info.status == "FINISHED"
    assert mirror.warning.startswith("the profile could not be attached in MLflow: ")
