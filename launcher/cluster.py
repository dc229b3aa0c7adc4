"""ClusterConfig: where a run runs. Nothing in it changes a number of the run except the world size.

What the file omits is not asked of the scheduler. Reads cluster files only; it never talks to a cluster.
"""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config_file import Section, read_toml, validate
from data_pipeline.errors import ConfigError
from launcher.paths import absolute

Count = Annotated[int, Field(ge=1)]

# Memory of one accelerator in GiB, as nvidia-smi reports it; `outlast plan` and preflight compare with it.
ACCELERATOR_MEMORY_GIB = {
    "a100-40gb": 40.0,
    "a100-80gb": 80.0,
    "h100-80gb": 79.6,
    "h200-141gb": 139.8,
    "b200-180gb": 178.4,
}

_SLURM_ONLY = (
    "partition",
    "time_limit",
    "account",
    "qos",
    "constraint",
    "exclude",
    "reservation",
    "gres",
    "mem",
    "cpus_per_process",
    "setup",
    "signal_delay_s",
    "container",
    "sbatch",
)
# Options of sbatch that the other fields decide, and so may not come in by [sbatch] unseen; None: nobody may.
_FIELD_OF = {
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "cpus-per-task": "cpus_per_process",
    "partition": "partition",
    "time": "time_limit",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "reservation": "reservation",
    "gres": "gres",
    "mem": "mem",
    "signal": "signal_delay_s",
    "array": None,
    "output": None,
    "error": None,
    "open-mode": None,
    "wrap": None,
    "wait": None,
    "test-only": None,
}


class Container(Section):
    """The image in which the training processes run.

    apptainer starts torchrun in it, the node's own Python stays outside. With pyxis the whole task of a node
    is inside, so that the image needs Outlast too; the batch script, which is outside, requeues the job.
    """

    runtime: Literal["apptainer", "pyxis"] = Field(
        description="What runs the image: Apptainer (or Singularity), or Slurm's plugin Pyxis with Enroot."
    )
    image: str = Field(
        min_length=1, description="A .sif or .sqsh file, or an address that the runtime can pull."
    )
    mounts: tuple[str, ...] = Field(
        default=(),
        description="SOURCE:TARGET of further folders; the run and data directories are mounted always.",
    )
    python: str = Field(default="python3", description="Python with Outlast's packages, inside the image.")


