"""The worker: from torchrun's environment to the last step. `python -m gpt.train RUN_DIR`

Everything that a step computes is a function of (config, data, step); this loop only decides when to
evaluate, save and stop, and writes down what happened. It never retries and never falls back: a crash
ends the process, the agent starts the next attempt, and that one continues from the newest checkpoint.
"""

# ruff: noqa: E402 - the handlers must stand before torch's import, which takes seconds
import gc
import os
import sys
import time
import traceback
from contextlib import suppress

from gpt.heartbeat import WAITING, Heartbeat
from gpt.stop import StopRequest, die_with_parent

STOP, HEARTBEAT = StopRequest(), Heartbeat()
if __name__ == "__main__":
    die_with_parent()
    STOP.install()
    HEARTBEAT.beat(0, "importing", is_starting=True)
_STARTED = time.monotonic()

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data_pipeline.batches import BatchReader
from data_pipeline.errors import CheckpointError, LaunchError, OutlastError
from data_pipeline.manifest import joint_fingerprint, read_manifest
from data_pipeline.skip_list import Ranges
from data_pipeline.tokenizer import load_encoding
from gpt import attempt as attempts
from gpt import record
from gpt.attempt import Superseded, is_superseded
from gpt.attention import choose
from gpt.checkpoint.load import load_newest
from gpt.checkpoint.saver import SILENCE_S, Saver
from gpt.compilation import compile_seconds
from gpt.config import RunConfig
from gpt.distributed import PendingTick, Tick, World, from_first, join, together, total
from gpt.flops import flops_per_token
from gpt.lines import Late, Line, Lines
from gpt.model import seed_dropout
from gpt.node_check import check_nodes
from gpt.optimizer import group_table
from gpt.peak import peak_flops_per_second
from gpt.prefetch import AHEAD, Prefetcher
from gpt.profile import Profile
from gpt.run_dir import RunDir
from gpt.schedule import learning_rate
from gpt.step import train_step
from gpt.validation import Validation, source_names
from gpt.warmup import initial_rate
from gpt.zero import DTYPES, Engine, build_model

# What Python does not free by itself is little, and a collection takes milliseconds.
COLLECT_EVERY_STEPS = 100


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    exit_code: int
    cause: str
    step: int | None = None


def main(path: Path) -> None:
    """Take part in one attempt at the run in `path`; rank 0 leaves its result there."""
    run_dir = RunDir(path)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    HEARTBEAT.beat(0, WAITING, is_starting=True)
    world = join(run.launch.collective_timeout_s, run.parallel.sequence)
    clock = _Clock(run_dir, world, HEARTBEAT)
    clock.lap("imports and rendezvous")
    try:
        number = attempts.claim(run_dir, world)
    except Superseded as error:  # a failure would be answered by a restart
        _say(str(error))
        return
    HEARTBEAT.attempt = number
    if world.is_first:
        STOP.watch(run_dir.stop)
    outcome = None
    try:
        outcome = _give_up(run, run_dir, world, number)
        if outcome is None and run.launch.node_check:
            outcome = _leave_bad_nodes(run_dir, world, number)
            clock.lap("node check")
        outcome = outcome or Trainer(run, run_dir, world, number, clock).train()
    except Superseded as error:  # not a file of the run is ours to write any more
        _say(str(error))
    except OutlastError as error:  # agreed upon: every rank raises it
        outcome = Outcome(error.exit_code, str(error))
    if world.is_first and outcome is not None:
        _say(f"attempt {number} ends with {outcome.exit_code}: {outcome.cause}")
        attempts.finish(run_dir, number, outcome.exit_code, outcome.cause, outcome.step)
    # All is written and agreed: a connection that another rank has closed already is no failure.
    with suppress(RuntimeError):
        dist.barrier(group=world.control)
        dist.destroy_process_group()


