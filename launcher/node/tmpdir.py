"""The temporary folder of one turn on one node: all its processes use it, and it goes when they do.

torch and the compilers below it leave caches in TMPDIR, and on many clusters nobody clears that. The folder
is removed by the node task; by a small shell that outlives it, where the task is killed; and where all is
killed at once, by the next turn of the job on that node.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from launcher.node.rendezvous import Place

# Waits until the pipe's other end is closed, as the kernel does for a process that is killed.
_SWEEPER = """exec 3<&0; (trap '' TERM INT HUP QUIT USR1 USR2; cat <&3; rm -rf -- "$1") >/dev/null 2>&1 &"""


def make_scratch(place: Place) -> Path | None:
    """A new folder, named by this process' TMPDIR from here on; None where there is no room for one.

    To be called before `adopt_orphans`, or the shell would end with the task's other children.
    """
    prefix = f"outlast-{place.job}-{place.node}-"
    home = Path(tempfile.gettempdir())
    for left in home.glob(f"{prefix}*"):
        if left.lstat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    except OSError as error:  # the node check measures what is free there, and says it
        print(f"no temporary folder: {error}", flush=True)
        return None
    os.environ["TMPDIR"] = str(folder)
    end, _held_open = os.pipe()  # the other end is closed with this process
    path = f"{os.environ.get('PATH', '')}:{os.defpath}"  # a container's own may have neither cat nor rm
    subprocess.run(
        ["/bin/sh", "-c", _SWEEPER, "sh", str(folder)], stdin=end, env={**os.environ, "PATH": path}
    )
    os.close(end)
    return folder


def remove_scratch(folder: Path | None) -> None:
    """Remove what `make_scratch` made, once the processes that use it have ended."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
