"""Resuming a run: what may change, from which checkpoint, and what is refused before a file changes."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, LaunchError
from gpt.checkpoint.format import committed
from gpt.run.events import Event, read_events
from gpt.run.exit_codes import exit_code_of
from gpt.run.json_file import read_json, write_json
from gpt.run.run_dir import REWOUND_PREFIX, RunDir
from launcher.cluster import ClusterSize
from launcher.commands import follow_job
from launcher.commands.resume import resume as resume_run
from launcher.runs.trust import foreign_writers
from tests.unit.launcher.commands.support import commit, spoil
from tests.unit.launcher.support import submit_what_ends_well


def resume(run: RunDir, *overrides: str, step: int | None = None) -> int:
    return resume_run(str(run.path), None, overrides, step, attend=None)


def test_resuming_a_finished_run_changes_nothing(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 10, 20)
    before = run.config.read_bytes()
    assert resume(run) == 0
    shown = capsys.readouterr()
    assert (
        "the run has finished: step 20 of 20. To train longer, add --set schedule.total_steps=" in shown.err
    )
    assert shown.out == f"{run.path}\n"
    assert run.config.read_bytes() == before
    assert not run.job.exists()


def test_a_finished_run_with_a_corrupt_last_checkpoint_trains_its_last_steps_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    commit(run, 10, 20)
    path = spoil(run, 20)
    assert resume(run) == 0
    assert (
        f"the last checkpoint is corrupt; its steps are trained again: {path}: byte 0:"
        in capsys.readouterr().err
    )
    assert run.job.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=7", "seed cannot change in the middle of a run: 1234 → 7."),
        ("model.n_layers=3", "model.n_layers cannot change in the middle of a run: 2 → 3."),
        ("optimizer.peak_lr=0.5", "optimizer.peak_lr cannot change in the middle of a run: 0.003 → 0.5."),
        ("batch.global_batch_tokens=2048", "batch.global_batch_tokens cannot change in the middle of a run"),
    ],
)
def test_fields_that_must_match_cannot_change_on_resume(run: RunDir, setting: str, words: str) -> None:
    before = run.config.read_bytes()
    with pytest.raises(ConfigError) as error:
        resume(run, setting)
    assert error.value.problems[0].startswith(words)
    assert exit_code_of(error.value) == 2
    assert run.config.read_bytes() == before


def test_allowed_changes_are_submitted_and_recorded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    assert resume(run, "schedule.total_tokens=40960", "checkpoint.keep_last=5", "zero.stage=2") == 0
    config = read_json(run.config)
    assert config is not None
    assert (config["schedule"]["total_tokens"], config["checkpoint"]["keep_last"]) == (40960, 5)
    assert "total_steps" not in config["schedule"]
    [changed] = read_events(run.events, Event.CONFIG_CHANGED)
    assert changed["changes"] == {
        "checkpoint.keep_last": [3, 5],
        "schedule.total_steps": [20, None],
        "schedule.total_tokens": [None, 40960],
        "zero.stage": [1, 2],
    }
    assert "warning: schedule.total_tokens changes from None to 40960" in capsys.readouterr().err


def test_skipped_sequences_must_come_after_the_resumed_step(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    commit(run, 5)
    commit(run, 10, skipped=((100, 120),))
    with pytest.raises(ConfigError) as error:
        resume(run, "data.skip=[[150, 160], [160, 190], [500, 501]]")
    assert error.value.problems == [
        "data.skip: [150, 190] begins among the first 180 sequences, which the run has read by step 10. "
        "Resume from an earlier checkpoint (outlast resume --step), or begin the range at 180 or later."
    ]
    assert resume(run, "data.skip=[[150, 190]]", step=5) == 0
    assert (read_json(run.config) or {})["data"]["skip"] == [[150, 190]]


def test_resuming_from_an_older_step_sets_later_checkpoints_aside(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    commit(run, 5, 10, 15)
    with pytest.raises(
        LaunchError, match=r"^there is no checkpoint of step 7\. Available steps: 5, 10, 15\.$"
    ):
        resume(run, step=7)
    spoil(run, 10)
    with pytest.raises(
        LaunchError, match=r"step 10 is corrupt: .*: byte 0: .*\. Other checkpoints: 5, 15\.$"
    ):
        resume(run, step=10)
    assert [number for number, _ in committed(run.checkpoints)] == [5, 10, 15]
    assert resume(run, step=5) == 0
    names = sorted(entry.name for entry in run.checkpoints.iterdir())
    assert names[-1] == "step-00000005"
    assert [name.rpartition("step-")[2] for name in names[:-1]] == ["00000010", "00000015"]
    assert all(name.startswith(REWOUND_PREFIX) for name in names[:-1])


def test_a_run_created_before_a_field_existed_can_be_resumed(run: RunDir) -> None:
    tables = read_json(run.config)
    assert tables is not None
    del tables["optimizer"]["eps"]
    write_json(run.config, tables)
    commit(run, int(tables["schedule"]["total_steps"]))
    assert resume(run) == 0


def test_a_finished_run_stores_where_its_data_is_now(
    run: RunDir, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(run, 20)
    shutil.copytree(data, tmp_path / "moved")
    assert resume(run, f"data.path={tmp_path / 'moved'}") == 0
    assert "stored: data.path\n" in capsys.readouterr().err
    assert (read_json(run.config) or {})["data"]["path"] == str(tmp_path / "moved")
    [changed] = read_events(run.events, Event.CONFIG_CHANGED)
    assert changed["changes"] == {"data.path": [str(data), str(tmp_path / "moved")]}
    before = run.config.read_bytes()
    assert resume(run, "data.max_epochs=50") == 0
    assert "not stored, because nothing is trained: data.max_epochs\n" in capsys.readouterr().err
    assert run.config.read_bytes() == before
    assert not run.job.exists()


def test_a_run_that_was_moved_where_its_code_cannot_be_imported_is_refused(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    moved = run.path.rename(run.path.with_name("a:b"))
    with pytest.raises(ConfigError, match="a:b: a run directory's path cannot have ':': it sep"):
        resume(RunDir(moved))
    link = moved.with_name("link")
    link.symlink_to(moved)
    assert resume(RunDir(link)) == 0


def test_missing_data_are_looked_for_where_the_user_says(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resume(run, f"data.path={tmp_path / 'gone'}")
    [problem] = error.value.problems
    assert problem.endswith("no such folder. If it was moved, give its folder with --set data.path=DIR")


def test_a_run_directory_that_others_can_change_is_refused_unless_trusted(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run, 20)
    run.cluster.chmod(0o666)
    with pytest.raises(
        ConfigError, match=rf"^everybody can write to {run.cluster}, and what lies there is executed"
    ):
        resume(run)
    assert not run.starting.exists()
    assert resume_run(str(run.path), None, [], None, attend=None, is_trusted=True) == 0
    run.cluster.chmod(0o664)  # a group that shares its runs
    assert resume(run) == 0
    monkeypatch.setattr("os.getuid", lambda: run.path.stat().st_uid + 1)
    is_root = run.path.stat().st_uid == 0
    assert (foreign_writers(run) is None) == is_root
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert foreign_writers(run) is None


def test_the_number_of_processes_is_changed_by_an_option(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    with pytest.raises(ConfigError, match=r"batch\.global_batch_tokens = 1024 is not a multiple of .* 3"):
        resume_run(str(run.path), None, [], None, attend=None, size=ClusterSize(processes=3))
    assert resume_run(str(run.path), None, [], None, attend=None, size=ClusterSize(processes=2)) == 0
    assert read_json(run.cluster) == {"kind": "local", "processes_per_node": 2}


def test_a_change_that_the_checkpoint_does_not_fit_is_not_offered_to_be_allowed(run: RunDir) -> None:
    commit(run, 10)
    with pytest.raises(ConfigError) as error:
        resume(run, "model.n_layers=3", "seed=7")
    layers, seed = error.value.problems
    assert layers.startswith(
        "model.n_layers cannot change in the middle of a run: 2 → 3. The checkpoint does"
    )
    assert layers.endswith("Launch a new run with this value.")
    assert seed.endswith("or allow the change with --allow-change seed.")
