"""Which folders other machines can see, by the file system that holds them."""

from pathlib import Path

import pytest

from launcher.findings import Findings
from launcher.scheduler.shared_folders import check_shared, file_system

MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sda1 /home/local ext4 rw 0 0
lfs@tcp:/scratch /scratch\\040space lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc", "overlay"),
        ("/tmp/runs/x", "tmpfs"),
        ("/home/me/runs", "nfs4"),
        ("/home/local/x", "ext4"),
        ("/homework", "overlay"),
        ("/scratch space/x", "lustre"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(path: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert file_system(Path(path), tmp_path / "mounts") == kind


def test_a_disk_that_other_machines_do_not_see_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {Path("/a"): "tmpfs", Path("/b"): "lustre", Path("/c"): None}
    monkeypatch.setattr("launcher.scheduler.shared_folders.file_system", lambda path: kinds[path])
    findings = Findings()
    check_shared(list(kinds), findings)
    assert findings.warnings == [
        "/a is on tmpfs, which other machines usually cannot see; every node of the job must."
    ]
