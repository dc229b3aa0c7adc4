"""What Outlast asks of Slurm's commands: where nodes are, how jobs stand, and to put a job back in the queue.

Every question has a time limit and an answer for "nobody can say": the controller may be restarting, and a
machine that trains locally has none of these commands. Without accounting sacct fails, so squeue and
scontrol are asked first.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_pipeline.errors import LaunchError

_QUESTION_S = 30.0
_PATIENCE_S = 5.0
_AGREES_S = 60.0
_REFUSALS = 12
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_ROW = "--format=%i|%T|%r|%N"
_FORGOTTEN = ("Invalid job id", "not found")  # the second of one job of an array
_AWAY = "Unable to contact slurm controller"


@dataclass(frozen=True)
class Standing:
    """How a job stands: "running", "pending", "ended" or "unknown"; Slurm's own word; its reason or nodes,
    or why nobody can say.
    """

    word: str
    slurm_state: str = ""
    reason: str = ""


_SILENT = Standing("unknown", reason="Slurm is silent")


def is_here() -> bool:
    """Whether this machine, or this container, can speak to Slurm."""
    return shutil.which("scontrol") is not None


def hostnames(node_list: str) -> list[str]:
    """The nodes of Slurm's short form: `node[1-3]` → node1, node2, node3. Raises LaunchError."""
    return _require(["scontrol", "show", "hostnames", node_list]).split()


def node_address(node: str, others: Sequence[str]) -> str:
    """The IP address at which the nodes `others` reach this one, which Slurm calls `node`.

    On Debian a machine knows its own name as 127.0.1.1. There it is the address that this machine has
    towards one of the others. Raises LaunchError when nobody knows one.
    """
    try:
        address = _address(node)
    except LaunchError:
        if is_here():
            raise
        address = socket.gethostbyname(socket.gethostname())  # in a container without Slurm's commands
    if not address.startswith("127.") or not others:
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_other_address(others[0]), 9))  # of UDP: nothing is sent, the kernel chooses a route
        return str(probe.getsockname()[0])


def _other_address(node: str) -> str:
    """The IP address of `node`; of the one that srun runs on, where a container knows no other."""
    try:
        return _address(node)
    except LaunchError:
        launched_from = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
        if launched_from is None or is_here():
            raise
        return launched_from


def _address(node: str) -> str:
    """The IP address of a node: its name's, or where the name is known to Slurm alone, its NodeAddr's."""
    try:
        return str(socket.getaddrinfo(node, None, socket.AF_INET)[0][4][0])
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", _require(["scontrol", "show", "node", node]))
        if found is None:
            raise LaunchError(f"neither this machine nor Slurm knows an address of node {node}") from None
        return socket.gethostbyname(found.group(1))


def job_fields(job_id: str) -> dict[str, str] | None:
    """What `scontrol show job` says, by field; empty when Slurm has forgotten it, None when it is silent."""
    answer = _ask(["scontrol", "--oneliner", "show", "job", job_id])
    if answer is None:
        return None
    if answer.returncode != 0:
        said = answer.stdout + answer.stderr
        return {} if any(words in said for words in _FORGOTTEN) else None
    return _fields(answer.stdout.splitlines()[0])


def standings(job_ids: Iterable[str]) -> dict[str, Standing]:
    """How each of these jobs stands, with two questions at most, however many they are."""
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    found = _rows("--me")
    if found is None:
        return dict.fromkeys(wanted, _SILENT)
    # Not among this user's: another user's, or one that Slurm has forgotten.
    others = [job_id for job_id in wanted if job_id not in found]
    if len(others) == 1:  # of a single one that is forgotten squeue makes an error like any other
        return {job_id: found.get(job_id) or _elsewhere(job_id) for job_id in wanted}
    left = _rows(f"--jobs={','.join(others)}") if others else {}
    unseen = _SILENT if left is None else Standing("ended")
    return {job_id: ({**(left or {}), **found}).get(job_id, unseen) for job_id in wanted}


