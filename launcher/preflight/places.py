"""Checks every name, path and URL of a run before anything is created or asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.places import shown, text_problem, url_problem, without_credentials
from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.paths import moved_folder_problem, new_folder_problem
from launcher.scheduler.container import needed_folders


def place_problems(config: RunConfig, cluster: ClusterConfig | None, folder: Path | None) -> list[str]:
    """Texts that are not names, URLs that cannot be used, and paths that a container cannot mount.

    `folder` is the run directory. What the paths lead to is checked elsewhere.
    """
    urls = {"tracking.uri": config.tracking.uri, "checkpoint.mirror": config.checkpoint.mirror}
    problems = [
        f"{name} = {shown(text)}: {problem}."
        for name, text in _texts(config.model_dump(mode="json"))
        if name not in urls and (problem := text_problem(text)) is not None
    ]
    problems += [
        f"{name} = {without_credentials(url)}: {problem}."
        for name, url in urls.items()
        if url is not None and (problem := url_problem(url)) is not None
    ]
    if cluster is not None and cluster.container is not None and folder is not None:
        problems += [
            f"{shown(path)} cannot be mounted in a container: a comma or a colon separates mounts. Use a "
            "path without them."
            for path in dict.fromkeys(needed_folders(RunDir(folder), config))
            if "," in str(path) or ":" in str(path)
        ]
    return problems


def folder_problem(folder: Path, *, is_new: bool) -> str | None:
    """Why no run can live at the path of its directory, which is created if `is_new`."""
    if is_new:
        problem = new_folder_problem(folder)
        return None if problem is None else f"{problem} Give another --run-dir."
    return moved_folder_problem(folder)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested tables, with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in entries:
            yield from _texts(below, f"{name}.{key}" if name else str(key))
