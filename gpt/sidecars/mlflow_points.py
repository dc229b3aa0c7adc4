"""Which lines of metrics.jsonl MLflow still lacks, although an attempt may cut it back and write it anew.

A line is known by its step, its time and the byte where it begins. As long as the last line that was sent is
still in its place, the record has only grown, and reading continues after it. Otherwise it continues after
the newest of the remembered lines that is still there.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt.run.json_file import open_regular
from gpt.run.line_reader import Line, object_of, raw_lines
from gpt.run.record import checked_step
from gpt.run.records import SentLine

_MARKS = 64


def line_at(path: Path, mark: SentLine) -> tuple[Line, int] | None:
    """The line of `mark` as it is now, and the byte after it; None if another line or no file is there.

    Raises OSError or ConfigError when the file cannot be read, which says nothing about its lines.
    """
    for line, found, end in lines_from(path, mark.begins):
        return (line, end) if found == mark else None
    return None


def still_there(path: Path, marks: Sequence[SentLine]) -> tuple[SentLine, ...]:
    """The leading marks whose lines are still in the record at `path`."""
    for count in range(len(marks), 0, -1):
        if line_at(path, marks[count - 1]) is not None:
            return tuple(marks[:count])
    return ()


def with_mark(marks: Sequence[SentLine], mark: SentLine) -> tuple[SentLine, ...]:
    """`marks` with a newer one; the older half is thinned out when there are many."""
    kept = [*marks, mark]
    return tuple(kept if len(kept) <= _MARKS else [*kept[: _MARKS // 2 : 2], *kept[_MARKS // 2 :]])


def marked(path: Path, step: int) -> tuple[SentLine, ...]:
    """The mark of the last line up to `step`, for a run whose earlier version kept no marks."""
    found: tuple[SentLine, ...] = ()
    for line, mark, _ in lines_from(path, 0):
        if line["step"] > step:
            break
        found = (mark,)
    return found


def lines_from(path: Path, offset: int) -> Iterator[tuple[Line, SentLine, int]]:
    """The complete lines of steps from byte `offset`, each with its mark and the byte after it."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        begins = file.seek(offset)
        for raw, end in raw_lines(file):
            if (line := checked_step(object_of(raw) or {})) is not None:
                yield line, SentLine(step=line["step"], begins=begins, time=line["time"]), end
            begins = end


def remove_points(client: Any, run_id: str, after_step: int) -> bool:
    """Remove the points after a step from a run in a database; False on a server, which cannot remove any."""
    store = client._tracking_client.store  # no API of MLflow removes points
    if not hasattr(store, "ManagedSessionMaker"):
        return False
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric
    from sqlalchemy import func

    with store.ManagedSessionMaker(read_only=False) as session:
        session.query(SqlMetric).filter(SqlMetric.run_uuid == run_id, SqlMetric.step > after_step).delete(
            synchronize_session=False
        )
        session.query(SqlLatestMetric).filter(SqlLatestMetric.run_uuid == run_id).delete(
            synchronize_session=False
        )
        session.flush()
        of_run = session.query(SqlMetric.key, func.max(SqlMetric.step)).filter(SqlMetric.run_uuid == run_id)
        for key, step in of_run.group_by(SqlMetric.key).all():
            newest = (
                session.query(SqlMetric)
                .filter(SqlMetric.run_uuid == run_id, SqlMetric.key == key, SqlMetric.step == step)
                .order_by(SqlMetric.timestamp.desc(), SqlMetric.value.desc())
                .first()
            )
            session.add(
                SqlLatestMetric(
                    run_uuid=run_id,
                    key=key,
                    value=newest.value,
                    timestamp=newest.timestamp,
                    step=newest.step,
                    is_nan=newest.is_nan,
                )
            )
    return True
