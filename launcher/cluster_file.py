"""--cluster on the command line: a TOML file, or the name of one that ships with Outlast.

Reads cluster files only; it never talks to a cluster.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from data_pipeline.config_file import read_toml, validate
from data_pipeline.errors import ConfigError
from launcher.cluster import ClusterConfig
from launcher.paths import absolute, usable_path


def cluster_names() -> list[str]:
    """The cluster files that ship with Outlast, by name."""
    folder = resources.files("cluster_configs")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_cluster(name_or_path: str) -> ClusterConfig:
    """The cluster in a file, or the one with that name in cluster_configs. Raises ConfigError."""
    path = usable_path(name_or_path, "--cluster")
    if not path.suffix and not path.is_file():
        if name_or_path not in cluster_names():
            near = difflib.get_close_matches(name_or_path, cluster_names(), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(cluster_names())}"
            raise ConfigError(f"--cluster {name_or_path}: neither a file nor a known cluster; {hint}")
        path = Path(str(resources.files("cluster_configs") / f"{name_or_path}.toml"))
    return validate(ClusterConfig, _with_absolute_paths(read_toml(path)), path.name)


def _with_absolute_paths(tables: dict[str, Any]) -> dict[str, Any]:
    """`tables` with absolute paths for the container's image, if it is a file, and for its mounts."""
    container = tables.get("container")
    if not isinstance(container, dict):
        return tables
    whole = dict(container)
    image, mounts = container.get("image"), container.get("mounts")
    if isinstance(image, str) and _is_file(image, container.get("runtime")):
        whole["image"] = str(absolute(image, "container.image"))
    if isinstance(mounts, list):
        whole["mounts"] = [_absolute_mount(mount) if isinstance(mount, str) else mount for mount in mounts]
    return {**tables, "container": whole}


def _is_file(image: str, runtime: object) -> bool:
    """Whether an image is a path. Without a scheme it is one for apptainer, but a registry name for pyxis."""
    if "://" in image:
        return False
    return runtime == "apptainer" or image.startswith((".", "/", "~")) or image.endswith((".sqsh", ".sif"))


def _absolute_mount(mount: str) -> str:
    source, colon, target = mount.partition(":")
    return f"{absolute(source, 'container.mounts')}{colon}{target}"
