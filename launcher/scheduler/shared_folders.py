"""Checks that other machines can see the folders of a job, as far as this machine can tell."""

from collections.abc import Iterable
from pathlib import Path

from launcher.findings import Findings

_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "wekafs", "panfs", "pvfs2", "9p", "afs", "cifs")


def check_shared(paths: Iterable[Path], findings: Findings) -> None:
    """Warn about folders that are on a disk of this machine."""
    for path in paths:
        kind = file_system(path)
        if kind is not None and not kind.startswith(_SHARED):
            findings.warn(
                f"{path} is on {kind}, which other machines usually cannot see; every node of the job must."
            )


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The type of the file system that holds `path`, or would hold it; None when /proc does not say."""
    absolute = path.absolute()
    best, found = -1, None
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        point = Path(fields[1].replace("\\040", " "))
        if absolute.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), fields[2]
    return found
