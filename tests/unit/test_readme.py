"""What the README files say is true: configs parse, commands and files exist, tables agree with the code.

Captures of a terminal are the one thing that is not tested here.
"""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from pydantic import BaseModel

from data_pipeline.config_file import Section, validate
from data_pipeline.prepare import pipeline
from gpt.checkpoint.format import INDEX_NAME, step_name
from gpt.config.resume_rules import RULES, Change
from gpt.config.run import RunConfig
from gpt.run.exit_codes import ExitCode
from gpt.run.failure_policy import POLICIES, TRIGGERS, Action, Policy
from gpt.run.run_dir import (
    CORRUPT_PREFIX,
    REWOUND_PREFIX,
    UNCOMMITTED_PREFIX,
    AttemptDir,
    RunDir,
    SubmissionDir,
)
from gpt.sidecars.mlflow_facts import STATUSES
from launcher.cli import commands
from launcher.cluster import ClusterConfig
from launcher.commands.sweep import SweepConfig
from launcher.preflight.plan import plan
from launcher.runs.recipes import recipe_names, run_tables
from tests.paths import ROOT
from tests.unit.test_architecture import LAYERS, layer_of

README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CHANGELOG.md",
    *(
        path
        for folder in ("gpt", "launcher", "data_pipeline", "tests")
        for path in sorted((ROOT / folder).rglob("README.md"))
    ),
]
TOP_LEVEL = ("gpt", "launcher", "data_pipeline", "tests", "docker", "cluster_configs")
CLUSTERS = {path.stem for path in (ROOT / "cluster_configs").glob("*.toml")}
CONFIGS: dict[str, type[Section]] = {
    "RUN.toml": RunConfig,
    "CLUSTER.toml": ClusterConfig,
    "DATA.toml": pipeline.DataPrepConfig,
    "SWEEP.toml": SweepConfig,
}


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)


