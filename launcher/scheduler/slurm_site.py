"""What the Slurm site and the tracker say to a submission before it is made: problems and warnings, in words.

Asks Slurm's commands and the tracker's port, each for a moment only; submits nothing, writes nothing.
"""

import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig, time_limit_min
from launcher.findings import Findings
from launcher.preflight.plan import checkpoint_bytes, size
from launcher.scheduler import slurm_commands as slurm
from launcher.scheduler.sbatch import submission_text
from launcher.scheduler.slurm_commands import Preemption

# What one node writes to a parallel file system while all others do; a site's own speed shows in the events.
SAVE_BYTES_PER_SECOND = 1e9
_SIGNAL_EARLY_S = 60  # Slurm may signal a minute before the moment it was asked for (sbatch(1), --signal)
_TRACKER_PATIENCE_S = 1.0
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "wekafs", "panfs", "pvfs2", "9p", "afs", "cifs")
_LESS = "the job would wait for ever. Ask for less; the run takes as many turns as it needs."
_SHOWN = 300  # characters of what sbatch says


def check_site(run: RunDir, config: RunConfig, cluster: ClusterConfig, findings: Findings) -> None:
    """Whether Slurm would take the job, bring it back after a preemption, and give it time to save."""
    answer = slurm.would_take(submission_text(run, config, cluster))
    if answer is not None:
        findings.problem(f"Slurm would refuse the job: {answer[:_SHOWN]}")
    if "no-requeue" in cluster.sbatch_options:
        findings.warnings.append(
            "the cluster file turns requeueing off: a preempted job does not come back by itself. "
            "`outlast resume` continues it by hand."
        )
    image = Path(cluster.container.image) if cluster.container is not None else None
    if image is not None and image.suffix in (".sif", ".sqsh") and not image.exists():
        findings.problem(f"container.image = {image}: no such file.")
    preemption = slurm.preemption()
    save_s = save_seconds(config, cluster)
    check_partitions(cluster, slurm.partitions(cluster.partition), preemption, save_s, findings)
    if cluster.qos is not None:
        check_qos(cluster, slurm.qos_fields(cluster.qos), preemption, save_s, findings)
    check_time(config, cluster, findings)
    # Also of a job of one node: that is another machine than this one.
    check_shared([run.path, *(source.path for source in config.data.sources)], findings)


def save_seconds(config: RunConfig, cluster: ClusterConfig) -> float:
    """About how long the nodes take to write one checkpoint."""
    return checkpoint_bytes(config) / (SAVE_BYTES_PER_SECOND * cluster.nodes)


def check_partitions(
    cluster: ClusterConfig,
    partitions: Sequence[Mapping[str, str]],
    preemption: Preemption,
    save_s: float,
    findings: Findings,
) -> None:
    """What Slurm takes into the queue and never starts, by default: more than any of the partitions allows.

    And whether a preemption leaves the `save_s` seconds that a checkpoint takes.
    """
    refusals = [refusal for fields in partitions if (refusal := _refusal(cluster, fields)) is not None]
    if refusals and len(refusals) == len(partitions):
        findings.problems += [f"{refusal}: {_LESS}" for refusal in refusals]
        return
    findings.warnings += [f"{refusal}: the job never starts there." for refusal in refusals]
    for fields in partitions:
        if (condition := fields.get("State", "UP")) != "UP":
            findings.warn(f"partition {fields['PartitionName']} is {condition}: nothing starts there now.")
    if preemption.kind == "preempt/partition_prio":
        for fields in partitions:
            mode = fields.get("PreemptMode", "OFF")
            findings.warn(_hasty(f"partition {fields['PartitionName']}", mode, fields, save_s))


def check_qos(
    cluster: ClusterConfig,
    qos: Mapping[str, str],
    preemption: Preemption,
    save_s: float,
    findings: Findings,
) -> None:
    """The same of the limits of a QOS, which sbatch does not refuse either unless the site says so."""
    if (refusal := _too_long(cluster, qos.get("MaxWall", ""), f"qos {cluster.qos}")) is not None:
        findings.problem(f"{refusal}: {_LESS}")
    asked = {"node": cluster.nodes, "gres/gpu": cluster.nodes * cluster.gpus_per_node}
    if cluster.cpus_per_process is not None:
        asked["cpu"] = cluster.world_size * cluster.cpus_per_process
    for limit in ("MaxTRES", "MaxTRESPU", "GrpTRES"):  # of a job, of a user, of all
        for name, most in (item.partition("=")[::2] for item in qos.get(limit, "").split(",") if item):
            if most.isdigit() and asked.get(name, 0) > int(most):
                findings.problem(
                    f"{asked[name]} × {name} is more than qos {cluster.qos} allows ({limit}: {name}={most}): "
                    "the job would wait for ever. Ask for less, or for another qos."
                )
    if preemption.kind == "preempt/qos":
        mode = qos.get("PreemptMode", "OFF")
        mode = preemption.mode if mode == "cluster" else mode
        findings.warn(_hasty(f"qos {cluster.qos}", mode, qos, save_s))


