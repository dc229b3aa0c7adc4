"""The report of a sidecar about itself."""

from pathlib import Path

import pytest

from gpt.run.records import Health, Sidecar, SidecarHealth
from gpt.run.run_dir import RunDir
from gpt.sidecars.health import HealthReport


def test_each_failure_is_told_once_until_it_changes_or_is_over(tmp_path: Path) -> None:
    told: list[str] = []
    run = RunDir(tmp_path)
    report = HealthReport(run, Sidecar.TRACKING, told.append)

    def now() -> SidecarHealth:
        found = SidecarHealth.read(run.sidecar_health(Sidecar.TRACKING))
        assert found is not None
        return found

    report.succeeded(3)
    report.failed(OSError("no answer from <socket at 0x7f00> after 10 s"))
    report.failed(OSError("no answer from <socket at 0x7f88> after 11 s"))
    assert told == ["no answer from <socket at 0x7f00> after 10 s"] == [now().error]
    assert (now().health, now().step) == (Health.FAILING, 3)
    report.failed(KeyError("name"))
    report.succeeded(4)
    report.failed(KeyError("name"))
    assert told[1:] == ["KeyError: 'name'"] * 2
    report.note("a new run receives the record")
    report.succeeded(5, warning="the profile could not be attached")
    report.ended(is_complete=True)
    assert (now().health, now().step, now().error) == (Health.DONE, 5, "the profile could not be attached")
    assert now().notes == ("a new run receives the record",)


def test_a_failure_names_no_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    report = HealthReport(RunDir(tmp_path), Sidecar.TRACKING, told.append)
    report.failed(OSError("no answer from http://me:secret@host/api"))
    assert told == ["no answer from http://…@host/api"]
    assert "secret" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_does_not_stop_a_sidecar(tmp_path: Path) -> None:
    report = HealthReport(RunDir(tmp_path / "gone"), Sidecar.MIRRORING, lambda _: None)
    report.succeeded(1)
    report.failed(OSError("no space left"))
    report.ended(is_complete=False)