def code_spans(path: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def section(heading: str) -> str:
    """The text of the README under a heading, up to the next one of the same level."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text_of(README), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"README has no section {heading!r}"
    return found[1]


def rows(table: str) -> list[list[str]]:
    """The cells of each row of the Markdown tables in `table`, headings left out."""
    lines = [line.strip().strip("|") for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [row for row in cells if row[0] and not set(row[0]) <= set("-|: ")]


def show(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Configs


def toml_blocks() -> list[Any]:
    documents = [path for path in DOCUMENTS if path != ROOT / "data_pipeline" / "README.md"]
    found = [(path, text) for path in documents for text in blocks(path, "toml")]
    return [pytest.param(text, id=f"{show(path)}-{number}") for number, (path, text) in enumerate(found)]


@pytest.mark.parametrize("text", toml_blocks())
def test_a_toml_block_is_a_valid_config(text: str) -> None:
    names = [name for name in CONFIGS if name in text.splitlines()[0]]
    assert names, f"the first line must be a comment that names one of {', '.join(CONFIGS)}"
    tables = tomllib.loads(text)
    if names == ["RUN.toml"]:  # a fragment is completed with the tables of a recipe
        tables = {**run_tables("tiny", ["data.path=nowhere"])[0], **tables}
    validate(CONFIGS[names[0]], tables, names[0])


def test_the_readme_shows_every_kind_of_config() -> None:
    first_lines = [text.splitlines()[0] for text in blocks(README, "toml")]
    assert {name for name in CONFIGS if any(name in line for line in first_lines)} == set(CONFIGS)


# Commands


def command_lines() -> list[Any]:
    """Every `outlast …` of the documents and whether it is a whole call, as in a block of shell commands.

    A mention in prose may leave arguments out. Lines with an ellipsis are left out.
    """
    calls, mentions = set(), set()
    for path in DOCUMENTS:
        for block in blocks(path, "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            calls.update(line.strip() for line in lines if line.strip().startswith("outlast "))
        mentions.update(span for span in code_spans(path) if span.startswith("outlast "))
    found = [(line, line in calls) for line in sorted(calls | mentions)]
    return [pytest.param(*one, id=one[0]) for one in found if not re.search("…|COMMAND|outlast -", one[0])]


@pytest.mark.parametrize(("line", "is_call"), command_lines())
def test_a_command_line_has_a_command_and_options_that_exist(line: str, is_call: bool) -> None:
    command, words = command_of(shlex.split(line, comments=True)[1:])
    context = click.Context(command, info_name=command.name)
    values, _, _ = command.make_parser(context).parse_args(list(words))
    if is_call:
        try:
            command.parse_args(context, list(words))
        except click.BadParameter as error:
            assert "does not exist" in error.message  # the files of the examples are not here
    if isinstance(run := values.get("run"), str) and command.name in ("launch", "plan", "rehearse"):
        assert run == "RUN" or run.endswith(".toml") or run in recipe_names()
    if (cluster := values.get("cluster")) is not None:
        assert cluster == "C" or cluster.endswith(".toml") or cluster in CLUSTERS
    for setting in values.get("overrides") or ():
        if command.name != "prepare" and setting != "FIELD=VALUE":
            assert is_field(RunConfig, setting.partition("=")[0].split(".")), setting


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `words` name, and the words after it."""
    command: click.Command = commands
    while isinstance(command, click.Group):
        assert words and words[0] in command.commands, f"no such command: {' '.join(words)}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def is_field(model: type[BaseModel], names: list[str]) -> bool:
    """Whether a dotted name is a field of a config model."""
    field = model.model_fields.get(names[0])
    if field is None:
        return False
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    inner = [kind for kind in kinds if issubclass(kind, BaseModel)]
    return not names[1:] or any(is_field(kind, names[1:]) for kind in inner)


def test_every_command_is_in_the_readme() -> None:
    def leaves(group: click.Group, prefix: str) -> Iterator[str]:
        for name, command in group.commands.items():
            is_group = isinstance(command, click.Group)
            yield from leaves(command, f"{prefix}{name} ") if is_group else [f"{prefix}{name}"]

    missing = [name for name in leaves(commands, "outlast ") if name not in text_of(README)]
    assert [name for name in missing if name != "outlast demo"] == []  # make demo runs it


def test_make_targets_exist() -> None:
    named = {
        target
        for path in DOCUMENTS
        for target in re.findall(r"\bmake ([a-z]+)\b", " ".join(code_spans(path)))
    }
    defined = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named
    assert named - defined == set()


# Files and links


@pytest.mark.parametrize("path", DOCUMENTS, ids=show)
def test_files_that_a_document_names_exist(path: Path) -> None:
    pattern = rf"(?:{'|'.join(TOP_LEVEL)})/[\w./-]*"
    named = {span for span in code_spans(path) if re.fullmatch(pattern, span)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=show)
def test_links_inside_the_repository_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(path)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("package", ["gpt", "launcher"])
def test_the_map_of_a_package_follows_its_layers(package: str) -> None:
    found = re.search(
        r"^## The map\n(.*?)^## ", text_of(ROOT / package / "README.md"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    members = [
        name.removesuffix(".py").replace("/", ".")
        for row in rows(found[1])
        for name in re.findall(rf"`{package}/([\w./]+?)/?`", row[0])
    ]
    layers = LAYERS[package]
    order = [layer_of(f"{package}.{member}", layers)[0] for member in members if member != "recipes"]
    assert order == sorted(order)
    assert set(members) == {member for layer in layers for member in layer}


def test_the_route_to_an_optimizer_step_is_that_of_the_code() -> None:
    found = re.search(
        r"^## From the config.*?(?=^## )", text_of(ROOT / "gpt/README.md"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    route = [
        (name, ROOT / file.strip("`"))
        for functions, file, _ in rows(found[0])[1:]
        for name in re.findall(r"`([\w.]+)`", functions)
    ]
    # Each function calls the next one, and the last one calls DeepSpeed's engine.step().
    following = [name.rpartition(".")[2] for name, _ in route[1:]] + ["step"]
    for (name, path), callee in zip(route, following, strict=True):
        assert callee in called_by(path, name), f"{name} does not call {callee}"
    words = ("zero", "one", "two", "three", "four", "five", "six")
    assert f"{words[len(route) - 1]} functions of ours" in found[0]


def called_by(path: Path, function: str) -> set[str]:
    """The names that a function or method of a file calls."""
    scope: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in function.split("."):
        inside = (node for node in ast.walk(scope) if isinstance(node, ast.FunctionDef | ast.ClassDef))
        scope = next(node for node in inside if node.name == part)
    calls = [node.func for node in ast.walk(scope) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


# Tables


def action_in_words(policy: Policy) -> str:
    if policy.limit is None:
        return policy.action.value
    return f"{policy.action.value}; after `{policy.table}.{policy.limit}` in a row, {policy.beyond.value}"


def exit_code_rows() -> list[list[str]]:
    return [[str(int(code)), code.meaning, action_in_words(POLICIES[TRIGGERS[code]])] for code in ExitCode]


def policy_rows() -> list[list[str]]:
    return [[trigger.value, action_in_words(policy)] for trigger, policy in POLICIES.items()]


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    assert rows(section("Exit codes"))[1:] == exit_code_rows()


def test_the_table_of_failures_is_that_of_the_code() -> None:
    table = section("When something fails").partition("gpt/run/failure_policy.py")[2]
    assert rows(table)[1:] == policy_rows()
    for policy in POLICIES.values():
        limits = RunConfig.model_fields[policy.table].annotation
        assert policy.limit is None or policy.limit in limits.model_fields  # type: ignore[union-attr]
    assert Action.REQUEUE.value in table


def fields_of(change: Change) -> list[str]:
    return [name for name, kind in RULES.items() if kind is change]


@pytest.mark.parametrize(
    ("kind", "change"),
    [("free", Change.FREE), ("warned", Change.WARNED), ("must match", Change.MUST_MATCH)],
)
def test_the_table_of_changes_lists_every_field(kind: str, change: Change) -> None:
    [row] = [row for row in rows(section("Changing a run")) if row[0] == kind]
    assert re.findall(r"`([^`]+)`", row[2]) == fields_of(change)


def metrics_in_code() -> set[str]:
    """Patterns of the metric names that the packages write; a computed part matches anything."""
    patterns = set()
    for path in [*(ROOT / "gpt" / "training").rglob("*.py"), *(ROOT / "gpt" / "distributed").rglob("*.py")]:
        inside = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                inside.update(id(value) for value in node.values)
                parts = [
                    re.escape(value.value) if isinstance(value, ast.Constant) else r"[\w./-]+"
                    for value in node.values
                ]
                patterns.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                patterns.add(re.escape(node.value))
    return {pattern for pattern in patterns if re.match(r"(train|val|data)/[^ ]*$", pattern)}


def test_the_table_of_metrics_lists_every_metric() -> None:
    table = [row for row in rows(section("Metrics")) if row[0].startswith("`")]
    listed = {name for row in table for name in re.findall(r"`([^`]+)`", row[0])}
    written = metrics_in_code()
    assert "train/loss" in written
    unknown = {name for name in listed if not any(re.fullmatch(pattern, name) for pattern in written)}
    missing = {pattern for pattern in written if not any(re.fullmatch(pattern, name) for name in listed)}
    assert (unknown, missing) == (set(), set())


def run_directory_paths() -> set[str]:
    """Every path of a run directory, with N for a digit."""
    found: set[str] = set()
    run = RunDir(Path())
    attempt, submission = run.attempt(0), run.submission(0)
    for layout in (run, attempt, submission):
        for name, member in vars(type(layout)).items():
            if isinstance(member, property) and isinstance(path := getattr(layout, name), Path):
                found.add(path.as_posix())
    found |= {path.as_posix() for path in (attempt.path, attempt.node(0), attempt.rank_log(0, 0))}
    found |= {path.as_posix() for path in (attempt.hang_report(0), submission.path, submission.node_log(0))}
    found |= {submission.torchrun_logs(0, 0).as_posix(), submission.meeting_point("JOB", 0).as_posix()}
    found |= {submission.node_failure("JOB", 0, 0).as_posix(), run.sidecar_health("NAME").as_posix()}
    found -= {run.mlflow_database.as_posix(), run.attempts.as_posix(), run.submissions.as_posix()}
    step = run.checkpoints / step_name(0)
    found |= {(step / INDEX_NAME).as_posix(), (step / "rank-00000.safetensors").as_posix()}
    return {path.replace("0", "N") for path in found}


def test_the_table_of_a_run_directory_lists_every_path() -> None:
    text = section("What is in a run directory")
    listed = {name for row in rows(text)[1:] for name in re.findall(r"`([^`]+)`", row[0])}
    assert listed == run_directory_paths()
    for name in (UNCOMMITTED_PREFIX, CORRUPT_PREFIX, REWOUND_PREFIX, RunDir(Path()).mlflow_database.name):
        assert f"`{name}`" in text


def test_all_paths_of_a_run_directory_are_properties_or_known_methods() -> None:
    methods = {
        name
        for layout in (RunDir, AttemptDir, SubmissionDir)
        for name, member in vars(layout).items()
        if callable(member) and not name.startswith("_")
    }
    numbers = {"attempt", "submission", "attempt_numbers", "last_submission"}
    paths = {"node", "rank_log", "hang_report", "node_log", "torchrun_logs", "meeting_point", "node_failure"}
    paths.add("sidecar_health")
    assert methods == numbers | paths, "add a new path to run_directory_paths() and to the README"


def test_the_table_of_endings_is_what_mlflow_shows() -> None:
    found = {
        word: status
        for words, status in rows(section("MLflow"))[1:]
        for word in re.findall(r"`([a-z]+)`", words)
    }
    assert found == STATUSES


def test_the_glossary_defines_the_terms_of_the_project() -> None:
    terms = (
        "rank, step, micro-batch, shard, attempt, job, job run, submission, restart, lost steps, "
        "sequence number, extent, manifest, mirror, stage"
    )
    assert set(terms.split(", ")) <= set(
        re.findall(r"^- \*\*([^*]+)\*\*:", section("Glossary"), re.MULTILINE)
    )


def gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def short(count: float) -> str:
    """A number of tokens as the table writes it: 300 B, 2 T."""
    unit, name = next(pair for pair in ((1e12, "T"), (1e9, "B"), (1, "")) if count >= 0.99 * pair[0])
    return f"{count / unit:.0f} {name}".strip()


def test_the_table_of_sizes_is_what_plan_computes() -> None:
    table = [row for row in rows(section("How big, how long, how much")) if row[0].startswith("`")]
    assert {row[0].strip("`") for row in table} == set(recipe_names()) - {"tiny", "demo", "transformer-base"}
    for name, parameters, tokens, gpus, *others in table:
        settings = ["data.path=nowhere", *["model.recompute=full"] * (name == "`llama-70b`")]
        tables, source = run_tables(name.strip("`"), settings)
        config = validate(RunConfig, tables, source)
        count = int(gpus.replace(",", ""))
        cluster = ClusterConfig(kind="slurm", nodes=count // 8, gpus_per_node=8, accelerator="h100-80gb")
        needs = plan(config.resolve(config.model.vocabulary), cluster, None)
        assert needs.days is not None and needs.gpu_hours is not None
        billions = needs.parameters / 1e9
        assert parameters == (f"{billions:.1f} B" if billions >= 1 else f"{1000 * billions:.0f} M")
        assert tokens == short(needs.tokens)
        assert others == [
            f"{needs.days:.1f}",
            f"{needs.gpu_hours:,.0f}",
            str(config.zero.stage),
            f"{config.batch.micro_batch}, {needs.largest_micro_batch}",
            gib(needs.memory.peak),
            gib(needs.checkpoint_bytes),
        ]


# The checks can fail


def test_unknown_commands_options_and_fields_are_found() -> None:
    with pytest.raises(AssertionError, match="no such command: lunch"):
        command_of(["lunch", "tiny"])
    command, words = command_of(["launch", "tiny", "--dry"])
    with pytest.raises(click.NoSuchOption):
        command.make_parser(click.Context(command)).parse_args(words)
    assert is_field(RunConfig, ["schedule", "total_steps"])
    assert not is_field(RunConfig, ["schedule", "steps"])
    assert not is_field(RunConfig, ["seed", "value"])
