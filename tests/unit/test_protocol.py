"""What Outlast's processes tell each other has one owner, gpt/run: no other module spells these names.

The test walks the syntax trees of the three packages. It looks at constants in code; docstrings and the prose
of messages may name a file or a variable.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.dataset.manifest import ENCODING_FILE
from gpt.run import run_dir as run_dir_module
from gpt.run.environment import Variable
from gpt.run.events import Event
from gpt.run.exit_codes import ExitCode
from gpt.run.run_dir import AttemptDir, RunDir, SubmissionDir
from tests.paths import ROOT

PACKAGES = ("launcher", "gpt", "data_pipeline")
OWNER = ROOT / "gpt/run"
# transformers calls its config file config.json too.
TRANSFORMERS = ("gpt/huggingface/", "gpt/export.py", "launcher/commands/import_model.py")
CODES = {int(ExitCode.STOPPED), int(ExitCode.DO_NOT_RESTART)}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (path for path in sorted((ROOT / package).rglob("*.py")) if not path.is_relative_to(OWNER))


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sources():
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def constants(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every constant that is not a statement of its own, as a docstring is."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in statements:
            yield node


def names_of(layout: type[RunDir] | type[AttemptDir] | type[SubmissionDir]) -> set[str]:
    """The last component of every path that `layout` gives without an argument, when it is a file name."""
    instance = layout(Path("runs/1"))
    values = (
        getattr(instance, name) for name, member in vars(layout).items() if isinstance(member, property)
    )
    return {value.name for value in values if isinstance(value, Path) and "." in value.name}


def file_names() -> set[str]:
    prefixes = {value for name, value in vars(run_dir_module).items() if name.endswith("_PREFIX")}
    return prefixes | names_of(RunDir) | names_of(AttemptDir) | names_of(SubmissionDir)


def names_the_event_key(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value == "event" for part in ast.walk(node))


def about_events(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of `node` that name events: arguments of our functions, operands next to the key "event"."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        yield from node.args if node.func.id in ("record_event", "read_events") else ()
    elif isinstance(node, ast.Compare) and names_the_event_key(node):
        yield from ast.walk(node)
    elif isinstance(node, ast.Match) and names_the_event_key(node.subject):
        yield from (part for case in node.cases for part in ast.walk(case.pattern))


def event_literals(tree: ast.Module) -> Iterator[ast.Constant]:
    """Literals of events: names of several words anywhere, single words where events are read or written."""
    events = {event.value for event in Event}
    several_words = {name for name in events if "_" in name}
    yield from (node for node in constants(tree) if node.value in several_words)
    parts = (part for node in ast.walk(tree) for part in about_events(node))
    yield from (part for part in parts if isinstance(part, ast.Constant) and part.value in events)


def test_file_names_cover_what_a_run_directory_holds() -> None:
    assert {
        "config.json",
        "OWNER.json",
        "outcome.json",
        "sweep.json",
        "metrics.jsonl",
        ".tmp-",
    } <= file_names()


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("record_event(path, 'finished')", 1),
        ("found = [line for line in lines if line['event'] == 'stopped']", 1),
        ("match line['event']:\n    case 'failed':\n        pass", 1),
        ("name = 'checkpoint_saved'", 1),
        ("state = 'finished'", 0),
        ("record_event(path, Event.FINISHED, cause='failed')", 0),
        ("'checkpoint_saved is an event'", 0),
    ],
)
def test_event_literals_are_found_in_code_and_only_there(code: str, count: int) -> None:
    assert len(set(event_literals(ast.parse(code)))) == count


def test_no_module_outside_gpt_run_spells_an_event() -> None:
    assert [f"{p}:{node.lineno}: {node.value}" for p, tree in trees() for node in event_literals(tree)] == []


def test_no_module_outside_gpt_run_spells_an_exit_code() -> None:
    found = [(p, node) for p, tree in trees() for node in constants(tree)]
    assert [
        f"{p}:{node.lineno}" for p, node in found if type(node.value) is int and node.value in CODES
    ] == []


def test_no_module_outside_gpt_run_spells_an_environment_variable() -> None:
    found = [(p, node) for p, tree in trees() for node in constants(tree) if isinstance(node.value, str)]
    assert [
        f"{p}:{node.lineno}: {node.value}"
        for p, node in found
        if re.fullmatch("OUTLAST_[A-Z_]+", str(node.value))
    ] == []


def test_no_module_outside_gpt_run_spells_a_file_of_a_run_directory() -> None:
    names = file_names()
    found = [(p, node) for p, tree in trees() for node in constants(tree) if node.value in names]
    assert [
        f"{p}:{node.lineno}: {node.value}"
        for p, node in found
        if not (node.value == "config.json" and p.startswith(TRANSFORMERS))
        # The run's copy has the name that the file has in a data directory.
        and not (node.value == ENCODING_FILE and p.startswith("data_pipeline/"))
    ] == []


def test_every_name_of_the_protocol_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gpt").rglob("*.py"))
    text += "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "launcher").rglob("*.py"))
    members = [f"Event.{event.name}" for event in Event] + [f"Variable.{name.name}" for name in Variable]
    assert [member for member in members if not re.search(rf"\b{re.escape(member)}\b", text)] == []


@pytest.mark.parametrize(
    ("call", "owner"), [("os.fsync(", "data_pipeline/durable.py"), (".prctl(", "gpt/run/process_control.py")]
)
def test_call_that_has_an_owner_is_in_no_other_module(call: str, owner: str) -> None:
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    users = [str(p.relative_to(ROOT)) for p in paths if call in p.read_text(encoding="utf-8")]
    assert users == [owner]
