"""What the ranks agree on while they build the network."""

from typing import Any

import pytest

from gpt.distributed.world import World
from gpt.training import setup
from tests.unit.gpt.saving import support
from tests.unit.gpt.training.test_start_plan import config

alone = support.alone


@pytest.mark.parametrize(("choice", "goes_on"), [("auto", False), (True, True)])
def test_only_an_automatic_compilation_is_left_out_without_a_compiler(
    choice: Any, goes_on: bool, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, warnings = config(compile=choice), list[str]()
    monkeypatch.setattr(setup, "compiler_problem", lambda: None)
    assert setup.has_compiler(run, alone, warnings.append) and not warnings
    monkeypatch.setattr(setup, "compiler_problem", lambda: "no g++")
    # Where it goes on, compiling raises.
    assert setup.has_compiler(run, alone, warnings.append) is goes_on
    warning = "warning: the network is not compiled, because a node has no C++ compiler: no g++"
    assert warnings == ([] if goes_on else [warning])
