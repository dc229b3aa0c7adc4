"""The command tree: names, options, help, exit codes. What a command does is imported when it runs.

`outlast --help` must answer in under 0.3 s, so nothing here imports more than click; nothing anywhere in
`launcher` imports torch.
"""

import sys
from pathlib import Path
from typing import Any

import click

from data_pipeline.errors import OutlastError

_RUN_HELP = "RUN is a recipe's name or a TOML file."
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Set a field of the run config; may be repeated.",
)
_cluster_option = click.option(
    "--cluster", default="local", show_default=True, metavar="C", help="A file, or a name in cluster_configs."
)
_detach_option = click.option(
    "--follow/--detach", "attend", default=None, help="Stay until the job ends (default: local jobs only)."
)


def _example(*lines: str) -> str:
    """An epilog that click does not rewrap."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="outlast")
def commands() -> None:
    """Pretraining runs that outlast their machines.

    \b
    First:   outlast demo
    Yours:   outlast prepare SOURCE… --tokenizer outlast-4k --out DATA
             outlast launch RUN.toml --cluster local --set data.path=DATA

    Exit codes: 0 done; 2 the input is wrong; 75 stopped with everything saved, start again to
    continue; 93 do not restart; 1 anything else.
    """


@commands.command(
    short_help="See it work: train, kill, restart, sample.", epilog=_example("outlast demo --out demo")
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, metavar="DIR"
)
def demo(out: Path) -> int:
    """Prepare, train, kill, restart, sample: the whole road in a few minutes, without a network."""
    from launcher.demo import demo

    return demo(out)


@commands.command(
    short_help="Turn raw text into token shards.",
    epilog=_example("outlast prepare texts/*.jsonl.gz --tokenizer outlast-4k --out data/mine"),
)
@click.argument("sources", nargs=-1, required=True, metavar="DATA.toml | SOURCE…")
@click.option("--tokenizer", metavar="NAME", help="A tiktoken encoding, a file, or outlast-4k.")
@click.option("--out", metavar="DIR", help="The data directory to make.")
@click.option("--workers", type=int, metavar="N", help="Processes that tokenize.")
@click.option("--val-fraction", type=float, metavar="F", help="Share of the documents that is held out.")
@click.option("--set", "overrides", multiple=True, metavar="A=C", help="Set a field of the data config.")
@click.option("--cluster", metavar="C", help="Prepare in tasks on this cluster: a file or a known name.")
@click.option("--tasks", type=click.IntRange(min=1), metavar="N", help="Tasks; default: the cluster's nodes.")
@click.option(
    "--adopt",
    "is_adoption",
    is_flag=True,
    help="The sources are prefixes of Megatron's .bin/.idx files: make them a data set where they lie.",
)
@click.option(
    "--adopt-val", "val", multiple=True, metavar="PREFIX", help="With --adopt: files to validate on."
)
def prepare(
    sources: tuple[str, ...],
    overrides: tuple[str, ...],
    is_adoption: bool,
    val: tuple[str, ...],
    cluster: str | None,
    tasks: int | None,
    **options: Any,
) -> int:
    """Turn raw text into token shards. Run again after an interruption, it continues."""
    from launcher.data_commands import adopt, prepare

    given = {key: value for key, value in options.items() if value is not None}
    if tasks is not None and cluster is None:
        raise click.UsageError("--tasks goes with --cluster")
    if is_adoption:
        return adopt(sources, val, {**given, **({"set": overrides} if overrides else {})})
    if val:
        raise click.UsageError("--adopt-val goes with --adopt")
    return prepare(sources, given, overrides, cluster, tasks)


@commands.group()
def data() -> None:
    """Look into data sets."""


@data.command(
    "inspect",
    epilog=_example("outlast data inspect data/mine", "outlast data inspect data/mine --documents 0"),
)
@click.argument("folder", metavar="DATA_DIR", type=click.Path(path_type=Path))
@click.option(
    "--documents", type=click.IntRange(min=0), default=3, show_default=True, help="How many to decode."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed shows other documents.")
def inspect(folder: Path, documents: int, seed: int) -> int:
    """Show what a data set holds: counts, how long its documents are, and some of them decoded."""
    from launcher.data_commands import inspect

    return inspect(folder, documents, seed)


@commands.group()
def tokenizer() -> None:
    """Train a tokenizer."""


@tokenizer.command(
    "train", epilog=_example("outlast tokenizer train texts/ --vocab-size 8192 --out mine.json")
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@click.option("--vocab-size", type=click.IntRange(min=257), required=True, metavar="N", help="Ids in all.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE")
def train(sources: tuple[str, ...], vocab_size: int, out: Path) -> int:
    """Learn a byte-level BPE from texts and save it as a tiktoken encoding."""
    from launcher.data_commands import train_encoding

    return train_encoding(sources, vocab_size, out)


@commands.command(
    short_help="Show what a run will need.",
    epilog=_example("outlast plan demo --cluster local --set data.path=data/mine"),
    help=f"Show what a run will need: parameters, memory a rank, time, steps, disk. {_RUN_HELP}",
)
@click.argument("run")
@_cluster_option
@_set_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option(
    "--mfu",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the accelerators' peak that the time assumes.",
)
def plan(run: str, cluster: str, overrides: tuple[str, ...], as_json: bool, mfu: float) -> int:
    import json

    from launcher.launch import show_plan, show_warnings
    from launcher.plan import plan
    from launcher.preflight import examine
    from launcher.recipes import run_tables

    tables, source = run_tables(run, overrides)
    request = examine(tables, source, cluster, None)
    show_warnings(request)
    if as_json:
        click.echo(json.dumps(plan(request.config, request.cluster, request.train_tokens, mfu).as_json()))
    else:
        show_plan(request, mfu)
    return 0


@commands.command(
    short_help="Check everything, then train.",
    epilog=_example("outlast launch my-run.toml --cluster local --set batch.micro_batch=4"),
    help=f"Check everything, then run here or submit; prints the run directory last. {_RUN_HELP}",
)
@click.argument("run")
@_cluster_option
@_set_option
@click.option(
    "--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Default: $OUTLAST_RUNS/NAME-NNNN."
)
@click.option(
    "--from", "origin", metavar="RUN_DIR[@STEP]", help="Begin with the state of another run's checkpoint."
)
@click.option("--dry-run", is_flag=True, help="Check and plan; start and write nothing.")
@_detach_option
def launch(
    run: str,
    cluster: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    origin: str | None,
    dry_run: bool,
    attend: bool | None,
) -> int:
    from launcher.launch import launch

    return launch(run, cluster, overrides, run_dir, origin=origin, dry_run=dry_run, attend=attend)


@commands.command(
    short_help="Continue a run.",
    epilog=_example(
        "outlast resume runs/demo-0001 --set schedule.total_steps=400",
        "outlast resume s3://bucket/runs/demo-0001",
    ),
)
@click.argument("run_dir")
@click.option("--cluster", metavar="C", help="Default: where it ran last.")
@_set_option
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="Continue from an older checkpoint.")
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="FIELD",
    help="Let a field change that must match (`data`: the data itself); may be repeated.",
)
@_detach_option
def resume(
    run_dir: str,
    cluster: str | None,
    overrides: tuple[str, ...],
    step: int | None,
    allowed: tuple[str, ...],
    attend: bool | None,
) -> int:
    """Continue a run from its newest checkpoint, also on another number of processes.

    The URL of a mirror in place of RUN_DIR brings the run from there first.
    """
    from launcher.launch import resume

    return resume(run_dir, cluster, overrides, step, attend=attend, allowed=allowed)


@commands.command(
    short_help="List, pin and delete checkpoints.",
    epilog=_example(
        "outlast checkpoints runs/demo-0001 --check", "outlast checkpoints runs/demo-0001 --pin 60"
    ),
)
@click.argument("run_dir")
@click.option("--pin", type=int, multiple=True, metavar="STEP", help="Keep it whatever retention says.")
@click.option("--unpin", type=int, multiple=True, metavar="STEP", help="Leave it to retention again.")
@click.option("--delete", type=int, multiple=True, metavar="STEP", help="Delete it; two stay always.")
@click.option("--check", is_flag=True, help="Read every byte now; exit 1 if one is bad.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list, one object a checkpoint.")
def checkpoints(
    run_dir: str,
    pin: tuple[int, ...],
    unpin: tuple[int, ...],
    delete: tuple[int, ...],
    check: bool,
    as_json: bool,
) -> int:
    """List a run's checkpoints: step, size, when, by how many processes, pinned or not, verified or not."""
    from launcher.checkpoints import checkpoints
    from launcher.runs import open_run

    return checkpoints(open_run(run_dir), pin=pin, unpin=unpin, delete=delete, check=check, as_json=as_json)


