"""ClusterConfig → submitit, and the job that came of it: local and Slurm through one interface.

The submission itself happens in a child (`python -m launcher.submit RUN_DIR`), in a session of its own and
with the run's snapshot of the code in front: whatever it starts is out of reach of the terminal's Ctrl-C and
hang-up, holds none of the caller's pipes open, and imports what was submitted.
"""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, LaunchError
from gpt import record
from gpt.checkpoint.format import committed
from gpt.run_dir import RunDir, read_json, write_json
from launcher import slurm
from launcher.cluster import ClusterConfig
from launcher.container import needed_folders
from launcher.processes import identity
from launcher.requests import is_persons, standing_stop
from launcher.runs import job_environment, python_module, read_cluster, read_config
from launcher.sbatch import slurm_executor
from launcher.slurm import Standing

_PAUSE_S = {"local": 0.0, "slurm": 5.0}  # between questions: squeue is a shared service
_LOCAL_TIMEOUT_MIN = 60 * 24 * 365 * 10  # submitit's local default is 2 minutes


@dataclass(frozen=True)
class Job:
    """One submission. `process` identifies a local job's controller beyond its reusable process id."""

    submission: int
    executor: str
    job_id: str
    host: str
    pid: int | None
    process: str | None
    run_inode: int
    submitted_at: float


@dataclass(frozen=True)
class Outcome:
    """How a job ended, as its node task wrote it: the exit code of commands, and the cause in words."""

    exit_code: int
    cause: str
    attempt: int | None
    is_cancelled: bool = False  # in the scheduler, by somebody


_JOB, _OUTCOME = TypeAdapter(Job), TypeAdapter(Outcome)
Written = TypeVar("Written")


def submit(run: RunDir, reason: str) -> Job:
    """Start a job for `run` and return once its executor has taken it. Raises LaunchError.

    `reason` ("launch", "resume") goes into the event "submitted".
    """
    [job] = submit_together([run], reason, run)
    return job


def submit_together(
    runs: Sequence[RunDir], reason: str, home: RunDir, at_once: int | None = None
) -> list[Job]:
    """Start a job for each of `runs`, several as one array of Slurm, of which `at_once` run at a time.

    submitit's files lie in `home`, whose code they run: the run itself, or the folder of all. A stop request
    that stands is removed. Raises LaunchError.
    """
    for run in runs:
        run.stop.unlink(missing_ok=True)
        submission_folder(run, _last_submission(run) + 1).mkdir(parents=True)
    folder = submission_folder(home, _last_submission(home) + (0 if home == runs[0] else 1))
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "controller.log"
    arguments = [str(folder), reason, str(at_once or len(runs)), *(str(run.path) for run in runs)]
    with output.open("ab") as log:
        child = subprocess.run(
            python_module("launcher.submit", *arguments),
            env=job_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    jobs = [job for run in runs if (job := read_job(run)) is not None]
    if child.returncode != 0 or len(jobs) != len(runs):
        raise LaunchError(f"the submission failed:\n{output.read_text(encoding='utf-8').rstrip()}")
    return jobs


def read_job(run: RunDir) -> Job | None:
    """The newest job of this very run directory; None before the first, and in a copy of a run.

    Raises ConfigError when job.json is not as it was written.
    """
    content = read_json(run.job)
    if content is None or content.get("run_inode") != run.path.stat().st_ino:
        return None
    return _as_written(_JOB, content, run.job)


def read_outcome(run: RunDir, job: Job) -> Outcome | None:
    """How `job` ended; None while it runs, or when its node was lost. Raises ConfigError as `read_job`."""
    path = outcome_path(submission_folder(run, job.submission))
    content = read_json(path)
    return _as_written(_OUTCOME, content, path) if content is not None else None


def _as_written(shape: TypeAdapter[Written], content: dict[str, Any], path: Path) -> Written:
    try:
        return shape.validate_python(content)
    except ValidationError as error:
        wrong = ", ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(
            f"{path} is not as this version of Outlast writes it ({wrong}). If the run's job is over, remove "
            "the file."
        ) from None


