"""`outlast prepare --cluster`: the chunks of a preparation as jobs of a scheduler.

The command plans the chunks, gives each job a share of them, and publishes what the jobs have committed. The
bytes are the same as on one machine, because no chunk depends on who made it. A job that fails is started
again alone, with the chunks that it has not committed. All machines must see the data set's folder and the
sources.
"""

import os
import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import DataError, LaunchError, OutlastError
from data_pipeline.prepare.chunk import Chunk, read_chunk_record
from data_pipeline.prepare.encode import EncodeSettings
from data_pipeline.prepare.progress import Advance
from data_pipeline.prepare.worker_pool import Task, encode_all, is_done
from gpt.run.records import Job
from launcher.cluster import ClusterConfig
from launcher.process_tree import identity
from launcher.scheduler.protocol import JobRequest, JobState, Standing, SubmittedJob
from launcher.scheduler.registry import scheduler_of

_MAX_STARTS = 3  # of one share, before the preparation gives up
_POLL_S = 0.5
_LOG_LINES = 5


@dataclass(frozen=True)
class PartOfPreparation:
    """What runs on a node: it encodes chunks, and returns the message of an error of ours, if any."""

    folder: Path
    chunks: tuple[Chunk, ...]
    settings: EncodeSettings
    workers: int | None
    task: Task

    def __call__(self) -> str | None:
        """Encode the chunks that are not committed yet; a requeued job may find some done."""
        missing = [chunk for chunk in self.chunks if not is_done(self.folder, chunk, self.task)]
        workers = self.workers or len(os.sched_getaffinity(0))
        try:
            for advance in encode_all(self.folder, missing, self.settings, workers, self.task):
                if isinstance(advance, Advance) and advance.message:
                    print(advance.message, flush=True)
        except OutlastError as error:
            return str(error)
        return None


@dataclass
class TaskShare:
    """A part of the chunks, and the job that works on it."""

    number: int
    chunks: tuple[Chunk, ...]
    job: SubmittedJob
    starts: int = 1
    ended_since: float | None = None


