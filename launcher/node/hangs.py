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
from launcher.scheduler.protocol import NodeIdentity


class HangHandler:
    """Watches the workers of one node in one job run."""

    def __init__(self, run: RunDir, identity: NodeIdentity, limits: LaunchConfig) -> None:
        self._run, self._identity, self._limits = run, identity, limits
        self._watch = HangWatchdog(limits.hang_timeout_s, limits.start_timeout_s)
        self._hangs_at_start = 0

    @property
    def heartbeat(self) -> str:
        """The socket to which the workers send heartbeats."""
        return self._watch.name

    def handle(self, workers: Sequence[int]) -> Action | None:
        """End the workers if one of them hangs; the action to take then, or None.

        RESTART_WORKERS needs nothing further, because torchrun restarts them. After several hangs at the
        start torchrun would try a hundred times more, while another job run may get other nodes.
        """
        if not self._watch.is_any_silent(workers):
            return None
        is_starting = not self._watch.attempt
        self._hangs_at_start += is_starting
        self._record()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self._watch.forget()
        if is_starting:
            return action_on(Trigger.HUNG_AT_START, count=self._hangs_at_start, limits=self._limits)
        return action_on(Trigger.RANK_HUNG)

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
            culprit = name_culprits(suspects, silent_nodes)
            print(f"no heartbeat for {self._watch.silence_s:.0f} s: {culprit}", flush=True)
            record_event(self._run.events, Event.HANG, attempt=attempt or None, culprit=culprit)
