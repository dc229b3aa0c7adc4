"""torchrun, forked from a process that has torch and DeepSpeed loaded.

Python and these imports take three quarters of the processor time of a short run. The agent is torchrun's own
and handles its workers as always; it forks them instead of executing an interpreter. Tests of kills and of
the start itself use the command, as do runs that compile: the compiler does not survive a fork.
"""

import math
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Protocol
from unittest.mock import patch

from tests.paths import ROOT


class Agent(Protocol):
    """A running torchrun: the methods of `subprocess.Popen` that tests use."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def start_torchrun(
    processes: int,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    cold: bool = False,
) -> Agent:
    """Start torchrun on this machine with more `arguments`: options, a program and its arguments."""
    options = [f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options += ["--monitor-interval=0.1", "--shutdown-timeout=20"]
    options += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", *arguments]
    if not cold:
        return _ForkedAgent(options, environment, log)
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


class _ForkedAgent:
    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preloaded"])
        with patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}):
            multiprocessing.forkserver.ensure_running()
        # A daemon may have no children of multiprocessing's own, and does not outlive the tests.
        self._process = context.Process(
            target=_run_agent, args=(list(arguments), dict(environment), Path.cwd(), log), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("torchrun", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def worker_name(arguments: Sequence[str]) -> str:
    """The name of a forked worker's process, in place of the command line that it would have had."""
    return f"warm-{sha256(chr(0).join(arguments).encode()).hexdigest()[:8]}"


def _run_agent(arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler
    import torch.distributed.run as torchrun

    import tests.distributed.preloaded  # noqa: F401 - loaded already, unless other tests began the server

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    handler.Popen = _ForkedWorker  # type: ignore[misc]
    torchrun.main(arguments)


class _ForkedWorker:
    """What torchrun needs of `subprocess.Popen`."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[bytes] | None,
        stderr: IO[bytes] | None,
        start_new_session: bool,
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become_worker(args, env, stdout, stderr, start_new_session)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(0.01)
        return self.returncode


def _become_worker(
    args: Sequence[str],
    env: Mapping[str, str],
    stdout: IO[bytes] | None,
    stderr: IO[bytes] | None,
    start_new_session: bool,
) -> None:
    if start_new_session:
        os.setsid()
    for stream, number in ((stdout, 1), (stderr, 2)):
        if stream is not None:
            os.dup2(stream.fileno(), number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    program = [argument for argument in args[1:] if argument != "-u"]
    is_module = program[0] == "-m"
    sys.argv = program[is_module:]
    Path("/proc/self/comm").write_text(worker_name(program))
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)
