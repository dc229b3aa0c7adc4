"""The training loop: one attempt at a run, from its data to its last step.

Everything that a step computes is a function of (config, data, step); this loop only decides when to
evaluate, save and stop, and writes down what happened.
"""

import gc
import time

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import CheckpointError, OutlastError
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.sampling.skip_list import Ranges
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.config.run import RunConfig
from gpt.distributed.world import PendingTick, Tick, World, agree, from_first, total
from gpt.distributed.zero.build import DTYPES, build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import choose
from gpt.model.compilation import compile_seconds
from gpt.model.flops import flops_per_token
from gpt.model.gpt import seed_dropout
from gpt.optimizer.build import group_table
from gpt.optimizer.lr_schedule import learning_rate
from gpt.run import record
from gpt.run.attempts import Superseded, is_superseded, refuse_if_superseded
from gpt.run.events import Event, record_event
from gpt.run.exit_codes import ExitCode
from gpt.run.heartbeat import Heartbeat
from gpt.run.run_dir import RunDir
from gpt.run.stop import StopFlag
from gpt.saving.restore import has_begun, load_newest
from gpt.saving.saver import Saver
from gpt.training.attempt import AttemptOutcome, log_line
from gpt.training.auto_warmup import initial_rate
from gpt.training.evaluation import Validation, source_names
from gpt.training.metrics import Late, Line, Lines
from gpt.training.peak_flops import peak_flops_per_second
from gpt.training.prefetch import AHEAD, Prefetcher
from gpt.training.profiler import Profile
from gpt.training.step import train_step

# What Python does not free by itself is little, and a collection takes milliseconds.
COLLECT_EVERY_STEPS = 100


class StartClock:
    """Names the phases of a start in events.jsonl, from rank 0."""

    def __init__(self, run_dir: RunDir, world: World, heartbeat: Heartbeat, started: float) -> None:
        self._run_dir, self._world, self.heartbeat = run_dir, world, heartbeat
        self._last = started

    def lap(self, name: str, seconds: float | None = None) -> None:
        """The phase `name` ends now, or took the first `seconds` of the time since the last one."""
        now = time.monotonic() if seconds is None else self._last + seconds
        if self._world.is_first:
            record_event(self._run_dir.events, Event.PHASE, name=name, seconds=round(now - self._last, 3))
        self.heartbeat.beat(0, f"starting, after {name}", is_starting=True)
        self._last = now


