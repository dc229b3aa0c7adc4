"""Signs of life: whose count, how long their silence is borne, and who is to blame for it."""

import json
import os
import socket
import time

import pytest

from gpt.run.environment import Variable
from gpt.run.heartbeat import WAITING, Heartbeat
from launcher.node.hang_watchdog import Suspect, Watch, culprits


def test_a_worker_that_was_heard_and_is_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(timeout_s=0.0, start_timeout_s=100.0)
    monkeypatch.setenv(Variable.HEARTBEAT, watch.name)
    assert not watch.silent([os.getpid()])
    Heartbeat().beat(3, "a step")
    assert watch.silent([os.getpid()])
    assert not watch.silent([os.getpid() + 1])  # it has ended meanwhile


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can send as somebody else")
def test_the_signs_of_another_user_of_the_machine_do_not_count() -> None:
    watch = Watch(timeout_s=0.0, start_timeout_s=100.0)
    sign = {"attempt": 1, "rank": 0, "pid": os.getpid(), "step": 1, "doing": "nothing", "starting": False}
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        forger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        forger.sendto(json.dumps(sign).encode(), "\0" + watch.name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not watch.silent([os.getpid()])


def test_a_phase_of_the_start_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = Watch(timeout_s=10.0, start_timeout_s=100.0)
    monkeypatch.setenv(Variable.HEARTBEAT, watch.name)
    heartbeat, me = Heartbeat(), [os.getpid()]
    heartbeat.beat(0, "importing", is_starting=True)
    assert not watch.silent(me)
    clock[0] = 101.0
    assert watch.silent(me)
    heartbeat.beat(0, WAITING, is_starting=True)  # whoever it waits for is found first, by its own node
    assert not watch.silent(me)
    clock[0] = 202.0
    assert not watch.silent(me)
    clock[0] = 262.0
    assert watch.silent(me)
    assert watch.attempt == 0
    heartbeat.attempt = 4
    heartbeat.beat(7, "training")
    assert not watch.silent(me)
    clock[0] = 273.0
    assert watch.silent(me)
    assert watch.attempt == 4


def test_who_still_imports_holds_up_those_that_wait() -> None:
    waiting = Suspect(0, "a", 0, WAITING, "S", "", True)
    importing = Suspect(1, "a", 0, "importing", "D", "", False)
    assert culprits([waiting, importing], []) == (
        "rank 1 on a does not wait for the others, they do for it; importing: state D in /proc"
    )


def test_who_does_not_wait_is_named_though_the_other_ones_last_signs_were_lost() -> None:
    waiting = Suspect(0, "a", 10, "training", "S", 'File "torch/distributed/c10d.py" in all_reduce', True)
    sleeping = Suspect(1, "b", 29, "training", "S", 'File "step.py" in sleeping_step', False)
    assert culprits([waiting, sleeping], []) == (
        'rank 1 on b does not wait for the others, they do for it; training: File "step.py" in sleeping_step'
    )
    also_waiting = Suspect(1, "b", 29, "training", "S", "all_gather", True)
    assert culprits([waiting, also_waiting], []).startswith("rank 0 on a has done 10 steps, the others more")
