"""What the ranks agree on while they build the network."""

from types import SimpleNamespace
from typing import Any

import pytest

from gpt.distributed.world import World
from gpt.training import setup
from tests.unit.gpt.saving import support
from tests.unit.gpt.training.test_start_plan import config

alone = support.alone


@pytest.mark.parametrize(("choice", "goes_on"), [("auto", False), (True, True)])
def test_only_an_automatic_compilation_is_left_out_without_a_compiler(
    choice: Any, goes_on: bool, alone: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    attempt: Any = SimpleNamespace(run=config(compile=choice), world=alone)
    monkeypatch.setattr(setup, "compiler_problem", lambda: None)
    assert setup.has_compiler(attempt)
    monkeypatch.setattr(setup, "compiler_problem", lambda: "no g++")
    assert setup.has_compiler(attempt) is goes_on  # where it does, compiling raises
    warning = "the network is not compiled, because a node has no C++ compiler: no g++"
    assert (warning in capsys.readouterr().out) is not goes_on
