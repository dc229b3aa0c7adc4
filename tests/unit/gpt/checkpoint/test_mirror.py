"""The second place of a run's checkpoints: a folder, and a real S3 server on this machine."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import ConfigError, LaunchError
from gpt.checkpoint.format import INDEX_NAME, PIN_NAME, committed, read_index, step_name
from gpt.checkpoint.mirror import Mirror, MirrorError
from gpt.checkpoint.removal import prune
from gpt.checkpoint.writer import Pace
from gpt.config.run import CheckpointConfig
from gpt.run import record
from gpt.run.json_file import read_json, write_json
from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir
from gpt.sidecars.checkpoint_mirror import Copier, follow
from launcher.cluster import ClusterConfig
from launcher.commands import follow_job
from launcher.commands.resume import resume
from launcher.preflight.check import examine
from launcher.runs.recipes import run_tables
from launcher.runs.store import create_run, read_config
from tests.unit.gpt.checkpoint.support import write_checkpoint
from tests.unit.launcher.support import give_job, make_data, submit_what_ends_well
from tests.unit.s3_support import s3_bucket


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_bucket("mirrors"):
        yield "s3://mirrors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A mirror that is empty."""
    if request.param == "folder":
        (tmp_path / "mirrors").mkdir()
        return str(tmp_path / "mirrors")
    return f"{request.getfixturevalue('s3')}/{time.time_ns()}"


@pytest.fixture
def run(tmp_path: Path, data: Path, place: str) -> RunDir:
    """A run of 20 steps that is mirrored."""
    return make_run(tmp_path / "here" / "mine-0001", data, place)


def make_run(folder: Path, data: Path, place: str) -> RunDir:
    tables, source = run_tables("tiny", [f"data.path={data}", f"checkpoint.mirror={place}"])
    request = examine(tables, source, ClusterConfig(kind="local"), folder)
    return create_run(folder, request, ["outlast"])


def save(run: RunDir, *steps: int) -> None:
    """Commit checkpoints as the run itself would."""
    config = read_config(run)
    data = joint_fingerprint([read_manifest(source.path) for source in config.data.sources])
    for step in steps:
        write_checkpoint(run.checkpoints, step=step, config=config, data_fingerprint=data)
        record.append(run.metrics, step=step)


def copier(run: RunDir) -> Copier:
    return Copier(run, read_config(run).checkpoint)


def copy_all(run: RunDir) -> list[int]:
    """Copy what is new; the steps in the order in which they went."""
    before = len(mirrored(run))
    mine = copier(run)
    while mine.copy_next():
        pass
    return mirrored(run)[before:]


