"""Who may import whom, read from the source itself.

Imports inside functions count too. Each rule is a function from imports or source to violations, so that the
last part of this file can show on small examples that every rule can fail.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.paths import ROOT

PACKAGES = ("launcher", "gpt", "data_pipeline")

# From the lowest layer up. A layer imports only layers below it, and the members of one layer do not import
# each other. A name is a sub-package, or a file that lies directly in the package.
LAYERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "data_pipeline": (
        ("errors", "corpus", "encodings", "places"),
        ("durable", "config_file", "remote", "git_lfs"),
        ("sources", "dataset"),
        ("tokenizer", "sampling"),
        ("prepare", "inspect"),
    ),
    "gpt": (
        ("config", "run", "recipes"),
        ("checkpoint", "model"),
        ("optimizer",),
        ("distributed",),
        ("distributed.zero",),
        ("saving", "huggingface"),
        ("training",),
        ("dry_run",),
        ("sidecars", "train", "export", "sample", "replay", "trace"),
    ),
    "launcher": (
        ("paths", "process_tree", "units", "findings"),
        ("cluster",),
        ("cluster_file", "request"),
        ("runs",),
        ("scheduler",),
        ("preflight", "node"),
        ("simulation",),
        ("commands",),
        ("cli",),
    ),
}

# The parts of gpt that login nodes import: these sub-packages, and single modules of others.
TORCH_FREE_PACKAGES = ("gpt.config", "gpt.run", "gpt.checkpoint")
TORCH_FREE_MODULES = (
    "gpt.huggingface.architectures",
    "gpt.huggingface.config_json",
    "gpt.huggingface.config_keys",
    "gpt.huggingface.stored_tensors",
    "gpt.huggingface.tokenizer",
    "gpt.huggingface.tokenizer_check",
    "gpt.model.flops",
    "gpt.model.loss_chunks",
    "gpt.optimizer.parameter_groups",
    "gpt.saving.save_interval",
)

# What turns token ids into batches. It runs in every worker and needs no parser of raw text.
DATA_READERS = ("data_pipeline.dataset", "data_pipeline.sampling", "data_pipeline.tokenizer.encoding")

ENTRY_POINTS = ("gpt.train", "gpt.export", "gpt.sample", "gpt.replay", "gpt.trace")

Imports = set[tuple[str, str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imported_by(source: str) -> Iterator[str]:
    """Every module that `source` imports; `from a import b` is a.b where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative imports hide what is imported"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if is_module(whole) else node.module


def is_in(name: str, *packages: str) -> bool:
    """Whether module `name` is one of `packages` or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer_of(name: str, layers: Iterable[Iterable[str]]) -> tuple[int, str]:
    """The number of the layer of a module, and the member that it belongs to: the longest name that fits."""
    inside = name.partition(".")[2]
    fitting = [
        (len(member), number, member)
        for number, members in enumerate(layers)
        for member in members
        if is_in(inside, member)
    ]
    assert fitting, f"{name} belongs to no declared layer: add it to LAYERS"
    _, number, member = max(fitting)
    return number, member


def upward(imports: Imports, layers: Iterable[Iterable[str]]) -> Imports:
    """The imports that do not lead to a lower layer or stay within one member."""
    wrong = set()
    for importer, target in imports:
        (above, member), (below, other) = layer_of(importer, layers), layer_of(target, layers)
        if member != other and above <= below:
            wrong.add((importer, target))
    return wrong


def cycle(imports: Imports) -> list[str]:
    """One cycle of imports, or an empty list."""
    graph: dict[str, set[str]] = {}
    for importer, target in imports:
        graph.setdefault(importer, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def reached(imports: Imports, starts: Iterable[str]) -> set[str]:
    """Every module that importing `starts` loads; a module loads the packages that it lies in."""
    targets: dict[str, set[str]] = {}
    for importer, target in imports:
        targets.setdefault(importer, set()).add(target)
    found, waiting = set(), list(starts)
    while waiting:
        name = waiting.pop()
        if name and name not in found:
            found.add(name)
            waiting += [*targets.get(name, ()), name.rpartition(".")[0]]
    return found


def private_uses(source: str) -> list[str]:
    """The private names of our other modules that `source` imports, or reads as module._name."""
    tree, modules, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_in(node.module or "", *PACKAGES, "tests"):
            for alias in node.names:
                if alias.name.startswith("_"):
                    found.append(f"{node.module}.{alias.name}")
                elif is_module(f"{node.module}.{alias.name}"):
                    modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        is_private = isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)
        if is_private and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.append(f"{node.value.id}.{node.attr}")
    return found


def modules_in_strings(source: str) -> set[str]:
    """Our modules that strings and docstrings name: whole strings, `python -m NAME`, and `import NAME`."""
    ours = rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(re.findall(rf"(?:-m|^import|^from) ({ours})", node.value, re.MULTILINE))
            found.update(re.findall(rf"^({ours})$", node.value))
    return found


def names_something(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one, such as a class or its method."""
    while "." in name:
        if is_module(name):
            return True
        name = name.rpartition(".")[0]
        path = ROOT.joinpath(*name.split("."))
        if path.with_suffix(".py").is_file():
            return True
    return False