class Trainer:
    """One attempt at a run."""

    def __init__(
        self, run: RunConfig, run_dir: RunDir, world: World, number: int, clock: StartClock, stop: StopFlag
    ) -> None:
        """Open the data, build the network, and continue from the newest checkpoint. Collective."""
        self.run, self.run_dir, self.world, self.number, self.clock = run, run_dir, world, number, clock
        self.stop, self.heartbeat = stop, clock.heartbeat
        manifests = agree(world, lambda: [read_manifest(source.path) for source in run.data.sources])
        self.data_fingerprint = joint_fingerprint(manifests)
        self.reader = agree(world, lambda: _open_data(run))
        self.validation = agree(world, lambda: _open_validation(run))
        clock.lap("data")
        agree(world, lambda: choose(run.model, world.device, DTYPES[run.precision]))
        is_begun = from_first(world, world.is_first and has_begun(run_dir))
        self.model = build_model(run, world, is_resumed=is_begun)
        if run.compile:
            agree(world, lambda: self.model.compile_parts(whole_rows=not run.data.document_mask))
        self.peak_flops = peak_flops_per_second(world, run.precision, DTYPES[run.precision])
        if world.is_first:
            chosen = {"attention": self.model.attention_name, "peak_flops_per_second": self.peak_flops}
            record_event(run_dir.events, Event.NETWORK_BUILT, device=world.device.type, **chosen)
        clock.lap("model")
        self.engine = Engine(self.model, run, world)
        clock.lap("engine")
        resumed = load_newest(run_dir, self.engine, world, self.data_fingerprint, is_begun=is_begun)
        self.start = resumed.step if resumed is not None else 0
        agree(world, lambda: self._skip(resumed.skipped if resumed is not None else ()))
        clock.lap("load")
        self.saver = Saver(
            run_dir,
            self.engine,
            world,
            attempt=number,
            data_fingerprint=self.data_fingerprint,
            heartbeat=self.heartbeat,
            stop=stop,
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
                record_event(run_dir.events, Event.CONTINUED, step=self.start, **lost)
            if complaint is not None:
                record_event(run_dir.events, Event.RECORD_DAMAGED, reason=complaint)
                log_line(f"{run_dir.metrics.name} is not whole: {complaint}")
            log_line(
                f"attempt {number}: {world.size} processes on {world.device.type}, attention "
                f"{self.model.attention_name}, step {self.start} of {run.total_steps} is done"
            )
            log_line(f"optimizer: {group_table(self.model, run.optimizer)}")
            if run.compile:
                log_line("the first step, and the first evaluation, compile the network: a minute or more")
        # Scored tokens over all ranks, of the steps that come next; 1 where there is none, as a divisor.
        self.scored: dict[int, float] = {}
        self.unsettled: tuple[int, PendingTick] | None = None
        self.is_time_to_save = False
        self.lines = Lines(run_dir, world, number)
        self.profile = Profile(run, run_dir, world)

    def _skip(self, before: Ranges) -> None:
        """Pass over the sequences that the checkpoint's run did, and those that the config names since."""
        self.reader.skip(before, 0)
        self.reader.skip(self.run.data.skip, self.start)

    def train(self) -> AttemptOutcome:
        """Take the steps that are left, or those until a stop request."""
        try:
            return self._train()
        except CheckpointError:
            raise
        except OutlastError:  # agreed upon: what is being saved is whole in host memory still
            self.saver.wait()
            raise

    def _train(self) -> AttemptOutcome:
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
            if is_last or is_stopping:
                return self._end(step, is_stopping=is_stopping)
            if is_due_save:
                self.saver.save(step, self.reader.skipped, problem=self.lines.problem)
                self.is_time_to_save = False  # what the tick of this boundary asked for was this save
        return self._finished()

    def _is_due_save(self, step: int) -> bool:
        every = self.run.checkpoint.every_steps
        return self.is_time_to_save or (every is not None and step % every == 0)

    def _is_anyone_asked_to_stop(self) -> bool:
        (asked,) = total(self.world, self.stop.is_requested())
        return asked > 0

    def _finished(self) -> AttemptOutcome:
        last = self.run.total_steps
        return AttemptOutcome(ExitCode.FINISHED, f"all {last} steps are done", last)

    def _stopped(self, step: int, what: str, exit_code: ExitCode = ExitCode.STOPPED) -> AttemptOutcome:
        reason = from_first(self.world, self.stop.reason) or "a signal to another rank"
        return AttemptOutcome(exit_code, f"stopped at step {step} ({reason}); {what}", step)

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
        stop = self.stop if step < self.run.total_steps else None
        return self.validation.measure(self.model, self.world, self.heartbeat, step, stop)

    def _agree_ahead(self, first: int) -> None:
        steps = range(first, first + AHEAD)
        agree(self.world, lambda: [self.batches.scored_tokens(step) for step in steps])
        counts = total(self.world, *(float(self.batches.scored_tokens(step)) for step in steps))
        self.scored.update((step, max(1.0, count)) for step, count in zip(steps, counts, strict=True))

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
            record_event(self.run_dir.events, Event.WARMUP_CHOSEN, initial_lr=rate, saved_steps=saved)
            log_line(
                f"the warmup starts at rate {rate:.3g}, {share:.1%} of the peak, and saves {saved} steps"
            )

    def _note_what_happened(self, step: int) -> None:
        if self.engine.was_skipped and self.world.is_first:
            record_event(self.run_dir.events, Event.UPDATE_SKIPPED, step=step, reason="non-finite gradient")
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
            stop=float(self.stop.is_requested()),
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
            agree(self.world, lambda: self._raise_what_is_broken(step))
        self.saver.advance(agreed.save_done, agreed.save_failed)
        self.is_time_to_save = agreed.save_due > 0
        self.scored[step + AHEAD] = max(1.0, agreed.scored_ahead)
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
        if self.world.is_first:
            refuse_if_superseded(self.run_dir, self.number)

    def _end(self, step: int, *, is_stopping: bool) -> AttemptOutcome:
        """Save and end this attempt; a stop gives up a save that is under way.

        Once a stop is asked for, also meanwhile, a save that fails costs what came after the last checkpoint;
        that is no reason to give the run up.
        """
        if is_stopping:
            self.saver.give_up()
        self.lines.write()
        try:
            self.saver.save_and_wait(step, self.reader.skipped, problem=self.lines.problem)
        except Superseded:
            raise
        except CheckpointError as error:
            if not self._is_anyone_asked_to_stop():
                raise
            return self._stopped(step, f"not saved: {error}", ExitCode.FAILED)
        is_finished = step == self.run.total_steps
        return self._finished() if is_finished else self._stopped(step, "everything is saved")


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