class ClusterEncoder:
    """Encodes chunks in `tasks` jobs on `cluster`; a replacement for `encode_all`.

    A job uses `workers` processes: by default all cores of its node, or its share of this machine's cores.
    """

    def __init__(self, cluster: ClusterConfig, tasks: int, workers: int | None) -> None:
        self._cluster, self._tasks = cluster, tasks
        self._scheduler = scheduler_of(cluster.kind)
        if workers is None and self._scheduler.runs_here:
            workers = max(1, len(os.sched_getaffinity(0)) // tasks)
        self._workers = workers
        self._standings: dict[str, Standing] = {}
        self._next_question = 0.0

    def __call__(
        self,
        folder: Path,
        chunks: Sequence[Chunk],
        settings: EncodeSettings,
        workers: int,
        task: Task = "encode",
    ) -> Generator[Advance | Chunk, None, None]:
        """See `encode_all`. Its `workers` does not apply here."""
        del workers
        folder = folder.absolute()
        settings = replace(settings, encoding=settings.encoding.absolute())
        count = min(self._tasks, len(chunks))
        parts = [
            PartOfPreparation(folder, tuple(chunks[number::count]), settings, self._workers, task)
            for number in range(count)
        ]
        shares: list[TaskShare] = []
        try:
            for number, (part, job) in enumerate(zip(parts, self._submit(parts), strict=True), 1):
                shares.append(TaskShare(number, part.chunks, job))
                yield _message(f"task {number} of {count}: {self._cluster.kind} job {job.job_id}")
            yield from self.follow(shares, parts[0] if parts else None, folder, task)
        finally:
            for share in shares:
                if not self._is_over(share, folder):
                    self._scheduler.cancel(share.job)

    def follow(
        self, shares: list[TaskShare], part: PartOfPreparation | None, folder: Path, task: Task
    ) -> Generator[Advance | Chunk, None, None]:
        """Report the chunks as the jobs commit them; `part` is the model for a job that starts again."""
        waiting = {chunk for share in shares for chunk in share.chunks}
        while waiting:
            self._ask_scheduler(shares)
            # Before the chunks: a job may commit its last one and end in between.
            over = {share.number for share in shares if self._is_over(share, folder)}
            for chunk in [chunk for chunk in waiting if is_done(folder, chunk, task)]:
                waiting.remove(chunk)
                yield _advance(folder, chunk, task)
                yield chunk
            for share in shares:
                left = tuple(chunk for chunk in share.chunks if chunk in waiting)
                if share.number not in over or not left:
                    continue
                reason = self._why_failed(share, folder)
                if share.starts == _MAX_STARTS or part is None:
                    raise DataError(
                        f"task {share.number} failed {_MAX_STARTS} times; the last time: {reason}\n"
                        "The finished chunks stay; run the command again to continue."
                    )
                [share.job] = self._submit([replace(part, chunks=left)])
                share.starts, share.ended_since = share.starts + 1, None
                yield _message(
                    f"task {share.number} failed and starts again as job {share.job.job_id}, with "
                    f"{len(left)} of {len(share.chunks)} chunks: {reason}"
                )
            if waiting:
                time.sleep(_POLL_S)

    def _submit(self, parts: Sequence[PartOfPreparation]) -> list[SubmittedJob]:
        if not parts:
            return []
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH") if name in os.environ}
        request = JobRequest(
            name="prepare",
            cluster=self._cluster.one_node_without_gpus(),
            folder=_job_folder(parts[0].folder),
            environment=kept,
            at_once=self._tasks,
        )
        try:
            return self._scheduler.submit(request, parts)
        except LaunchError as error:
            raise LaunchError(f"the tasks could not be submitted: {error}") from error

    def _ask_scheduler(self, shares: list[TaskShare]) -> None:
        """Update the standing of all jobs, once every few seconds."""
        if time.monotonic() < self._next_question:
            return
        jobs = [self._record(share.job) for share in shares]
        answers = self._scheduler.standings(jobs)
        self._standings = {job.job_id: answer for job, answer in zip(jobs, answers, strict=True)}
        self._next_question = time.monotonic() + self._scheduler.poll_s

    def _record(self, job: SubmittedJob) -> Job:
        return Job(
            submission=0,
            executor=self._scheduler.kind,
            job_id=job.job_id,
            host=socket.gethostname(),
            pid=job.pid,
            process=identity(job.pid) if job.pid is not None else None,
            run_inode=0,
            submitted_at=0.0,
        )

    def _is_over(self, share: TaskShare, folder: Path) -> bool:
        """Whether the job has a result, or has ended without one."""
        from submitit.core.utils import JobPaths

        if JobPaths(_job_folder(folder), share.job.job_id).result_pickle.exists():
            return True
        standing = self._standings.get(share.job.job_id)
        if standing is None or standing.state != JobState.ENDED:
            share.ended_since = None
            return False
        share.ended_since = share.ended_since or time.monotonic()
        # Its result may be on the file system already, and not visible to this machine yet.
        return time.monotonic() - share.ended_since >= self._scheduler.result_delay_s

    def _why_failed(self, share: TaskShare, folder: Path) -> str:
        from submitit.core.utils import JobPaths, pickle_load

        paths = JobPaths(_job_folder(folder), share.job.job_id)
        if paths.result_pickle.exists():
            outcome, result = pickle_load(paths.result_pickle)
            if outcome == "success":
                return str(result or "it ended without encoding its chunks")
            return str(result).rstrip().splitlines()[-1]
        reason = self._scheduler.why_ended(share.job.job_id) or "its job ended without a result"
        log = paths.stderr.read_text(errors="replace").splitlines() if paths.stderr.exists() else []
        last_lines = " | ".join(log[-_LOG_LINES:])
        return f"{reason} ({last_lines})" if last_lines else reason


def _job_folder(folder: Path) -> Path:
    """Where submitit keeps the files of the jobs for the data set in `folder`."""
    return folder / "tasks"


def _message(text: str) -> Advance:
    return Advance(0, 0, 0, text)


def _advance(folder: Path, chunk: Chunk, task: Task) -> Advance:
    record = read_chunk_record(folder, chunk) if task == "encode" else None
    return Advance(chunk.size_bytes, record.documents, record.tokens) if record else Advance(0, 0, 0)
