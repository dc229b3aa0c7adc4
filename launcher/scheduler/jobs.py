"""The jobs of a run: the newest one, how it stands, how it ended, and who may start the next.

Who asks does not disturb: the scheduler is asked seldom, and about all jobs at once.
"""

import fcntl
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import click

from data_pipeline.errors import LaunchError
from gpt.checkpoint.format import committed
from gpt.run.exit_codes import ExitCode
from gpt.run.records import Job, JobOutcome
from gpt.run.run_dir import RunDir
from launcher.process_tree import identity
from launcher.runs.job_record import read_job, read_outcome
from launcher.runs.stop_request import is_persons, pending_stop
from launcher.scheduler import slurm_commands as slurm
from launcher.scheduler.slurm_commands import Standing

_PAUSE_S = {"local": 0.0, "slurm": 5.0}  # between questions: squeue is a shared service


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
            found[run.path] = _local_standing(job)
        else:
            questions[run.path] = job.job_id
    answers = slurm.standings(questions.values())
    return found | {path: answers[job_id] for path, job_id in questions.items()}


def _local_standing(job: Job) -> Standing:
    if job.host != socket.gethostname():
        return Standing("unknown", reason=f"started on {job.host}")
    is_alive = job.process is not None and job.pid is not None and identity(job.pid) == job.process
    return Standing("running" if is_alive else "ended")


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
        if self._serves_stop and self._word == "pending" and is_persons(pending_stop(self._run)):
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
    cause = f"taken out of the queue; {what}"
    outcome = JobOutcome(exit_code=ExitCode.STOPPED, cause=cause, attempt=None)
    outcome.write(run.submission(job.submission).outcome)


def claim_start(run: RunDir) -> TextIO:
    """The right to start `run`, held until the file is closed. Raises LaunchError when it is taken."""
    claim = run.starting.open("w")
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
