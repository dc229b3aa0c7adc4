"""The task on each node: torchrun as a child, stop requests, and one truthful word about how it ended.

submitit calls `NodeTask` once a node. torchrun's exit code is not to be trusted (it is 1 after a clean stop),
so the outcome is what rank 0 wrote in the newest attempt's result.json; without one, the job failed. Nothing
is left behind: the children end with this process, and this process ends with the local controller. It
trains nothing, imports no torch, and never decides to go on after a result that says not to.
"""

import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.errors import ConfigError, LaunchError
from gpt import record
from gpt.config import RunConfig
from gpt.run_dir import RunDir, read_json, write_json
from launcher.cluster import ClusterConfig
from launcher.processes import adopt_orphans, end_self_with_parent, end_with_parent, kill_descendants
from launcher.runs import python_module, read_cluster, read_config
from launcher.submit import Outcome, outcome_path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # torchrun would die of the last two, and orphan
_SHUTDOWN_TIMEOUT_S = 60  # torchrun's wait between passing a signal on and SIGKILL: time for a save
_POLL_S = 0.1
_TRACKING_DRAIN_S = 60.0
_TAIL_LINES = 20


@dataclass(frozen=True)
class Place:
    """This node's place in the job, and where the first node listens (port 0: one that is free)."""

    node: int
    nodes: int
    address: str
    port: int


@dataclass
class NodeTask:
    """What submitit pickles: where the run is, and which submission this belongs to. Nothing else."""

    run_dir: str
    submission: str

    def __call__(self) -> dict[str, Any]:
        """Train until the workers end; the outcome as a dict, on every node but the first an empty one."""
        return _Node(RunDir(Path(self.run_dir)), self.submission).work()


class _Node:
    def __init__(self, run: RunDir, submission: str) -> None:
        self.run = run
        self.folder = run.submission / submission
        self.config: RunConfig = read_config(run)
        self.cluster: ClusterConfig = read_cluster(run)
        self.place = find_place(self.cluster)
        self.signal_name: str | None = None
        self.stopped_now = False
        self.tracking: subprocess.Popen[bytes] | None = None

    def work(self) -> dict[str, Any]:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        adopt_orphans()
        if self.cluster.kind == "local":
            end_self_with_parent(signal.SIGKILL)  # a job whose controller is gone would pass for dead
        is_first = self.place.node == 0
        if is_first:
            outcome_path(self.folder).unlink(missing_ok=True)
            if self.config.tracking.enabled:
                self.tracking = self._start_tracking()
        earlier = self.run.attempt_numbers()
        code = self._train()
        kill_descendants(spare=self.tracking.pid if self.tracking else None)
        if not is_first:
            return {}
        outcome = self._outcome(code, max(earlier, default=0))
        # Before the tracker is waited for: a node that is killed meanwhile has ended as it ended.
        write_json(outcome_path(self.folder), asdict(outcome))
        if self.tracking is not None and not self.stopped_now:
            _drain(self.tracking)
        kill_descendants()
        return asdict(outcome)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _train(self) -> int:
        """Run torchrun to its end, turning signals into stop requests; its exit code."""
        log_path = self.folder / f"node-{self.place.node}.log"
        environment = worker_environment(self.cluster, dict(os.environ))
        with log_path.open("ab") as log:
            torchrun = subprocess.Popen(
                torchrun_command(self.run, self.config, self.cluster, self.place, self.folder),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )
        while torchrun.poll() is None:
            time.sleep(_POLL_S)
            if self.signal_name is not None:
                request_stop(self.run, self.signal_name)
                self.signal_name = None
            stop = standing_stop(self.run)
            if stop is not None and stop.get("now"):
                self.stopped_now = True
                torchrun.kill()
                kill_descendants(spare=self.tracking.pid if self.tracking else None)
        return torchrun.wait()

    def _start_tracking(self) -> subprocess.Popen[bytes]:
        with (self.folder / "tracking.log").open("ab") as log:
            return subprocess.Popen(
                python_module("gpt.tracking", str(self.run.path)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGTERM),
            )

    def _outcome(self, torchrun_code: int, newest_before: int) -> Outcome:
        attempt = max(self.run.attempt_numbers(), default=0)
        is_ours = attempt > newest_before
        result_path = self.run.attempt(attempt) / "result.json"
        result = read_json(result_path) if is_ours else None
        if result is not None:
            return Outcome(int(result["exit_code"]), str(result["cause"]), attempt)
        if self.stopped_now:
            outcome = Outcome(1, "stopped at once, without saving, as asked", attempt if is_ours else None)
        else:
            cause = f"the workers ended without a result (torchrun: {torchrun_code})"
            tail = _tail(self.folder / f"node-{self.place.node}.log")
            outcome = Outcome(1, f"{cause}\n{tail}".rstrip(), attempt if is_ours else None)
        if is_ours:
            write_json(result_path, {"exit_code": outcome.exit_code, "cause": outcome.cause})
        record.event(self.run.events, "failed", cause=outcome.cause.splitlines()[0])
        return outcome


