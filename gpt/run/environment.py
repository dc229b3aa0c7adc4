"""Every environment variable of Outlast's own, and what the node task tells its workers through them.

Workers read them here, once; nothing else in `gpt` reads an OUTLAST_ variable.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class Variable(StrEnum):
    """The names; `meaning` says what each one holds."""

    RUNS = "OUTLAST_RUNS"
    JOB = "OUTLAST_JOB"
    JOB_RUN = "OUTLAST_TURN"
    AFTER_ATTEMPT = "OUTLAST_AFTER_ATTEMPT"
    REQUEUES = "OUTLAST_REQUEUES"
    NODE = "OUTLAST_NODE"
    NODE_NAME = "OUTLAST_NODE_NAME"
    GPUS_PER_NODE = "OUTLAST_GPUS_PER_NODE"
    HEARTBEAT = "OUTLAST_HEARTBEAT"
    CUDA_VISIBLE_DEVICES = "OUTLAST_CUDA_VISIBLE_DEVICES"
    PAUSE_AT = "OUTLAST_PAUSE_AT"
    STOP_AT = "OUTLAST_STOP_AT"
    FAILPOINTS = "OUTLAST_FAILPOINTS"

    @property
    def meaning(self) -> str:
        """What the variable holds, in one sentence."""
        return _MEANINGS[self]


_MEANINGS = {
    Variable.RUNS: "The folder in which new runs are created; `runs` by default.",
    Variable.JOB: "The scheduler's name and id of the job, for example slurm-1234.",
    Variable.JOB_RUN: "How often the scheduler has restarted the job: 0 in its first run.",
    Variable.AFTER_ATTEMPT: "The newest attempt before this job run; a later one by another job wins.",
    Variable.REQUEUES: "1 when the scheduler can start the job again on other nodes, else 0.",
    Variable.NODE: "The index of this node in the job.",
    Variable.NODE_NAME: "What the scheduler calls this node.",
    Variable.GPUS_PER_NODE: "The GPUs of a node that the cluster file asks for; 0 trains on the CPU.",
    Variable.HEARTBEAT: "The abstract Unix socket on which the node task receives heartbeats.",
    Variable.CUDA_VISIBLE_DEVICES: "The caller's CUDA_VISIBLE_DEVICES, which submitit overwrites.",
    Variable.PAUSE_AT: "Rehearsals only: the step after which a new run waits to be killed.",
    Variable.STOP_AT: "Rehearsals only: the step after which a run that has resumed saves and stops.",
    Variable.FAILPOINTS: "Tests only: where a save kills its own process.",
}


@dataclass(frozen=True)
class WorkerEnvironment:
    """What a node task tells the workers of its node. The defaults hold under a bare torchrun."""

    job: str | None = None
    job_run: int = 0
    after_attempt: int | None = None
    can_requeue: bool = False
    node: int | None = None
    node_name: str | None = None
    gpus_per_node: int | None = None
    heartbeat: str | None = None
    pause_at: int | None = None
    stop_at: int | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Self:
        """The values in `environment`, by default this process's."""
        values = os.environ if environment is None else environment

        def integer(name: Variable) -> int | None:
            return int(values[name]) if values.get(name) else None

        return cls(
            job=values.get(Variable.JOB) or None,
            job_run=integer(Variable.JOB_RUN) or 0,
            after_attempt=integer(Variable.AFTER_ATTEMPT),
            can_requeue=values.get(Variable.REQUEUES) == "1",
            node=integer(Variable.NODE),
            node_name=values.get(Variable.NODE_NAME) or None,
            gpus_per_node=integer(Variable.GPUS_PER_NODE),
            heartbeat=values.get(Variable.HEARTBEAT) or None,
            pause_at=integer(Variable.PAUSE_AT),
            stop_at=integer(Variable.STOP_AT),
        )

    def variables(self) -> dict[str, str]:
        """The environment variables that `read` turns back into this object."""
        values: dict[Variable, str | int | None] = {
            Variable.JOB: self.job,
            Variable.JOB_RUN: self.job_run,
            Variable.AFTER_ATTEMPT: self.after_attempt,
            Variable.REQUEUES: int(self.can_requeue),
            Variable.NODE: self.node,
            Variable.NODE_NAME: self.node_name,
            Variable.GPUS_PER_NODE: self.gpus_per_node,
            Variable.HEARTBEAT: self.heartbeat,
            Variable.PAUSE_AT: self.pause_at,
            Variable.STOP_AT: self.stop_at,
        }
        return {name.value: str(value) for name, value in values.items() if value is not None}

    @property
    def host(self) -> str:
        """What messages call this node: the scheduler's name for it, else the host name."""
        return self.node_name or socket.gethostname()
