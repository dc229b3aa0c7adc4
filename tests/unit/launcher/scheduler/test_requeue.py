"""A controller that answers and refuses: it may not be asked for ever, while nodes stand idle."""

import subprocess
from collections.abc import Callable

import pytest

from data_pipeline.errors import LaunchError
from launcher.scheduler import slurm_commands as slurm


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Stands in for scontrol: what it says to each `requeue`; what it was asked is in the list."""
    asked: list[str] = []

    def install(answers: list[str]) -> list[str]:
        def ask(command: list[str], _question: str | None = None) -> "subprocess.CompletedProcess[str]":
            asked.append(command[1])
            if command[1] == "requeue":
                said = answers.pop(0) if len(answers) > 1 else answers[0]
                return subprocess.CompletedProcess(command, 1 if said else 0, "", said)
            return subprocess.CompletedProcess(
                command, 0, "JobId=7 JobState=RUNNING ExcNodeList=(null)\n", ""
            )

        monkeypatch.setattr(slurm, "_ask", ask)
        monkeypatch.setattr(slurm, "_PATIENCE_S", 0.0)
        return asked

    return install


def test_a_refusal_that_stands_is_told(controller: Callable[..., list[str]]) -> None:
    asked = controller(["Requested operation is presently disabled"])
    with pytest.raises(LaunchError, match="Requested operation is presently disabled"):
        slurm.requeue("7", 0)
    assert asked.count("requeue") == 12


def test_a_controller_that_is_away_is_asked_until_it_is_back(controller: Callable[..., list[str]]) -> None:
    away = "Unable to contact slurm controller (connect failure)"
    asked = controller([*[away] * 40, ""])
    assert slurm.requeue("7", 0)
    assert asked.count("requeue") == 41
