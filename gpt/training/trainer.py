"""The training loop: one attempt at a run, from its first step to its last.

Everything that a step computes is a function of (config, data, step). This loop only decides when to
evaluate, save and stop, and records what happened.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from data_pipeline.errors import CheckpointError, OutlastError
from data_pipeline.sampling.batches import BatchReader
from gpt.distributed.reduction import PendingReduction
from gpt.distributed.world import agree, from_first, total
from gpt.distributed.zero.engine import Engine
from gpt.model.compilation import compile_seconds
from gpt.model.flops import causal_flops_per_token, flops_per_token
from gpt.model.gpt import seed_dropout
from gpt.optimizer.lr_schedule import learning_rate
from gpt.run import record
from gpt.run.attempts import must_end, refuse_if_superseded
from gpt.run.events import Event, record_event
from gpt.saving.saver import Saver
from gpt.training.attempt import Attempt, AttemptOutcome, log_line
from gpt.training.auto_warmup import initial_rate
from gpt.training.ending import (
    ask_to_stop_for_good,
    finished,
    is_any_rank_asked_to_stop,
    refuse_endless_skips,
    save_and_end,
    stopped,
    wait_to_be_killed,
)
from gpt.training.evaluation import Validation, source_names
from gpt.training.metrics import REDUCTIONS, DeferredScalars, MetricsWriter
from gpt.training.prefetch import AHEAD, Prefetcher
from gpt.training.profiler import Profile
from gpt.training.start_plan import ResumePlan, is_evaluation_missing
from gpt.training.step import train_step

# Python frees most memory without the garbage collector, and a collection takes milliseconds.
COLLECT_EVERY_STEPS = 100


@dataclass(frozen=True)
class TrainingData:
    """The opened data of a run."""

    reader: BatchReader
    validation: Validation
    fingerprint: str


class Trainer:
    """Takes the steps of one attempt. gpt.training.setup builds the parts that it gets."""

    def __init__(
        self,
        attempt: Attempt,
        data: TrainingData,
        engine: Engine,
        saver: Saver,
        batches: Prefetcher,
        plan: ResumePlan,
        peak_flops: float | None,
    ) -> None:
        self._attempt, self._data, self._engine, self._saver = attempt, data, engine, saver
        self._batches, self._plan, self._peak_flops = batches, plan, peak_flops
        # The scored tokens of the coming steps over all ranks; at least 1, because they are a divisor.
        self._scored: dict[int, float] = {}
        self._pending: tuple[int, PendingReduction] | None = None
        self._is_time_to_save = False
        self._skipped_in_a_row = 0
        self._metrics = MetricsWriter(attempt.run_dir, attempt.world, attempt.number)
        self._profile = Profile(attempt.run, attempt.run_dir, attempt.world)

    def train(self) -> AttemptOutcome:
        """Take the remaining steps, or those until a stop request. Collective."""
        run, plan, heartbeat = self._attempt.run, self._plan, self._attempt.clock.heartbeat
        with _finishing_the_save(self._saver):
            self._agree_ahead()
            if is_any_rank_asked_to_stop(self._attempt) or not self._evaluate_start_if_missing():
                return stopped(self._attempt, plan.start, "nothing new to save")
            if plan.searches_warmup:
                self._choose_initial_rate()
            is_stopping = False
            _disable_garbage_collection()
            for step in range(plan.first, plan.last + 1):
                started = time.monotonic()
                heartbeat.beat(step - 1, "training", is_starting=step == plan.first)
                self._profile.before(step)
                loaded = self._batches.get(step)
                waited = time.monotonic() - started
                lr = learning_rate(
                    run.schedule, run.optimizer.peak_lr, plan.last, step, self._engine.initial_lr
                )
                if run.model.dropout:
                    seed_dropout(run.seed, step, self._attempt.world.rank)
                numbers = train_step(self._engine, loaded.micro_batches, lr, self._scored[step])
                deferred = DeferredScalars(numbers)  # read once the next step is queued
                self._profile.after(step)
                self._note_events(step)
                if self._pending is not None:
                    is_stopping = self._end_exchange()
                self._begin_exchange(step, loaded.digest)
                if step % COLLECT_EVERY_STEPS == 0:
                    gc.collect()
                fields = self._fields(step, lr, time.monotonic() - started, waited)
                self._metrics.begin(step, fields, deferred, self._scored.pop(step))

                is_last = step == plan.last
                is_evaluation_due = is_last or step % run.evaluation.every_steps == 0
                is_save_due = self._is_save_due(step)
                if step == plan.stop_at:
                    is_stopping = ask_to_stop_for_good(self._attempt, "the rehearsal")
                is_pausing = step == plan.pause_at
                if not (is_last or is_evaluation_due or is_save_due or is_stopping or is_pausing):
                    continue
                is_stopping = self._complete_line(step, is_evaluation_due, is_stopping)
                heartbeat.beat(step, "saving")
                if is_last or is_stopping:
                    return self._end(step, is_stopping)
                if is_save_due:
                    self._saver.save(step, self._data.reader.skipped, problem=self._metrics.problem)
                    self._is_time_to_save = False  # the exchange at this boundary asked for this save
                if is_pausing:
                    self._saver.wait()
                    wait_to_be_killed(self._attempt, step)
            return finished(self._attempt)

    def _is_save_due(self, step: int) -> bool:
        every = self._attempt.run.checkpoint.every_steps
        return self._is_time_to_save or (every is not None and step % every == 0)

    def _end(self, step: int, is_stopping: bool) -> AttemptOutcome:
        self._metrics.write()
        skipped, problem = self._data.reader.skipped, self._metrics.problem
        return save_and_end(
            self._attempt, self._saver, step, skipped, problem=problem, is_stopping=is_stopping
        )

    def _evaluate_start_if_missing(self) -> bool:
        """Evaluate the step resumed from when a stop cut its evaluation short.

        Returns False when another stop cuts this one short.
        """
        run_dir, world, start = self._attempt.run_dir, self._attempt.world, self._plan.start
        line = from_first(world, record.last(run_dir.metrics)) or {}
        if not is_evaluation_missing(start, self._attempt.run.evaluation.every_steps, line):
            return True
        scores = self._evaluate(start)
        if scores is not None and world.is_first:
            record.amend_last(run_dir.metrics, **scores)
        return scores is not None

    def _evaluate(self, step: int) -> dict[str, float] | None:
        """The validation scores; None when a stop request cut them short, which the last step ignores."""
        attempt = self._attempt
        stop = attempt.stop if step < self._plan.last else None
        heartbeat = attempt.clock.heartbeat
        started = time.monotonic()
        scores = self._data.validation.measure(self._engine.model, attempt.world, heartbeat, step, stop)
        return None if scores is None else {**scores, "val/seconds": time.monotonic() - started}

    def _agree_ahead(self) -> None:
        """Agree on the scored tokens of the first steps; a rank that has no data for them ends all ranks."""
        world, steps = self._attempt.world, range(self._plan.first, self._plan.first + AHEAD)
        agree(world, lambda: [self._batches.scored_tokens(step) for step in steps])
        counts = total(world, *(float(self._batches.scored_tokens(step)) for step in steps))
        self._scored.update((step, max(1.0, count)) for step, count in zip(steps, counts, strict=True))

    def _fields(self, step: int, lr: float, seconds: float, waited: float) -> dict[str, float]:
        run = self._attempt.run
        tokens_per_second = run.batch.sizes.at(step) / seconds
        fields = {
            "tokens": run.batch.sizes.until(step),
            "train/lr": lr,
            "train/step_seconds": seconds,
            "train/tokens_per_second": tokens_per_second,
            "data/wait_seconds": waited,
        }
        if self._peak_flops is not None:
            share = tokens_per_second / self._peak_flops
            fields["train/mfu"] = flops_per_token(run.model) * share
            fields["train/mfu_causal"] = causal_flops_per_token(run.model) * share
        return fields

    def _choose_initial_rate(self) -> None:
        """Choose the rate at which the warmup starts; every checkpoint stores it."""
        batch = self._batches.peek(1).micro_batches
        rate = initial_rate(self._engine, batch, self._scored[1])
        self._engine.initial_lr = rate
        self._attempt.clock.lap("warmup")
        if self._attempt.world.is_first:
            share = rate / self._attempt.run.optimizer.peak_lr
            saved = int(self._attempt.run.schedule.warmup_steps * share)
            events = self._attempt.run_dir.events
            record_event(events, Event.WARMUP_CHOSEN, initial_lr=rate, saved_steps=saved)
            log_line(
                f"the warmup starts at rate {rate:.3g}, {share:.1%} of the peak, and saves {saved} steps"
            )

    def _note_events(self, step: int) -> None:
        """Record a skipped update, and the end of the first step."""
        attempt = self._attempt
        if not self._engine.was_skipped:
            self._skipped_in_a_row = 0
        else:
            self._skipped_in_a_row += 1
            if attempt.world.is_first:
                record_event(
                    attempt.run_dir.events, Event.UPDATE_SKIPPED, step=step, reason="non-finite gradient"
                )
            refuse_endless_skips(attempt, step, self._skipped_in_a_row)
        if step == self._plan.first:
            if self._engine.model.is_compiled:
                attempt.clock.lap("compile", seconds=compile_seconds())
            attempt.clock.lap("first_step")

    def _begin_exchange(self, step: int, digest: int) -> None:
        """Start to reduce what the ranks exchange after `step`; `_end_exchange` reads it a step later."""
        attempt = self._attempt
        has_no_data = self._batches.error(step + AHEAD) is not None
        is_broken = has_no_data or (attempt.world.is_first and must_end(attempt.run_dir, attempt.number))
        ahead = 0 if has_no_data else self._batches.scored_tokens(step + AHEAD)
        is_saved, has_failed = self._saver.report()
        numbers = {
            **self._metrics.to_reduce(step - 1),
            "scored_ahead": float(ahead),
            "data/digest": float(digest),
            "stop": float(attempt.stop.is_requested()),
            "error": float(is_broken),
            "save_due": float(self._saver.is_due()),
            "save_done": float(is_saved),
            "save_failed": float(has_failed),
        }
        self._pending = (step, PendingReduction(attempt.world, numbers, REDUCTIONS))

    def _end_exchange(self) -> bool:
        """Act on what the ranks exchanged at the last boundary. Returns whether a rank was asked to stop."""
        assert self._pending is not None
        (step, pending), self._pending = self._pending, None
        agreed = pending.result()
        if agreed["error"]:
            agree(self._attempt.world, lambda: self._raise_error(step))
        self._saver.advance(agreed["save_done"], agreed["save_failed"])
        self._is_time_to_save = agreed["save_due"] > 0
        self._scored[step + AHEAD] = max(1.0, agreed["scored_ahead"])
        consumed = self._data.reader.numbers_consumed(step)
        self._metrics.add(step, **{"data/digest": agreed["data/digest"], "data/sequences_behind": consumed})
        self._metrics.complete(step - 1, agreed)
        return agreed["stop"] > 0

    def _complete_line(self, step: int, is_evaluation_due: bool, is_stopping: bool) -> bool:
        """Complete the line of `step`, the last one taken, with an evaluation when it is due.

        Returns whether a rank was asked to stop, before or meanwhile.
        """
        is_stopping = self._end_exchange() or is_stopping
        if is_evaluation_due:
            is_left_out = is_stopping and step < self._plan.last
            scores = None if is_left_out else self._evaluate(step)
            is_stopping = is_stopping or scores is None
            self._metrics.add(step, **(scores or {}), **self._metrics.step_times(), **self._counts(step))
        own = self._metrics.to_reduce(step)
        self._metrics.complete(step, PendingReduction(self._attempt.world, own, REDUCTIONS).result())
        return is_stopping

    def _counts(self, step: int) -> dict[str, float]:
        """The number of sequences read so far from each source of a mixture."""
        names = [f"data/sequences/{name}" for name in source_names(self._attempt.run.data)]
        counts = self._data.reader.counts_at(step)
        return dict(zip(names, counts, strict=True)) if len(names) > 1 else {}

    def _raise_error(self, step: int) -> None:
        """Raise the error that this rank reported after `step`, if it reported one."""
        self._batches.scored_tokens(step + AHEAD)
        if self._attempt.world.is_first:
            refuse_if_superseded(self._attempt.run_dir, self._attempt.number)


@contextmanager
def _finishing_the_save(saver: Saver) -> Iterator[None]:
    """Finish the save in flight before an error ends the attempt: its copy in host memory is intact."""
    try:
        yield
    except CheckpointError:
        raise
    except OutlastError:  # every rank raises it
        saver.wait()
        raise


def _disable_garbage_collection() -> None:
    """Collect garbage only where the loop asks for it, at the same step on every rank.

    A rank that pauses for a collection delays all others.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
