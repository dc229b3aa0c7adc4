"""The checks of a Slurm site before a submission; tests/slurm asks a real one."""

from pathlib import Path
from typing import Any

import pytest

from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig
from launcher.findings import Findings
from launcher.scheduler import slurm_commands
from launcher.scheduler.slurm_commands import Preemption
from launcher.scheduler.slurm_site import check_partitions, check_qos, check_slurm_site, check_time
from tests.unit.launcher.fake_slurm import FakeSlurm, has_srun

SMALL = 1 << 20  # bytes of a checkpoint
LLAMA_7B = 12 * 6_738_415_616  # bytes of a checkpoint: 12 per parameter


def config(**tables: object) -> RunConfig:
    base = {"name": "x", "data": {"path": "/data"}, "schedule": {"total_steps": 1}, **tables}
    return RunConfig.model_validate(base).resolve(4096)


def test_time_limit_shorter_than_the_signal_delay_is_refused() -> None:
    findings = Findings()
    check_time(SMALL, ClusterConfig(kind="slurm", time_limit="0:02:00"), findings)
    [problem] = findings.problems
    assert problem.startswith(
        "time_limit = 0:02:00 leaves no time to train: Slurm asks the job to save signal_delay_s = 90 s"
    )
    findings = Findings()
    check_time(SMALL, ClusterConfig(kind="slurm", time_limit="0:02:00", signal_delay_s=30), findings)
    assert findings == Findings()


def test_signal_delay_shorter_than_a_save_warns() -> None:
    fields = {"kind": "slurm", "time_limit": "24:00:00", "signal_delay_s": 30}
    findings = Findings()
    check_time(LLAMA_7B, ClusterConfig.model_validate(fields), findings)
    assert findings.problems == []
    [warning] = findings.warnings
    assert warning.startswith("signal_delay_s = 30 is short for a checkpoint of 7")
    findings = Findings()
    check_time(LLAMA_7B, ClusterConfig.model_validate({**fields, "nodes": 4}), findings)
    assert findings.warnings == []


LOW = {"PartitionName": "low", "MaxTime": "UNLIMITED", "MaxNodes": "8", "PreemptMode": "OFF"}
SHORT = {"PartitionName": "short", "MaxTime": "01:00:00", "MaxNodes": "UNLIMITED", "PreemptMode": "OFF"}


def of_partitions(*partitions: dict[str, str], preemption: str = "preempt/none", **fields: Any) -> Findings:
    findings = Findings()
    how = Preemption(preemption, "REQUEUE")
    check_partitions(ClusterConfig(kind="slurm", **fields), partitions, how, 25.0, findings)
    return findings


def test_limits_of_all_partitions_are_problems_and_those_of_one_are_warnings() -> None:
    assert of_partitions(LOW, SHORT, nodes=8, time_limit="01:00:00") == Findings()
    found = of_partitions(LOW, SHORT, time_limit="02:00:00")
    assert found.problems == []
    assert found.warnings == [
        "time_limit = 02:00:00 is more than partition short allows (01:00:00): the job never starts there."
    ]
    found = of_partitions(LOW, SHORT, time_limit="02:00:00", nodes=9)
    assert found.problems == [
        "nodes = 9 is more than partition low allows (8): the job would wait forever. Ask for less; the run "
        "takes as many job runs as it needs.",
        "time_limit = 02:00:00 is more than partition short allows (01:00:00): the job would wait forever. "
        "Ask for less; the run takes as many job runs as it needs.",
    ]
    assert found.warnings == []
    assert of_partitions(nodes=9) == Findings()  # Slurm does not answer
    down = of_partitions({**LOW, "State": "DOWN"})
    assert down.warnings == ["partition low is DOWN: no job starts there now."]