@pytest.fixture(scope="module")
def imports() -> Imports:
    """Every import in our packages, as (module, imported module)."""
    return {
        (module_name(path), target)
        for path in files_of(*PACKAGES)
        for target in imported_by(path.read_text(encoding="utf-8"))
    }


def within(imports: Imports, *packages: str) -> Imports:
    """The imports that begin and end in `packages`."""
    return {edge for edge in imports if all(is_in(name, *packages) for name in edge)}


# What the packages must be like


def test_the_imports_that_the_rules_judge_are_found(imports: Imports) -> None:
    assert ("launcher.commands.demo", "gpt.run.record") in imports, "from gpt.run import record"
    assert ("launcher.cli.training", "launcher.commands.launch") in imports, "inside a function"
    assert {name.partition(".")[0] for name, _ in imports} == set(PACKAGES)


def test_no_files_import_each_other_in_a_circle(imports: Imports) -> None:
    assert cycle(within(imports, *PACKAGES)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_layer_imports_only_layers_below_it(imports: Imports, package: str) -> None:
    inside = {edge for edge in within(imports, package) if package not in edge}
    assert upward(inside, LAYERS[package]) == set()


def test_every_layer_member_exists() -> None:
    names = [f"{package}.{member}" for package in PACKAGES for layer in LAYERS[package] for member in layer]
    assert [name for name in names if not is_module(name)] == []


def test_data_pipeline_imports_neither_gpt_nor_launcher(imports: Imports) -> None:
    assert [e for e in imports if is_in(e[0], "data_pipeline") and is_in(e[1], "gpt", "launcher")] == []


def test_gpt_never_imports_launcher(imports: Imports) -> None:
    assert [e for e in imports if is_in(e[0], "gpt") and is_in(e[1], "launcher")] == []


def test_no_package_imports_the_tests(imports: Imports) -> None:
    assert [e for e in imports if is_in(e[1], "tests")] == []


def test_gpt_itself_imports_nothing(imports: Imports) -> None:
    assert [target for name, target in imports if name == "gpt"] == []


def test_launcher_imports_only_the_torch_free_parts_of_gpt(imports: Imports) -> None:
    used = {target for name, target in imports if is_in(name, "launcher") and is_in(target, "gpt")}
    assert {name for name in used if not is_in(name, *TORCH_FREE_PACKAGES, *TORCH_FREE_MODULES)} == set()


@pytest.mark.parametrize("heavy", ["torch", "deepspeed", "mlflow"])
def test_launcher_and_data_pipeline_do_not_import(heavy: str, imports: Imports) -> None:
    assert [e for e in imports if is_in(e[0], "launcher", "data_pipeline") and is_in(e[1], heavy)] == []


def test_launcher_and_data_pipeline_import_with_torch_blocked(imports: Imports) -> None:
    light = ("launcher", "data_pipeline", *TORCH_FREE_PACKAGES)
    names = {module_name(path) for path in files_of(*PACKAGES) if is_in(module_name(path), *light)}
    names |= {target for name, target in imports if is_in(name, "launcher") and is_in(target, "gpt")}
    program = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "mlflow", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
for name in {sorted(names)!r}:
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


def test_data_readers_load_no_parser_of_raw_text(imports: Imports) -> None:
    readers = {module_name(path) for path in files_of("data_pipeline")}
    loaded = reached(imports, {name for name in readers if is_in(name, *DATA_READERS)})
    assert {name for name in loaded if is_in(name, "data_pipeline.sources", "data_pipeline.prepare")} == set()


def test_only_the_zero_package_imports_deepspeed(imports: Imports) -> None:
    users = {name for name, target in imports if is_in(target, "deepspeed")}
    assert users
    assert {name for name in users if not is_in(name, "gpt.distributed.zero")} == set()


def test_only_two_modules_name_cuda() -> None:
    """Elsewhere a fake device could not take the branches for GPUs. Streams for copies are CUDA's own."""
    asks = re.compile(r"\.type [!=]= [\"']|\.is_cuda|torch\.cuda\.")
    found = {path.relative_to(ROOT).as_posix() for path in files_of("gpt") if asks.search(path.read_text())}
    assert found == {"gpt/model/hardware.py", "gpt/distributed/device_copies.py"}


def test_no_module_imports_an_entry_point(imports: Imports) -> None:
    assert [e for e in imports if e[1] in ENTRY_POINTS] == []


def test_no_file_is_called_utils() -> None:
    assert [path for path in files_of(*PACKAGES, "tests") if "util" in path.name] == []


def test_no_module_uses_a_private_name_of_another() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in files_of(*PACKAGES, "tests")
        if (names := private_uses(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_modules_that_strings_name_exist() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in files_of(*PACKAGES, "tests")}
    here = texts.pop(Path(__file__).resolve())
    assert "data_pipeline.dataset" in modules_in_strings(here), "whole strings are found"
    wrong = {
        path.relative_to(ROOT).as_posix(): missing
        for path, text in texts.items()
        if (missing := {name for name in modules_in_strings(text) if not names_something(name)})
    }
    assert wrong == {}


def test_every_sub_package_and_its_files_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = project["tool"]["setuptools"]
    packaged = set(find_packages(str(ROOT), include=settings["packages"]["find"]["include"]))
    folders = {module_name(path.parent / "__init__.py") for path in files_of(*PACKAGES, "cluster_configs")}
    assert folders - packaged == set()
    for package in packaged:
        patterns = settings["package-data"].get(package, [])
        for path in ROOT.joinpath(*package.split(".")).iterdir():
            is_read_by_code = path.is_file() and path.suffix in (".toml", ".json", ".gz")
            assert not is_read_by_code or any(fnmatch(path.name, pattern) for pattern in patterns), path


def test_the_unit_tests_mirror_the_packages() -> None:
    unit = ROOT / "tests" / "unit"
    folders = [module_name(path.parent / "__init__.py") for path in unit.rglob("test_*.py")]
    mirrored = {name.removeprefix("tests.unit").removeprefix(".") for name in folders} - {""}
    assert {
        name for name in mirrored if not ROOT.joinpath(*name.split("."), "__init__.py").is_file()
    } == set()


# Each rule can fail


def test_a_circle_of_imports_is_found() -> None:
    assert cycle({("a", "b"), ("b", "c")}) == []
    circle = cycle({("a", "b"), ("b", "c"), ("c", "a")})
    assert set(pairwise(circle)) in (
        {("a", "b"), ("b", "c"), ("c", "a")},
        {("b", "a"), ("c", "b"), ("a", "c")},
    )


def test_an_import_of_a_higher_layer_is_found() -> None:
    layers = (("config", "run"), ("zero",), ("zero.state",))
    allowed = {
        ("p.zero.engine", "p.run.stop"),
        ("p.zero.engine", "p.zero.other"),
        ("p.zero.state.a", "p.zero"),
    }
    wrong = {("p.run.stop", "p.zero.engine"), ("p.config", "p.run.stop"), ("p.zero", "p.zero.state.a")}
    assert upward(allowed | wrong, layers) == wrong


def test_a_module_without_a_layer_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"p\.other\.file belongs to no declared layer"):
        upward({("p.other.file", "p.config")}, (("config",),))


def test_what_a_module_loads_through_others_is_found() -> None:
    edges = {("p.a", "p.b"), ("p.b", "p.sub.c"), ("p.sub", "p.d"), ("p.e", "p.f")}
    assert reached(edges, ["p.a"]) == {"p", "p.a", "p.b", "p.sub", "p.sub.c", "p.d"}


def test_imports_inside_functions_and_of_modules_from_packages_are_found() -> None:
    source = (
        "import numpy as np\ndef f():\n    from gpt.run import record\n    from gpt.run.stop import Flag\n"
    )
    assert set(imported_by(source)) == {"numpy", "gpt.run.record", "gpt.run.stop"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from gpt.run.record import _parse", ["gpt.run.record._parse"]),
        ("from gpt.run import record\nrecord._parse(1)", ["record._parse"]),
        ("from gpt.run import record as r\nr._parse(1)", ["r._parse"]),
        ("from gpt.run import record\nrecord.__name__, self._x", []),
        ("from torch import _dynamo", []),
    ],
)
def test_a_private_name_of_another_module_is_found(source: str, found: list[str]) -> None:
    assert private_uses(source) == found


def test_modules_in_strings_are_found() -> None:
    source = (
        '"""`python -m gpt.gone RUN`"""\nrun("gpt.lost")\ncode = """\nimport gpt.away\n"""\nx = "gpt.md is"'
    )
    assert modules_in_strings(source) == {"gpt.gone", "gpt.lost", "gpt.away"}
    assert not any(names_something(name) for name in modules_in_strings(source))
    assert names_something("gpt.run.stop.StopFlag")
