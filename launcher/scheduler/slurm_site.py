"""What the Slurm site says about a submission before it is made, as problems and warnings.

Asks Slurm's commands, each for a moment only; submits nothing and writes nothing.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig, time_limit_min
from launcher.findings import Findings
from launcher.scheduler import slurm_commands
from launcher.scheduler.sbatch import sbatch_options, submission_text
from launcher.scheduler.shared_folders import check_shared
from launcher.scheduler.slurm_commands import Preemption
from launcher.units import size

# What one node is assumed to write to a parallel file system while all the others write too. The events of a
# run show its site's own speed.
SAVE_BYTES_PER_SECOND = 1e9
_SIGNAL_EARLY_S = 60  # Slurm may send the signal up to a minute early (sbatch(1), --signal)
_NEVER_STARTS = "the job would wait forever. Ask for less; the run takes as many job runs as it needs."
_SHOWN = 300  # characters of sbatch's message


def check_slurm_site(
    run: RunDir, config: RunConfig, cluster: ClusterConfig, checkpoint_bytes: int, findings: Findings
) -> None:
    """Check whether Slurm accepts the job, requeues it after a preemption, and leaves it time to save."""
    refusal = slurm_commands.submission_refusal(submission_text(run, config, cluster))
    if refusal is not None:
        findings.problem(f"Slurm would refuse the job: {refusal[:_SHOWN]}")
    if "no-requeue" in sbatch_options(cluster):
        findings.warn(
            "the cluster file turns requeueing off: a preempted job does not start again by itself. "
            "`outlast resume` continues it by hand."
        )
    image = Path(cluster.container.image) if cluster.container is not None else None
    if image is not None and image.suffix in (".sif", ".sqsh") and not image.exists():
        findings.problem(f"container.image = {image}: no such file.")
    preemption = slurm_commands.preemption()
    save_s = save_seconds(checkpoint_bytes, cluster)
    check_partitions(cluster, slurm_commands.partitions(cluster.partition), preemption, save_s, findings)
    if cluster.qos is not None:
        check_qos(cluster, slurm_commands.qos_fields(cluster.qos), preemption, save_s, findings)
    check_time(checkpoint_bytes, cluster, findings)
    # Also for a job of one node, which is rarely the machine that submits it.
    check_shared([run.path, *(source.path for source in config.data.sources)], findings)


def save_seconds(checkpoint_bytes: int, cluster: ClusterConfig) -> float:
    """About how long the nodes take to write one checkpoint."""
    return checkpoint_bytes / (SAVE_BYTES_PER_SECOND * cluster.nodes)


def check_partitions(
    cluster: ClusterConfig,
    partitions: Sequence[Mapping[str, str]],
    preemption: Preemption,
    save_s: float,
    findings: Findings,
) -> None:
    """Find jobs that exceed their partitions' limits: by default Slurm queues them and never starts them.

    Also warn when a preemption there leaves less than the `save_s` seconds that a checkpoint takes.
    """
    refusals = [refusal for fields in partitions if (refusal := _refusal(cluster, fields)) is not None]
    if refusals and len(refusals) == len(partitions):
        for refusal in refusals:
            findings.problem(f"{refusal}: {_NEVER_STARTS}")
        return
    for refusal in refusals:
        findings.warn(f"{refusal}: the job never starts there.")
    for fields in partitions:
        if (condition := fields.get("State", "UP")) != "UP":
            findings.warn(f"partition {fields['PartitionName']} is {condition}: no job starts there now.")
    if preemption.kind == "preempt/partition_prio":
        for fields in partitions:
            mode = fields.get("PreemptMode", "OFF")
            where = f"partition {fields['PartitionName']}"
            findings.warn(_preemption_warning(where, mode, fields, save_s))


def check_qos(
    cluster: ClusterConfig,
    qos: Mapping[str, str],
    preemption: Preemption,
    save_s: float,
    findings: Findings,
) -> None:
    """Check the limits and the preemption of a QOS in the same way."""
    if (refusal := _too_long(cluster, qos.get("MaxWall", ""), f"qos {cluster.qos}")) is not None:
        findings.problem(f"{refusal}: {_NEVER_STARTS}")
    asked = {"node": cluster.nodes, "gres/gpu": cluster.nodes * cluster.gpus_per_node}
    if cluster.cpus_per_process is not None:
        asked["cpu"] = cluster.world_size * cluster.cpus_per_process
    for limit in ("MaxTRES", "MaxTRESPU", "GrpTRES"):  # per job, per user, in total
        for name, most in (item.partition("=")[::2] for item in qos.get(limit, "").split(",") if item):
            if most.isdigit() and asked.get(name, 0) > int(most):
                findings.problem(
                    f"{asked[name]} × {name} is more than qos {cluster.qos} allows ({limit}: {name}={most}): "
                    "the job would wait forever. Ask for less, or for another qos."
                )
    if preemption.kind == "preempt/qos":
        mode = qos.get("PreemptMode", "OFF")
        mode = preemption.mode if mode == "cluster" else mode
        findings.warn(_preemption_warning(f"qos {cluster.qos}", mode, qos, save_s))


def check_time(checkpoint_bytes: int, cluster: ClusterConfig, findings: Findings) -> None:
    """Check that a job has time to train, and then to save, within its time limit."""
    if cluster.time_limit_min is None:
        return
    limit_s, delay_s = 60 * cluster.time_limit_min, cluster.signal_delay_s
    if limit_s <= delay_s + _SIGNAL_EARLY_S:
        findings.problem(
            f"time_limit = {cluster.time_limit} leaves no time to train: Slurm asks the job to save "
            f"signal_delay_s = {delay_s} s before its end, and may do so {_SIGNAL_EARLY_S} s early. "
            "Use a longer limit, or a smaller signal_delay_s."
        )
    save_s = save_seconds(checkpoint_bytes, cluster)
    if save_s > delay_s:
        findings.warn(
            f"signal_delay_s = {delay_s} is short for a checkpoint of {size(checkpoint_bytes)}: at "
            f"{size(SAVE_BYTES_PER_SECOND)} per second and node it takes {save_s:.0f} s. "
            f"Use signal_delay_s = {2 * round(save_s)}."
        )


def _refusal(cluster: ClusterConfig, partition: Mapping[str, str]) -> str | None:
    name, most = partition["PartitionName"], partition.get("MaxNodes", "")
    if most.isdigit() and cluster.nodes > int(most):
        return f"nodes = {cluster.nodes} is more than partition {name} allows ({most})"
    return _too_long(cluster, partition.get("MaxTime", ""), f"partition {name}")


def _too_long(cluster: ClusterConfig, most: str, where: str) -> str | None:
    asked_min, most_min = cluster.time_limit_min, time_limit_min(most)
    if asked_min is None or most_min is None or asked_min <= most_min:
        return None
    return f"time_limit = {cluster.time_limit} is more than {where} allows ({most})"


def _preemption_warning(where: str, mode: str, fields: Mapping[str, str], save_s: float) -> str | None:
    """Why a preemption may lose work, or the job itself; None when it leaves the time to save."""
    modes = set(mode.upper().split(","))
    grace_s = _seconds(fields.get("GraceTime", "0"))
    if not modes & {"CANCEL", "REQUEUE"}:
        return None
    if grace_s == 0 and "CANCEL" in modes:
        return (
            f"{where} preempts by ending jobs for good, without a grace time (PreemptMode=CANCEL, "
            "GraceTime=0): a preempted job cannot save, and does not start again by itself. `outlast "
            "resume` continues from the last checkpoint; choose checkpoint.every_steps accordingly."
        )
    if grace_s == 0:
        return (
            f"{where} preempts without a grace time (GraceTime=0): the steps since the last checkpoint are "
            "then lost and computed again. Choose checkpoint.every_steps accordingly."
        )
    if grace_s < save_s:
        return (
            f"{where} preempts with a grace time of {grace_s} s, and a checkpoint takes about {save_s:.0f} "
            "s: the steps since the last one are then lost and computed again. Choose checkpoint.every_steps "
            "accordingly, or use more nodes."
        )
    return None


def _seconds(text: str) -> int:
    """Seconds of a time, which scontrol writes as a number and sacctmgr as [DAYS-]HOURS:MM:SS; else 0."""
    if text.isdigit():
        return int(text)
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