@commands.command(short_help="Save and stop a run.", epilog=_example("outlast stop runs/demo-0001"))
@click.argument("run_dir")
@click.option("--now", is_flag=True, help="End it at once, without saving.")
def stop(run_dir: str, now: bool) -> int:
    """Save and stop a run; `outlast resume` continues it."""
    from launcher.launch import stop

    return stop(run_dir, now=now)


@commands.command(
    short_help="Prove on your cluster that a run survives.",
    epilog=_example("outlast rehearse gpt2-124m --cluster my-cluster.toml --set data.path=data/mine"),
)
@click.argument("run", metavar="RUN")
@_cluster_option
@_set_option
@click.option("--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Default: among the runs.")
@click.option(
    "--steps", type=click.IntRange(min=8), default=24, show_default=True, help="Of each of two runs."
)
def rehearse(run: str, cluster: str, overrides: tuple[str, ...], run_dir: Path | None, steps: int) -> int:
    """Train a short version of RUN twice, one of them killed, resumed and resized, and compare."""
    from launcher.rehearse import rehearse

    return rehearse(run, cluster, overrides, run_dir, steps)


@commands.command(
    short_help="Run a grid over config fields.",
    epilog=_example("outlast sweep sweep.toml --cluster my-cluster.toml", "outlast sweep runs/sweep-0001"),
)
@click.argument("source", metavar="SWEEP.toml | SWEEP_DIR", type=click.Path(path_type=Path, exists=True))
@click.option("--cluster", metavar="C", help="A file, or a name in cluster_configs. Default: local.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Default: among the runs.")
@click.option("--results", is_flag=True, help="Start nothing; show what came out, the best first.")
@click.option("--json", "as_json", is_flag=True, help="With --results: a JSON list.")
@_detach_option
def sweep(
    source: Path, cluster: str | None, out: Path | None, results: bool, as_json: bool, attend: bool | None
) -> int:
    """Run every combination of some fields' values: on Slurm as one array, here one after the other.

    \b
    SWEEP.toml:  run = "my-run.toml"
                 [set]
                 data.path = "data/mine"
                 [grid]
                 optimizer.peak_lr = [3e-4, 6e-4]
                 seed = [1, 2]
    """
    from launcher.sweep import show_results, sweep

    if results:
        show_results(source, as_json=as_json)
        return 0
    return sweep(source, cluster, out, attend=attend)


