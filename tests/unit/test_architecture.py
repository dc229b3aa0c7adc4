"""The rooms and who may enter which, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

ROOMS = ("launcher", "gpt", "data_pipeline")
TORCH_FREE_IN_GPT = (
    "gpt",
    "gpt.config.run",
    "gpt.config.resume_rules",
    "gpt.config.data",
    "gpt.config.model",
    "gpt.config.optimizer",
    "gpt.config.parallel",
    "gpt.optimizer.parameter_groups",
    "gpt.huggingface.architectures",
    "gpt.run.run_dir",
    "gpt.run.record",
    "gpt.run.heartbeat",
    "gpt.model.flops",
    "gpt.run.host_memory",
    "gpt.checkpoint.format",
    "gpt.checkpoint.mirror",
)
LAUNCHER_MAY_USE = {*TORCH_FREE_IN_GPT[1:]}


def modules(room: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too; `from a import b` is a.b where that is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is entered"
            assert node.module is not None
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if is_module(below) else node.module


def edges() -> list[tuple[str, str]]:
    return [(name, target) for room in ROOMS for name, path in modules(room) for target in imported(path)]


def room_of(name: str) -> str:
    return name.partition(".")[0]


def test_the_walk_sees_the_imports_that_it_judges() -> None:
    found = edges()
    assert ("launcher.node.task", "gpt.run.record") in found, "from gpt import record"
    assert ("launcher.cli.training", "launcher.commands.launch") in found, "inside a function"
    assert {room_of(name) for name, _ in found} == set(ROOMS)


def test_data_pipeline_imports_nothing_of_ours_but_itself() -> None:
    wrong = [e for e in edges() if room_of(e[0]) == "data_pipeline" and room_of(e[1]) in ("launcher", "gpt")]
    assert wrong == []


def test_gpt_never_imports_launcher() -> None:
    assert [e for e in edges() if room_of(e[0]) == "gpt" and room_of(e[1]) == "launcher"] == []


def test_launcher_enters_only_the_torch_free_part_of_gpt() -> None:
    used = {target for name, target in edges() if room_of(name) == "launcher" and room_of(target) == "gpt"}
    assert used <= LAUNCHER_MAY_USE


def test_nothing_imports_the_training_entry() -> None:
    assert [e for e in edges() if e[1] == "gpt.train"] == []


def test_the_run_config_imports_its_tables_and_no_other_sibling() -> None:
    tables = {f"gpt.{name}_config" for name in ("data", "model", "optimizer", "parallel")}
    siblings = {e[1] for e in edges() if e[0] in {"gpt.config.run", *tables} and room_of(e[1]) == "gpt"}
    assert siblings == tables


def test_tests_are_imported_by_nobody() -> None:
    assert [e for e in edges() if room_of(e[1]) == "tests"] == []


@pytest.mark.parametrize("heavy", ["torch", "deepspeed", "mlflow"])
def test_launcher_and_data_pipeline_do_not_name(heavy: str) -> None:
    assert [
        e for e in edges() if room_of(e[0]) in ("launcher", "data_pipeline") and room_of(e[1]) == heavy
    ] == []


def test_launcher_and_data_pipeline_import_with_torch_blocked() -> None:
    names = [name for room in ("launcher", "data_pipeline") for name, _ in modules(room)]
    program = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "mlflow", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
for name in {[*names, *TORCH_FREE_IN_GPT]!r}:
    importlib.import_module(name)
try:
    import torch
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch is blocked"


def test_no_file_is_called_utils() -> None:
    assert [path for room in ROOMS for _, path in modules(room) if "util" in path.name] == []
