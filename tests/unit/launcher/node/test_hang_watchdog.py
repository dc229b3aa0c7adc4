"""Which heartbeats count, how long silence is tolerated, and which rank is named as the culprit."""

import ast
import faulthandler
import os
import socket
import time
from pathlib import Path

import pytest

from gpt.run.environment import Variable
from gpt.run.heartbeat import WAITING, Heartbeat, HeartbeatMessage, wait_for_ranks
from launcher.node.hang_watchdog import (
    HangWatchdog,
    Suspect,
    is_waiting_for_ranks,
    main_thread_frames,
    name_culprits,
)
from tests.paths import ROOT


def test_worker_that_stops_sending_heartbeats_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = HangWatchdog(timeout_s=0.0, start_timeout_s=100.0)
    monkeypatch.setenv(Variable.HEARTBEAT, watchdog.name)
    assert not watchdog.is_any_silent([os.getpid()])
    Heartbeat().beat(3, "a step")
    assert watchdog.is_any_silent([os.getpid()])
    assert not watchdog.is_any_silent([os.getpid() + 1])  # the worker has exited meanwhile


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can send as another user")
def test_heartbeats_of_another_user_are_ignored() -> None:
    watchdog = HangWatchdog(timeout_s=0.0, start_timeout_s=100.0)
    message = HeartbeatMessage(attempt=1, rank=0, pid=os.getpid(), step=1, doing="nothing", starting=False)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        forger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        forger.sendto(message.encode(), "\0" + watchdog.name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not watchdog.is_any_silent([os.getpid()])


def test_datagram_that_is_no_heartbeat_is_ignored() -> None:
    watchdog = HangWatchdog(timeout_s=0.0, start_timeout_s=100.0)
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for datagram in (b"not JSON", b'{"rank": 0}', b"[]"):
        sender.sendto(datagram, "\0" + watchdog.name)
    assert not watchdog.is_any_silent([os.getpid()])


def test_heartbeat_keeps_its_wire_format() -> None:
    """A node task and its workers may come from different versions, for example after an update."""
    datagram = b'{"attempt": 2, "rank": 1, "pid": 77, "step": 5, "doing": "training", "starting": false}'
    message = HeartbeatMessage(attempt=2, rank=1, pid=77, step=5, doing="training", starting=False)
    assert message.encode() == datagram
    assert HeartbeatMessage.decode(datagram) == message


def test_start_has_a_timeout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watchdog = HangWatchdog(timeout_s=10.0, start_timeout_s=100.0)
    monkeypatch.setenv(Variable.HEARTBEAT, watchdog.name)
    heartbeat, me = Heartbeat(), [os.getpid()]

    def is_silent_at(until: float) -> bool:
        """Look every second until then, as the supervisor does."""
        while clock[0] < until:
            clock[0] += 1.0
            is_silent = watchdog.is_any_silent(me)
        return is_silent

    heartbeat.beat(0, "importing", is_starting=True)
    assert not watchdog.is_any_silent(me)
    assert is_silent_at(101.0)
    heartbeat.beat(0, WAITING, is_starting=True)  # the node of the late rank reports first
    assert not watchdog.is_any_silent(me)
    assert not is_silent_at(202.0)
    assert is_silent_at(262.0)
    assert watchdog.attempt == 0
    heartbeat.attempt = 4
    heartbeat.beat(7, "training")
    assert not watchdog.is_any_silent(me)
    assert is_silent_at(273.0)
    assert watchdog.attempt == 4


def test_time_in_which_the_job_was_suspended_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watchdog = HangWatchdog(timeout_s=10.0, start_timeout_s=100.0)
    monkeypatch.setenv(Variable.HEARTBEAT, watchdog.name)
    me = [os.getpid()]
    Heartbeat().beat(3, "training")
    found = []
    for at in (1.0, 2.0, 3600.0, *(3600.0 + second for second in range(1, 12))):
        clock[0] = at
        found.append(watchdog.is_any_silent(me))
        assert watchdog.seconds_without([]) <= 11.0
    assert found == [False] * 13 + [True]  # ten seconds after the job continued


def dump_here(log: Path) -> None:
    """Write this thread's stack as a worker does on SIGQUIT. A C function waits, so it has no frame."""
    with log.open("a") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def test_wait_of_our_own_is_recognised_in_a_real_stack(tmp_path: Path) -> None:
    busy, waiting = tmp_path / "busy.log", tmp_path / "waiting.log"
    dump_here(busy)
    wait_for_ranks(dump_here, waiting)
    assert not is_waiting_for_ranks(main_thread_frames(busy, 0))
    assert is_waiting_for_ranks(main_thread_frames(waiting, 0))


@pytest.mark.parametrize("library", ["torch/distributed/distributed_c10d.py", "deepspeed/comm/comm.py"])
def test_only_the_innermost_frame_counts_for_library_collectives(library: str) -> None:
    collective = f'File "/env/lib/python3.11/site-packages/{library}", line 7 in all_reduce'
    ours = 'File "/code/gpt/training/step.py", line 9 in train_step'
    assert is_waiting_for_ranks([collective, ours])
    assert not is_waiting_for_ranks([ours, collective])
    assert not is_waiting_for_ranks([])


def waiting_calls(path: Path) -> list[str]:
    """The calls in a file that wait for other ranks directly, instead of through `wait_for_ranks`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        is_collective = owner == "dist" and name.startswith(("all_", "broadcast", "barrier", "reduce"))
        is_asynchronous = any(keyword.arg == "async_op" for keyword in node.keywords)
        if (is_collective and not is_asynchronous) or (name == "wait" and owner.endswith("_work")):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}")
    return found


def test_every_wait_of_ours_for_other_ranks_is_marked() -> None:
    """Except inside a step, where torch's or DeepSpeed's collective is the innermost frame."""
    folders = [ROOT / "gpt" / "distributed", ROOT / "gpt" / "training", ROOT / "gpt" / "saving"]
    files = [ROOT / "gpt" / "train.py", *(path for folder in folders for path in folder.glob("*.py"))]
    assert [call for path in files for call in waiting_calls(path)] == []


def test_rank_that_still_imports_is_named_before_ranks_that_wait_for_it() -> None:
    waiting = Suspect(0, "a", 0, WAITING, "S", "", True)
    importing = Suspect(1, "a", 0, "importing", "D", "", False)
    assert name_culprits([waiting, importing], []) == (
        "the other ranks wait for rank 1 on a, which is not waiting; importing: state D in /proc"
    )


def test_stacks_name_the_culprit_when_last_heartbeats_were_lost() -> None:
    waiting = Suspect(0, "a", 10, "training", "S", 'File "torch/distributed/c10d.py" in all_reduce', True)
    sleeping = Suspect(1, "b", 29, "training", "S", 'File "step.py" in sleeping_step', False)
    assert name_culprits([waiting, sleeping], []) == (
        "the other ranks wait for rank 1 on b, which is not waiting; training: "
        'File "step.py" in sleeping_step'
    )
    also_waiting = Suspect(1, "b", 29, "training", "S", "all_gather", True)
    assert name_culprits([waiting, also_waiting], []).startswith(
        "rank 0 on a has done 10 steps, the others more"
    )