@commands.command(
    short_help="Show runs and how they are doing.",
    epilog=_example("outlast status", "outlast status runs/demo-0001 --json"),
)
@click.argument("run_dirs", nargs=-1, metavar="[RUN_DIR…]")
@click.option("--json", "as_json", is_flag=True, help="A JSON list, one object a run.")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
def status(run_dirs: tuple[str, ...], as_json: bool, watch: bool) -> int:
    """Show runs: state, step, loss, speed, last checkpoint, restarts. Default: all of $OUTLAST_RUNS.

    A sweep's folder stands for all of its runs.
    """
    import json

    from gpt.run_dir import RunDir
    from launcher.paths import absolute
    from launcher.runs import list_runs, open_run, runs_folder, sweep_runs
    from launcher.status import show, statuses

    def find() -> list[RunDir]:
        named = [sweep_runs(absolute(folder)) or [open_run(folder)] for folder in run_dirs]
        return [run for several in named for run in several] or list_runs()

    if as_json and watch:
        raise click.UsageError("--watch shows the table again and again; --json is for one look")
    if as_json:
        click.echo(json.dumps([row.as_json() for row in statuses(find())], indent=2))
    elif watch or find():
        show(find, watch=watch)
    else:
        click.echo(f"no runs in {runs_folder()}", err=True)
    return 0


@commands.command(
    short_help="Print what the processes wrote.", epilog=_example("outlast logs runs/demo-0001 --follow")
)
@click.argument("run_dir")
@click.option("--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--attempt", type=int, metavar="N", help="Default: the newest.")
@click.option("--node", type=int, metavar="N", help="Default: all.")
def logs(run_dir: str, follow: bool, attempt: int | None, node: int | None) -> int:
    """Print what the processes of a run wrote, each line with its origin."""
    from launcher.logs import lines
    from launcher.runs import open_run

    for line in lines(open_run(run_dir), follow=follow, attempt=attempt, node=node):
        click.echo(line)
    return 0


