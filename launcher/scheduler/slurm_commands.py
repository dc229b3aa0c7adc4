"""Slurm's commands: where nodes are, which state jobs have, and how a job gets back into the queue.

Every command has a time limit, and every function a value for "no answer": the controller may be restarting,
and a machine that trains locally has none of these commands. Without accounting sacct fails, so squeue and
scontrol are asked first.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

from data_pipeline.errors import LaunchError
from launcher.scheduler.protocol import JobState, Standing

_TIMEOUT_S = 30.0
_RETRY_S = 5.0
_EXCLUDE_TIMEOUT_S = 60.0
_REFUSALS = 12
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")  # a job, or one of an array
_ROW = "--format=%i|%T|%r|%N"
_FORGOTTEN = ("Invalid job id", "not found")  # the second one for a job of an array
_AWAY = "Unable to contact slurm controller"
_NO_ANSWER = Standing(JobState.UNKNOWN, reason="Slurm does not answer")


def is_here() -> bool:
    """Whether this machine, or this container, has Slurm's commands."""
    return shutil.which("scontrol") is not None


def hostnames(node_list: str) -> list[str]:
    """The nodes in Slurm's short form: `node[1-3]` → node1, node2, node3. Raises LaunchError."""
    return _require(["scontrol", "show", "hostnames", node_list]).split()


def node_address(node: str, others: Sequence[str]) -> str:
    """The IP address at which the nodes `others` reach this one, which Slurm calls `node`.

    On Debian a machine resolves its own name to 127.0.1.1. The result is then this machine's address on the
    route to one of the others. Raises LaunchError when no address is known.
    """
    try:
        address = _address(node)
    except LaunchError:
        if is_here():
            raise
        found = _resolved(socket.gethostname())  # a container without Slurm's commands
        if found is None:
            raise
        address = found
    if not ip_address(address).is_loopback or not others:
        return address
    other = _other_address(others[0])
    with socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # UDP sends nothing here; the kernel only chooses a route
        return str(probe.getsockname()[0])


def _other_address(node: str) -> str:
    """The IP address of `node`, or of the node that runs srun if a container knows no other."""
    try:
        return _address(node)
    except LaunchError:
        launched_from = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
        if launched_from is None or is_here():
            raise
        return launched_from


def _address(node: str) -> str:
    """The IP address of a node's name, or of its NodeAddr if only Slurm knows the name."""
    if (address := _resolved(node)) is not None:
        return address
    found = re.search(r"NodeAddr=(\S+)", _require(["scontrol", "show", "node", node]))
    if found is None:
        raise LaunchError(f"neither this machine nor Slurm knows an address of node {node}")
    if (address := _resolved(found[1])) is None:
        raise LaunchError(
            f"node {node} has no address here: neither that name nor its NodeAddr, {found[1]}, has one. Ask "
            "the site for an entry in its name service or in /etc/hosts."
        )
    return address


def _resolved(name: str) -> str | None:
    """The IPv4 address of a name, else its IPv6 address, else None."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return str(socket.getaddrinfo(name, None, family)[0][4][0])
    return None


def job_fields(job_id: str) -> dict[str, str] | None:
    """The fields of `scontrol show job`; empty if Slurm has forgotten the job, None if it does not answer."""
    answer = ask(["scontrol", "--oneliner", "show", "job", job_id])
    if answer is None:
        return None
    if answer.returncode != 0:
        output = answer.stdout + answer.stderr
        return {} if any(words in output for words in _FORGOTTEN) else None
    return _fields(answer.stdout.splitlines()[0])


def standings(job_ids: Iterable[str]) -> dict[str, Standing]:
    """The standing of each job, from two questions at most, however many jobs there are."""
    asked = sorted(set(job_ids))
    wanted = [job_id for job_id in asked if _JOB_ID.fullmatch(job_id)]
    # squeue refuses a whole question that names one such id.
    foreign = {job_id: _standing_of_foreign(job_id) for job_id in asked if job_id not in wanted}
    return {**foreign, **(_standings(wanted) if wanted else {})}


def _standing_of_foreign(job_id: str) -> Standing:
    return Standing(JobState.UNKNOWN, reason=f"{job_id} is not the id of a Slurm job")


def _standings(wanted: Sequence[str]) -> dict[str, Standing]:
    found = _rows("--me")
    if found is None:
        return dict.fromkeys(wanted, _NO_ANSWER)
    # The others belong to another user, or Slurm has forgotten them.
    others = [job_id for job_id in wanted if job_id not in found]
    if len(others) == 1:  # squeue reports a single forgotten job as an error like any other
        return {job_id: found.get(job_id) or _standing_by_scontrol(job_id) for job_id in wanted}
    left = _rows(f"--jobs={','.join(others)}") if others else {}
    unseen = _NO_ANSWER if left is None else Standing(JobState.ENDED)
    return {job_id: ({**(left or {}), **found}).get(job_id, unseen) for job_id in wanted}


def why_ended(job_id: str) -> str | None:
    """Slurm's state of a job that has ended (CANCELLED, TIMEOUT, NODE_FAIL…), while Slurm remembers it."""
    fields = job_fields(job_id)
    if fields and "JobState" in fields:
        return fields["JobState"]
    return accounted_states([job_id]).get(job_id)