class ClusterConfig(Section):
    """One cluster, or this machine."""

    kind: Literal["local", "slurm"] = Field(description="This machine, or a Slurm cluster.")
    nodes: Count = Field(default=1, description="Machines of one job.")
    gpus_per_node: int = Field(
        default=0, ge=0, description="GPUs of one machine; 0 = train on its CPU (gloo)."
    )
    processes_per_node: Count | None = Field(
        default=None, description="Training processes of one machine. Default: gpus_per_node, or 1."
    )
    accelerator: str | None = Field(
        default=None,
        description=f"The GPU, for the memory check of `outlast plan`: {', '.join(ACCELERATOR_MEMORY_GIB)}.",
    )
    partition: str | None = Field(default=None, description="Slurm partition.")
    time_limit: str | None = Field(
        default=None, pattern=r"^(\d+-)?\d+:\d\d:\d\d$", description="Of one job: [DAYS-]HOURS:MM:SS."
    )
    account: str | None = Field(default=None, description="Slurm account.")
    qos: str | None = Field(default=None, description="Slurm quality of service.")
    constraint: str | None = Field(default=None, description="Slurm node features.")
    exclude: str | None = Field(default=None, description="Slurm nodes to stay away from.")
    reservation: str | None = Field(default=None, description="Slurm reservation.")
    gres: str | None = Field(default=None, description="Slurm generic resources, beside gpus_per_node.")
    mem: str | None = Field(default=None, description="Memory of one node, as Slurm writes it: 480G.")
    cpus_per_process: Count | None = Field(default=None, description="CPU cores of one training process.")
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines before the job starts, such as `module load cuda`."
    )
    signal_delay_s: Count = Field(
        default=90, description="Seconds before the time limit at which the job is told to save."
    )
    interface: str | None = Field(
        default=None,
        description="Network interface of the collectives, such as ib0: NCCL_SOCKET_IFNAME and "
        "GLOO_SOCKET_IFNAME. Default: each library's own choice.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of the training processes (NCCL_…)."
    )
    container: Container | None = Field(default=None, description="Default: no container.")
    sbatch: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other option of sbatch, by its long name; true for one without a value.",
    )

    @property
    def processes(self) -> int:
        """Training processes of one node, after the default."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Training processes of the whole job."""
        return self.nodes * self.processes

    @property
    def time_limit_min(self) -> int | None:
        """The time limit in minutes, rounded up."""
        return time_limit_min(self.time_limit) if self.time_limit is not None else None

    @property
    def sbatch_options(self) -> dict[str, Any]:
        """[sbatch] by the names that sbatch knows, and whether the job may be requeued: by default it may."""
        options = {name.replace("_", "-"): value for name, value in self.sbatch.items()}
        is_wanted = options.pop("requeue", True) is not False and options.pop("no-requeue", False) is False
        options["requeue" if is_wanted else "no-requeue"] = True
        return {name: value for name, value in options.items() if value is not False}

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        problems = []
        for option in self.sbatch_options:
            if option.startswith("ntasks"):
                problems.append(f"sbatch.{option}: a node has one task, which starts processes_per_node.")
            elif (field := _FIELD_OF.get(option)) is not None:
                problems.append(f"sbatch.{option}: say it by the field {field}, outside [sbatch].")
            elif option in _FIELD_OF:
                problems.append(f"sbatch.{option}: the launcher itself needs this option; leave it out.")
        if self.kind == "local":
            given = [name for name in _SLURM_ONLY if name in self.model_fields_set]
            if given:
                problems.append(
                    f"{', '.join(given)}: only with kind = 'slurm'; this file says kind = 'local'."
                )
            if self.nodes > 1:
                problems.append(f"nodes = {self.nodes}: kind = 'local' is one machine; use nodes = 1.")
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


def time_limit_min(text: str) -> int | None:
    """Minutes, rounded up, of a time as Slurm writes it, [DAYS-]HOURS:MM:SS; None of any other text."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes + (seconds > 0)


def cluster_names() -> list[str]:
    """The cluster files that ship with Outlast, by name."""
    folder = resources.files("cluster_configs")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_cluster(name_or_path: str) -> ClusterConfig:
    """The cluster of a file, or of a name in cluster_configs. Raises ConfigError."""
    path = Path(name_or_path)
    if not path.suffix and not path.is_file():
        if name_or_path not in cluster_names():
            near = difflib.get_close_matches(name_or_path, cluster_names(), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(cluster_names())}"
            raise ConfigError(f"--cluster {name_or_path}: neither a file nor a known cluster; {hint}")
        path = Path(str(resources.files("cluster_configs") / f"{name_or_path}.toml"))
    return validate(ClusterConfig, _with_absolute_paths(read_toml(path)), path.name)


def _with_absolute_paths(tables: dict[str, Any]) -> dict[str, Any]:
    """`tables` with the container's image, where it is a file, and the sources of its mounts absolute."""
    container = tables.get("container")
    if not isinstance(container, dict):
        return tables
    whole = dict(container)
    image, mounts = container.get("image"), container.get("mounts")
    if isinstance(image, str) and _is_file(image, container.get("runtime")):
        whole["image"] = str(absolute(image))
    if isinstance(mounts, list):
        whole["mounts"] = [_absolute_mount(mount) if isinstance(mount, str) else mount for mount in mounts]
    return {**tables, "container": whole}


def _is_file(image: str, runtime: object) -> bool:
    """Whether an image is a path: without a scheme it is to apptainer, and a name in a registry to pyxis."""
    if "://" in image:
        return False
    return runtime == "apptainer" or image.startswith((".", "/", "~")) or image.endswith((".sqsh", ".sif"))


def _absolute_mount(mount: str) -> str:
    source, colon, target = mount.partition(":")
    return f"{absolute(source)}{colon}{target}"