@commands.command(
    short_help="Check every byte of data or checkpoints.",
    epilog=_example("outlast verify runs/demo-0001", "outlast verify data/mine"),
)
@click.argument("folder", metavar="RUN_DIR | DATA_DIR", type=click.Path(path_type=Path))
def verify(folder: Path) -> int:
    """Check every byte of a data set, or of all checkpoints of a run; one line for each bad file."""
    from launcher.data_commands import verify

    return verify(folder)


@commands.command(
    short_help="Let a checkpoint or an export write.",
    epilog=_example('outlast sample runs/demo-0001 --prompt "In the beginning"'),
)
@click.argument("folder", metavar="RUN_DIR|EXPORT")
@click.option("--prompt", default="", metavar="TEXT", help="What the text begins with.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0.0), default=0.8, show_default=True, help="0: the likeliest."
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Only the N likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    metavar="P",
    help="Only the likeliest tokens that make up P of the probability.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Default: the newest intact one.")
def sample(folder: str, prompt: str, **options: float | None) -> int:
    """Let a run's checkpoint, or an exported folder, write until it ends its text; printed as it is drawn."""
    from launcher.children import sample

    return sample(folder, prompt, **options)


@commands.command(
    short_help="Write a checkpoint for transformers.",
    epilog=_example("outlast export runs/demo-0001 exported", "outlast export runs/demo-0001 out --step 60"),
)
@click.argument("run_dir")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Default: the newest intact one.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
def export(run_dir: str, out: Path, step: int | None, dtype: str) -> int:
    """Write a checkpoint as a folder that transformers loads: weights, config and tokenizer."""
    from launcher.children import export

    return export(run_dir, out, step, dtype)


@commands.command(
    "import",
    short_help="Make a run from a transformers model.",
    epilog=_example(
        "outlast import gpt2/ runs/mine --data data/mine --set schedule.total_steps=1000",
        "outlast resume runs/mine",
    ),
)
@click.argument("hf_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DIR", help="A data directory, prepared with its tokenizer.")
@_cluster_option
@_set_option
def import_(hf_dir: Path, run_dir: Path, data: str, cluster: str, overrides: tuple[str, ...]) -> int:
    """Make a run that continues the pretraining of a GPT-2, Llama, Mistral or Qwen3 folder."""
    from launcher.imported import import_run

    return import_run(hf_dir, run_dir, data, cluster, overrides)


@commands.command(
    short_help="Open the MLflow UI.", epilog=_example("outlast ui", "outlast ui runs/demo-0001 --port 5001")
)
@click.argument("folder", required=False, metavar="[RUN_DIR | RUNS_DIR]", type=click.Path(path_type=Path))
@click.option("--port", type=int, default=5000, show_default=True)
def ui(folder: Path | None, port: int) -> int:
    """Open the MLflow UI over the tracked runs of a folder; default: $OUTLAST_RUNS."""
    from launcher.children import ui

    return ui(folder, port)


@commands.command(
    short_help="Print a config file's JSON Schema.", epilog=_example("outlast schema run > run.schema.json")
)
@click.argument("kind", type=click.Choice(["run", "cluster", "data"]))
def schema(kind: str) -> int:
    """Print the JSON Schema of a config file, for editors."""
    import json

    from data_pipeline.config_file import Section

    model: type[Section]
    if kind == "run":
        from gpt.config import RunConfig as model
    elif kind == "cluster":
        from launcher.cluster import ClusterConfig as model
    else:
        from data_pipeline.prepare import DataPrepConfig as model
    click.echo(json.dumps(model.model_json_schema(), indent=2))
    return 0


def main() -> None:
    """The `outlast` command: runs it and exits with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one command; errors meant for users are lines on standard error."""
    try:
        return int(commands.main(arguments, prog_name="outlast", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except OutlastError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # or the interpreter complains while it flushes
        return 1
    except (NotADirectoryError, IsADirectoryError, PermissionError) as error:  # what was named is not usable
        click.echo(f"error: {error.filename}: {error.strerror}", err=True)
        return 2