def accounted_states(job_ids: Sequence[str]) -> dict[str, str]:
    """The states of several jobs that only the accounting remembers, if the site has one."""
    if not job_ids:
        return {}
    question = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    answer = ask([*question, f"--jobs={','.join(job_ids)}"])
    if answer is None or answer.returncode != 0:
        return {}
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}


def submission_refusal(submission: str) -> str | None:
    """Why sbatch would refuse this batch script (partition, account, GPUs, time limit…), or None.

    None also when Slurm does not answer, which is not the script's fault.
    """
    answer = ask(["sbatch", "--test-only"], submission)
    if answer is None or answer.returncode == 0 or _AWAY in answer.stderr:
        return None
    messages = [line for line in answer.stderr.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in messages) or None


def is_wanted(job_id: str, job_run: int) -> bool:
    """Whether job run `job_run` has its nodes and is not cancelled; waits while the controller is away.

    A later job run may have started while a node that was cut off still ends an earlier one.
    """
    while (fields := job_fields(job_id)) is None:
        time.sleep(_RETRY_S)
    return fields.get("JobState") == "RUNNING" and int(fields.get("Restarts", "0")) == job_run


def restarts(job_id: str) -> int:
    """How often the job was requeued, as far as Slurm says."""
    return int((job_fields(job_id) or {}).get("Restarts", "0"))


def partitions(names: str | None) -> list[dict[str, str]]:
    """The fields of `scontrol show partition` for these partitions (a,b,…); None means the default one.

    A partition that Slurm does not know is left out.
    """
    answer = ask(["scontrol", "--oneliner", "show", "partition"])
    if answer is None or answer.returncode != 0:
        return []
    found = [_fields(line) for line in answer.stdout.splitlines() if line.strip()]
    if names is None:
        return [fields for fields in found if fields.get("Default") == "YES"]
    return [fields for fields in found if fields.get("PartitionName") in names.split(",")]


@dataclass(frozen=True)
class Preemption:
    """A site's PreemptType (by partition, by qos, none) and PreemptMode; empty if Slurm does not answer."""

    kind: str = ""
    mode: str = ""


def preemption() -> Preemption:
    """How the site preempts jobs."""
    answer = ask(["scontrol", "show", "config"])
    text = answer.stdout if answer is not None else ""
    found = dict(re.findall(r"^(Preempt(?:Type|Mode))\s*=\s*(\S+)", text, re.MULTILINE))
    return Preemption(found.get("PreemptType", ""), found.get("PreemptMode", ""))


def qos_fields(name: str) -> dict[str, str]:
    """The fields of a QOS in the accounting; empty if there is no accounting or no such QOS."""
    columns = "MaxWall,MaxTRES,MaxTRESPU,GrpTRES,PreemptMode,GraceTime"
    question = ["sacctmgr", "--noheader", "--parsable2", "show", "qos", name, f"format={columns}"]
    answer = ask(question)
    if answer is None or answer.returncode != 0 or not answer.stdout.strip():
        return {}
    return dict(zip(columns.split(","), answer.stdout.splitlines()[0].split("|"), strict=False))


