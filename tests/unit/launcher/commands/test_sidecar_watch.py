"""How the sidecars of a run fare, as status and the foreground say it."""

import io
import time

import pytest
from rich.console import Console

from gpt.run.json_file import read_json, write_json
from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir
from launcher.commands.sidecar_watch import SidecarWatch
from launcher.commands.status import status
from launcher.commands.status_table import table
from tests.unit.launcher.commands.support import commit, record_step
from tests.unit.launcher.support import end_job, give_job


def put(run: RunDir, health: Health, sidecar: Sidecar = Sidecar.TRACKING, **fields: object) -> None:
    now = time.time()
    state = SidecarHealth(health=health, since=now, time=now).model_copy(update=fields)
    state.write(run.sidecar_health(sidecar))


def give_mirror(run: RunDir) -> None:
    config = read_json(run.config) or {}
    write_json(run.config, {**config, "checkpoint": {**config.get("checkpoint", {}), "mirror": "/second"}})


def test_status_shows_what_keeps_a_sidecar_from_its_work(run: RunDir) -> None:
    give_job(run, alive=True)
    put(run, Health.WORKING, step=3)
    assert status(run).sidecar_problems == ()
    long_ago = time.time() - 600.5
    put(run, Health.FAILING, error="of an earlier job", time=long_ago)
    assert status(run).sidecar_problems == ()
    write_json(run.job, {**(read_json(run.job) or {}), "submitted_at": long_ago - 1})
    put(run, Health.WORKING, step=3, time=long_ago)
    [problem] = status(run).sidecar_problems
    assert problem.startswith("the process that sends to MLflow has not reported for 10:")
    put(run, Health.FAILING, step=3, error="connection refused")
    found = status(run)
    assert found.sidecar_problems == (
        "MLflow does not take what is sent to it, and is tried again (connection refused); the last step "
        "that arrived is 3",
    )
    assert found.as_json()["sidecars"]["tracking"]["health"] == "failing"
    console = Console(file=io.StringIO(), width=300)
    console.print(table([run]))
    assert isinstance(console.file, io.StringIO)
    assert f"{run.path.name}: MLflow does not take what is sent" in console.file.getvalue()
    put(run, Health.DEAD, Sidecar.MIRRORING, error="its process ended with SIGKILL")
    assert len(status(run).sidecar_problems) == 1, "the config asks for no mirror"


def test_status_says_what_has_not_arrived_when_the_job_has_ended(run: RunDir) -> None:
    give_mirror(run)
    give_job(run, alive=True)
    record_step(run, 7)
    commit(run, 6)
    put(run, Health.WORKING, step=5)
    put(run, Health.WORKING, Sidecar.MIRRORING, step=4)
    assert status(run).sidecar_problems == (), "the job goes on"
    end_job(run, 0, "done")
    assert status(run).sidecar_problems == (
        "MLflow has everything up to step 5 of 7 so far",
        "the mirror has everything up to the checkpoint of step 4 of 6 so far",
    )
    put(run, Health.DONE, step=7)
    put(run, Health.INCOMPLETE, Sidecar.MIRRORING, step=4, error="no route to host")
    assert status(run).sidecar_problems == (
        "the mirror has not received everything (no route to host); the last step that arrived is 4; the "
        "next job of the run copies the rest",
    )


def test_the_foreground_tells_each_problem_once_and_when_it_is_over(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.commands.sidecar_watch._POLL_S", 0.0)
    put(run, Health.FAILING, error="of an earlier job", time=1.0)
    watch = SidecarWatch(run)
    assert list(watch.news()) == []
    put(run, Health.FAILING, error="connection refused")
    [told] = watch.news()
    assert told.startswith("warning: MLflow does not take what is sent to it") and "refused" in told
    assert list(watch.news()) == []
    assert len(list(watch.last_words())) == 1
    put(run, Health.WORKING, step=4, notes=("the run was restored",))
    assert list(watch.news()) == ["note: the run was restored", "the tracking sidecar works again"]
    assert list(watch.news()) == list(watch.last_words()) == []
    commit(run, 6)
    put(run, Health.WORKING, Sidecar.MIRRORING, step=4)
    [told] = watch.last_words()
    assert told.startswith("the checkpoint of step 6 is still being copied to the mirror")
