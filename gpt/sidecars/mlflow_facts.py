"""What the files of a run say for MLflow besides its points: parameters, tags, and how the run ended."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.config_file import dotted
from gpt.config.parameter_table import parameter_count
from gpt.config.run import RunConfig
from gpt.run.events import Event, read_events
from gpt.run.exit_codes import ExitCode
from gpt.run.json_file import read_json
from gpt.run.records import JobOutcome, Result, StopRequest
from gpt.run.run_dir import RunDir
from gpt.sidecars.mlflow_names import mlflow_name

LONGEST_PARAM, LONGEST_TAG = 6000, 8000  # MLflow's limits

# How a run ended → the status in MLflow. A run that is saved and stopped is no failure: MLflow has no status
# for it, so it is finished there, and the tag outlast.ending says "stopped".
STATUSES = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "requeued": "SCHEDULED",
    "cancelled": "KILLED",
    "killed": "KILLED",
    "failed": "FAILED",
}


def parameters(run: RunConfig) -> dict[str, str]:
    """Every field of the config, as MLflow's parameters."""
    fields = dotted(run.model_dump(mode="json"))
    return {mlflow_name(name): str(value)[:LONGEST_PARAM] for name, value in fields}


def fixed_tags(run_dir: RunDir, run: RunConfig) -> dict[str, str]:
    """The tags that are known before the first step; MLflow's table of runs shows them as columns."""
    provenance = read_json(run_dir.provenance) or {}
    found = {
        "name": run.name,
        "data": ", ".join(source.path.name for source in run.data.sources),
        "parameters": str(parameter_count(run.model)) if run.model.vocab_size is not None else None,
        "git_commit": provenance.get("git_commit"),
        "host": provenance.get("host"),
    }
    return _tags(found)


def event_tags(events: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The tags that the events of a run give: its newest attempt, and every change of its config."""
    found: dict[str, Any] = {}
    changes: dict[str, list[str]] = {}
    pending: list[Mapping[str, Any]] = []
    for event in events:
        match event.get("event"):
            case Event.NETWORK_BUILT:
                found["attention"] = event.get("attention")
            case Event.ATTEMPT_STARTED:
                found["attempts"] = event.get("attempt")
                found["world_size"] = event.get("world_size")
            case Event.CONFIG_CHANGED if isinstance(event.get("changes"), dict):
                pending.append(event["changes"])
            case Event.RESUMED | Event.CONTINUED:
                _note_changes(changes, pending, event.get("step"))
                pending = []
    _note_changes(changes, pending, None)
    lines = {field: "; ".join(texts) for field, texts in changes.items()}
    found |= {f"changed.{field}": text for field, text in lines.items()}
    if lines:
        found["changes"] = "\n".join(f"{field}: {text}" for field, text in lines.items())
    return _tags(found)


def _note_changes(
    changes: dict[str, list[str]], pending: Iterable[Mapping[str, Any]], step: int | None
) -> None:
    """Add the `pending` changes of the config, which hold from after `step`."""
    where = f"step {step}" if step is not None else "at the last resume"
    for fields in pending:
        for field, pair in fields.items():
            if isinstance(pair, list) and len(pair) == 2:
                changes.setdefault(field, []).append(f"{where}: {_value(pair[0])} → {_value(pair[1])}")


def _value(value: Any) -> str:
    return "unset" if value is None else value if isinstance(value, str) else json.dumps(value)


def _tags(found: Mapping[str, Any]) -> dict[str, str]:
    return {
        mlflow_name(f"outlast.{name}"): str(value)[:LONGEST_TAG]
        for name, value in found.items()
        if value is not None and value != ""
    }


def newest_attempt(run_dir: RunDir) -> int:
    """The number of the newest attempt, 0 before the first."""
    return max(run_dir.attempt_numbers(), default=0)


def ending(run_dir: RunDir) -> tuple[str, str]:
    """How the job has ended, as a key of STATUSES, and the cause."""
    outcome = JobOutcome.read_or_none(run_dir.submission(run_dir.last_submission()).outcome)
    if outcome is not None:
        if outcome.is_cancelled:
            return "cancelled", outcome.cause
        stop = StopRequest.read_or_none(run_dir.stop)
        if stop is not None and stop.now and outcome.exit_code == ExitCode.FAILED:
            return "killed", outcome.cause
        return _word(outcome.exit_code), outcome.cause
    newest = newest_attempt(run_dir)
    result = Result.read_or_none(run_dir.attempt(newest).result) if newest else None
    cause = result.cause if result is not None else ""
    if _is_requeued(run_dir):
        return "requeued", cause
    return (_word(result.exit_code), cause) if result is not None else ("failed", cause)


def _word(code: ExitCode) -> str:
    return {ExitCode.FINISHED: "finished", ExitCode.STOPPED: "stopped"}.get(code, "failed")


def _is_requeued(run_dir: RunDir) -> bool:
    last = None
    for event in read_events(run_dir.events, Event.JOB_RUN_STARTED, Event.REQUEUED):
        last = event["event"]
    return last == Event.REQUEUED
