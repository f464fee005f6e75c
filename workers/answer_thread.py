"""Waits for what the device answers and sends it, beside the thread that launches steps."""

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable

from argosy.cluster.protocol.errors import ChannelClosed
from argosy.workers.step_outcome import StepOutcome

GRACE_SECONDS = 1.0  # between the driver's going away and our own end, for an orderly one
EXIT_FAILED = 4


class AnswerThread:
    """Waits for the device's answers and sends them, so that the main thread can launch the next step."""

    def __init__(self, send: Callable[[object], None], on_failure: Callable[[BaseException], None]):
        self._send, self._on_failure = send, on_failure
        self._outcomes: queue.SimpleQueue[StepOutcome | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def put(self, outcome: StepOutcome) -> None:
        """Send this when the device has it."""
        self._outcomes.put(outcome)

    def close(self) -> None:
        """Send what is left, then end."""
        self._outcomes.put(None)
        self._thread.join(timeout=GRACE_SECONDS)

    def _run(self) -> None:
        try:
            while (outcome := self._outcomes.get()) is not None:
                self._send(outcome.result())
        except ChannelClosed:
            return  # the watcher and the main thread see it, too
        except Exception as error:  # a device error shows here first; nothing can be computed after it
            traceback.print_exc()
            self._on_failure(error)
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
