"""Cluster files: what they may say, and in what words a wrong one is refused."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from launcher.cluster import ClusterConfig, cluster_names, load_cluster
from launcher.runs import explicit
from launcher.submit import slurm_parameters


def problems(**tables: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(ClusterConfig, tables, "mine.toml")
    assert error.value.exit_code == 2
    return error.value.problems


def test_every_shipped_cluster_file_is_valid() -> None:
    assert {load_cluster(name).kind for name in cluster_names()} == {"local", "slurm"}


def test_a_name_close_to_a_shipped_one_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"^--cluster lcal: neither a file nor .*; did you mean 'local'\?$"):
        load_cluster("lcal")


def test_a_name_like_none_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"known: local, slurm$"):
        load_cluster("zzz")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.toml: no such file$"):
        load_cluster("nowhere.toml")


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_cluster("local").kind == "local"


def test_an_unknown_key_suggests_the_nearest() -> None:
    assert problems(kind="slurm", partiton="gpu") == [
        "mine.toml: unknown key 'partiton'; did you mean 'partition'?"
    ]


def test_slurm_fields_do_not_belong_to_a_local_cluster() -> None:
    assert problems(kind="local", partition="gpu", mem="1G") == [
        "mine.toml: partition, mem: only with kind = 'slurm'; this file says kind = 'local'."
    ]


def test_a_local_cluster_is_one_machine() -> None:
    assert problems(kind="local", nodes=2) == [
        "mine.toml: nodes = 2: kind = 'local' is one machine; use nodes = 1."
    ]


def test_more_processes_than_gpus_are_refused() -> None:
    assert problems(kind="slurm", gpus_per_node=4, processes_per_node=8) == [
        "mine.toml: processes_per_node = 8 is more than gpus_per_node = 4; each process trains on a GPU "
        "of its "
        "own. Use at most 4."
    ]


def test_an_unknown_accelerator_suggests_the_nearest() -> None:
    assert problems(kind="slurm", accelerator="h100") == [
        "mine.toml: accelerator = 'h100' is not known; did you mean 'h100-80gb'?"
    ]


def test_a_time_limit_without_seconds_is_refused() -> None:
    assert problems(kind="slurm", time_limit="24:00")[0].startswith(
        "mine.toml: time_limit = '24:00': string should"
    )


@pytest.mark.parametrize(
    ("text", "minutes"), [("24:00:00", 1440), ("2-01:30:00", 2970), ("0:02:00", 2), ("0:02:01", 3)]
)
def test_the_time_limit_in_minutes(text: str, minutes: int) -> None:
    assert ClusterConfig(kind="slurm", time_limit=text).time_limit_min == minutes


@pytest.mark.parametrize(
    ("fields", "processes", "world_size"),
    [
        ({"kind": "local"}, 1, 1),
        ({"kind": "local", "processes_per_node": 3}, 3, 3),
        ({"kind": "slurm", "nodes": 4, "gpus_per_node": 8}, 8, 32),
        ({"kind": "slurm", "nodes": 2, "gpus_per_node": 8, "processes_per_node": 2}, 2, 4),
    ],
)
def test_processes_default_to_gpus_or_one(fields: dict[str, Any], processes: int, world_size: int) -> None:
    cluster = ClusterConfig(**fields)
    assert (cluster.processes, cluster.world_size) == (processes, world_size)


def test_what_the_file_omits_is_not_asked_of_slurm() -> None:
    asked = slurm_parameters(ClusterConfig(kind="slurm", nodes=2), "mine")
    assert asked == {
        "job_name": "mine",
        "nodes": 2,
        "ntasks_per_node": 1,
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True},
    }


def test_every_slurm_field_reaches_the_submission_file(tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    fields = {
        "partition": "gpu-x",
        "time_limit": "1:00:00",
        "account": "acc-x",
        "qos": "qos-x",
        "constraint": "con-x",
        "exclude": "exc-x",
        "reservation": "res-x",
        "gres": "gre-x",
        "mem": "7G",
        "cpus_per_process": 6,
        "gpus_per_node": 4,
        "nodes": 3,
        "setup": ("module load mod-x",),
        "signal_delay_s": 77,
        "sbatch": {"mail_type": "mail-x"},
    }
    text = _make_sbatch_string(
        command="run", folder=tmp_path, **slurm_parameters(ClusterConfig(kind="slurm", **fields), "name-x")
    )
    lines = set(text.splitlines())
    for value in ("partition=gpu-x", "account=acc-x", "qos=qos-x", "constraint=con-x", "exclude=exc-x"):
        assert f"#SBATCH --{value}" in lines
    for value in (
        "reservation=res-x",
        "gres=gre-x",
        "mem=7G",
        "cpus-per-task=24",
        "gpus-per-node=4",
        "nodes=3",
    ):
        assert f"#SBATCH --{value}" in lines
    for value in ("time=60", "job-name=name-x", "signal=USR2@77", "mail-type=mail-x", "ntasks-per-node=1"):
        assert f"#SBATCH --{value}" in lines
    assert "module load mod-x" in lines
    assert "--kill-on-bad-exit=1" in text


def test_cluster_json_holds_what_was_said_and_no_defaults() -> None:
    cluster = ClusterConfig(kind="slurm", nodes=2)
    assert explicit(cluster) == {"kind": "slurm", "nodes": 2}
    assert validate(ClusterConfig, explicit(cluster), "cluster.json") == cluster
