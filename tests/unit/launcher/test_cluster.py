"""Cluster files: which are valid, how wrong ones are refused, and what is asked of Slurm for them."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from gpt.run.exit_codes import exit_code_of
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig, ClusterSize
from launcher.cluster_file import cluster_names, load_cluster
from launcher.node.rendezvous import Rendezvous
from launcher.node.torchrun import torchrun_command, worker_environment
from launcher.scheduler.protocol import NodeIdentity
from launcher.scheduler.sbatch import slurm_parameters, submission_text
from tests.unit.launcher.fake_slurm import FakeJob, FakeSlurm, has_srun


def problems(**tables: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(ClusterConfig, tables, "mine.toml")
    assert exit_code_of(error.value) == 2
    return error.value.problems


def test_every_shipped_cluster_file_is_valid() -> None:
    assert {load_cluster(name).kind for name in cluster_names()} == {"local", "slurm"}


def test_misspelt_name_suggests_the_nearest_shipped_cluster() -> None:
    with pytest.raises(ConfigError, match=r"^--cluster lcal: neither a file nor .*; did you mean 'local'\?$"):
        load_cluster("lcal")


def test_unknown_name_lists_the_shipped_clusters() -> None:
    names = "local, slurm-a100, slurm-container, slurm-h100, slurm-preemptible"
    with pytest.raises(ConfigError, match=rf"known: {names}$"):
        load_cluster("zzz")


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.toml: no such file$"):
        load_cluster("nowhere.toml")


def test_folder_of_the_same_name_does_not_hide_a_shipped_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_cluster("local").kind == "local"


@pytest.mark.parametrize(
    ("runtime", "image", "stored"),
    [
        ("apptainer", "images/a.sif", "{here}/images/a.sif"),
        ("apptainer", "sandbox", "{here}/sandbox"),
        ("apptainer", "docker://team/a:1", "docker://team/a:1"),
        ("apptainer", "/images/a.sif", "/images/a.sif"),
        ("pyxis", "a.sqsh", "{here}/a.sqsh"),
        ("pyxis", "./a", "{here}/a"),
        ("pyxis", "../a.sqsh", "{above}/a.sqsh"),
        ("pyxis", "~/a.sqsh", "/home/me/a.sqsh"),
        ("pyxis", "registry/team/a:1", "registry/team/a:1"),
    ],
)
def test_container_paths_are_relative_to_the_callers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, image: str, stored: str
) -> None:
    (tmp_path / "below" / "here").mkdir(parents=True)
    (tmp_path / "below" / "mine.toml").write_text(
        f'kind = "slurm"\n[container]\nruntime = "{runtime}"\nimage = "{image}"\n'
        'mounts = ["data:/data", "/scratch:/s:ro"]\n'
    )
    here = tmp_path / "below" / "here"
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/me")
    container = load_cluster("../mine.toml").container
    assert container is not None
    assert container.image == stored.format(here=here, above=here.parent)
    assert container.mounts == (f"{here}/data:/data", "/scratch:/s:ro")


def test_unknown_key_suggests_the_nearest() -> None:
    assert problems(kind="slurm", partiton="gpu") == [
        "mine.toml: unknown key 'partiton'; did you mean 'partition'?"
    ]


def test_slurm_fields_are_refused_for_a_local_cluster() -> None:
    assert problems(kind="local", partition="gpu", mem="1G") == [
        "mine.toml: partition, mem: only with kind = 'slurm'; this file says kind = 'local'."
    ]


def test_local_cluster_is_one_machine() -> None:
    assert problems(kind="local", nodes=2) == [
        "mine.toml: nodes = 2: kind = 'local' is one machine; use nodes = 1."
    ]


def test_more_processes_than_gpus_are_refused() -> None:
    assert problems(kind="slurm", gpus_per_node=4, processes_per_node=8) == [
        "mine.toml: processes_per_node = 8 is more than gpus_per_node = 4; each process trains on a GPU "
        "of its "
        "own. Use at most 4."
    ]


def test_unknown_accelerator_suggests_the_nearest() -> None:
    assert problems(kind="slurm", accelerator="h100") == [
        "mine.toml: accelerator = 'h100' is not known; did you mean 'h100-80gb'?"
    ]


def test_time_limit_without_seconds_is_refused() -> None:
    assert problems(kind="slurm", time_limit="24:00") == [
        "mine.toml: time_limit = '24:00' is not of the form that it needs. Time limit of one job, as "
        "[DAYS-]HOURS:MM:SS."
    ]


@pytest.mark.parametrize(
    ("text", "minutes"), [("24:00:00", 1440), ("2-01:30:00", 2970), ("0:02:00", 2), ("0:02:01", 3)]
)
def test_time_limit_in_minutes(text: str, minutes: int) -> None:
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


RUN = RunDir(Path("/shared/runs/name-x"))
CONFIG = RunConfig.model_validate(
    {"name": "x", "data": {"path": "/shared/data"}, "schedule": {"total_steps": 1}}
)


def submission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **fields: Any) -> list[str]:
    """The lines of the batch script, on a machine that has srun."""
    has_srun(tmp_path, monkeypatch)
    return submission_text(RUN, CONFIG, ClusterConfig(kind="slurm", **fields)).splitlines()


def test_omitted_fields_are_not_asked_of_slurm() -> None:
    asked = slurm_parameters("name-x", ClusterConfig(kind="slurm", nodes=2), [], Path("/folder"), {})
    assert asked.pop("teardown")  # our lines at the end of the batch script
    assert asked == {
        "job_name": "name-x",
        "nodes": 2,
        "ntasks_per_node": 1,
        "time": None,
        "wckey": None,
        "signal_delay_s": 90,
        "setup": [],
        "srun_args": ["--kill-on-bad-exit=1", "--export=ALL"],
        "additional_parameters": {"requeue": True},
    }


def test_every_slurm_field_reaches_the_submission_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = submission(
        monkeypatch,
        tmp_path,
        partition="gpu-x",
        time_limit="1:00:00",
        account="acc-x",
        qos="qos-x",
        constraint="con-x",
        exclude="exc-x",
        reservation="res-x",
        gres="gre-x",
        mem="7G",
        cpus_per_process=6,
        gpus_per_node=4,
        nodes=3,
        setup=("module load mod-x",),
        signal_delay_s=77,
        sbatch={"mail_type": "mail-x"},
    )
    wanted = {
        "partition=gpu-x", "account=acc-x", "qos=qos-x", "constraint=con-x", "exclude=exc-x", "gres=gre-x",
        "reservation=res-x", "mem=7G", "cpus-per-task=24", "gpus-per-node=4", "nodes=3", "time=60", "requeue",
        "job-name=name-x", "signal=USR2@77", "mail-type=mail-x", "ntasks-per-node=1", "open-mode=append",
    }  # fmt: skip
    found = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert found >= wanted
    assert {line.partition("=")[0] for line in found - wanted} == {"output", "error"}, found
    assert "module load mod-x" in lines
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in lines
    [srun] = [line for line in lines if line.startswith("srun ")]
    assert " --kill-on-bad-exit=1 " in srun


@pytest.mark.parametrize(
    "sbatch",
    [{"requeue": False}, {"no-requeue": True}, {"no_requeue": ""}, {"requeue": True, "no-requeue": True}],
)
def test_cluster_file_can_forbid_requeueing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sbatch: dict[str, Any]
) -> None:
    lines = submission(monkeypatch, tmp_path, sbatch=sbatch)
    asked = [line for line in lines if line.startswith("#SBATCH") and "requeue" in line]
    assert asked == ["#SBATCH --no-requeue"]


def test_false_sbatch_option_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = submission(monkeypatch, tmp_path, sbatch={"exclusive": False, "contiguous": True})
    assert "#SBATCH --contiguous" in lines
    assert not any("exclusive" in line for line in lines)


def test_sbatch_option_that_a_field_decides_is_refused() -> None:
    options = {"nodes": 4, "ntasks_per_node": 8, "cpus-per-task": 2, "output": "x", "mail-user": "me"}
    [problem] = problems(kind="slurm", sbatch=options)
    assert problem == (
        "mine.toml: sbatch.nodes: set it with the field nodes, outside [sbatch]. "
        "sbatch.ntasks-per-node: a node has one task, which starts processes_per_node. "
        "sbatch.cpus-per-task: set it with the field cpus_per_process, outside [sbatch]. "
        "sbatch.output: the launcher itself needs this option; leave it out."
    )


def test_time_limit_and_wckey_are_not_asked_of_slurm_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = submission(monkeypatch, tmp_path)
    assert not any(line.startswith(("#SBATCH --time", "#SBATCH --wckey")) for line in lines)


def test_pyxis_starts_the_tasks_in_the_image_and_the_batch_script_requeues(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    container = {"runtime": "pyxis", "image": "team/outlast:1", "mounts": ["/scratch:/s"], "python": "py3"}
    lines = submission(monkeypatch, tmp_path, container=container)
    [srun] = [line for line in lines if line.startswith("srun ")]
    assert " --container-image=team/outlast:1 " in srun
    assert " --container-mounts=/shared/runs:/shared/runs,/shared/data:/shared/data,/scratch:/s " in srun
    assert " py3 -u -m submitit.core._submit " in srun
    after = "\n".join(lines[lines.index(srun) + 1 :])
    assert 'scontrol requeue "$job"' in after
    assert "/shared/runs/name-x/submission/0001/requeue-$job-$turn" in after


def test_tasks_get_their_code_when_sbatch_exports_no_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = submission(monkeypatch, tmp_path, setup=("module load mod-x",), sbatch={"export": "NONE"})
    ours = ["export PYTHONPATH=/shared/runs/name-x/code", "export PYTHONSAFEPATH=1", "module load mod-x"]
    assert lines[lines.index("# setup") + 1 :][:3] == ours
    [srun] = [line for line in lines if line.startswith("srun ")]
    assert " --export=ALL " in srun


PREEMPTED = "2026-11-25T13:47:17"


@pytest.mark.parametrize(
    ("code", "job", "is_requeued"),
    [
        (143, FakeJob(preempted=PREEMPTED), True),
        (143, FakeJob(), False),  # another node failed, and srun ended this one
        (143, FakeJob(state="CANCELLED", preempted=PREEMPTED), False),
        (143, FakeJob(restarts=1, preempted=PREEMPTED), False),  # a later job run has started already
        (1, FakeJob(preempted=PREEMPTED), False),
        (0, FakeJob(preempted=PREEMPTED), False),
    ],
)
def test_batch_script_requeues_a_job_preempted_before_python_catches_signals(
    tmp_path: Path, code: int, job: FakeJob, is_requeued: bool
) -> None:
    slurm = FakeSlurm()
    slurm.jobs["7"] = job
    asked = slurm.install_scontrol(tmp_path / "bin")
    parameters = slurm_parameters("x", ClusterConfig(kind="slurm"), [], tmp_path, {})
    script = "\n".join([f"(exit {code})", *parameters["teardown"]])
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=20)
    assert asked.exists() == is_requeued
    if is_requeued:
        assert asked.read_text() == "requeue 7\n"
    else:
        assert done.returncode == code


def test_apptainer_runs_only_torchrun_in_the_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    container = {"runtime": "apptainer", "image": "/images/outlast.sif", "mounts": ["/scratch:/s"]}
    cluster = ClusterConfig(kind="slurm", gpus_per_node=2, container=container)
    identity = NodeIdentity("slurm-7", 0, 0, 1, "node1", "7")
    meeting, mounts = Rendezvous("", "127.0.0.1:0"), [Path("/shared/runs"), Path("/shared/data")]
    command = torchrun_command(RUN, CONFIG, cluster, identity, meeting, Path("/logs"), mounts)
    assert command[:9] == [
        "apptainer", "exec", "--nv", "--bind=/shared/runs:/shared/runs", "--bind=/shared/data:/shared/data",
        "--bind=/scratch:/s", "/images/outlast.sif", "python3", "-u",
    ]  # fmt: skip
    assert command[9:11] == ["-m", "torch.distributed.run"]
    assert not any("container" in line for line in submission(monkeypatch, tmp_path, container=container))


def test_interface_is_set_for_nccl_and_gloo() -> None:
    identity = NodeIdentity("slurm-7", 0, 0, 1, "node1", "7")
    cluster = ClusterConfig(kind="slurm", interface="ib0", environment={"GLOO_SOCKET_IFNAME": "eth1"})
    environment = worker_environment(cluster, identity, 0, "heartbeat", {})
    assert (environment["NCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == ("ib0", "eth1")


def test_cluster_json_holds_only_the_fields_that_the_file_sets() -> None:
    cluster = ClusterConfig(kind="slurm", nodes=2)
    assert cluster.explicit() == {"kind": "slurm", "nodes": 2}
    assert validate(ClusterConfig, cluster.explicit(), "cluster.json") == cluster


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"partition": "a\n#SBATCH --x"}, "partition = a\\n#SBATCH --x: it has the control character"),
        ({"sbatch": {"comment": "a\nb"}}, "sbatch.comment = a\\nb: it has the control character \\n."),
        ({"sbatch": {"a\nb": 1}}, "sbatch: a\\nb is not the name of an option of sbatch."),
        ({"environment": {"A=1;B": "x"}}, "environment: A=1;B is not the name of an environment variable."),
        ({"environment": {"A": "x\0"}}, "environment.A = x\\x00: it has the control character \\x00."),
        ({"setup": ["echo \x1b"]}, "setup = echo \\x1b: it has the control character \\x1b."),
        ({"container": {"runtime": "pyxis", "image": "a\nb"}}, "container.image = a\\nb: it has the control"),
    ],
)  # fmt: skip
def test_text_that_would_add_lines_to_the_batch_script_is_refused(
    fields: dict[str, Any], problem: str
) -> None:
    [found] = problems(kind="slurm", **fields)
    assert found.startswith(f"mine.toml: {problem}")


def test_setup_and_environment_may_have_several_lines() -> None:
    tables = {"setup": ["if true; then\n\tmodule load cuda\nfi"], "environment": {"A": "1\n2"}}
    assert validate(ClusterConfig, {"kind": "slurm", **tables}, "mine.toml").setup == tuple(tables["setup"])


def test_the_command_line_changes_the_size_of_a_cluster() -> None:
    cluster = ClusterConfig(kind="slurm", nodes=4, gpus_per_node=8)
    smaller = cluster.in_size(ClusterSize(nodes=2, processes=3))
    assert (smaller.nodes, smaller.processes, smaller.gpus_per_node) == (2, 3, 3)
    assert cluster.in_size(ClusterSize()) is cluster
    on_cpus = ClusterConfig(kind="slurm", processes_per_node=8).in_size(ClusterSize(processes=2))
    assert on_cpus.explicit() == {"kind": "slurm", "processes_per_node": 2}
    with pytest.raises(ConfigError, match=r"^--nodes, --processes: nodes = 2: kind = 'local' is one machine"):
        ClusterConfig(kind="local").in_size(ClusterSize(nodes=2))
