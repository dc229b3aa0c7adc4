"""Sends what MLflow shows of a run besides its points: parameters, tags, the attempts' configs, its end."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gpt.config.run import RunConfig
from gpt.run import record
from gpt.run.run_dir import RunDir
from gpt.sidecars import mlflow_facts

_BATCH = 100  # MLflow's limit of parameters or tags for one request


class RunDescription:
    """Describes the run of a run directory in MLflow. `warning` says which files could not be attached."""

    def __init__(self, client: Any, run_id: str, run_dir: RunDir, run: RunConfig) -> None:
        self._client, self._run_id, self._run_dir, self._run = client, run_id, run_dir, run
        self.warning: str | None = None
        self._tags: dict[str, str] = {}
        self._events_size = -1
        self._attempt_without_config = 0

    def describe(self) -> None:
        """Send the parameters and the tags that are known before the first step."""
        from mlflow.entities import Param

        there = self._client.get_run(self._run_id).data.params
        params = [
            Param(name, value)
            for name, value in mlflow_facts.parameters(self._run).items()
            if name not in there  # a parameter can never be changed
        ]
        for first in range(0, len(params), _BATCH):
            self._client.log_batch(self._run_id, params=params[first : first + _BATCH])
        self._tag(mlflow_facts.fixed_tags(self._run_dir, self._run))

    def tag_events(self) -> None:
        """Tag the run with what its events say, when there are new ones."""
        with suppress(FileNotFoundError):
            size = self._run_dir.events.stat().st_size
            if size != self._events_size:
                self._tag(mlflow_facts.event_tags(record.read(self._run_dir.events)))
                self._events_size = size

    def attach_config(self, described: int) -> int:
        """Attach the config of an attempt later than `described`; the newest attempt that has one now."""
        attempt = mlflow_facts.newest_attempt(self._run_dir)
        if attempt <= max(described, self._attempt_without_config):
            return described
        try:
            text = self._run_dir.config.read_text(encoding="utf-8")
            self._client.log_text(self._run_id, text, f"config/attempt-{attempt:04d}.json")
        except Exception as error:  # of any artifact store
            self._attempt_without_config = attempt
            self.warning = f"the config could not be attached in MLflow: {error}"
            return described
        return attempt

    def end(self) -> None:
        """Set how the run ended, and attach its profiler traces."""
        word, cause = mlflow_facts.ending(self._run_dir)
        attempts = len(self._run_dir.attempt_numbers())
        # An empty cause replaces that of an earlier end.
        self._tag({"outlast.ending": word, "outlast.cause": cause, "outlast.attempts": str(attempts)})
        status = mlflow_facts.STATUSES[word]
        if status == "SCHEDULED":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status=status)
        try:
            for trace in sorted(self._run_dir.profiles.glob("steps-*.json.gz")):
                self._client.log_artifact(self._run_id, str(trace), "profile")
        except Exception as error:  # of any artifact store
            self.warning = f"the profile could not be attached in MLflow: {error}"

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        new = {key: value for key, value in tags.items() if self._tags.get(key) != value}
        entities = [RunTag(key, value[: mlflow_facts.LONGEST_TAG]) for key, value in new.items()]
        for first in range(0, len(entities), _BATCH):
            self._client.log_batch(self._run_id, tags=entities[first : first + _BATCH])
        self._tags |= new
