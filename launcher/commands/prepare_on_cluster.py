"""`outlast prepare --cluster`: pieces of a preparation on several Slurm nodes or in local tasks, by submitit.

The command plans the pieces, hands each task a share of them, and publishes what they have committed: the
same bytes as on one machine, since no piece depends on who made it. A task that fails is started again alone,
with what it has not committed. All machines see the folder of the data set and the sources.
"""

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DataError, LaunchError, OutlastError
from data_pipeline.prepare.chunk import Advance, Piece, Settings, committed
from data_pipeline.prepare.worker_pool import Task, encode_all, is_done
from launcher.cluster import ClusterConfig
from launcher.scheduler import slurm_commands as slurm
from launcher.scheduler.sbatch import slurm_executor
from launcher.scheduler.slurm_commands import Standing

if TYPE_CHECKING:
    from submitit import Executor, Job

_STARTS = 3  # of one task, before the preparation gives up
_POLL_S = 0.5
_SCHEDULER_POLL_S = 5.0  # squeue is a shared service
_LOCAL_TIMEOUT_MIN = 60 * 24 * 365 * 10  # submitit's local default is 2 minutes
_LOG_LINES = 5
_SILENCE_S = 30.0  # a result that lies on the file system of another machine may take as long to be seen here


@dataclass(frozen=True)
class PartOfPreparation:
    """What runs on a node: encodes pieces, and returns the sentence of an error of ours, if there was one."""

    folder: Path
    pieces: tuple[Piece, ...]
    settings: Settings
    workers: int | None
    task: Task

    def __call__(self) -> str | None:
        """Do what is not done yet: a job that Slurm requeued begins with what it had committed."""
        missing = [piece for piece in self.pieces if not is_done(self.folder, piece, self.task)]
        workers = self.workers or len(os.sched_getaffinity(0))
        try:
            for advance in encode_all(self.folder, missing, self.settings, workers, self.task):
                if isinstance(advance, Advance) and advance.message:
                    print(advance.message, flush=True)
        except OutlastError as error:
            return str(error)
        return None


@dataclass
class _Share:
    """One task: its pieces, and the job that does them now."""

    number: int
    pieces: tuple[Piece, ...]
    job: "Job[Any]"
    starts: int = 1
    over_since: float | None = None


