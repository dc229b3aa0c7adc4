"""An action in a low-priority thread, so that a save slows the training steps as little as possible."""

import os
import threading
import traceback
from collections.abc import Callable

import torch

from data_pipeline.errors import CheckpointError
from gpt.checkpoint.format import FileEntry
from gpt.checkpoint.writer import Cancelled
from gpt.distributed.device_copies import use_in_this_thread

# Niceness 12 gets 6% of a core that the steps keep busy; 19 gets 1%. At 19 the thread is descheduled while it
# holds the interpreter's lock, and the steps wait for it (measured: 21% slower for 80 s, against 8% for 8 s).
_NICENESS = 12


class BackgroundTask:
    """An action in a thread of its own: its result, or why it failed."""

    def __init__(self, action: Callable[[], FileEntry | None], device: torch.device) -> None:
        """The action may wait for copies from `device`."""
        self.entry: FileEntry | None = None
        self.error: CheckpointError | None = None
        self._action, self._device = action, device
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether the action has ended, successfully or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the action has ended, for at most `timeout_s`."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            use_in_this_thread(self._device)
            self.entry = self._action()
        except CheckpointError as error:
            self.error = error
        except (OSError, Cancelled) as error:
            self.error = CheckpointError(str(error) or "the save was given up")
        except Exception as error:  # a bug must fail the save, or the save would never end
            traceback.print_exc()
            self.error = CheckpointError(f"the writer failed: {error!r}")
