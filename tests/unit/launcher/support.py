"""Small runs for the launcher's tests: a real run directory in which a worker is a few lines of Python.

The worker replaces gpt.train in the run's snapshot of the code. submitit, the node task, torchrun and all the
processes are real.
"""

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.config_file import validate
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.tokenizer.train import train_tokenizer
from gpt.config.run import RunConfig
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import write_json
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.commands.submit import submit
from launcher.process_tree import descendants, identity
from launcher.runs.code_snapshot import snapshot_code

# Shared by the fake workers: their rank, how to claim an attempt and to finish like gpt.train, and the
# parent-death signal.
WORKER_PRELUDE = """
import json, os, signal, sys, tempfile, time
from pathlib import Path
from gpt.run.run_dir import RunDir
from gpt.run.json_file import write_json
from gpt.run.process_control import die_with_parent
die_with_parent(signal.SIGKILL)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
run = RunDir(Path(sys.argv[1]))
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
generation = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
Path(tempfile.gettempdir(), f"torchinductor_{rank}").mkdir(exist_ok=True)  # as torch does
(run.path / f"worker-{generation}-{rank}").write_text(str(os.getpid()))

def claim():
    number = max(run.attempt_numbers(), default=0) + 1
    run.attempt(number).path.mkdir()
    owner = {"job": os.environ["OUTLAST_JOB"], "turn": int(os.environ["OUTLAST_TURN"])}
    write_json(run.attempt(number).owner, owner)
    return number

def finish(number, exit_code, cause):
    write_json(run.attempt(number).result, {"exit_code": exit_code, "cause": cause})
"""

TINY = {"name": "tiny", "data": {"path": "/nowhere"}, "schedule": {"total_steps": 10}}


def make_run(folder: Path, worker: str, *, processes: int = 1, tracking: str | None = None) -> RunDir:
    """A run directory in `folder` whose workers run `worker` after WORKER_PRELUDE."""
    run = RunDir(folder)
    run.attempts.mkdir(parents=True)
    run.checkpoints.mkdir()
    config = validate(RunConfig, {**TINY, "tracking": {"enabled": tracking is not None}}, "tiny").resolve(
        4096
    )
    write_json(run.config, config.model_dump(mode="json", exclude_none=True))
    cluster = ClusterConfig(kind="local", processes_per_node=processes)
    write_json(run.cluster, cluster.explicit())
    snapshot_code(run)
    shutil.rmtree(run.code / "gpt" / "__pycache__", ignore_errors=True)
    (run.code / "gpt" / "train.py").write_text(WORKER_PRELUDE + worker)
    if tracking is not None:
        (run.code / "gpt" / "sidecars" / "mlflow.py").write_text(tracking)
    return run


def job_record(
    submission: int,
    executor: str,
    job_id: str,
    host: str,
    pid: int | None,
    process: str | None,
    run_inode: int,
    submitted_at: float,
) -> Job:
    """A job.json's content."""
    return Job(
        submission=submission,
        executor=executor,
        job_id=job_id,
        host=host,
        pid=pid,
        process=process,
        run_inode=run_inode,
        submitted_at=submitted_at,
    )


def job_outcome(exit_code: int, cause: str, attempt: int | None) -> JobOutcome:
    """An outcome.json's content."""
    return JobOutcome(exit_code=ExitCode(exit_code), cause=cause, attempt=attempt)


def start(run: RunDir) -> Job:
    """Submit `run` as any launch does."""
    return submit(run, "launch")


def wait_for(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Return once `condition` holds; fail if it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether process `pid` lives (a zombie does not)."""
    return identity(pid) is not None


def tree(job: Job) -> list[int]:
    """The controller of a local job and every process below it."""
    assert job.pid is not None
    return [job.pid, *descendants(job.pid)]


def worker_pid(run: RunDir, generation: int, rank: int) -> int | None:
    """Process id of a fake worker, once it has started."""
    path = run.path / f"worker-{generation}-{rank}"
    return int(path.read_text()) if path.exists() and path.read_text() else None


def outcome(run: RunDir) -> dict[str, object]:
    """outcome.json of the newest submission."""
    newest = max(run.submissions.iterdir())
    content: dict[str, object] = json.loads((newest / "outcome.json").read_text())
    return content


def processes_naming(text: str) -> list[int]:
    """Other living processes with `text` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text.encode() in command and is_alive(int(entry.name)):
            found.append(int(entry.name))
    return found


def make_data(folder: Path, *, val_fraction: float = 0.2, tokenizer_of: str | None = None) -> Path:
    """A small data set of random words, about 12,000 tokens, encoded by `outlast-4k` or by a BPE trained on a
    text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = ("light", "water", "and", "the", "days", "of", "stone", "made", "he", "river")
    texts = [" ".join(random.Random(i).choices(words, k=200)) for i in range(60)]
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = "outlast-4k"
    if tokenizer_of is not None:
        (folder / "words.txt").write_text(tokenizer_of * 100)
        tokenizer = str(folder / "own.json")
        train_tokenizer([folder / "words.txt"], 260, Path(tokenizer))
    config = DataPrepConfig(
        sources=(str(raw),), tokenizer=tokenizer, out=folder / "data", val_fraction=val_fraction, workers=1
    )
    prepare(config)
    return folder / "data"


def kill_tree(folder: Path) -> None:
    """Kill the processes that a failed test has left for the run in `folder`."""
    for pid in processes_naming(str(folder)):
        os.kill(pid, signal.SIGKILL)


def give_job(run: RunDir, *, alive: bool, submission: int = 1) -> Job:
    process = identity(os.getpid()) if alive else "an-earlier-boot/1"
    pid, inode = os.getpid(), run.path.stat().st_ino
    job = job_record(submission, "local", str(pid), socket.gethostname(), pid, process, inode, time.time())
    job.write(run.job)
    run.submission(submission).path.mkdir(parents=True, exist_ok=True)
    return job


def end_job(run: RunDir, exit_code: int, cause: str) -> None:
    content = {"exit_code": exit_code, "cause": cause, "attempt": 1}
    write_json(run.submission(1).outcome, content)


def submit_what_ends_well(run: RunDir, reason: str) -> Job:
    assert reason == "resume"
    job = give_job(run, alive=False)
    end_job(run, 0, "done")
    return job
