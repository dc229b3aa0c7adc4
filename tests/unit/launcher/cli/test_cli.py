"""The command line as users see it: exit codes, standard output and standard error of child processes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gpt.run.run_dir import RunDir
from launcher.cli import commands
from launcher.scheduler.jobs import job_state
from tests.paths import ROOT
from tests.unit.launcher.support import kill_tree, make_data, make_run, start, wait_for

# What the user types, with every import of torch (or MLflow) an error.
PROGRAM = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "mlflow", "transformers", "tokenizers"):
            raise ImportError(name + " was imported")
sys.meta_path.insert(0, Block())
from launcher.cli import main
main()
"""


def outlast(*arguments: str, cwd: Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    environment.pop("OUTLAST_RUNS", None)
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=timeout_s
    )


def seconds_of(*arguments: str, cwd: Path, tries: int = 3) -> float:
    """The least CPU time of some tries, in seconds; a loaded machine does not stretch CPU time."""
    times = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert outlast(*arguments, cwd=cwd).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(times)


def leaves(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """A run that waits to be stopped, then ends with exit code 75."""
    worker = """
if rank == 0:
    number = claim()
    print("the worker speaks", flush=True)
while not run.stop.exists():
    time.sleep(0.05)
while json.loads(run.stop.read_text())["now"]:
    time.sleep(0.05)
if rank == 0:
    finish(number, 75, "stopped: " + json.loads(run.stop.read_text())["reason"])
"""
    yield make_run(tmp_path / "runs" / "waiting", worker)
    kill_tree(tmp_path / "runs" / "waiting")


def test_help_answers_in_under_300_ms(tmp_path: Path) -> None:
    assert seconds_of("--help", cwd=tmp_path) < 0.3


def test_a_dry_run_answers_in_under_a_second(tmp_path: Path, data: Path) -> None:
    assert seconds_of("launch", "tiny", "--set", f"data.path={data}", "--dry-run", cwd=tmp_path) < 1.0


def test_help_lists_exactly_these_commands() -> None:
    assert sorted(name for name, _ in leaves(commands)) == [
        "checkpoints", "compare", "data inspect", "demo", "export", "goodput", "import", "init", "launch",
        "logs", "plan", "prepare", "recipes", "rehearse", "replay", "resume", "sample", "schema", "simulate",
        "status", "stop", "sweep",
        "tokenizer train", "ui", "verify",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "command"), list(leaves(commands)))
def test_every_command_explains_itself_with_an_example(name: str, command: click.Command) -> None:
    help_text = command.get_help(click.Context(command, info_name=name))
    assert command.help
    assert f"Example:\n    outlast {name}" in help_text


def test_a_dry_run_writes_nothing_and_prints_the_run_directory_last(tmp_path: Path, data: Path) -> None:
    done = outlast("launch", "tiny", "--set", f"data.path={data}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "runs" / "tiny-0001")
    assert "parameters                      631,104" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_config_ends_with_2_and_one_line_per_problem(tmp_path: Path, data: Path) -> None:
    settings = [f"data.path={data}", "model.n_layer=3", "batch.micro_batch=0"]
    done = outlast("launch", "tiny", *(f"--set={setting}" for setting in settings), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: tiny.toml: unknown key 'model.n_layer'; did you mean 'model.n_layers'?",
        "error: tiny.toml: batch.micro_batch = 0: input should be greater than or equal to 1",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lunch"], 2, "No such command 'lunch'"),
        (["launch"], 2, "Missing argument 'RUN'"),
        (["launch", "tiny", "--clster", "x"], 2, "No such option '--clster'"),
        (["launch", "tiny", "--set", "seed"], 2, "error: --set seed: expected a.b=value, for example"),
        (["launch", "no.toml"], 2, "error: no.toml: no such file"),
        (["status", "nowhere"], 2, "error: nowhere is not a run directory: it has no config.json."),
        (["resume", "nowhere"], 2, "error: nowhere is not a run directory: it has no config.json."),
        (["stop", "nowhere"], 2, "error: nowhere is not a run directory: it has no config.json."),
        (["logs", "nowhere"], 2, "error: nowhere is not a run directory: it has no config.json."),
        (["verify", "nowhere"], 2, "error: nowhere does not exist. Name a run directory (`outlast"),
        (["ui", "nowhere"], 2, "no run in {cwd}/nowhere has been tracked yet."),
        (["prepare", "x.jsonl"], 2, "error: --tokenizer and --out must be given. Alternatively, give"),
        (["tokenizer", "train", "x", "--vocab-size", "300", "--out", "no/b"], 2, "error: --out no/b: the"),
        (["schema", "ran"], 2, "'ran' is not one of 'run', 'cluster', 'data'"),
        ([], 2, "Usage: outlast"),
    ],
)  # fmt: skip
def test_a_usage_error_is_explained(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    done = outlast(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert words.format(cwd=tmp_path) in done.stderr.replace("\n  ", " ")
    assert "Traceback" not in done.stderr


def test_plan_prints_json(tmp_path: Path, data: Path) -> None:
    done = outlast("plan", "tiny", "--set", f"data.path={data}", "--json", cwd=tmp_path)
    content = json.loads(done.stdout)
    assert (content["parameters"], content["world_size"], content["steps"]) == (631_104, 2, 20)
    assert content["tokens"] == 20 * 1024
    assert content["checkpoint_bytes"] == 12 * 631_104


@pytest.mark.parametrize(
    ("kind", "field"), [("run", "precision"), ("cluster", "partition"), ("data", "val_fraction")]
)
def test_schema_prints_json_schema(tmp_path: Path, kind: str, field: str) -> None:
    schema = json.loads(outlast("schema", kind, cwd=tmp_path).stdout)
    assert schema["properties"][field]["description"]
    assert schema["additionalProperties"] is False


def test_prepare_then_verify_then_a_flipped_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "In the beginning"}\n' * 3)
    (tmp_path / "data.toml").write_text('sources = ["a.jsonl"]\ntokenizer = "outlast-4k"\nout = "d"\n')
    before = os.umask(0)
    done = outlast("prepare", "data.toml", "--workers", "1", cwd=tmp_path)
    os.umask(before)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o775  # files of a run are executed
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'd'}\n"), done.stderr
    clean = outlast("verify", "d", cwd=tmp_path)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "", "data set: every byte is intact\n")
    shard = tmp_path / "d" / "train-00000.bin"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    bad = outlast("verify", "d", cwd=tmp_path)
    assert bad.returncode == 1
    [line] = bad.stdout.splitlines()
    assert line.startswith("d/train-00000.bin: byte 0: its bytes changed")
    assert bad.stderr == "data set: 1 corrupt file\n"


