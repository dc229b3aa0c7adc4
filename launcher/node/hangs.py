"""What the node task does about a hang: it finds the rank at fault, records it, and ends the workers."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from gpt.config.run import LaunchConfig
from gpt.run.events import Event, record_event
from gpt.run.failure_policy import Action, Trigger, action_on
from gpt.run.run_dir import RunDir
from launcher.node.hang_watchdog import HangWatchdog, collect_reports, name_culprits, write_report
from launcher.process_tree import process_state
from launcher.scheduler.protocol import NodeIdentity

_RESTART_S = 5.0  # what torchrun takes to restart workers, on a busy machine
_MEETING_S = 60.0  # its own start, and the meeting of its agents


class HangHandler:
    """Watches the workers of one node in one job run. `culprit` is what the last hang was due to."""

    def __init__(self, run: RunDir, identity: NodeIdentity, limits: LaunchConfig) -> None:
        self._run, self._identity, self._limits = run, identity, limits
        self._watch = HangWatchdog(limits.hang_timeout_s, limits.start_timeout_s)
        self._hangs_at_start = 0
        self.culprit = ""

    @property
    def heartbeat(self) -> str:
        """The socket to which the workers send heartbeats."""
        return self._watch.name

    @property
    def newest_attempt(self) -> int:
        """The newest attempt of which the workers have told, 0 before the first one."""
        return self._watch.newest_attempt

    def handle(self, torchrun: int, workers: Sequence[int], *, is_stopping: bool) -> Trigger | None:
        """End the workers of the process `torchrun` if one of them hangs; what has happened then, or None.

        A torchrun without workers, for example a stopped one whose workers were killed, hangs as well.
        """
        if self._watch.is_any_silent(workers):
            return self._end_workers(workers, is_stopping)
        if (seconds := self._watch.seconds_without(workers)) > self._patience_s():
            state = process_state(torchrun) or "gone"
            self._report(
                f"torchrun on {self._identity.name} (process {torchrun}, state {state} in /proc) has had no "
                f"workers for {seconds:.0f} s"
            )
            return Trigger.NO_WORKERS
        return None

    def action_on(self, trigger: Trigger) -> Action:
        """What follows; torchrun does RESTART_WORKERS by itself."""
        return action_on(trigger, count=self._hangs_at_start, limits=self._limits)

    def _end_workers(self, workers: Sequence[int], is_stopping: bool) -> Trigger:
        is_starting = not self._watch.attempt
        self._hangs_at_start += is_starting
        self._record()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self._watch.forget()
        if not is_starting:
            return Trigger.RANK_HUNG
        # After several hangs torchrun would try a hundred times more; another job run may get other nodes.
        return Trigger.STARTED_IN_VAIN if is_stopping else Trigger.HUNG_AT_START

    def _patience_s(self) -> float:
        """How long torchrun may be without workers: the nodes of a job must first meet, as at the start."""
        if self._watch.has_seen_workers and self._identity.nodes == 1:
            return self._limits.hang_timeout_s + _RESTART_S
        return max(self._limits.hang_timeout_s, self._limits.start_timeout_s) + _MEETING_S

    def _record(self) -> None:
        """Find out, with the other nodes, which rank is at fault, and write it down."""
        attempt = self._watch.attempt
        attempt_dir = self._run.attempt(attempt)
        suspects = self._watch.suspects(self._identity.name, self._identity.node, attempt_dir)
        silent_nodes: list[int] = []
        if attempt:
            try:
                write_report(attempt_dir, self._identity.node, suspects)
                suspects, silent_nodes = collect_reports(attempt_dir, self._identity.nodes)
            except OSError as error:
                print(f"the report on the hang cannot be shared: {error}", flush=True)
        # At the start each node records its own hang: the workers of the others may not even exist.
        if self._identity.is_first or not attempt:
            print(f"no heartbeat for {self._watch.silence_s:.0f} s", flush=True)
            self._report(name_culprits(suspects, silent_nodes))

    def _report(self, culprit: str) -> None:
        self.culprit = culprit
        print(f"the workers hang: {culprit}", flush=True)
        record_event(self._run.events, Event.HANG, attempt=self._watch.attempt or None, culprit=culprit)
