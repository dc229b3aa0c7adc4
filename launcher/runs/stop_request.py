"""Stop requests: the file RUN/stop, which commands and node tasks write and workers read.

A person's request ends the run until it is resumed; a scheduler's (`requeue`) ends this turn of the job only.
"""

import time
from typing import Any

from data_pipeline.errors import ConfigError
from gpt.run.run_dir import RunDir, is_listed, read_json, write_json


def standing_stop(run: RunDir) -> dict[str, Any] | None:
    """The stop request of `run`, if one stands; an empty or garbled file is a plain one."""
    try:
        return read_json(run.stop) if is_listed(run.stop) else None
    except ConfigError:
        return {}
    except OSError:  # a shared file system that fails for a moment: the request is read at the next look
        return None


def is_persons(standing: dict[str, Any] | None) -> bool:
    """Whether a stop request stands that ends the run until somebody resumes it."""
    return standing is not None and not standing.get("requeue")


def request_stop(run: RunDir, reason: str, *, now: bool = False, requeue: bool = False) -> None:
    """Ask the workers to save and stop (`now`: to be killed without saving).

    An earlier request stands, except that "now" goes before "save", and a person's before a scheduler's.
    """
    standing = standing_stop(run)
    is_stronger = standing is not None and (
        (now and not standing.get("now")) or (standing.get("requeue") and not requeue)
    )
    if standing is None or is_stronger:
        write_json(run.stop, {"reason": reason, "time": time.time(), "now": now, "requeue": requeue})


def clear_turn_stop(run: RunDir) -> None:
    """Remove a stop request that meant the turn of a job which is over now."""
    standing = standing_stop(run)
    if standing is not None and standing.get("requeue"):
        run.stop.unlink(missing_ok=True)
