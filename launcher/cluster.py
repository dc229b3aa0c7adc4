"""ClusterConfig: where a run runs. Nothing in it changes a number of the run except the world size.

A field that the file omits is not asked of the scheduler. Nothing here talks to a cluster.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from data_pipeline.config_file import Section, validate
from data_pipeline.places import shown, text_problem

# The module that implements each `kind`, through its object SCHEDULER (see launcher/scheduler/protocol.py).
# They are named here, not imported, because a scheduler reads ClusterConfig.
SCHEDULERS = {
    "local": "launcher.scheduler.local",
    "slurm": "launcher.scheduler.slurm",
}

# Memory of one accelerator in GiB, as nvidia-smi reports it; `outlast plan` and preflight compare with it.
ACCELERATOR_MEMORY_GIB = {
    "a100-40gb": 40.0,
    "a100-80gb": 80.0,
    "h100-80gb": 79.6,
    "h200-141gb": 139.8,
    "b200-180gb": 178.4,
}


class ClusterRules(Protocol):
    """What a scheduler says about cluster files."""

    own_fields: tuple[str, ...]

    def cluster_problems(self, cluster: "ClusterConfig") -> list[str]:
        """What is wrong with `cluster` by the scheduler's own rules."""
        ...


def _rules_of(kind: str) -> ClusterRules:
    rules: ClusterRules = import_module(SCHEDULERS[kind]).SCHEDULER
    return rules


def _is_known_kind(kind: str) -> str:
    if kind not in SCHEDULERS:
        *others, last = (repr(name) for name in SCHEDULERS)
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(others)} or {last}")
    return kind


def _list_kinds(schema: dict[str, Any]) -> None:
    schema["enum"] = list(SCHEDULERS)


# What the keys of the free tables must look like.
_NAMES = {"environment": r"[A-Za-z_][A-Za-z0-9_]*", "sbatch": r"[A-Za-z][A-Za-z0-9_-]*"}
_NAMED = {"environment": "an environment variable", "sbatch": "an option of sbatch"}
_WHITESPACE = str.maketrans("\n\t", "  ")

Count = Annotated[int, Field(ge=1)]
Kind = Annotated[str, AfterValidator(_is_known_kind)]


class Container(Section):
    """The image in which the training processes run.

    With apptainer, torchrun runs inside the image and the node's own Python outside. With pyxis, the whole
    task of a node runs inside, so the image needs Outlast too; the batch script outside requeues the job.
    """

    runtime: Literal["apptainer", "pyxis"] = Field(
        description="What runs the image: Apptainer (or Singularity), or Slurm's plugin Pyxis with Enroot."
    )
    image: str = Field(
        min_length=1, description="A .sif or .sqsh file, or an address from which the runtime can pull."
    )
    mounts: tuple[str, ...] = Field(
        default=(),
        description="Further folders to mount, as SOURCE:TARGET. The run and data directories are always "
        "mounted.",
    )
    python: str = Field(
        default="python3", description="The Python inside the image that has Outlast's packages."
    )


class ClusterSize(NamedTuple):
    """What the command line says instead of the cluster file; None where it says nothing."""

    nodes: int | None = None
    processes: int | None = None  # per node


AS_THE_FILE_SAYS = ClusterSize()