def _give_up(run: RunConfig, run_dir: RunDir, world: World, number: int) -> Outcome | None:
    failures = from_first(world, attempts.failures_in_a_row(run_dir, number) if world.is_first else 0)
    if failures < run.launch.max_failures:
        return None
    last = run_dir.attempt(number - 1)
    return Outcome(
        attempts.DO_NOT_RESTART,
        f"{failures} attempts in a row ended without a new checkpoint; the last one's output is in "
        f"attempts/{last.name}. `outlast resume` tries again once the cause is mended.",
    )


def _leave_bad_nodes(run_dir: RunDir, world: World, number: int) -> Outcome | None:
    """Look at the nodes; in a job that can be requeued elsewhere a bad one ends the attempt."""
    found = check_nodes(world, run_dir.attempt(number))
    if world.is_first:
        gflops, mb = found.slowest_flops_per_second / 1e9, found.all_reduce_bytes_per_second / 1e6
        record.event(
            run_dir.events,
            "nodes_checked",
            bad=found.bad,
            gflops=round(gflops),
            all_reduce_mb_per_s=round(mb),
        )
        for node, reason in found.bad.items():
            record.append(run_dir.bad_nodes, node=node, reason=reason, attempt=number)
    said = "; ".join(f"{node}: {reason}" for node, reason in found.bad.items())
    is_elsewhere = (os.environ.get("OUTLAST_JOB") or "").startswith("slurm-")
    if found.bad and is_elsewhere:
        return Outcome(attempts.STOPPED, f"bad nodes: {said}")
    if world.device_problem is not None:
        raise LaunchError(world.device_problem)
    if found.bad and world.is_first:
        _say(f"warning: {said}")
    return None


def _say(text: str) -> None:
    with suppress(OSError):  # the log may lie on a full disk
        print(text, flush=True)


class _Clock:
    """Names the phases of a start in events.jsonl, from rank 0."""

    def __init__(self, run_dir: RunDir, world: World, heartbeat: Heartbeat) -> None:
        self._run_dir, self._world, self._last, self.heartbeat = run_dir, world, _STARTED, heartbeat

    def lap(self, name: str, seconds: float | None = None) -> None:
        """The phase `name` ends now, or took the first `seconds` of the time since the last one."""
        now = time.monotonic() if seconds is None else self._last + seconds
        if self._world.is_first:
            record.event(self._run_dir.events, "phase", name=name, seconds=round(now - self._last, 3))
        self.heartbeat.beat(0, f"starting, after {name}", is_starting=True)
        self._last = now


