"""The mirror in MLflow: every point once, whatever is killed, cut back, moved, deleted, or down."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from data_pipeline.errors import ConfigError
from gpt.run import record
from gpt.run.events import Event, read_events, record_event
from gpt.run.json_file import read_json, write_json
from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir
from gpt.sidecars.mlflow import MlflowRun, follow
from tests.unit.gpt.sidecars.support import Server, add_steps, config, history, new_run, recorded


def send(run_dir: RunDir, **tracking: object) -> MlflowRun:
    """Send what is new in the record, as a sidecar that has just started does."""
    mirror = MlflowRun(run_dir, config(**tracking))
    mirror.send()
    return mirror


def test_restart_continues_the_mlflow_run_and_repeats_no_point(run_dir: RunDir) -> None:
    uri = f"sqlite:///{run_dir.mlflow_database}"
    add_steps(run_dir, 1, 6)
    record_event(run_dir.events, Event("network_built"), attention="sdpa")
    first = send(run_dir)
    assert MlflowClient(uri).get_run(first.run_id).data.tags["outlast.attention"] == "sdpa"
    record.cut_back(run_dir.metrics, 4)  # what a resume from step 4 does
    add_steps(run_dir, 5, 9)
    second = send(run_dir)
    second.close()
    assert second.run_id == first.run_id == (read_json(run_dir.provenance) or {})["mlflow_run_id"]
    assert history(uri, first.run_id) == [(step, 1.0 / step) for step in range(1, 10)]
    assert MlflowClient(uri).get_run(first.run_id).data.params["schedule.total_steps"] == "9"


def test_scores_added_to_a_sent_line_are_sent_once(run_dir: RunDir) -> None:
    uri = f"sqlite:///{run_dir.mlflow_database}"
    add_steps(run_dir, 1, 2)
    mirror = send(run_dir)
    record.amend_last(run_dir.metrics, **{"val/loss": 3.0})
    for _ in range(2):
        send(run_dir)
    assert history(uri, mirror.run_id, "val/loss") == [(2, 3.0)]
    assert history(uri, mirror.run_id) == [(1, 1.0), (2, 0.5)]


def test_points_keep_their_original_time(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 1)
    happened = next(record.read(run_dir.metrics))["time"]
    mirror = send(run_dir)
    (point,) = mirror.client.get_metric_history(mirror.run_id, "train/loss")
    assert point.timestamp == int(happened * 1000)


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(("back_to", "until"), [(0, 4), (0, 12), (3, 5), (3, 8), (3, 12), (8, 9)])
def test_mlflow_has_the_course_of_the_record_after_it_went_back(
    run_dir: RunDir, back_to: int, until: int, is_restarted: bool
) -> None:
    """Steps are recorded anew with other losses, and perhaps fewer of them than before."""
    add_steps(run_dir, 1, 3)
    mirror = send(run_dir)
    add_steps(run_dir, 4, 8)
    mirror.send()
    record.cut_back(run_dir.metrics, back_to)
    if until > 8:  # the tracker looks between the two
        mirror.send()
        assert len(history(mirror._uri, mirror.run_id)) == 8, "nothing is removed before its replacement"
    add_steps(run_dir, back_to + 1, until, factor=2.0)
    if is_restarted:
        mirror = MlflowRun(run_dir, config())
    mirror.send(is_last=True)
    mirror.close()
    assert history(mirror._uri, mirror.run_id) == recorded(run_dir)
    latest = mirror.client.get_run(mirror.run_id).data.metrics["train/loss"]
    assert latest == recorded(run_dir)[-1][1]


def test_a_missing_record_removes_nothing(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 4)
    mirror = send(run_dir)
    run_dir.metrics.unlink()
    mirror.send(is_last=True)
    send(run_dir).close()
    assert len(history(mirror._uri, mirror.run_id)) == 4
    run_dir.metrics.mkdir()  # cannot be read
    with pytest.raises(ConfigError, match="is not a regular file"):
        mirror.send()
    assert len(history(mirror._uri, mirror.run_id)) == 4


def test_a_state_of_an_earlier_version_continues(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 4)
    mirror = send(run_dir)
    old = {name: (read_json(run_dir.tracking) or {})[name] for name in ("run_id", "inode", "sent_step")}
    write_json(run_dir.tracking, old)
    add_steps(run_dir, 5, 6)
    assert send(run_dir).run_id == mirror.run_id
    assert history(mirror._uri, mirror.run_id) == recorded(run_dir)


def test_a_poll_reads_only_what_is_new(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt.sidecars import mlflow as tracker

    read_from: list[int] = []
    read = tracker.lines_from

    def noted(path: Path, offset: int) -> Any:
        read_from.append(offset)
        return read(path, offset)

    add_steps(run_dir, 1, 5)
    mirror = send(run_dir)
    size = run_dir.metrics.stat().st_size
    monkeypatch.setattr(tracker, "lines_from", noted)
    mirror.send()
    add_steps(run_dir, 6, 6)
    mirror.send()
    assert read_from == [size, size]
    assert history(mirror._uri, mirror.run_id) == recorded(run_dir)


def test_damaged_lines_hide_no_other_line(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 2)
    with run_dir.metrics.open("a") as file:
        file.write('{"time": 1.0, "step": null}\n{"step": 3, "time": "x"}\n[1]\nnothing\n{"time": 2.0, "st\n')
        file.write('{"time": 3.0, "step": 3, "train/loss": 1e400, "train/lr": true, "val/loss": 5}\n')
    mirror = send(run_dir)
    add_steps(run_dir, 4, 4)
    mirror.send()
    send(run_dir)
    assert history(mirror._uri, mirror.run_id) == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert history(mirror._uri, mirror.run_id, "val/loss") == [(3, 5.0)]


def test_names_that_mlflow_refuses_arrive_escaped(run_dir: RunDir) -> None:
    names = [f"val/loss/{source}" for source in ("code-c++", "a(b)", "web@en", "a,b", "a=b", "x" * 400)]
    record.append(run_dir.metrics, step=1, **dict.fromkeys(names, 1.0))
    mirror = send(run_dir)
    found = mirror.client.get_run(mirror.run_id).data.metrics
    assert len(found) == len(names)
    assert "val/loss/code-c:2b::2b:" in found


def test_one_refused_metric_hides_no_other(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.sidecars.mlflow.mlflow_name", lambda name: name)  # as for a stricter server
    record.append(run_dir.metrics, step=1, **{"good": 1.0, "a(b)": 2.0})
    mirror = send(run_dir)
    assert mirror.client.get_run(mirror.run_id).data.metrics == {"good": 1.0}
    assert mirror.warning is not None and mirror.warning.startswith("MLflow refuses the metrics a(b): ")


def test_parameters_that_failed_once_are_sent_again(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise MlflowException("the database is locked")

        patch.setattr(MlflowClient, "log_batch", fail)
        with pytest.raises(MlflowException):
            send(run_dir)
    again = send(run_dir)
    assert again.client.get_run(again.run_id).data.params["schedule.total_steps"] == "9"
    assert len(again.client.search_runs([again.client.get_run(again.run_id).info.experiment_id])) == 1


def test_copied_run_directory_gets_its_own_mlflow_run(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 2)
    first = send(run_dir)
    copy = RunDir(run_dir.path.with_name("tiny-copy"))
    shutil.copytree(run_dir.path, copy.path)
    second = send(copy)
    assert second.run_id != first.run_id
    assert len(second.client.get_metric_history(second.run_id, "train/loss")) == 2


def test_a_run_that_mlflow_does_not_have_is_sent_whole_to_a_new_one(
    run_dir: RunDir, tmp_path: Path, empty_database: Path
) -> None:
    """The run directory was moved away from its database; or tracking.uri changed, which looks the same."""
    add_steps(run_dir, 1, 3)
    first = send(run_dir)
    elsewhere = new_run(tmp_path / "elsewhere", empty_database)
    shutil.rmtree(elsewhere.path)
    moved = RunDir(run_dir.path.rename(elsewhere.path))
    add_steps(moved, 4, 5)
    told: list[str] = []
    second = MlflowRun(moved, config(), told.append)
    second.send()
    assert second.run_id != first.run_id
    assert history(f"sqlite:///{moved.mlflow_database}", second.run_id) == recorded(moved)
    assert [sentence.startswith(f"MLflow has no run {first.run_id} here") for sentence in told] == [True]


def test_another_experiment_gets_a_run_of_its_own(run_dir: RunDir) -> None:
    add_steps(run_dir, 1, 3)
    first, second = send(run_dir), send(run_dir, experiment="other")
    assert first.run_id != second.run_id
    assert history(second._uri, second.run_id) == recorded(run_dir)


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_in_the_ui_is_restored(run_dir: RunDir, what: str) -> None:
    add_steps(run_dir, 1, 3)
    first = send(run_dir)
    experiment = first.client.get_run(first.run_id).info.experiment_id
    if what == "run":
        first.client.delete_run(first.run_id)
    else:
        first.client.delete_experiment(experiment)
    add_steps(run_dir, 4, 5)
    told: list[str] = []
    MlflowRun(run_dir, config(), told.append).send()
    assert history(first._uri, first.run_id) == recorded(run_dir)
    assert "deleted in MLflow; it is restored" in told[0]
    other = RunDir(run_dir.path.with_name("tiny-0002"))
    shutil.copytree(run_dir.path, other.path)
    first.client.delete_experiment(experiment)
    assert history(first._uri, send(other).run_id) == recorded(other), "a new run restores the experiment"


def test_a_run_deleted_while_it_is_sent_goes_on(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.sidecars.mlflow.RETRY_S", 0.05)
    monkeypatch.setattr("gpt.sidecars.mlflow.POLL_S", 0.05)
    add_steps(run_dir, 1, 3)
    first = send(run_dir)
    ended = threading.Event()
    thread = threading.Thread(target=follow, args=(run_dir, config(), ended))
    thread.start()
    while SidecarHealth.read_or_none(run_dir.sidecar_health(Sidecar.TRACKING)) is None:
        time.sleep(0.05)
    first.client.delete_run(first.run_id)
    add_steps(run_dir, 4, 5)
    ended.set()
    thread.join(timeout=120)
    assert history(first._uri, first.run_id) == recorded(run_dir)
    health = SidecarHealth.read(run_dir.sidecar_health(Sidecar.TRACKING))
    assert health is not None
    assert (health.health, health.step) == (Health.DONE, 5)


def test_server_that_starts_late_gets_every_point(
    run_dir: RunDir, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("gpt.sidecars.mlflow.RETRY_S", 0.5)
    # On a busy machine the server starts for a minute.
    monkeypatch.setattr("gpt.sidecars.mlflow.DRAIN_S", 170.0)
    add_steps(run_dir, 1, 5)
    ended = threading.Event()
    thread = threading.Thread(target=follow, args=(run_dir, config(uri=server.uri), ended))
    thread.start()
    path = run_dir.sidecar_health(Sidecar.TRACKING)
    while (health := SidecarHealth.read_or_none(path)) is None:
        time.sleep(0.05)
    assert health.health is Health.FAILING
    assert health.error is not None and "Connection refused" in health.error
    assert [event["reason"] for event in read_events(run_dir.events, Event.TRACKING_FAILED)]
    server.start()
    add_steps(run_dir, 6, 9)
    ended.set()
    thread.join(timeout=180)
    assert not thread.is_alive()
    run_id = (read_json(run_dir.tracking) or {})["run_id"]
    assert history(server.uri, run_id) == [(step, 1.0 / step) for step in range(1, 10)]
    health = SidecarHealth.read(path)
    assert health is not None
    assert (health.health, health.step, health.error) == (Health.DONE, 9, None)


def test_on_a_server_the_later_points_of_a_step_count(run_dir: RunDir, server: Server) -> None:
    """A crash: no checkpoint lies in the steps that are lost."""
    server.start()
    add_steps(run_dir, 1, 6)
    run_dir.attempt(1).path.mkdir(parents=True)
    mirror = send(run_dir, uri=server.uri)
    assert [file.path for file in mirror.client.list_artifacts(mirror.run_id)] == ["config"]
    record_event(run_dir.events, Event.CHECKPOINT_SAVED, step=4)
    record.cut_back(run_dir.metrics, 4)
    add_steps(run_dir, 5, 8, factor=2.0)
    assert send(run_dir, uri=server.uri).run_id == mirror.run_id
    points = history(server.uri, mirror.run_id)
    assert sorted(dict(points).items()) == recorded(run_dir)
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 5, 6, 6, 7, 8]


@pytest.mark.parametrize("is_behind_a_checkpoint", [True, False])
def test_on_a_server_a_course_that_was_left_is_another_run(
    run_dir: RunDir, server: Server, is_behind_a_checkpoint: bool
) -> None:
    """The run went back behind a checkpoint, or ends before the last step that MLflow has."""
    server.start()
    add_steps(run_dir, 1, 6)
    if is_behind_a_checkpoint:
        record_event(run_dir.events, Event.CHECKPOINT_SAVED, step=5)
    old = send(run_dir, uri=server.uri)
    record.cut_back(run_dir.metrics, 3)
    add_steps(run_dir, 4, 5, factor=2.0)
    told: list[str] = []
    new = MlflowRun(run_dir, config(uri=server.uri), told.append)
    new.send(is_last=True)
    new.close()
    assert new.run_id != old.run_id
    assert history(server.uri, new.run_id) == recorded(run_dir)
    assert new.client.get_run(new.run_id).data.params["schedule.total_steps"] == "9"
    left = new.client.get_run(old.run_id)
    assert left.data.tags["mlflow.parentRunId"] == left.data.tags["outlast.replaced_by"] == new.run_id
    assert (left.info.status, left.info.run_name) == ("KILLED", "tiny-0001 (left at step 6)")
    assert (read_json(run_dir.provenance) or {})["mlflow_run_id"] == new.run_id
    assert len(told) == 1


def test_server_that_never_starts_is_given_up_at_the_end(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("gpt.sidecars.mlflow.RETRY_S", 0.2)
    monkeypatch.setattr("gpt.sidecars.mlflow.DRAIN_S", 1.0)
    add_steps(run_dir, 1, 3)
    ended = threading.Event()
    ended.set()
    follow(run_dir, config(uri="http://127.0.0.1:9"), ended)
    assert "gave up; the lines that were not sent stay in the record" in capfd.readouterr().out
    assert len(list(record.read(run_dir.metrics))) == 3
    health = SidecarHealth.read(run_dir.sidecar_health(Sidecar.TRACKING))
    assert health is not None
    assert health.health is Health.INCOMPLETE
