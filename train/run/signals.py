"""SIGTERM and SIGUSR1: a cluster's notice that the job is about to end."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, notes these signals instead of ending the process, so that the loop can save first."""

    def __init__(self) -> None:
        self.name: str | None = None
        """The signal that came, or None."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Elsewhere, such as in a notebook's thread, Python allows no handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