def standing_stop(run: RunDir) -> dict[str, Any] | None:
    """The stop request of `run`, if one stands; an empty or garbled file is a plain one."""
    try:
        return read_json(run.stop)
    except ConfigError:
        return {}


def request_stop(run: RunDir, reason: str, *, now: bool = False) -> None:
    """Ask the workers to save and stop (`now`: to be killed without saving); an earlier request stands."""
    standing = standing_stop(run)
    if standing is None or (now and not standing.get("now")):
        write_json(run.stop, {"reason": reason, "time": time.time(), "now": now})


def torchrun_command(
    run: RunDir, config: RunConfig, cluster: ClusterConfig, place: Place, folder: Path
) -> list[str]:
    """torchrun with its c10d rendezvous, which restarts the workers of all nodes together.

    The static rendezvous lets each node restart on its own, and needs a port that is known beforehand.
    """
    workers_address = ["--local-addr=127.0.0.1"] if place.nodes == 1 else []  # never a name lookup
    return python_module(
        "torch.distributed.run",
        f"--nnodes={place.nodes}",
        f"--nproc-per-node={cluster.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.address}:{place.port}",
        f"--rdzv-id={run.path.name}",
        f"--rdzv-conf=is_host={int(place.node == 0)}",
        *workers_address,
        f"--max-restarts={config.launch.max_restarts}",
        "--monitor-interval=0.2",
        f"--signals-to-handle={_FORWARDED}",
        f"--shutdown-timeout={_SHUTDOWN_TIMEOUT_S}",
        f"--log-dir={folder / 'torchrun'}",  # its default is a folder in /tmp that stays behind
        "-m",
        "gpt.train",
        str(run.path),
    )


def worker_environment(cluster: ClusterConfig, inherited: dict[str, str]) -> dict[str, str]:
    """The environment of the workers: the node's, a share of its cores, and what the cluster file sets."""
    environment = dict(inherited)
    if not cluster.gpus_per_node:
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, cores // cluster.processes))
    elif cluster.kind == "local":
        # submitit numbers the GPUs from 0, whatever the caller may use.
        allowed = inherited.get("OUTLAST_CUDA_VISIBLE_DEVICES")
        if allowed:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(allowed.split(",")[: cluster.gpus_per_node])
    environment.update(cluster.environment)
    return environment


def find_place(cluster: ClusterConfig) -> Place:
    """This node's rank, and where the first node listens. Raises LaunchError outside a job."""
    if cluster.kind == "local":
        return Place(0, 1, "127.0.0.1", 0)
    try:
        node, job_id, node_list = (
            os.environ[name] for name in ("SLURM_NODEID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
        )
    except KeyError as error:
        raise LaunchError(f"not inside a Slurm job: {error} is not set") from None
    listing = ["scontrol", "show", "hostnames", node_list]
    hosts = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    # Every node computes the same port without talking to another; below the kernel's ephemeral range.
    return Place(int(node), cluster.nodes, hosts[0], 12_000 + int(job_id) % 18_000)


def _drain(tracking: subprocess.Popen[bytes]) -> None:
    """Let the mirror send what is left of the record; its failure never matters."""
    tracking.terminate()
    try:
        tracking.wait(timeout=_TRACKING_DRAIN_S)
    except subprocess.TimeoutExpired:
        tracking.kill()


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])
