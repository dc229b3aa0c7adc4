"""Signs of life: whose count."""

import json
import os
import socket

import pytest

from gpt.heartbeat import VARIABLE, Heartbeat
from launcher.hangs import Watch


def test_a_worker_that_was_heard_and_is_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(timeout_s=0.0)
    monkeypatch.setenv(VARIABLE, watch.name)
    assert not watch.silent([os.getpid()])
    Heartbeat().beat(3, "a step")
    assert watch.silent([os.getpid()])
    assert not watch.silent([os.getpid() + 1])  # it has ended meanwhile


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can send as somebody else")
def test_the_signs_of_another_user_of_the_machine_do_not_count() -> None:
    watch = Watch(timeout_s=0.0)
    sign = {"rank": 0, "pid": os.getpid(), "step": 1, "doing": "nothing", "starting": False}
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        forger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        forger.sendto(json.dumps(sign).encode(), "\0" + watch.name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not watch.silent([os.getpid()])
