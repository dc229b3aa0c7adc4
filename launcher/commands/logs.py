"""The logs of a run in one stream: torchrun writes under submission/, the ranks write under attempts/.

Each line is prefixed with its origin. The lines of one file keep their order. Workers write no timestamps, so
the files are printed one after the other; with `--follow`, new lines are printed as they arrive.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import LaunchError
from gpt.run.run_dir import NODE_PREFIX, RunDir
from launcher.runs.job_record import read_job
from launcher.runs.store import read_cluster
from launcher.scheduler.jobs import JobWatcher
from launcher.scheduler.protocol import JobState

_POLL_S = 0.3
_LONGEST_LINE_BYTES = 1 << 20  # a longer line is printed in parts


def log_files(run: RunDir, attempt: int | None, node: int | None) -> list[tuple[str, Path]]:
    """Label and path of the logs of `attempt` (default: the newest submission and attempt) on `node`."""
    of_node = "*" if node is None else node
    files = []
    numbers = run.attempt_numbers()
    if attempt is None:
        if last := run.last_submission():
            pattern = run.submission(last).node_log(of_node)
            files += [
                (f"job {pattern.parent.name} {path.stem}", path)
                for path in sorted(pattern.parent.glob(pattern.name))
                if path.is_file()
            ]
        numbers = numbers[-1:]
    elif attempt in numbers:
        numbers = [attempt]
    else:
        raise LaunchError(
            f"there is no attempt {attempt}. Available attempts: {', '.join(map(str, numbers)) or 'none'}."
        )
    for number in numbers:
        pattern = run.attempt(number).node(of_node)
        for path in filter(Path.is_file, sorted(pattern.parent.glob(f"{pattern.name}/*.log"))):
            files.append((f"attempt {number} {path.parent.name} {path.stem}", path))
    return files


def lines(run: RunDir, *, follow: bool, attempt: int | None, node: int | None) -> Iterator[str]:
    """The log lines with their origins; `follow` waits for more until the job ends, over all attempts."""
    if node is not None and node not in (there := _nodes(run, attempt)):
        raise LaunchError(
            f"there is no node {node}. Available nodes: {', '.join(map(str, sorted(there))) or 'none'}."
        )
    offsets: dict[Path, int] = {}
    watched, watcher = None, None
    while True:
        if follow and (job := read_job(run)) != watched:
            watched = job
            watcher = JobWatcher(run, job, serves_stop=False) if job is not None else None
        is_over = watcher is None or watcher.state() == JobState.ENDED
        for label, path in log_files(run, attempt, node):
            for text in _new_lines(path, offsets, is_over):
                yield f"[{label}] {text}"
        if is_over:
            return
        time.sleep(_POLL_S)


def _nodes(run: RunDir, attempt: int | None) -> set[int]:
    """The nodes with logs of `attempt`; by default also the nodes that have not started yet."""
    names = (name for _, path in log_files(run, attempt, None) for name in (path.stem, path.parent.name))
    numbers = (name.removeprefix(NODE_PREFIX) for name in names if name.startswith(NODE_PREFIX))
    there = {int(number) for number in numbers if number.isascii() and number.isdigit()}
    return there | set(range(read_cluster(run).nodes)) if attempt is None else there


def _new_lines(path: Path, offsets: dict[Path, int], is_last: bool) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(offsets.get(path, 0))
        for raw in file:
            if not raw.endswith(b"\n") and not is_last and len(raw) < _LONGEST_LINE_BYTES:
                return  # the process has not finished this line
            offsets[path] = offsets.get(path, 0) + len(raw)
            yield raw.decode(errors="replace").rstrip("\n")
