"""Names, paths and URLs of a run are checked together, before anything is created or asked."""

from pathlib import Path

import pytest

from gpt.config.run import RunConfig
from launcher.cluster import ClusterConfig
from launcher.preflight.places import place_problems


def problems(folder: Path | None, cluster: ClusterConfig | None = None, **tables: object) -> list[str]:
    base = {"name": "x", "data": {"path": "/data"}, "schedule": {"total_steps": 1}, **tables}
    return place_problems(RunConfig.model_validate(base), cluster, folder)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"tracking": {"uri": "http://localhost:5000x"}}, "tracking.uri = http://localhost:5000x: it is not"),
        ({"tracking": {"uri": "http://my host:5000"}}, "tracking.uri = http://my host:5000: it has a space."),
        ({"tracking": {"uri": "http://a\nb"}}, "tracking.uri = http://a\\nb: it has the control character"),
        ({"tracking": {"experiment": "a\0b"}}, "tracking.experiment = a\\x00b: it has the control character"),
        ({"tracking": {"uri": "https://me:pw@host"}}, "tracking.uri = https://…@host: it has credentials"),
        ({"checkpoint": {"mirror": "s3://k:pw@bucket"}}, "checkpoint.mirror = s3://…@bucket: it has cred"),
        ({"data": {"mixture": [{"path": "/a\x1bb", "weight": 1}]}}, "data.mixture.0.path = /a\\x1bb: it"),
    ],
)
def test_each_problem_names_its_field(tables: dict[str, object], words: str) -> None:
    [problem] = problems(None, **tables)
    assert problem.startswith(words)


def test_credentials_are_refused_without_tracking_too() -> None:
    assert len(problems(None, tracking={"uri": "https://me:pw@host", "enabled": False})) == 1


def test_a_container_cannot_mount_a_path_with_a_comma_or_a_colon(tmp_path: Path) -> None:
    container = {"runtime": "pyxis", "image": "registry/image"}
    cluster = ClusterConfig.model_validate({"kind": "slurm", "container": container})
    tables: dict[str, object] = {"data": {"path": "/a,b"}, "checkpoint": {"mirror": "/c:d"}}
    found = problems(tmp_path / "e,f" / "run", cluster, **tables)
    assert [problem.partition(" cannot be mounted")[0] for problem in found] == [
        str(tmp_path / "e,f"), "/c:d", "/a,b"
    ]  # fmt: skip
    assert problems(tmp_path / "e,f" / "run", ClusterConfig(kind="slurm"), **tables) == []