def mirrored(run: RunDir) -> list[int]:
    return [line["step"] for line in record.read(run.events) if line["event"] == "mirrored"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(place: str, run: RunDir, step: int) -> None:
    """Flip a bit of a rank's file at the mirror."""
    mirror = Mirror.of(run, place)
    path = mirror._path(step, "rank-00001.safetensors")
    content = bytearray(mirror._store.cat_file(path))
    content[len(content) // 2] ^= 1
    mirror._store.pipe_file(path, bytes(content))


def test_newest_checkpoint_is_copied_first_and_fetched_back_unchanged(
    run: RunDir, place: str, tmp_path: Path
) -> None:
    save(run, 5, 10)
    assert copy_all(run) == [10, 5]
    assert copy_all(run) == []  # a process that starts anew finds them there
    mirror = Mirror.of(run, place)
    assert mirror.steps() == [5, 10]
    for step in (5, 10):
        mirror.fetch(step, tmp_path / "back")
        assert contents(tmp_path / "back" / step_name(step)) == contents(run.checkpoints / step_name(step))
    assert not list((tmp_path / "back").glob(".*"))


def test_checkpoint_counts_at_the_mirror_only_with_its_index(run: RunDir, place: str) -> None:
    save(run, 5)
    mirror = Mirror.of(run, place)
    mirror.put(5, run.checkpoints / step_name(5))
    mirror._store.rm_file(mirror._path(5, INDEX_NAME))  # as if it had been cut off
    assert mirror.steps() == []
    assert copy_all(run) == [5]


@pytest.mark.parametrize("is_gone", [False, True])
def test_interrupted_copy_is_repeated(run: RunDir, place: str, is_gone: bool) -> None:
    save(run, 5)
    copy_all(run)
    mirror = Mirror.of(run, place)
    path = mirror._path(5, "rank-00001.safetensors")
    content = mirror._store.cat_file(path)
    mirror._store.rm_file(path)
    if not is_gone:
        mirror._store.pipe_file(path, content[:-1])
    assert copier(run).copy_next()
    assert mirror._store.cat_file(path) == content


def test_another_checkpoint_of_the_same_step_replaces_the_mirrors(run: RunDir, place: str) -> None:
    save(run, 5)
    copy_all(run)
    shutil.rmtree(run.checkpoints / step_name(5))
    index = read_index(write_checkpoint(run.checkpoints, step=5, world_size=1))
    assert copy_all(run) == [5]
    Mirror.of(run, place).fetch(5, run.path / "back")
    assert read_index(run.path / "back" / step_name(5)) == index


def test_the_mirror_keeps_what_the_run_keeps(run: RunDir, place: str) -> None:
    save(run, 5)
    (run.checkpoints / step_name(5) / PIN_NAME).touch()
    for step in (10, 15, 20):
        save(run, step)
        copy_all(run)
    mirror = Mirror.of(run, place)
    assert mirror.steps() == [5, 10, 15, 20]  # three of checkpoint.keep_last, and a pinned one
    (run.checkpoints / step_name(5) / PIN_NAME).unlink()
    save(run, 25)
    prune(run.checkpoints, {5, 20, 25})
    copy_all(run)
    assert mirror.steps() == [15, 20, 25]
    left = [path for path in mirror._store.find(f"{mirror._root}/checkpoints") if "00000005" in path]
    assert left == []


def test_copy_respects_the_speed_limit_until_the_run_has_ended(run: RunDir, place: str) -> None:
    save(run, 5)
    size = sum(len(content) for content in contents(run.checkpoints / step_name(5)).values())
    megabytes, ended = size / 1e6, threading.Event()
    config = read_config(run).checkpoint.model_copy(update={"max_mb_per_s": megabytes})
    started = time.monotonic()
    assert Copier(run, config, ended).copy_next()
    assert time.monotonic() - started >= 0.99
    assert Mirror.of(run, place).has(5, run.checkpoints / step_name(5))

    save(run, 10)
    config = config.model_copy(update={"max_mb_per_s": megabytes / 1000})  # a quarter of an hour
    threading.Timer(0.5, ended.set).start()
    started = time.monotonic()
    assert Copier(run, config, ended).copy_next()
    assert 0.5 <= time.monotonic() - started < 60
    assert Mirror.of(run, place).has(10, run.checkpoints / step_name(10))


def test_corrupt_copy_is_reported_and_passed_over(run: RunDir, place: str, tmp_path: Path) -> None:
    save(run, 5, 10)
    copy_all(run)
    damage(place, run, 10)
    said: list[str] = []
    assert Mirror.of(run, place).fetch_newest(tmp_path / "back", said.append) == 5
    assert [step for step, _ in committed(tmp_path / "back")] == [5]
    assert len(said) == 1
    assert "step-00000010/rank-00001.safetensors at the mirror: byte" in said[0]


def test_mirror_of_another_run_with_the_same_name_is_not_touched(
    run: RunDir, place: str, data: Path, tmp_path: Path
) -> None:
    save(run, 5)
    copy_all(run)
    with pytest.raises(ConfigError, match="is the mirror of another run with this name"):
        make_run(tmp_path / "elsewhere" / "mine-0001", data, place)
    run.provenance.write_text('{"run_id": "another"}')
    with pytest.raises(MirrorError, match="is the mirror of another run"):
        copier(run)


def test_run_continues_from_its_mirror_on_a_fresh_machine(
    run: RunDir, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(run, 5, 10)
    copy_all(run)
    monkeypatch.setenv("OUTLAST_RUNS", str(tmp_path / "fresh"))
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    assert resume(f"{place}/mine-0001", None, [], None, attend=None) == 0
    fresh = RunDir(tmp_path / "fresh" / "mine-0001")
    assert read_config(fresh) == read_config(run)
    assert [step for step, _ in committed(fresh.checkpoints)] == [10]
    assert list(record.read(fresh.metrics)) == list(record.read(run.metrics))
    with pytest.raises(LaunchError, match="is there already"):
        resume(f"{place}/mine-0001", None, [], None, attend=None)
    assert fresh.encoding.read_bytes() == run.encoding.read_bytes()
    with pytest.raises(LaunchError, match=r"mine-0002 is no(t| mirror of) a run.*: it has no config\.json"):
        resume(f"{place}/mine-0002", None, [], None, attend=None)
    if Path(place).is_dir():
        assert not RunDir(Path(place) / "mine-0001").starting.exists()
        monkeypatch.setenv("OUTLAST_RUNS", place)
        with pytest.raises(
            LaunchError, match=r"mine-0001 is the mirror itself\. Set OUTLAST_RUNS to the fold"
        ):
            resume(f"{place}/mine-0001", None, [], None, attend=None)


def test_commands_in_the_cluster_file_of_a_mirror_are_not_run_unasked(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTLAST_RUNS", str(tmp_path / "fresh"))
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    (tmp_path / "mirrors").mkdir()
    run = make_run(tmp_path / "here" / "mine-0001", data, str(tmp_path / "mirrors"))
    save(run, 5)
    planted = {"kind": "local", "environment": {"LD_PRELOAD": "/tmp/evil.so"}}
    write_json(run.cluster, planted)
    copy_all(run)
    place, fresh = str(tmp_path / "mirrors" / "mine-0001"), RunDir(tmp_path / "fresh" / "mine-0001")
    with pytest.raises(
        ConfigError, match=r'executes?: environment = \{"LD_PRELOAD": "/tmp/evil\.so"\}.*--trust'
    ):
        resume(place, None, [], None, attend=None)
    assert not fresh.path.exists()
    with pytest.raises(ConfigError, match="gone is not a data set"):  # the run is fetched, but not resumed
        resume(place, "local", [f"data.path={tmp_path / 'gone'}"], None, attend=None)
    with pytest.raises(ConfigError, match=r"cluster\.json is missing\. Give the cluster with --cluster\.$"):
        resume(str(fresh.path), None, [], None, attend=None)
    assert resume(str(fresh.path), "local", [], None, attend=None) == 0
    assert "environment" not in (read_json(fresh.cluster) or {})
    shutil.rmtree(fresh.path)
    assert resume(place, None, [], None, attend=None, is_trusted=True) == 0
    assert read_json(fresh.cluster) == planted


def test_resume_fetches_what_only_the_mirror_has(
    run: RunDir, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    save(run, 5, 10, 15)
    copy_all(run)
    shutil.rmtree(run.checkpoints / step_name(15))
    shutil.rmtree(run.checkpoints / step_name(5))
    assert resume(str(run.path), None, [], None, attend=None) == 0
    assert "step 15 is taken from the mirror" in capsys.readouterr().err
    assert [step for step, _ in committed(run.checkpoints)] == [10, 15]
    assert resume(str(run.path), None, [], 5, attend=None) == 0
    assert [step for step, _ in committed(run.checkpoints)] == [5]
    assert Mirror.of(run, place).steps() == [5]  # a later resume must not come back to step 15
    assert resume(str(run.path), None, [], None, attend=None) == 0
    assert [step for step, _ in committed(run.checkpoints)] == [5]


def test_copy_of_a_run_does_not_use_the_mirror_of_the_original(
    run: RunDir, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(follow_job, "submit", submit_what_ends_well)
    save(run, 5)
    copy_all(run)
    give_job(run, alive=False)
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "copies" / "mine-0001")))
    with pytest.raises(ConfigError, match="is the mirror of the original run"):
        resume(str(copy.path), None, [], None, attend=None)
    (tmp_path / "others").mkdir()
    elsewhere = f"checkpoint.mirror={tmp_path / 'others'}"
    assert resume(str(copy.path), None, [elsewhere], None, attend=None) == 0
    ours, theirs = (read_json(each.provenance) or {} for each in (copy, run))
    assert ours["run_id"] != theirs["run_id"]
    back = f"checkpoint.mirror={place}"
    with pytest.raises(ConfigError, match="is the mirror of another run"):
        resume(str(copy.path), None, [back], None, attend=None)
    copier(run)  # the mirror is still the original's


def test_failing_mirror_is_recorded_and_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.sidecars.checkpoint_mirror.RETRY_S", 0.05)
    monkeypatch.setattr("gpt.sidecars.checkpoint_mirror.POLL_S", 0.05)
    run, place = RunDir(tmp_path / "run"), tmp_path / "mirrors"
    write_checkpoint(run.checkpoints, step=5)
    place.write_text("a file where a folder should be")
    ended = threading.Event()
    config = CheckpointConfig(mirror=str(place))
    following = threading.Thread(target=follow, args=(run, config, ended), daemon=True)
    following.start()
    time.sleep(0.5)  # several tries
    (failed,) = record.read(run.events)
    assert failed["event"] == "mirror_failed"
    assert str(failed["reason"]).startswith(f"the mirror {place}/run: NotADirectoryError")
    health = SidecarHealth.read(run.sidecar_health(Sidecar.MIRRORING))
    assert health is not None
    assert (health.health, health.error) == (Health.FAILING, failed["reason"])
    place.unlink()
    ended.set()
    following.join(20)
    assert Mirror.of(run, str(place)).steps() == [5]
    health = SidecarHealth.read(run.sidecar_health(Sidecar.MIRRORING))
    assert health is not None
    assert (health.health, health.error, health.step) == (Health.DONE, None, 5)


def test_checkpoint_pruned_during_its_copy_is_no_failure(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 5)
    mine = copier(run)
    put = mine.mirror.put

    def put_late(step: int, folder: Path, pace: Pace | None) -> int:
        shutil.rmtree(folder)
        return put(step, folder, pace)

    monkeypatch.setattr(mine.mirror, "put", put_late)
    assert not mine.copy_next()
    assert mirrored(run) == []


@pytest.mark.parametrize(
    ("mirror", "words"),
    [
        ("{folder}/none", "is not a folder. Create it, or mount its file system."),
        ("{folder}", "already holds the run itself. Use another folder."),
        ("nosuch://x", "checkpoint.mirror: nosuch://x/new: ValueError Protocol not known: nosuch"),
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x: this bucket does not exist."),
    ],
)
@pytest.mark.usefixtures("s3")
def test_launch_checks_the_mirror_first(tmp_path: Path, data: Path, mirror: str, words: str) -> None:
    place = mirror.format(folder=tmp_path)
    with pytest.raises(ConfigError) as error:
        make_run(tmp_path / "new", data, place)
    assert words in error.value.problems[0]