def why_ended(job_id: str) -> str | None:
    """Slurm's last word on a job that has ended (CANCELLED, TIMEOUT, NODE_FAIL…), while it is remembered."""
    fields = job_fields(job_id)
    if fields and "JobState" in fields:
        return fields["JobState"]
    return last_words([job_id]).get(job_id)


def last_words(job_ids: Sequence[str]) -> dict[str, str]:
    """The same of several jobs that only the accounting remembers, where there is one."""
    if not job_ids:
        return {}
    question = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    answer = _ask([*question, f"--jobs={','.join(job_ids)}"])
    if answer is None or answer.returncode != 0:
        return {}
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}


def would_take(submission: str) -> str | None:
    """Why sbatch would refuse this submission file (partition, account, GPUs, time limit…), or None.

    Also None when Slurm says nothing: that it is away at this moment is not the submission's fault.
    """
    answer = _ask(["sbatch", "--test-only"], submission)
    if answer is None or answer.returncode == 0 or _AWAY in answer.stderr:
        return None
    said = [line for line in answer.stderr.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in said) or None


def is_wanted(job_id: str, turn: int) -> bool:
    """Whether the job has its nodes in its turn `turn` and nobody has cancelled it; waits for a controller
    that is away. A later turn may run while a node that was cut off still ends an earlier one.
    """
    while (fields := job_fields(job_id)) is None:
        time.sleep(_PATIENCE_S)
    return fields.get("JobState") == "RUNNING" and int(fields.get("Restarts", "0")) == turn


def comes_back(job_id: str, turn: int) -> bool:
    """Whether somebody has put the job back in the queue during its turn `turn`.

    Slurm counts a restart as soon as it is asked for, while the job still runs out.
    """
    return restarts(job_id) > turn


def restarts(job_id: str) -> int:
    """How often the job was put back in the queue, as far as Slurm says."""
    return int((job_fields(job_id) or {}).get("Restarts", "0"))


def partitions(names: str | None) -> list[dict[str, str]]:
    """What `scontrol show partition` says of these partitions (a,b,…), by field; None names the default one.

    One of which Slurm says nothing is left out.
    """
    answer = _ask(["scontrol", "--oneliner", "show", "partition"])
    if answer is None or answer.returncode != 0:
        return []
    found = [_fields(line) for line in answer.stdout.splitlines() if line.strip()]
    if names is None:
        return [fields for fields in found if fields.get("Default") == "YES"]
    return [fields for fields in found if fields.get("PartitionName") in names.split(",")]


@dataclass(frozen=True)
class Preemption:
    """A site's PreemptType (by partition, by qos, none) and PreemptMode; empty when Slurm says nothing."""

    kind: str = ""
    mode: str = ""


def preemption() -> Preemption:
    """How the site takes nodes away from jobs."""
    answer = _ask(["scontrol", "show", "config"])
    text = answer.stdout if answer is not None else ""
    found = dict(re.findall(r"^(Preempt(?:Type|Mode))\s*=\s*(\S+)", text, re.MULTILINE))
    return Preemption(found.get("PreemptType", ""), found.get("PreemptMode", ""))


def qos_fields(name: str) -> dict[str, str]:
    """What the accounting says of a QOS, by field; empty when there is no accounting or no such QOS."""
    columns = "MaxWall,MaxTRES,MaxTRESPU,GrpTRES,PreemptMode,GraceTime"
    question = ["sacctmgr", "--noheader", "--parsable2", "show", "qos", name, f"format={columns}"]
    answer = _ask(question)
    if answer is None or answer.returncode != 0 or not answer.stdout.strip():
        return {}
    return dict(zip(columns.split(","), answer.stdout.splitlines()[0].split("|"), strict=False))