class Spread:
    """Encodes pieces on `tasks` tasks of `cluster`, in the place of `encode_all`.

    A task uses `workers` processes; by default all cores of its node, or its share of this machine's.
    """

    def __init__(self, cluster: ClusterConfig, tasks: int, workers: int | None) -> None:
        self._cluster, self._tasks = cluster, tasks
        if workers is None and cluster.kind == "local":
            workers = max(1, len(os.sched_getaffinity(0)) // tasks)
        self._workers = workers
        self._standings: dict[str, Standing] = {}
        self._next_question = 0.0

    def __call__(
        self, folder: Path, pieces: Sequence[Piece], settings: Settings, workers: int, task: Task = "encode"
    ) -> Generator[Advance | Piece, None, None]:
        """See `encode_all`; of its `workers` nothing is heard here."""
        from submitit.core.utils import FailedJobError

        from launcher.commands.submit import outside_any_job

        del workers
        folder = folder.absolute()
        settings = replace(settings, encoding=settings.encoding.absolute())
        executor = self._executor(folder / "tasks")

        def start(pieces: tuple[Piece, ...]) -> "Job[Any]":
            return executor.submit(PartOfPreparation(folder, pieces, settings, self._workers, task))

        count = min(self._tasks, len(pieces))
        parts = [tuple(pieces[number::count]) for number in range(count)]
        shares: list[_Share] = []
        try:
            with outside_any_job(), executor.batch():
                jobs = [start(part) for part in parts]
            for number, (part, job) in enumerate(zip(parts, jobs, strict=True), 1):
                shares.append(_Share(number, part, job))
                yield _said(f"task {number} of {count}: {self._cluster.kind} job {job.job_id}")
            yield from self._follow(shares, start, folder, task)
        except FailedJobError as error:
            raise LaunchError(f"the tasks could not be submitted: {error}") from error
        finally:
            for share in shares:
                if not self._is_over(share):
                    share.job.cancel(check=False)

    def _follow(
        self, shares: list[_Share], start: Any, folder: Path, task: Task
    ) -> Generator[Advance | Piece, None, None]:
        waiting = {piece for share in shares for piece in share.pieces}
        while waiting:
            self._ask_slurm(shares)
            over = {
                share.number for share in shares if self._is_over(share)
            }  # before the pieces are looked at
            for piece in [piece for piece in waiting if is_done(folder, piece, task)]:
                waiting.remove(piece)
                yield _advance(folder, piece, task)
                yield piece
            for share in shares:
                left = tuple(piece for piece in share.pieces if piece in waiting)
                if share.number not in over or not left:
                    continue
                reason = self._why_failed(share)
                if share.starts == _STARTS:
                    raise DataError(
                        f"task {share.number} failed {_STARTS} times, at last: {reason}\n"
                        f"What is finished stays; run again to continue"
                    )
                share.job, share.starts, share.over_since = start(left), share.starts + 1, None
                yield _said(
                    f"task {share.number} failed and starts again as job {share.job.job_id}, with "
                    f"{len(left)} of {len(share.pieces)} pieces: {reason}"
                )
            if waiting:
                time.sleep(_POLL_S)

    def _ask_slurm(self, shares: list[_Share]) -> None:
        """Learn how the jobs of all tasks stand, once every few seconds."""
        if self._cluster.kind == "slurm" and time.monotonic() >= self._next_question:
            self._standings = slurm.standings(share.job.job_id for share in shares)
            self._next_question = time.monotonic() + _SCHEDULER_POLL_S

    def _is_over(self, share: _Share) -> bool:
        """Whether the job has ended, by its result or by what its executor has said."""
        if share.job.paths.result_pickle.exists():
            return True
        if self._cluster.kind == "local":
            return share.job.done()
        standing = self._standings.get(share.job.job_id)
        if standing is None or standing.word != "ended":
            share.over_since = None
            return False
        share.over_since = share.over_since or time.monotonic()
        return time.monotonic() - share.over_since > _SILENCE_S

    def _why_failed(self, share: _Share) -> str:
        paths = share.job.paths
        if paths.result_pickle.exists():
            outcome, result = share.job._get_outcome_and_result()
            if outcome == "success":
                return str(result or "it ended without having done its pieces")
            return str(result).rstrip().splitlines()[-1]
        is_slurm = self._cluster.kind == "slurm"
        word = slurm.why_ended(share.job.job_id) or "Slurm has dropped it" if is_slurm else "it was killed"
        log = paths.stderr.read_text(errors="replace").splitlines() if paths.stderr.exists() else []
        said = " | ".join(log[-_LOG_LINES:])
        return f"{word} ({said})" if said else word

    def _executor(self, folder: Path) -> "Executor":
        if self._cluster.kind == "local":
            from submitit import LocalExecutor

            local = LocalExecutor(folder)
            local.update_parameters(timeout_min=_LOCAL_TIMEOUT_MIN, gpus_per_node=0, tasks_per_node=1)
            return local
        cores = self._cluster.cpus_per_process
        one_node = self._cluster.model_copy(
            update={
                "nodes": 1,
                "gpus_per_node": 0,
                "processes_per_node": None,
                "cpus_per_process": cores and cores * self._cluster.processes,
            }
        )
        ours = {name: os.environ[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH") if name in os.environ}
        return slurm_executor("prepare", one_node, [], folder, ours, array_parallelism=self._tasks)


def _said(message: str) -> Advance:
    return Advance(0, 0, 0, message)


def _advance(folder: Path, piece: Piece, task: Task) -> Advance:
    record = committed(folder, piece) if task == "encode" else None
    return Advance(piece.size_bytes, record.documents, record.tokens) if record else Advance(0, 0, 0)