def _refusal(cluster: ClusterConfig, partition: Mapping[str, str]) -> str | None:
    name, most = partition["PartitionName"], partition.get("MaxNodes", "")
    if most.isdigit() and cluster.nodes > int(most):
        return f"nodes = {cluster.nodes} is more than partition {name} allows ({most})"
    return _too_long(cluster, partition.get("MaxTime", ""), f"partition {name}")


def _too_long(cluster: ClusterConfig, most: str, what: str) -> str | None:
    asked_min, most_min = cluster.time_limit_min, time_limit_min(most)
    if asked_min is None or most_min is None or asked_min <= most_min:
        return None
    return f"time_limit = {cluster.time_limit} is more than {what} allows ({most})"


def _hasty(what: str, mode: str, fields: Mapping[str, str], save_s: float) -> str | None:
    """Why a preemption there may lose work, or the job for good; None where it leaves the time to save."""
    modes = set(mode.upper().split(","))
    grace_s = _seconds(fields.get("GraceTime", "0"))
    if not modes & {"CANCEL", "REQUEUE"}:
        return None
    if grace_s == 0 and "CANCEL" in modes:
        return (
            f"{what} preempts by ending jobs for good, without a grace time (PreemptMode=CANCEL, "
            "GraceTime=0): nothing can be saved then, and the job does not come back by itself. `outlast "
            "resume` continues from the last checkpoint; choose checkpoint.every_steps accordingly."
        )
    if grace_s == 0:
        return (
            f"{what} preempts without a grace time (GraceTime=0): what came after the last checkpoint is "
            "then lost and computed again. Choose checkpoint.every_steps accordingly."
        )
    if grace_s < save_s:
        return (
            f"{what} preempts with a grace time of {grace_s} s, and a checkpoint takes about {save_s:.0f} s: "
            "what came after the last one is then lost and computed again. Choose checkpoint.every_steps "
            "accordingly, or more nodes."
        )
    return None


def _seconds(text: str) -> int:
    """Seconds of a time that scontrol writes as such and sacctmgr as HOURS:MM:SS; 0 of anything else."""
    if text.isdigit():
        return int(text)
    hours, minutes, seconds = (int(part) for part in text.split(":")) if text.count(":") == 2 else (0, 0, 0)
    return (hours * 60 + minutes) * 60 + seconds


def check_time(config: RunConfig, cluster: ClusterConfig, findings: Findings) -> None:
    """Whether a job can train and then save within its time limit."""
    if cluster.time_limit_min is None:
        return
    limit_s, delay_s = 60 * cluster.time_limit_min, cluster.signal_delay_s
    if limit_s <= delay_s + _SIGNAL_EARLY_S:
        findings.problem(
            f"time_limit = {cluster.time_limit} leaves no time to train: the job is told to save "
            f"signal_delay_s = {delay_s} s before its end, and Slurm may do so {_SIGNAL_EARLY_S} s early. "
            f"Use a longer limit, or a smaller signal_delay_s."
        )
    save_s = save_seconds(config, cluster)
    if save_s > delay_s:
        findings.warnings.append(
            f"signal_delay_s = {delay_s} is short for a checkpoint of {size(checkpoint_bytes(config))}: at "
            f"{size(SAVE_BYTES_PER_SECOND)} a second and node it takes {save_s:.0f} s. "
            f"Use signal_delay_s = {2 * round(save_s)}."
        )


def check_shared(paths: list[Path], findings: Findings) -> None:
    """Warn of folders that lie on a disk of this machine, as far as can be seen from here."""
    for path in paths:
        kind = file_system(path)
        if kind is not None and not kind.startswith(_SHARED):
            findings.warnings.append(
                f"{path} lies on {kind}, which other machines usually do not see; every node of the job must."
            )


def check_tracker(config: RunConfig, findings: Findings) -> None:
    """Warn when the tracking server does not answer: the record then waits for it."""
    uri = config.tracking.uri
    if not config.tracking.enabled or uri is None or not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_TRACKER_PATIENCE_S).close()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        findings.warnings.append(
            f"tracking.uri = {uri} does not answer from here ({reason}); training goes on without it, and "
            "what was recorded is sent once it does."
        )


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The type of the file system that holds `path`, or would; None where the machine does not say."""
    absolute = path.absolute()
    best, found = -1, None
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        point = Path(fields[1].replace("\\040", " "))
        if absolute.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), fields[2]
    return found