def requeue(job_id: str, turn: int, exclude: Sequence[str] = ()) -> bool:
    """Put the job `job_id`, which runs its turn `turn`, back in the queue, away from the nodes `exclude`;
    False once that turn is not running any more. A controller that does not answer is asked again; one that
    answers and refuses for a minute (the job may not be requeued at all) raises LaunchError.

    Slurm ends this very process soon after: nothing may be left to do.
    """
    refusals = 0
    while is_wanted(job_id, turn):
        before = (job_fields(job_id) or {}).get("ExcNodeList", "(null)")
        answer = _ask(["scontrol", "requeue", job_id])
        if answer is not None and answer.returncode == 0:
            if exclude:
                _keep_away(job_id, {*exclude, *([] if before == "(null)" else hostnames(before))})
            return True
        said = answer.stderr.strip() if answer is not None else "no answer"
        print(f"scontrol requeue {job_id}: {said}", flush=True)
        refusals += answer is not None and _AWAY not in said
        if refusals == _REFUSALS:
            raise LaunchError(
                f"Slurm does not put the job back in the queue: {said}. `outlast resume` continues."
            )
        time.sleep(_PATIENCE_S)
    return False


def _keep_away(job_id: str, nodes: set[str]) -> None:
    """Have the requeued job start elsewhere; while Slurm still ends what ran it refuses, so ask again.

    The job cannot start again before this process has ended.
    """
    deadline = time.monotonic() + _AGREES_S
    while time.monotonic() < deadline:
        _ask(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted(nodes))}"])
        excluded = (job_fields(job_id) or {}).get("ExcNodeList", "(null)")
        if excluded != "(null)" and nodes <= set(hostnames(excluded)):
            return
        time.sleep(0.5)
    print(f"Slurm does not keep job {job_id} away from {', '.join(sorted(nodes))}", flush=True)


def start_now(job_id: str) -> None:
    """End the two minutes for which Slurm keeps a requeued job back, where it lets us."""
    _ask(["scontrol", "update", f"JobId={job_id}", "StartTime=now"])


def cancel_waiting(job_id: str) -> None:
    """Take a job that waits out of the queue; one that has just started is left alone, but for a job of an
    array, which gets SIGTERM then and saves in Slurm's KillWait. Raises LaunchError.
    """
    # With a state named, scancel ends all the waiting jobs of an array for one of them (22.05).
    only = [] if "_" in job_id else ["--state=PENDING"]
    _require(["scancel", *only, job_id])


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def _rows(choice: str) -> dict[str, Standing] | None:
    """How the jobs stand that squeue shows for `choice`; None when it says nothing."""
    answer = _ask(["squeue", "--noheader", "--array", "--states=all", choice, _ROW])
    if answer is None or answer.returncode != 0:
        return None
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: _standing(row) for row in rows if len(row) == 4}


def _standing(row: list[str]) -> Standing:
    _, state, reason, nodes = row
    if state in _RUNNING:
        return Standing("running", state, nodes)
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "CONFIGURING"):
        return Standing("pending", state, reason)
    return Standing("ended", state, reason)


def _elsewhere(job_id: str) -> Standing:
    """A job that is not among this user's: another user's run, or one that Slurm has forgotten."""
    fields = job_fields(job_id)
    if fields is None:
        return _SILENT
    if not fields:
        return Standing("ended")
    return _standing(
        [job_id, fields.get("JobState", ""), fields.get("Reason", ""), fields.get("NodeList", "")]
    )


def _ask(command: list[str], question: str | None = None) -> "subprocess.CompletedProcess[str] | None":
    """The answer, or None when there is no such command, or it cannot run or does not end in time."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, input=question, capture_output=True, text=True, timeout=_QUESTION_S)
    except (OSError, subprocess.TimeoutExpired):  # no memory for another process, say
        return None


def _require(command: list[str]) -> str:
    answer = _ask(command)
    if answer is None or answer.returncode != 0:
        said = answer.stderr.strip() if answer is not None else "no such command here, or no answer in time"
        raise LaunchError(f"`{' '.join(command)}` failed: {said}")
    return answer.stdout