class Trainer:
    """One attempt at a run."""

    def __init__(self, run: RunConfig, run_dir: RunDir, world: World, number: int, clock: _Clock) -> None:
        """Open the data, build the network, and continue from the newest checkpoint. Collective."""
        self.run, self.run_dir, self.world, self.number, self.clock = run, run_dir, world, number, clock
        self.heartbeat = clock.heartbeat
        manifests = together(world, lambda: [read_manifest(source.path) for source in run.data.sources])
        self.data_fingerprint = joint_fingerprint(manifests)
        self.reader = together(world, lambda: _open_data(run))
        self.validation = together(world, lambda: _open_validation(run))
        clock.lap("data")
        together(world, lambda: choose(run.model, world.device, DTYPES[run.precision]))
        self.model = build_model(run, world)
        if run.compile:
            together(world, lambda: self.model.compile_parts())
        self.peak_flops = peak_flops_per_second(world, run.precision, DTYPES[run.precision])
        if world.is_first:
            chosen = {"attention": self.model.attention_name, "peak_flops_per_second": self.peak_flops}
            record.event(run_dir.events, "network_built", device=world.device.type, **chosen)
        clock.lap("model")
        self.engine = Engine(self.model, run, world)
        clock.lap("engine")
        resumed = load_newest(run_dir, self.engine, world, self.data_fingerprint)
        self.start = resumed.step if resumed is not None else 0
        together(world, lambda: self._skip(resumed.skipped if resumed is not None else ()))
        clock.lap("load")
        self.saver = Saver(
            run_dir,
            self.engine,
            world,
            attempt=number,
            data_fingerprint=self.data_fingerprint,
            heartbeat=self.heartbeat,
        )
        clock.lap("checkpoint buffers")
        if world.is_first:
            reached = record.last(run_dir.metrics)
            complaint = record.cut_back(run_dir.metrics, self.start)
            if reached is not None and (kept := record.last(run_dir.metrics) or reached):
                lost = {
                    "lost_steps": reached["step"] - self.start,
                    "lost_s": round(time.time() - kept["time"], 1),
                }
                record.event(run_dir.events, "continued", step=self.start, **lost)
            if complaint is not None:
                record.event(run_dir.events, "record_damaged", reason=complaint)
                _say(f"{run_dir.metrics.name} is not whole: {complaint}")
            _say(
                f"attempt {number}: {world.size} processes on {world.device.type}, attention "
                f"{self.model.attention_name}, step {self.start} of {run.total_steps} is done"
            )
            _say(f"optimizer: {group_table(self.model, run.optimizer)}")
            if run.compile:
                _say("the first step, and the first evaluation, compile the network: a minute or more")
        self.scored: dict[int, float] = {}  # scored tokens over all ranks, of the steps that come next
        self.unsettled: tuple[int, PendingTick] | None = None
        self.is_time_to_save = False
        self.lines = Lines(run_dir, world, number)
        self.profile = Profile(run, run_dir, world)

    def _skip(self, before: Ranges) -> None:
        """Pass over the sequences that the checkpoint's run did, and those that the config names since."""
        self.reader.skip(before, 0)
        self.reader.skip(self.run.data.skip, self.start)

    def train(self) -> Outcome:
        """Take the steps that are left, or those until a stop request."""
        try:
            return self._train()
        except CheckpointError:
            raise
        except OutlastError:  # agreed upon: what is being saved is whole in host memory still
            self.saver.wait()
            raise

    def _train(self) -> Outcome:
        run, world = self.run, self.world
        first, last = self.start + 1, run.total_steps
        self.batches = Prefetcher(self.reader, world, run.batch.micro_batch, first, last)
        self._agree_ahead(first)
        if self._is_anyone_asked_to_stop() or not self._make_up_for_evaluation():
            return self._stopped(self.start, "nothing new to save")
        if run.schedule.warmup == "auto" and first == 1:
            self._choose_initial_rate()
        is_stopping = False
        _leave_garbage()
        for step in range(first, last + 1):
            started = time.monotonic()
            self.heartbeat.beat(step - 1, "training", is_starting=step == first)
            self.profile.before(step)
            loaded = self.batches.get(step)
            waited = time.monotonic() - started
            lr = learning_rate(run.schedule, run.optimizer.peak_lr, last, step, self.engine.initial_lr)
            if run.model.dropout:
                seed_dropout(run.seed, step, world.rank)
            loss_sum = train_step(self.engine, loaded.micro_batches, lr, self.scored[step])
            numbers = Late(loss_sum, self.engine.grad_norm)  # the next step is queued before they are read
            self.profile.after(step)
            self._note_what_happened(step)
            if self.unsettled is not None:
                is_stopping = self._settle()
            self._tick(step, loaded.digest)
            if step % COLLECT_EVERY_STEPS == 0:
                gc.collect()
            fields = self._fields(step, lr, time.monotonic() - started, waited)
            self.lines.begin(Line(step, fields, numbers, self.scored.pop(step)))

            is_last = step == last
            is_due_evaluation = is_last or step % run.evaluation.every_steps == 0
            is_due_save = self._is_due_save(step)
            if not (is_last or is_due_evaluation or is_due_save or is_stopping):
                continue
            is_stopping = self._settle_all(step, is_due_evaluation, is_stopping)
            self.heartbeat.beat(step, "saving")
            if is_stopping:
                stopped = self._stop(step)
                if not is_last or stopped.exit_code != attempts.STOPPED:
                    return stopped
            elif is_last:
                self.lines.write()
                self.saver.save_and_wait(step, self.reader.skipped, problem=self.lines.problem)
            elif is_due_save:
                self.saver.save(step, self.reader.skipped, problem=self.lines.problem)
                self.is_time_to_save = False  # what the tick of this boundary asked for was this save
        return Outcome(attempts.FINISHED, f"all {last} steps are done", last)

    def _is_due_save(self, step: int) -> bool:
        every = self.run.checkpoint.every_steps
        return self.is_time_to_save or (every is not None and step % every == 0)

    def _is_anyone_asked_to_stop(self) -> bool:
        (asked,) = total(self.world, STOP.is_requested())
        return asked > 0

    def _stopped(self, step: int, what: str, exit_code: int = attempts.STOPPED) -> Outcome:
        reason = from_first(self.world, STOP.reason) or "a signal to another rank"
        return Outcome(exit_code, f"stopped at step {step} ({reason}); {what}", step)

    def _make_up_for_evaluation(self) -> bool:
        """Evaluate the step that was resumed from, if a stop cut that short; False if another one does."""
        line = from_first(self.world, record.last(self.run_dir.metrics)) or {}
        is_missing = line.get("step") == self.start and "val/loss" not in line
        if not is_missing or self.start % self.run.evaluation.every_steps:
            return True
        scores = self._evaluate(self.start)
        if scores is not None and self.world.is_first:
            record.amend_last(self.run_dir.metrics, **scores)
        return scores is not None

    def _evaluate(self, step: int) -> dict[str, float] | None:
        """The scores on the validation split; None if a stop request cut it short, never at the last step."""
        stop = STOP if step < self.run.total_steps else None
        return self.validation.measure(self.model, self.world, self.heartbeat, step, stop)

    def _agree_ahead(self, first: int) -> None:
        steps = range(first, first + AHEAD)
        together(self.world, lambda: [self.batches.scored_tokens(step) for step in steps])
        counts = total(self.world, *(float(self.batches.scored_tokens(step)) for step in steps))
        self.scored.update(zip(steps, counts, strict=True))

    def _fields(self, step: int, lr: float, seconds: float, waited: float) -> dict[str, float]:
        tokens_per_second = self.run.batch.sizes.at(step) / seconds
        fields = {
            "tokens": self.run.batch.sizes.until(step),
            "train/lr": lr,
            "train/step_seconds": seconds,
            "train/tokens_per_second": tokens_per_second,
            "data/wait_seconds": waited,
        }
        if self.peak_flops is not None:
            fields["train/mfu"] = flops_per_token(self.run.model) * tokens_per_second / self.peak_flops
        return fields

    def _choose_initial_rate(self) -> None:
        """Settle on where the warmup starts; the checkpoints keep it."""
        batch = self.batches.peek(1).micro_batches
        rate = initial_rate(self.engine, self.model, batch, self.scored[1], self.world)
        self.engine.initial_lr = rate
        self.clock.lap("warmup")
        if self.world.is_first:
            share = rate / self.run.optimizer.peak_lr
            saved = int(self.run.schedule.warmup_steps * share)
            record.event(self.run_dir.events, "warmup_chosen", initial_lr=rate, saved_steps=saved)
            _say(f"the warmup starts at rate {rate:.3g}, {share:.1%} of the peak, and saves {saved} steps")

    def _note_what_happened(self, step: int) -> None:
        if self.engine.was_skipped and self.world.is_first:
            record.event(self.run_dir.events, "update_skipped", step=step, reason="non-finite gradient")
        if step == self.start + 1:
            if self.run.compile:
                self.clock.lap("compile", seconds=compile_seconds())
            self.clock.lap("first_step")

    def _tick(self, step: int, digest: int) -> None:
        """Start telling the others how `step` went, and the loss of the one before; `_settle` reads it."""
        has_no_data = self.batches.error(step + AHEAD) is not None
        is_broken = has_no_data or (self.world.is_first and is_superseded(self.run_dir, self.number))
        ahead = 0 if has_no_data else self.batches.scored_tokens(step + AHEAD)
        is_saved, has_failed = self.saver.report()
        tick = Tick(
            self.lines.loss_sum(step - 1),
            ahead,
            float(digest),
            stop=float(STOP.is_requested()),
            error=float(is_broken),
            save_due=float(self.saver.is_due()),
            save_done=float(is_saved),
            save_failed=float(has_failed),
        )
        self.unsettled = (step, PendingTick(self.world, tick))

    def _settle(self) -> bool:
        """Take note of what the ranks said at the last boundary; whether one of them was asked to stop."""
        assert self.unsettled is not None
        (step, pending), self.unsettled = self.unsettled, None
        agreed = pending.result()
        if agreed.error:
            together(self.world, lambda: self._raise_what_is_broken(step))
        self.saver.advance(agreed.save_done, agreed.save_failed)
        self.is_time_to_save = agreed.save_due > 0
        self.scored[step + AHEAD] = agreed.scored_ahead
        behind = self.reader.numbers_behind(step)
        self.lines.add(step, **{"data/digest": agreed.digest, "data/sequences_behind": behind})
        self.lines.complete(step - 1, agreed.loss_sum)
        return agreed.stop > 0

    def _settle_all(self, step: int, is_due_evaluation: bool, is_stopping: bool) -> bool:
        """Complete the line of `step`, the last one taken, with an evaluation where it is due.

        Whether a rank was asked to stop, also meanwhile.
        """
        is_stopping = self._settle() or is_stopping
        if is_due_evaluation:
            is_left_out = is_stopping and step < self.run.total_steps
            scores = None if is_left_out else self._evaluate(step)
            is_stopping = is_stopping or scores is None
            self.lines.add(step, **(scores or {}), **self.lines.step_times(), **self._counts(step))
        self.lines.complete(step, *total(self.world, self.lines.loss_sum(step)))
        return is_stopping

    def _counts(self, step: int) -> dict[str, float]:
        """How many sequences of each source of a mixture are behind `step`."""
        names = [f"data/sequences/{name}" for name in source_names(self.run.data)]
        return dict(zip(names, self.reader.counts_at(step), strict=True)) if len(names) > 1 else {}

    def _raise_what_is_broken(self, step: int) -> None:
        self.batches.scored_tokens(step + AHEAD)
        if self.world.is_first and is_superseded(self.run_dir, self.number):
            raise Superseded(f"attempt {self.number + 1} has started since: attempt {self.number} ends here.")

    def _stop(self, step: int) -> Outcome:
        """Save and end this attempt; a save that is under way is given up, and one that hangs not waited for.

        A save that fails costs what came after the last checkpoint; that is no reason to give the run up.
        """
        try:
            self.saver.give_up()
            self.lines.write()
            self.saver.save_and_wait(
                step, self.reader.skipped, problem=self.lines.problem, patience_s=SILENCE_S
            )
        except Superseded:
            raise
        except CheckpointError as error:
            return self._stopped(step, f"not saved: {error}", attempts.FAILED)
        return self._stopped(step, "everything is saved")


def _leave_garbage() -> None:
    """From here on rubbish is collected at the same step on every rank: one that pauses delays them all."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _open_data(run: RunConfig) -> BatchReader:
    sources = [(source.path, source.weight) for source in run.data.sources]
    return BatchReader(
        sources,
        context=run.model.context,
        global_batch=run.batch_sizes,
        seed=run.seed,
        document_mask=run.data.document_mask,
        later=run.stages,
        caps=[source.max_epochs for source in run.data.sources],
        max_epochs=run.data.max_epochs,
        packing=run.data.packing,
    )


def _open_validation(run: RunConfig) -> Validation:
    token_bytes = load_encoding(run.data.sources[0].path).token_bytes()
    return Validation(run.data, run.model.context, run.evaluation.tokens, run.batch.micro_batch, token_bytes)


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        code = 1
    # At once, either way. An orderly exit waits for collectives whose other side may be dead, and the agent
    # for it; and it tears C++ threads down, where torch 2.13 was seen to abort after all had been written:
    # the agent would take a finished attempt for a failed one and start another.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