@pytest.mark.parametrize(
    ("preemption", "mode", "grace", "words"),
    [
        ("preempt/partition_prio", "REQUEUE", "0", "partition p preempts without a grace time (GraceTime=0)"),
        ("preempt/partition_prio", "REQUEUE", "30", None),
        ("preempt/partition_prio", "REQUEUE", "00:00:20", "partition p preempts with a grace time of 20 s"),
        ("preempt/partition_prio", "REQUEUE", "1-00:00:00", None),
        (
            "preempt/partition_prio",
            "REQUEUE",
            "20",
            "partition p preempts with a grace time of 20 s, and a "
            "checkpoint takes about 25 s: the steps since the last one are then lost and computed again.",
        ),
        ("preempt/partition_prio", "CANCEL", "0", "partition p preempts by ending jobs for good, without a"),
        ("preempt/partition_prio", "CANCEL", "30", None),
        ("preempt/partition_prio", "GANG,SUSPEND", "0", None),
        ("preempt/partition_prio", "OFF", "0", None),
        ("preempt/qos", "REQUEUE", "0", None),
        ("preempt/none", "REQUEUE", "0", None),
    ],
)
def test_preemption_that_leaves_no_time_to_save_warns(
    preemption: str, mode: str, grace: str, words: str | None
) -> None:
    partition = {"PartitionName": "p", "PreemptMode": mode, "GraceTime": grace}
    found = of_partitions(partition, preemption=preemption)
    assert found.problems == []
    assert [warning[: len(words or "")] for warning in found.warnings] == ([words] if words else [])


def test_qos_limits_apply_per_job_per_user_and_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm()
    slurm.qos["spare"] = "1-00:00:00|cpu=64,gres/gpu=8,node=2|node=4|gres/gpu=32|cluster|00:01:00"
    slurm.install(monkeypatch)

    def of_qos(preemption: str = "preempt/none", save_s: float = 59.0, **fields: Any) -> Findings:
        findings = Findings()
        cluster = ClusterConfig(kind="slurm", qos="spare", **fields)
        check_qos(
            cluster, slurm_commands.qos_fields("spare"), Preemption(preemption, "REQUEUE"), save_s, findings
        )
        return findings

    assert of_qos(nodes=2, gpus_per_node=4, cpus_per_process=8, time_limit="24:00:00") == Findings()
    found = of_qos(nodes=5, gpus_per_node=8, cpus_per_process=2, time_limit="1-00:01:00")
    assert found.problems[0] == (
        "time_limit = 1-00:01:00 is more than qos spare allows (1-00:00:00): the job would wait forever. "
        "Ask for less; the run takes as many job runs as it needs."
    )
    remedy = ": the job would wait forever. Ask for less, or for another qos."
    assert found.problems[1:] == [
        "80 × cpu is more than qos spare allows (MaxTRES: cpu=64)" + remedy,
        "40 × gres/gpu is more than qos spare allows (MaxTRES: gres/gpu=8)" + remedy,
        "5 × node is more than qos spare allows (MaxTRES: node=2)" + remedy,
        "5 × node is more than qos spare allows (MaxTRESPU: node=4)" + remedy,
        "40 × gres/gpu is more than qos spare allows (GrpTRES: gres/gpu=32)" + remedy,
    ]
    assert of_qos("preempt/qos") == Findings()
    [warning] = of_qos("preempt/qos", save_s=61.0).warnings
    assert warning.startswith(
        "qos spare preempts with a grace time of 60 s, and a checkpoint takes about 61 s"
    )
    slurm.is_silent = True
    assert of_qos("preempt/qos", nodes=99) == Findings()


def test_forbidden_requeue_warns_and_missing_image_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_srun(tmp_path, monkeypatch)
    slurm = FakeSlurm()
    slurm.is_silent = True
    slurm.install(monkeypatch)
    monkeypatch.setattr("launcher.scheduler.shared_folders.file_system", lambda _path: "lustre")
    image = tmp_path / "a.sif"
    fields = {"kind": "slurm", "container": {"runtime": "apptainer", "image": str(image)}}
    run = RunDir(tmp_path / "run")
    findings = Findings()
    cluster = ClusterConfig.model_validate({**fields, "sbatch": {"requeue": False}})
    check_slurm_site(run, config(), cluster, SMALL, findings)
    assert findings.problems == [f"container.image = {image}: no such file."]
    assert findings.warnings == [
        "the cluster file turns requeueing off: a preempted job does not start again by itself. "
        "`outlast resume` continues it by hand."
    ]
    image.touch()
    findings = Findings()
    check_slurm_site(run, config(), ClusterConfig.model_validate(fields), SMALL, findings)
    assert findings == Findings()