def requeue(job_id: str, job_run: int, exclude: Sequence[str] = ()) -> bool:
    """Requeue the job `job_id` from its job run `job_run`, away from the nodes `exclude`.

    False if that job run is no longer running. A controller that does not answer is asked again. Raises
    LaunchError if the controller refuses for a minute, as it does for a job that may not be requeued.

    Slurm ends the calling process soon afterwards, so the caller must have nothing left to do.
    """
    refusals = 0
    while is_wanted(job_id, job_run):
        before = (job_fields(job_id) or {}).get("ExcNodeList", "(null)")
        answer = ask(["scontrol", "requeue", job_id])
        if answer is not None and answer.returncode == 0:
            if exclude:
                _exclude(job_id, {*exclude, *([] if before == "(null)" else hostnames(before))})
            return True
        message = answer.stderr.strip() if answer is not None else "no answer"
        print(f"scontrol requeue {job_id}: {message}", flush=True)
        refusals += answer is not None and _AWAY not in message
        if refusals == _REFUSALS:
            raise LaunchError(
                f"Slurm does not requeue the job: {message}. `outlast resume` continues the run."
            )
        time.sleep(_RETRY_S)
    return False


def _exclude(job_id: str, nodes: set[str]) -> None:
    """Make the requeued job avoid `nodes`. Slurm refuses while it still ends the job run, so ask again.

    The job cannot start again before this process has ended.
    """
    deadline = time.monotonic() + _EXCLUDE_TIMEOUT_S
    while time.monotonic() < deadline:
        ask(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted(nodes))}"])
        excluded = (job_fields(job_id) or {}).get("ExcNodeList", "(null)")
        if excluded != "(null)" and nodes <= set(hostnames(excluded)):
            return
        time.sleep(0.5)
    print(f"Slurm does not exclude {', '.join(sorted(nodes))} from job {job_id}", flush=True)


def start_now(job_id: str) -> None:
    """End the two minutes for which Slurm holds a requeued job, if the site allows it."""
    ask(["scontrol", "update", f"JobId={job_id}", "StartTime=now"])


def cancel_pending(job_id: str) -> None:
    """Remove a pending job from the queue. Raises LaunchError.

    A job that has just started is left alone, except for a job of an array: that gets SIGTERM, and saves
    within Slurm's KillWait.
    """
    # Given a state, scancel 22.05 ends all the pending jobs of an array instead of one.
    only = [] if "_" in job_id else ["--state=PENDING"]
    _require(["scancel", *only, job_id])


def cancel(job_id: str) -> None:
    """End a job in whatever state it is, without asking whether that worked."""
    ask(["scancel", job_id])


def require_cancel(job_id: str) -> None:
    """End a job in whatever state it is. Raises LaunchError if Slurm refuses."""
    _require(["scancel", job_id])


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def _rows(choice: str) -> dict[str, Standing] | None:
    """The standing of the jobs that squeue shows for `choice`; None if it does not answer."""
    answer = ask(["squeue", "--noheader", "--array", "--states=all", choice, _ROW])
    if answer is None or answer.returncode != 0:
        return None
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: _standing(row) for row in rows if len(row) == 4}


def _standing(row: list[str]) -> Standing:
    _, state, reason, nodes = row
    if state in _RUNNING:
        return Standing(JobState.RUNNING, state, nodes)
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "CONFIGURING"):
        return Standing(JobState.PENDING, state, reason)
    return Standing(JobState.ENDED, state, reason)


def _standing_by_scontrol(job_id: str) -> Standing:
    """The standing of another user's job, or of one that Slurm has forgotten."""
    fields = job_fields(job_id)
    if fields is None:
        return _NO_ANSWER
    if not fields:
        return Standing(JobState.ENDED)
    return _standing(
        [job_id, fields.get("JobState", ""), fields.get("Reason", ""), fields.get("NodeList", "")]
    )


def ask(command: list[str], stdin: str | None = None) -> "subprocess.CompletedProcess[str] | None":
    """Run one of Slurm's commands; None if it is not installed, cannot run, or does not end in time."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # for example no memory for another process
        return None


def _require(command: list[str]) -> str:
    answer = ask(command)
    if answer is None or answer.returncode != 0:
        message = (
            answer.stderr.strip()
            if answer is not None
            else "the command is not installed here, or did not end in time"
        )
        raise LaunchError(f"`{' '.join(command)}` failed: {message}")
    return answer.stdout
