"""The temporary folder of one job run on one node. All its processes use it, and it is removed with them.

torch and its compilers leave caches in TMPDIR, which many clusters never clear. The node task removes the
folder; if the task is killed, a small shell that outlives it does; if everything is killed at once, the next
job run of the job on that node does.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from launcher.scheduler.protocol import NodeIdentity

# Waits until the other end of the pipe is closed, which the kernel does even for a killed process.
_CLEANER = """exec 3<&0; (trap '' TERM INT HUP QUIT USR1 USR2; cat <&3; rm -rf -- "$1") >/dev/null 2>&1 &"""


def make_tmpdir(identity: NodeIdentity) -> Path | None:
    """Create a folder and set this process's TMPDIR to it; None if there is no room for one.

    Call it before `adopt_orphans`, or the shell would end with the task's other children.
    """
    prefix = f"outlast-{identity.job}-{identity.node}-"
    home = Path(tempfile.gettempdir())
    for left in home.glob(f"{prefix}*"):
        if left.lstat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    except OSError as error:  # the node check measures the free space, and reports it
        print(f"no temporary folder: {error}", flush=True)
        return None
    os.environ["TMPDIR"] = str(folder)
    end, _held_open = os.pipe()  # the other end is closed with this process
    path = f"{os.environ.get('PATH', '')}:{os.defpath}"  # the container's PATH may have neither cat nor rm
    subprocess.run(
        ["/bin/sh", "-c", _CLEANER, "sh", str(folder)], stdin=end, env={**os.environ, "PATH": path}
    )
    os.close(end)
    return folder


def remove_tmpdir(folder: Path | None) -> None:
    """Remove the folder of `make_tmpdir`, once the processes that use it have ended."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