class ClusterConfig(Section):
    """One cluster, or this machine."""

    kind: Kind = Field(
        description="The scheduler: 'local' for this machine, 'slurm' for a Slurm cluster.",
        json_schema_extra=_list_kinds,
    )
    nodes: Count = Field(default=1, description="Machines per job.")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs per machine; 0 trains on the CPU (gloo).")
    processes_per_node: Count | None = Field(
        default=None, description="Training processes per machine. Default: gpus_per_node, or 1."
    )
    accelerator: str | None = Field(
        default=None,
        description="The GPU model, for the memory check and the time estimate of `outlast plan`: "
        f"{', '.join(ACCELERATOR_MEMORY_GIB)}.",
    )
    link_gb_per_s: float | None = Field(
        default=None,
        gt=0,
        description="GB/s that a GPU sends to the others of its node, for `outlast plan --trace`. Default: "
        "that of NVLink in NVIDIA's servers with this accelerator.",
    )
    network_gb_per_s: float | None = Field(
        default=None,
        gt=0,
        description="GB/s that a node sends to other nodes, for `outlast plan --trace`. Default: that of "
        "NVIDIA's servers with this accelerator.",
    )
    partition: str | None = Field(default=None, description="Slurm partition.")
    time_limit: str | None = Field(
        default=None,
        pattern=r"^(\d+-)?\d+:\d\d:\d\d$",
        description="Time limit of one job, as [DAYS-]HOURS:MM:SS.",
    )
    account: str | None = Field(default=None, description="Slurm account.")
    qos: str | None = Field(default=None, description="Slurm quality of service.")
    constraint: str | None = Field(default=None, description="Slurm node features that the job needs.")
    exclude: str | None = Field(default=None, description="Slurm nodes that the job must not use.")
    reservation: str | None = Field(default=None, description="Slurm reservation.")
    gres: str | None = Field(
        default=None, description="Slurm generic resources, in addition to gpus_per_node."
    )
    mem: str | None = Field(default=None, description="Memory per node, in Slurm's notation: 480G.")
    cpus_per_process: Count | None = Field(default=None, description="CPU cores per training process.")
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines to run before the job starts, such as `module load cuda`."
    )
    signal_delay_s: Count = Field(
        default=90, description="Seconds before the time limit at which Slurm asks the job to save and stop."
    )
    interface: str | None = Field(
        default=None,
        description="Network interface for collectives, such as ib0: sets NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME. By default each library chooses one.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables for the training processes (NCCL_…)."
    )
    container: Container | None = Field(
        default=None, description="The container image to train in. By default no container is used."
    )
    sbatch: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other option of sbatch by its long name; use true for one that takes no value.",
    )

    @property
    def processes(self) -> int:
        """Training processes per node, with the default filled in."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Training processes of the whole job."""
        return self.nodes * self.processes

    @property
    def time_limit_min(self) -> int | None:
        """The time limit in minutes, rounded up."""
        return time_limit_min(self.time_limit) if self.time_limit is not None else None

    def explicit(self) -> dict[str, Any]:
        """The fields that the file sets, as JSON. The others must not be asked of the scheduler."""
        return self.model_dump(mode="json", exclude_unset=True)

    def excluding(self, nodes: Iterable[str]) -> Self:
        """This cluster without `nodes`."""
        names = [*filter(None, [self.exclude]), *nodes]
        return self._with({"exclude": ",".join(names)}) if names else self

    def one_node_without_gpus(self) -> Self:
        """This cluster for a job of one task, which gets the CPU cores of all processes of a node."""
        cores = self.cpus_per_process
        all_cores = {} if cores is None else {"cpus_per_process": cores * self.processes}
        return self._with({"nodes": 1, "gpus_per_node": 0, **all_cores}, dropped="processes_per_node")

    def in_size(self, size: ClusterSize) -> Self:
        """This cluster with other numbers of nodes, and of processes per node; each gets a GPU if any does.

        Raises ConfigError when the cluster cannot have that size.
        """
        changes = {"nodes": size.nodes, "processes_per_node": size.processes}
        if self.gpus_per_node:
            changes["gpus_per_node"] = size.processes
        given = {name: value for name, value in changes.items() if value is not None}
        return validate(type(self), {**self.explicit(), **given}, "--nodes, --processes") if given else self

    def _with(self, changes: Mapping[str, Any], dropped: str | None = None) -> Self:
        kept = {name: value for name, value in self.explicit().items() if name != dropped}
        return self.model_validate({**kept, **changes})

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        own = _rules_of(self.kind)
        problems = _text_problems(self.explicit())
        for kind in SCHEDULERS:
            given = [
                name
                for name in _rules_of(kind).own_fields
                if name in self.model_fields_set and name not in own.own_fields
            ]
            if given:
                problems.append(
                    f"{', '.join(given)}: only with kind = {kind!r}; this file says kind = {self.kind!r}."
                )
        problems += own.cluster_problems(self)
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            problems.append(
                f"processes_per_node = {self.processes} is more than gpus_per_node = {self.gpus_per_node}; "
                f"each process trains on a GPU of its own. Use at most {self.gpus_per_node}."
            )
        if self.accelerator is not None and self.accelerator not in ACCELERATOR_MEMORY_GIB:
            near = difflib.get_close_matches(self.accelerator, ACCELERATOR_MEMORY_GIB, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ACCELERATOR_MEMORY_GIB)}"
            problems.append(f"accelerator = {self.accelerator!r} is not known; {hint}")
        if problems:
            raise ValueError(" ".join(problems))
        return self


def _text_problems(value: Any, name: str = "") -> list[str]:
    """The texts of a cluster file that would add lines to a batch script, or that no script can hold."""
    if isinstance(value, Mapping):
        wrong = [_name_problem(key, name) for key in value if name in _NAMES]
        found = [problem for problem in wrong if problem is not None]
        for key, entry in value.items():
            found += _text_problems(entry, f"{name}.{key}" if name else key)
        return found
    if isinstance(value, list):
        return [problem for entry in value for problem in _text_problems(entry, name)]
    if not isinstance(value, str):
        return []
    # Lines of shell and values of variables may have several lines; these are quoted, those meant so.
    text = value.translate(_WHITESPACE) if name == "setup" or name.startswith("environment.") else value
    problem = text_problem(text)
    return [] if problem is None else [f"{name} = {shown(value)}: {problem}."]


def _name_problem(key: str, table: str) -> str | None:
    if re.fullmatch(_NAMES[table], key):
        return None
    return f"{table}: {shown(key)} is not the name of {_NAMED[table]}."


def time_limit_min(text: str) -> int | None:
    """Minutes, rounded up, of a time in Slurm's notation [DAYS-]HOURS:MM:SS; None for any other text."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes + (seconds > 0)
