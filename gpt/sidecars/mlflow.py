"""Sends the record of a run to MLflow, from a process that training never waits for.

`python -m gpt.sidecars.mlflow RUN_DIR` runs next to the workers of the first node. It follows metrics.jsonl
and sends new lines in batches, with their original times. SIGTERM means that the record is complete: the
process sends the rest and ends. When the server is down, it tries again for as long as the job runs. What it
could not send stays in the record and is sent after the next start. No error here reaches the training.
"""

import os
import sys
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from data_pipeline.config_file import dotted
from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json, write_json
from gpt.run.records import Result, TrackingState
from gpt.run.run_dir import RunDir
from gpt.sidecars import follower

BATCH_METRICS, BATCH_PARAMS = 1000, 100  # MLflow's limits for one request
POLL_S = 2.0
RETRY_S = 10.0
DRAIN_S = 45.0  # the node task waits a minute for this process


class MlflowRun:
    """The MLflow run that receives the record of one run directory."""

    def __init__(self, run_dir: RunDir, run: RunConfig) -> None:
        from mlflow.tracking import MlflowClient

        self.run_dir, self.run = run_dir, run
        self.client = MlflowClient(run.tracking.uri or f"sqlite:///{run_dir.mlflow_database}")
        self.run_id, self.sent_step, self.has_sent_scores = self._resume() or (self._create(), 0, False)
        self.client.update_run(self.run_id, status="RUNNING")
        self.is_tagged = False

    def send(self) -> bool:
        """Send every line of the record that was not sent yet; whether there was one.

        The scores of the last line that was sent may be added to it later: when a stop cuts an evaluation
        short, the next attempt repeats it.
        """
        from mlflow.entities import Metric

        lines = (line for line in record.read(self.run_dir.metrics) if self._is_new(line))
        any_sent = False
        while batch := _take(lines, BATCH_METRICS):
            metrics = [
                Metric(name, float(value), int(line["time"] * 1000), line["step"])
                for line in batch
                for name, value in line.items()
                if name not in ("time", "step", "data/digest") and value is not None
                if line["step"] > self.sent_step or name.startswith("val/")
            ]
            self.client.log_batch(self.run_id, metrics=metrics)
            self._remember(batch[-1]["step"], has_scores="val/loss" in batch[-1])
            any_sent = True
        if any_sent and not self.is_tagged:
            self._tag_attention()
        return any_sent

    def _tag_attention(self) -> None:
        """Tag the run with the attention kernel that the newest attempt chose."""
        events = record.read(self.run_dir.events)
        chosen = [event["attention"] for event in events if event.get("event") == Event.NETWORK_BUILT]
        if chosen:
            self.client.set_tag(self.run_id, "outlast.attention", chosen[-1])
            self.is_tagged = True

    def _is_new(self, line: dict[str, Any]) -> bool:
        step = line.get("step", 0)
        is_scored_since = step == self.sent_step and not self.has_sent_scores and "val/loss" in line
        return step > self.sent_step or is_scored_since

    def close(self) -> None:
        """Set how the run ended, and attach its profiler traces."""
        for trace in sorted(self.run_dir.profiles.glob("steps-*.json.gz")):
            self.client.log_artifact(self.run_id, str(trace), "profile")
        numbers = self.run_dir.attempt_numbers()
        result = Result.read(self.run_dir.attempt(numbers[-1]).result) if numbers else None
        code = result.exit_code if result is not None else ExitCode.FAILED
        status = {ExitCode.FINISHED: "FINISHED", ExitCode.STOPPED: "KILLED"}.get(code, "FAILED")
        self.client.set_tag(self.run_id, "outlast.cause", result.cause if result is not None else "")
        self.client.set_tag(self.run_id, "outlast.attempts", str(len(numbers)))
        self.client.set_terminated(self.run_id, status=status)

    def _resume(self) -> tuple[str, int, bool] | None:
        state = TrackingState.read(self.run_dir.tracking)
        # A copied run directory is a run of its own; a moved one keeps its inode.
        if state is None or state.inode != self.run_dir.path.stat().st_ino:
            return None
        return state.run_id, state.sent_step, state.has_sent_scores

    def _create(self) -> str:
        from mlflow.entities import Param

        parent = self.run.tracking.parent
        created = self.client.create_run(
            experiment_id(self.client, self.run.tracking.experiment),
            run_name=self.run_dir.path.name,
            tags={"mlflow.parentRunId": parent} if parent is not None else None,
        )
        run_id: str = created.info.run_id
        self.run_id = run_id
        self._remember(0, has_scores=False)
        provenance = read_json(self.run_dir.provenance) or {}
        write_json(self.run_dir.provenance, {**provenance, "mlflow_run_id": run_id})
        params = [Param(name, str(value)[:6000]) for name, value in dotted(self.run.model_dump(mode="json"))]
        for first in range(0, len(params), BATCH_PARAMS):
            self.client.log_batch(run_id, params=params[first : first + BATCH_PARAMS])
        for name in ("git_commit", "host"):
            if provenance.get(name):
                self.client.set_tag(run_id, f"outlast.{name}", str(provenance[name]))
        return run_id

    def _remember(self, step: int, *, has_scores: bool) -> None:
        self.sent_step, self.has_sent_scores = step, has_scores
        inode = self.run_dir.path.stat().st_ino
        state = TrackingState(run_id=self.run_id, inode=inode, sent_step=step, has_sent_scores=has_scores)
        state.write(self.run_dir.tracking)


def experiment_id(client: Any, name: str) -> str:
    """The id of MLflow's experiment `name`, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


def fail_soon(environment: MutableMapping[str, str]) -> None:
    """Make MLflow give up quickly: its own retries take four minutes per call."""
    environment.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    environment.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def follow(run_dir: RunDir, run: RunConfig, ended: threading.Event) -> None:
    """Send the record until `ended` is set and all of it is sent, or until DRAIN_S after that."""
    tracked: MlflowRun | None = None

    def send(is_last: bool) -> None:
        nonlocal tracked
        tracked = tracked or MlflowRun(run_dir, run)
        tracked.send()
        if is_last:
            tracked.close()

    def log_failure(error: Exception) -> None:
        print(f"MLflow: {type(error).__name__}: {error}", flush=True)

    if not follower.follow(
        send, ended, failed=log_failure, poll_s=POLL_S, retry_s=RETRY_S, patience_s=DRAIN_S
    ):
        print("MLflow: gave up; the lines that were not sent stay in the record", flush=True)


def _take(lines: Iterator[dict[str, Any]], metrics: int) -> list[dict[str, Any]]:
    """The next lines with at most `metrics` numbers: it stops at half, and no line has as many as that."""
    taken: list[dict[str, Any]] = []
    held = 0
    while held < metrics // 2 and (line := next(lines, None)) is not None:
        taken.append(line)
        held += len(line)
    return taken


if __name__ == "__main__":
    ended = follower.become_sidecar()
    fail_soon(os.environ)
    directory = RunDir(Path(sys.argv[1]))
    follow(directory, RunConfig.model_validate_json(directory.config.read_text()), ended)