def test_stop_waits_until_the_run_has_saved_and_status_says_so(tmp_path: Path, run: RunDir) -> None:
    job = start(run)
    wait_for(lambda: run.attempt_numbers())
    busy = outlast("resume", str(run.path), cwd=tmp_path)
    assert busy.returncode == 2
    assert f"already has a job (local {job.job_id} on" in busy.stderr
    assert json.loads(outlast("status", "--json", cwd=tmp_path).stdout)[0]["state"] == "running"
    done = outlast("stop", str(run.path), cwd=tmp_path)
    first, *_, last = done.stderr.splitlines()
    assert (done.returncode, first, last) == (0, "saving, then stopping", "stopped: outlast stop")
    assert job_state(run, job) == "ended"
    [row] = json.loads(outlast("status", str(run.path), "--json", cwd=tmp_path).stdout)
    assert (row["state"], row["cause"], row["attempts"]) == ("stopped", "stopped: outlast stop", 1)
    again = outlast("stop", str(run.path), cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == (
        f"error: {run.path} is not running. `outlast status {run.path}` shows how it ended.\n"
    )


def test_stop_now_waits_until_the_run_has_ended(tmp_path: Path, run: RunDir) -> None:
    start(run)
    wait_for(lambda: run.attempt_numbers())
    done = outlast("stop", str(run.path), "--now", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "stopped at once without saving, as requested"


def test_logs_follow_a_run_to_its_end(tmp_path: Path, run: RunDir) -> None:
    start(run)
    wait_for(lambda: run.attempt_numbers())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, "logs", str(run.path), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "[job 0001 node-0] the worker speaks\n"
        assert outlast("stop", str(run.path), cwd=tmp_path).returncode == 0
        follower.communicate(timeout=20)
    assert follower.returncode == 0


def test_a_garbled_file_is_named_and_ends_with_2(tmp_path: Path, run: RunDir) -> None:
    run.job.write_text(json.dumps({"run_inode": run.path.stat().st_ino, "pid": "many"}))
    done = outlast("resume", str(run.path), cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {run.job} is not as this version of Outlast writes it (submission: Field" in done.stderr
    assert "Traceback" not in done.stderr
    run.job.write_text("[]")
    done = outlast("stop", str(run.path), cwd=tmp_path)
    assert done.returncode == 2
    assert f"{run.job} holds list, not an object" in done.stderr


def test_status_lists_unreadable_runs_with_the_others(tmp_path: Path, run: RunDir) -> None:
    for name in ("broken", "moved"):
        shutil.copytree(run.path, run.path.with_name(name))
    broken = RunDir(run.path.with_name("broken"))
    broken.job.write_text(json.dumps({"run_inode": broken.path.stat().st_ino}))
    RunDir(run.path.with_name("moved")).config.write_text("{")
    done = outlast("status", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {Path(row["run_dir"]).name: row for row in json.loads(done.stdout)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "broken": "unreadable",
        "moved": "unreadable",
        "waiting": "created",
    }
    assert "job.json is not as this version of Outlast writes it" in rows["broken"]["reason"]
    assert "config.json is not readable as JSON" in rows["moved"]["reason"]
    assert rows["waiting"]["total_steps"] == 10


def test_an_unexpected_error_keeps_its_traceback_and_ends_with_1(tmp_path: Path) -> None:
    program = PROGRAM.replace("main()", "sys.modules['launcher.commands.status'] = None; main()")
    done = subprocess.run(
        [sys.executable, "-c", program, "status"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
