"""What decides how long a run takes on a cluster that fails, with defaults and where they come from."""

from dataclasses import dataclass

from gpt.saving.save_interval import best_interval_s

DAY_S = 86_400.0


@dataclass(frozen=True)
class Scenario:
    """One run on one cluster. All times are in seconds, all rates are per second of wall-clock time."""

    nodes: int
    work_s: float  # what the run takes if nothing interrupts it and nothing is saved
    node_failure_rate: float  # failures of one node
    needs_other_node: float = 0.6  # share of the failures after which the node cannot be used
    hangs: float = 0.1  # share of the failures that are noticed only by the hang watchdog
    preemption_rate: float = 0.0  # preemptions of the whole job; each saves first
    detect_s: float = 5.0  # from a crash until every worker is stopped
    hang_s: float = 600.0  # from a hang until every worker is stopped
    start_s: float = 60.0  # from starting the workers to the first step, without loading the checkpoint
    load_s: float = 10.0  # loading the checkpoint
    queue_s: float = 1800.0  # mean wait after a requeue
    repair_s: float = DAY_S  # until a failed node can be used again
    spare_nodes: int = 0  # allocated and idle
    interval_s: float | None = None  # between the starts of two saves; None takes the best one
    stall_s: float = 1.0  # how long a save stops the training
    save_s: float = 10.0  # from the start of a save until it is committed

    @property
    def failure_rate(self) -> float:
        """Failures of the whole job."""
        return self.nodes * self.node_failure_rate

    @property
    def interruption_rate(self) -> float:
        """Failures and preemptions of the whole job."""
        return self.failure_rate + self.preemption_rate

    @property
    def recovery_s(self) -> float:
        """Mean time from a failure to the first step afterwards."""
        detect_s = self.hangs * self.hang_s + (1 - self.hangs) * self.detect_s
        waits = 0.0 if self.spare_nodes else self.needs_other_node * self.queue_s
        return detect_s + waits + self.start_s + self.load_s

    @property
    def save_interval_s(self) -> float:
        """The time between the starts of two saves that the simulation uses.

        Saves do not overlap, so it is never shorter than a save.
        """
        wanted = self.interval_s
        if wanted is None:
            wanted = best_interval_s(self.stall_s, 1 / max(self.failure_rate, 1e-12), self.recovery_s)
        return max(wanted, self.save_s, 1.001 * self.stall_s)
