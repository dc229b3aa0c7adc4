"""From a claimed attempt to a Trainer that is ready for its first step, by the plans of start_plan."""

import time
from collections.abc import Callable

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.sampling.batches import BatchReader
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.config.run import RunConfig
from gpt.distributed.world import World, agree, from_first, gather
from gpt.distributed.zero.build import DTYPES, build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import choose
from gpt.model.compilation import compiler_problem
from gpt.model.gpt import GPT
from gpt.model.hardware import is_cpu
from gpt.optimizer.build import group_table
from gpt.run import record
from gpt.run.environment import WorkerEnvironment
from gpt.run.events import Event, record_event
from gpt.saving.restore import has_begun, load_newest
from gpt.saving.saver import Saver
from gpt.training.attempt import Attempt, log_line
from gpt.training.evaluation import Validation
from gpt.training.peak_flops import peak_flops_per_second
from gpt.training.prefetch import Prefetcher
from gpt.training.start_plan import BuildPlan, ResumePlan, lost_work
from gpt.training.trainer import Trainer, TrainingData


def set_up(attempt: Attempt) -> Trainer:
    """Open the data, build the network, and continue from the newest checkpoint. Collective."""
    run, run_dir, world = attempt.run, attempt.run_dir, attempt.world
    has_checkpoint = from_first(world, world.is_first and has_begun(run_dir))
    build = BuildPlan.of(run, has_checkpoint=has_checkpoint, has_gpu=not is_cpu(world.device))
    data = _open_data(attempt, build)
    attempt.clock.lap("data")
    model, peak_flops = _build_network(attempt, build)
    attempt.clock.lap("model")
    engine = Engine(model, run, world)
    attempt.clock.lap("engine")
    loaded = load_newest(run_dir, engine, world, data.fingerprint, is_begun=has_checkpoint)
    plan = ResumePlan.of(run, step=loaded.step, skipped=loaded.skipped) if loaded else ResumePlan.of(run)
    plan = plan.rehearsed(WorkerEnvironment.read())
    agree(world, lambda: _skip(data.reader, plan))
    attempt.clock.lap("load")
    saver = Saver(
        run_dir,
        engine,
        world,
        attempt=attempt.number,
        data_fingerprint=data.fingerprint,
        heartbeat=attempt.clock.heartbeat,
        stop=attempt.stop,
    )
    attempt.clock.lap("checkpoint buffers")
    if world.is_first:
        _cut_record_back(attempt, plan.start)
        _log_start(attempt, plan, model)
    batches = Prefetcher(data.reader, world, run.batch.micro_batch, plan.first, plan.last)
    return Trainer(attempt, data, engine, saver, batches, plan, peak_flops)


def _skip(reader: BatchReader, plan: ResumePlan) -> None:
    for ranges, step in plan.skips:
        reader.skip(ranges, step)


def _open_data(attempt: Attempt, plan: BuildPlan) -> TrainingData:
    run, world = attempt.run, attempt.world
    manifests = agree(world, lambda: [read_manifest(path) for path, _ in plan.sources])
    reader = agree(world, lambda: open_reader(run, plan))
    validation = agree(world, lambda: _open_validation(run, plan))
    return TrainingData(reader, validation, joint_fingerprint(manifests))


def open_reader(run: RunConfig, plan: BuildPlan) -> BatchReader:
    """The reader of the run's batches. Raises OutlastError when the data cannot be read."""
    return BatchReader(
        list(plan.sources),
        context=run.model.context,
        global_batch=run.batch_sizes,
        seed=run.seed,
        document_mask=run.data.document_mask,
        later=run.stages,
        caps=[source.max_epochs for source in run.data.sources],
        max_epochs=run.data.max_epochs,
        packing=run.data.packing,
    )


def _open_validation(run: RunConfig, plan: BuildPlan) -> Validation:
    token_bytes = load_encoding(plan.sources[0][0]).token_bytes()
    return Validation(run.data, run.model.context, run.evaluation.tokens, run.batch.micro_batch, token_bytes)


def _build_network(attempt: Attempt, plan: BuildPlan) -> tuple[GPT, float | None]:
    """The network, and the peak FLOP/s of all devices together where that is known."""
    run, world = attempt.run, attempt.world
    agree(world, lambda: choose(run.model, world.device, DTYPES[run.precision]))
    model = build_network(run, world, plan, log_line)
    peak_flops = peak_flops_per_second(world, run.precision, DTYPES[run.precision])
    if world.is_first:
        chosen = {"attention": model.attention_name, "peak_flops_per_second": peak_flops}
        record_event(attempt.run_dir.events, Event.NETWORK_BUILT, device=world.device.type, **chosen)
    return model, peak_flops


def build_network(run: RunConfig, world: World, plan: BuildPlan, warn: Callable[[str], None]) -> GPT:
    """The network of `plan`, compiled if that is planned. Collective.

    `warn` is called on rank 0 when compile = "auto" and a node has no compiler.
    """
    model = build_model(run, world, is_resumed=not plan.draws_weights)
    if plan.compiles and has_compiler(run, world, warn):
        agree(world, lambda: model.compile_parts(whole_rows=plan.has_whole_rows))
    return model


def has_compiler(run: RunConfig, world: World, warn: Callable[[str], None]) -> bool:
    """Whether every node has the compiler. Without one, compile = "auto" warns and goes on. Collective."""
    if run.compile != "auto":
        return True  # compile_parts raises without one
    problem = next((found for found in gather(world, compiler_problem()) if found), None)
    if problem is not None and world.is_first:
        warn(f"warning: the network is not compiled, because a node has no C++ compiler: {problem}")
    return problem is None


def _cut_record_back(attempt: Attempt, start: int) -> None:
    """Cut metrics.jsonl back to step `start`, and record the lost steps as an event."""
    run_dir = attempt.run_dir
    reached = record.last(run_dir.metrics)
    complaint = record.cut_back(run_dir.metrics, start)
    lost = lost_work(start, reached, record.last(run_dir.metrics), time.time())
    if lost is not None:
        record_event(run_dir.events, Event.CONTINUED, step=start, **lost)
    if complaint is not None:
        record_event(run_dir.events, Event.RECORD_DAMAGED, reason=complaint)
        log_line(f"warning: {run_dir.metrics.name} is damaged: {complaint}")


def _log_start(attempt: Attempt, plan: ResumePlan, model: GPT) -> None:
    world = attempt.world
    log_line(
        f"attempt {attempt.number}: {world.size} processes on {world.device.type}, attention "
        f"{model.attention_name}, {plan.start} of {plan.last} steps are done"
    )
    log_line(f"optimizer: {group_table(model, attempt.run.optimizer)}")
    if model.is_compiled:
        log_line("the first step and the first evaluation compile the network, which takes a minute or more")