def state(run: RunDir, job: Job) -> str:
    """ "running", "pending", "ended", or "unknown" where nobody can say from here."""
    return standings([(run, job)])[run.path].word


def standings(jobs: Iterable[tuple[RunDir, Job]]) -> dict[Path, Standing]:
    """How each run's job stands, by run directory; Slurm is asked once for all of them.

    A job that has said how it ended is over: what its processes still do (the tracker may take a minute to
    send the rest of the record) stands in nobody's way.
    """
    found, questions = {}, {}
    for run, job in jobs:
        if read_outcome(run, job) is not None:
            found[run.path] = Standing("ended")
        elif job.executor == "local":
            found[run.path] = Standing(_local_state(job))
        else:
            questions[run.path] = job.job_id
    answers = slurm.standings(questions.values())
    return found | {path: answers[job_id] for path, job_id in questions.items()}


def _local_state(job: Job) -> str:
    if job.host != socket.gethostname():
        return "unknown"
    is_alive = job.process is not None and job.pid is not None and identity(job.pid) == job.process
    return "running" if is_alive else "ended"


def claim_start(run: RunDir) -> TextIO:
    """The right to start `run`, held until the file is closed. Raises LaunchError when it is taken."""
    claim = (run.path / ".starting").open("w")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise LaunchError(f"{run.path} is being started by another command at this moment.") from None
    except OSError:
        pass  # a file system without locks: the attempt's number fences what starts twice
    return claim


def refuse_while_alive(run: RunDir) -> None:
    """Raise LaunchError while the newest job of `run` lives, or may live for all that Slurm says.

    Of a local job of another machine nothing can be known here, and that machine may be gone for good (a
    container's name is new each time): the run is taken over with a warning, and the other job, if it does
    live, finds itself fenced.
    """
    job = read_job(run)
    if job is None:
        return
    word = state(run, job)
    if word in ("running", "pending"):
        raise LaunchError(
            f"{run.path} has a job already ({job.executor} {job.job_id} on {job.host}, {word}). "
            f"`outlast stop {run.path}` ends it; `outlast logs {run.path} --follow` shows it."
        )
    if word == "unknown" and job.executor == "slurm":
        raise LaunchError(
            f"whether Slurm job {job.job_id} of {run.path} has ended cannot be known here: squeue and "
            "scontrol do not answer. Try again once they do, or on a login node of that cluster; if you know "
            f"that the job is over, remove {run.job} first."
        )
    if word == "unknown":
        click.echo(
            f"warning: the run's last job was on {job.host}; if it still lives there, it ends now: this "
            "start takes the run over",
            err=True,
        )


def without_bad_nodes(run: RunDir, cluster: ClusterConfig) -> ClusterConfig:
    """`cluster` with the nodes of RUN/bad_nodes.jsonl excluded; who mends one takes its line out."""
    bad = sorted({str(line["node"]) for line in record.read(run.bad_nodes) if "node" in line})
    if not bad:
        return cluster
    return cluster.model_copy(update={"exclude": ",".join([*filter(None, [cluster.exclude]), *bad])})


class Lookout:
    """How a job stands, each time it is asked for; the scheduler hears of it every few seconds only.

    With `serves_stop`, a job that waits in the queue (for the first time, or again) while a person's stop
    request stands is taken out of it: nobody else is there to see the request.
    """

    def __init__(self, run: RunDir, job: Job, *, serves_stop: bool) -> None:
        self._run, self._job, self._serves_stop = run, job, serves_stop
        self._word, self._next_question = "unknown", 0.0
        self._unknown_since: float | None = None
        self._is_cancelled = False

    @property
    def unknown_s(self) -> float:
        """For how long nobody has been able to say how the job stands."""
        return 0.0 if self._unknown_since is None else time.monotonic() - self._unknown_since

    def word(self) -> str:
        """ "running", "pending", "ended" or "unknown", a few seconds old at most. Raises LaunchError."""
        if time.monotonic() < self._next_question:
            return self._word
        self._word = state(self._run, self._job)
        if self._serves_stop and self._word == "pending" and is_persons(standing_stop(self._run)):
            slurm.cancel_waiting(self._job.job_id)
            self._is_cancelled = True
            self._word = state(self._run, self._job)
        if self._is_cancelled and self._word == "ended":
            _say_taken_out(self._run, self._job)
        if self._word != "unknown":
            self._unknown_since = None
        elif self._unknown_since is None:
            self._unknown_since = time.monotonic()
        self._next_question = time.monotonic() + _PAUSE_S[self._job.executor]
        return self._word


