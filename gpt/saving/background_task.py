"""What a save does beside the training: an action in a thread that is no burden to the steps."""

import os
import threading
import traceback
from collections.abc import Callable

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.format import FileEntry
from gpt.checkpoint.writer import Cancelled

# Of a core that the steps fill, 6%. At 19 it is 1%: the thread is then put aside while it holds the
# interpreter's lock, and the steps wait for it (measured: 21% slower for 80 s, here 8% for 8 s).
_NICENESS = 12


class Work:
    """An action in a thread of its own: what it gave, or why it failed."""

    def __init__(self, action: Callable[[], FileEntry | None]) -> None:
        self.entry: FileEntry | None = None
        self.error: CheckpointError | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether it has ended, either way."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it has ended, or `timeout_s` is over."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self.entry = self._action()
        except CheckpointError as error:
            self.error = error
        except (OSError, Cancelled) as error:
            self.error = CheckpointError(str(error) or "it was given up")
        except Exception as error:  # a defect of ours must not pass for a save that goes on for ever
            traceback.print_exc()
            self.error = CheckpointError(f"the writer failed: {error!r}")
