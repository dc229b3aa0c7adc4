"""Sends the record of a run to MLflow, from a process that training never waits for.

`python -m gpt.sidecars.mlflow RUN_DIR` runs next to the workers of the first node. It follows metrics.jsonl
and sends new lines in batches, with their original times. SIGTERM means that the record is complete, as does
`--last-pass`: the process sends the rest and ends. When the server is down, it tries again for as long as the
job runs. What it could not send stays in the record and is sent after the next start. No error here reaches
the training.

MLflow ends with what the record says. When an attempt has gone back and records steps anew, their old points
are removed from a database. A server cannot remove points: there the new ones, which are later, count; and a
run that went back behind a saved checkpoint gets a new MLflow run, with the old one nested below it.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt.config.run import RunConfig
from gpt.run.events import Event, read_events, record_event
from gpt.run.json_file import read_json, write_json
from gpt.run.records import SentLine, Sidecar, TrackingState
from gpt.run.run_dir import RunDir
from gpt.sidecars import follower
from gpt.sidecars.health import HealthReport
from gpt.sidecars.mlflow_description import RunDescription
from gpt.sidecars.mlflow_names import mlflow_name
from gpt.sidecars.mlflow_points import line_at, lines_from, marked, remove_points, still_there, with_mark
from gpt.sidecars.mlflow_store import Found, experiment_id, find_run, open_client, prepare_environment

BATCH_METRICS = 1000  # MLflow's limit for one request
POLL_S = 2.0
RETRY_S = 10.0
DRAIN_S = 45.0  # the node task waits a minute for this process
_LONGEST_NAME = 200  # MLflow's limit is 250
_NOT_METRICS = ("time", "step", "data/digest")


class MlflowRun:
    """The MLflow run that receives the record of one run directory.

    `tell` is called with each decision that a user should know of.
    """

    def __init__(self, run_dir: RunDir, run: RunConfig, tell: Callable[[str], None] = print) -> None:
        self.run_dir, self.run, self._tell = run_dir, run, tell
        self._uri = run.tracking.uri or f"sqlite:///{run_dir.mlflow_database}"
        self.client = open_client(self._uri)
        self._refusal: str | None = None
        self.state = self._resume() or self._create()
        self._description = RunDescription(self.client, self.run_id, run_dir, run)
        self.client.update_run(self.run_id, status="RUNNING")

    @property
    def warning(self) -> str | None:
        """What MLflow did not take although everything else arrives."""
        return self._refusal or self._description.warning

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self.state.run_id

    def send(self, *, is_last: bool = False) -> bool:
        """Send every line of the record that was not sent yet; whether there was one.

        The scores of the last line that was sent may be added to it later: when a stop cuts an evaluation
        short, the next attempt repeats it.
        """
        lines = lines_from(self.run_dir.metrics, self._next_byte(is_last=is_last))
        if not self.state.is_described:
            self._description.describe()
            self._remember(is_described=True)
        any_sent = False
        while batch := _take(lines, BATCH_METRICS):
            self._log_points(batch)
            line, mark = batch[-1]
            self._remember(
                sent_step=mark.step,
                has_sent_scores="val/loss" in line,
                marks=with_mark([old for old in self.state.marks if old.begins < mark.begins], mark),
            )
            any_sent = True
        self._description.tag_events()
        attempt = self._description.attach_config(self.state.described_attempt)
        if attempt != self.state.described_attempt:
            self._remember(described_attempt=attempt)
        return any_sent

    def close(self) -> None:
        """Set how the run ended, and attach its profiler traces."""
        if self.state.overtaken_step > self.state.sent_step:
            self._replace()
            self.send()
        self._description.end()

    # Which run in MLflow

    def _resume(self) -> TrackingState | None:
        """The run that has received the record so far, if MLflow still has it."""
        state = TrackingState.read(self.run_dir.tracking)
        # A copied run directory is a run of its own; a moved one keeps its inode.
        if state is None or state.inode != self.run_dir.path.stat().st_ino:
            return None
        experiment = self.run.tracking.experiment
        if state.experiment not in (None, experiment):
            self._tell(
                f"tracking.experiment changed from {state.experiment!r} to {experiment!r}: a new MLflow run "
                f"there receives the whole record, and the old one, {state.run_id}, stays as it is"
            )
            return None
        match find_run(self.client, state.run_id):
            case Found.MISSING:
                self._tell(
                    f"MLflow has no run {state.run_id} here (tracking.uri was changed, the run directory was "
                    "moved, or the run was removed): a new run receives the whole record"
                )
                return None
            case Found.RESTORED:
                self._tell(
                    f"the run {state.run_id} was deleted in MLflow; it is restored, because the run continues"
                )
        return state

    def _create(self, **tags: str) -> TrackingState:
        """A new run in MLflow, without any line of the record."""
        parent = self.run.tracking.parent
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        experiment = self.run.tracking.experiment
        created = self.client.create_run(
            experiment_id(self.client, experiment, self._uri),
            run_name=self.run_dir.path.name[:_LONGEST_NAME],
            tags=tags,
        )
        self.state = TrackingState(
            run_id=created.info.run_id,
            inode=self.run_dir.path.stat().st_ino,
            sent_step=0,
            has_sent_scores=False,
            is_described=False,
            experiment=experiment,
        )
        self._remember()
        provenance = read_json(self.run_dir.provenance) or {}
        write_json(self.run_dir.provenance, {**provenance, "mlflow_run_id": self.run_id})
        return self.state

    def _replace(self) -> None:
        """Continue in a new run, because a server cannot remove the points of the course that was left."""
        old, step = self.run_id, max(self.state.sent_step, self.state.overtaken_step)
        self.state = self._create(**{"outlast.replaces": old})
        self._description = RunDescription(self.client, self.run_id, self.run_dir, self.run)
        self._tell(
            f"the run went back and records steps up to {step} anew: the MLflow run {self.run_id} receives "
            f"the whole record, and {old}, with the course that was left, is nested below it"
        )
        self.client.set_tag(old, "outlast.replaced_by", self.run_id)
        self.client.set_tag(old, "mlflow.parentRunId", self.run_id)
        self.client.update_run(old, name=f"{self.run_dir.path.name[:_LONGEST_NAME]} (left at step {step})")
        self.client.set_terminated(old, status="KILLED")

    def _remember(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
        self.state.write(self.run_dir.tracking)

    # Points

    def _next_byte(self, *, is_last: bool) -> int:
        """The byte of metrics.jsonl from which lines are to be sent."""
        path, marks = self.run_dir.metrics, self.state.marks
        if not marks and self.state.sent_step:
            marks = marked(path, self.state.sent_step)
            is_left = not marks or marks[-1].step < self.state.sent_step
        else:
            is_left = False
        kept = still_there(path, marks)
        if is_left or kept != marks:
            if not _has_replacement(path, kept, is_last=is_last):
                return path.stat().st_size if path.exists() else 0
            self._go_back(kept, marks[-1].time if marks else 0.0)
            kept = self.state.marks
        if not kept or (last := line_at(path, kept[-1])) is None:
            return 0
        line, end = last
        return kept[-1].begins if not self.state.has_sent_scores and "val/loss" in line else end

    def _go_back(self, kept: tuple[SentLine, ...], last_time: float) -> None:
        """Prepare MLflow for the lines after `kept`, which replace lines up to the one of `last_time`."""
        step, sent = (kept[-1].step if kept else 0), self.state.sent_step
        if remove_points(self.client, self.run_id, step):
            self._remember(sent_step=step, has_sent_scores=False, marks=kept, overtaken_step=0)
            return
        unchanged = step
        for line, mark, _ in lines_from(self.run_dir.metrics, kept[-1].begins if kept else 0):
            if mark.time > last_time:
                break
            unchanged = max(unchanged, line["step"])
        saved = (event.get("step") for event in read_events(self.run_dir.events, Event.CHECKPOINT_SAVED))
        if any(isinstance(of, int) and unchanged < of <= sent for of in saved):
            self._replace()
            return
        overtaken = max(self.state.overtaken_step, sent)
        self._remember(sent_step=step, has_sent_scores=False, marks=kept, overtaken_step=overtaken)

    def _log_points(self, batch: Iterable[tuple[Mapping[str, Any], SentLine]]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        points = [
            Metric(mlflow_name(name), float(value), int(mark.time * 1000), mark.step)
            for line, mark in batch
            for name, value in _numbers(line)
        ]
        for first in range(0, len(points), BATCH_METRICS):
            chunk = points[first : first + BATCH_METRICS]
            try:
                self.client.log_batch(self.run_id, metrics=chunk)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                self._log_one_by_one(chunk, error)

    def _log_one_by_one(self, points: list[Any], refusal: Exception) -> None:
        """Send each metric by itself, because MLflow refuses one; raises `refusal` when it refuses all."""
        from mlflow.exceptions import MlflowException

        names = {point.key for point in points}
        refused = set()
        for name in sorted(names):
            try:
                self.client.log_batch(self.run_id, metrics=[point for point in points if point.key == name])
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                refused.add(name)
        if refused == names:
            raise refusal
        self._refusal = f"MLflow refuses the metrics {', '.join(sorted(refused))}: {refusal}"


def follow(run_dir: RunDir, run: RunConfig, ended: threading.Event) -> None:
    """Send the record until `ended` is set and all of it is sent, or until DRAIN_S after that."""
    tracked: MlflowRun | None = None

    def record_failure(reason: str) -> None:
        record_event(run_dir.events, Event.TRACKING_FAILED, reason=reason)

    def tell(sentence: str) -> None:
        record_event(run_dir.events, Event.TRACKING_CHANGED, reason=sentence)
        report.note(sentence)

    def send(is_last: bool) -> None:
        nonlocal tracked
        try:
            tracked = tracked or MlflowRun(run_dir, run, tell)
            tracked.send(is_last=is_last)
            if is_last:
                tracked.close()
        except Exception:
            tracked = None  # the next try looks anew whether MLflow still has the run
            raise
        report.succeeded(tracked.state.sent_step, warning=tracked.warning)

    report = HealthReport(run_dir, Sidecar.TRACKING, record_failure)
    if not follower.follow(send, ended, report, poll_s=POLL_S, retry_s=RETRY_S, patience_s=DRAIN_S):
        print("MLflow: gave up; the lines that were not sent stay in the record", flush=True)


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a line."""
    for name, value in line.items():
        if name in _NOT_METRICS or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            yield name, float(value)


def _take(
    lines: Iterator[tuple[dict[str, Any], SentLine, int]], metrics: int
) -> list[tuple[dict[str, Any], SentLine]]:
    """The next lines, until they hold half of `metrics` numbers or more."""
    taken: list[tuple[dict[str, Any], SentLine]] = []
    held = 0
    while held < metrics // 2 and (found := next(lines, None)) is not None:
        taken.append(found[:2])
        held += len(found[0])
    return taken


def _has_replacement(path: Path, kept: tuple[SentLine, ...], *, is_last: bool) -> bool:
    """Whether the record at `path` says what comes after the `kept` lines: it may just have been cut back."""
    last = line_at(path, kept[-1]) if kept else None
    is_longer = next(lines_from(path, last[1] if last is not None else 0), None) is not None
    return is_longer or (is_last and last is not None)


if __name__ == "__main__":
    prepare_environment(os.environ)
    ended = follower.become_sidecar(is_last_pass="--last-pass" in sys.argv[2:])
    directory = RunDir(Path(sys.argv[1]))
    follow(directory, RunConfig.model_validate_json(directory.config.read_text()), ended)