def _say_taken_out(run: RunDir, job: Job) -> None:
    """Write how a job ended that was cancelled while it waited, where it could not say so itself."""
    # A waiting job of an array is forgotten as soon as it is cancelled.
    if read_outcome(run, job) is not None or slurm.why_ended(job.job_id) not in ("CANCELLED", None):
        return
    saved = committed(run.checkpoints)
    what = f"step {saved[-1][0]} is saved" if saved else "it had not begun"
    write_json(
        outcome_path(submission_folder(run, job.submission)),
        asdict(Outcome(75, f"taken out of the queue; {what}", None)),
    )


def submission_folder(run: RunDir, number: int) -> Path:
    """Pickles, logs and outcome of submission `number`."""
    return run.submission / f"{number:04d}"


def outcome_path(folder: Path) -> Path:
    """Where the first node's task writes how the job ended."""
    return folder / "outcome.json"


def _last_submission(run: RunDir) -> int:
    if not run.submission.is_dir():
        return 0
    return max((int(entry.name) for entry in run.submission.iterdir() if entry.name.isdigit()), default=0)


@contextmanager
def outside_any_job() -> Iterator[None]:
    """The environment without the job that this command runs in, if it does: sbatch would inherit it.

    Where Slurm's configuration lies stays, and so do the SBATCH_ variables of somebody on a login node.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    from submitit import helpers

    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with helpers.clean_env():
        os.environ.update(kept)
        yield


def main() -> None:
    """The child of `submit_together`: hand the node tasks to submitit and write each run's job.json."""
    from submitit import Executor, LocalExecutor
    from submitit.core.utils import FailedJobError

    from launcher.node import NodeTask

    folder, reason, at_once = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    runs = [RunDir(Path(path)) for path in sys.argv[4:]]
    cluster = read_cluster(runs[0])
    executor: Executor
    if cluster.kind == "local":
        executor = LocalExecutor(folder)
        executor.update_parameters(
            timeout_min=_LOCAL_TIMEOUT_MIN, gpus_per_node=cluster.gpus_per_node, tasks_per_node=1
        )
    else:
        mounts = [path for run in runs for path in needed_folders(run, read_config(run))]
        name = runs[0].path.name if len(runs) == 1 else runs[0].path.parent.name
        for run in runs:
            cluster = without_bad_nodes(run, cluster)
        ours = {variable: os.environ[variable] for variable in runs[0].code_environment}
        executor = slurm_executor(name, cluster, mounts, folder, ours, array_parallelism=at_once)
    tasks = [NodeTask(str(run.path), f"{_last_submission(run):04d}") for run in runs]
    try:
        with outside_any_job(), executor.batch():
            submitted = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        sys.exit(str(error))  # sbatch's own words
    for run, task, made in zip(runs, tasks, submitted, strict=True):
        pid = int(made.job_id) if cluster.kind == "local" else None
        job = Job(
            submission=int(task.submission),
            executor=cluster.kind,
            job_id=made.job_id,
            host=socket.gethostname(),
            pid=pid,
            process=identity(pid) if pid is not None else None,
            run_inode=run.path.stat().st_ino,
            submitted_at=time.time(),
        )
        write_json(run.job, asdict(job))
        record.event(
            run.events,
            "submitted",
            submission=job.submission,
            reason=reason,
            executor=job.executor,
            job_id=job.job_id,
            world_size=cluster.world_size,
        )


if __name__ == "__main__":
    main()
