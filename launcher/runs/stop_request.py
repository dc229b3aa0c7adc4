"""Stop requests: the file RUN/stop, which commands and node tasks write and workers read.

A person's request ends the run until it is resumed; the scheduler's (`requeue`) ends this job run only.
"""

import time

from data_pipeline.errors import ConfigError
from gpt.run.json_file import is_listed
from gpt.run.records import StopRequest
from gpt.run.run_dir import RunDir


def pending_stop(run: RunDir) -> StopRequest | None:
    """The pending stop request of `run`, or None; an empty or garbled file is a plain request."""
    try:
        return StopRequest.read(run.stop) if is_listed(run.stop) else None
    except ConfigError:
        return StopRequest()
    except OSError:  # a shared file system that fails for a moment: the next poll reads the request
        return None


def is_persons(request: StopRequest | None) -> bool:
    """Whether a person asked for the stop: it ends the run until it is resumed."""
    return request is not None and not request.requeue


def request_stop(run: RunDir, reason: str, *, now: bool = False, requeue: bool = False) -> None:
    """Ask the workers to save and stop (`now`: to be killed without saving).

    A pending request stays, unless the new one is stronger: "now" outranks "save", and a person outranks the
    scheduler.
    """
    pending = pending_stop(run)
    is_stronger = pending is not None and ((now and not pending.now) or (pending.requeue and not requeue))
    if pending is None or is_stronger:
        StopRequest(reason=reason, time=time.time(), now=now, requeue=requeue).write(run.stop)


def clear_job_run_stop(run: RunDir) -> None:
    """Remove a stop request that meant the job run which has just ended."""
    pending = pending_stop(run)
    if pending is not None and pending.requeue:
        run.stop.unlink(missing_ok=True)
