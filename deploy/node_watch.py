"""Whether Ray has any node left. Without one nothing that died is started again, and requests would wait in vain."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

PERIOD_SECONDS: Final = 2.0
_MISSES: Final = 2  # in a row, for the moment in which one node leaves and another comes


class NodeWatch:
    """Asks on a thread of its own while it is open: a question to Ray may take long when Ray is in trouble."""

    def __init__(self, has_nodes: Callable[[], bool], *, period_seconds: float = PERIOD_SECONDS):
        self._has_nodes, self._period_seconds = has_nodes, period_seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="node-watch", daemon=True)
        self.is_lost = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._is_over.set()  # nobody waits for the thread: its question may never be answered

    def _look(self) -> None:
        misses = 0
        while not self._is_over.wait(self._period_seconds):
            try:
                misses = 0 if self._has_nodes() else misses + 1
            except Exception:  # Ray has many words for "no answer", and none of them says that nodes are gone
                continue
            if misses >= _MISSES:
                self.is_lost = True
                return
