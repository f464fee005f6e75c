"""Which sockets have something to say: epoll with one callback each.

`selectors` does the same with three Python objects per event; the loop that carries every step is worth these lines.
"""

import os
import select
import threading
from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class Poller:
    """Belongs to one thread; only `wake` and `call_soon` may be used by others."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._closed = False
        self.register(self._wake_fd, self._on_wake)

    def register(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """Call `callback` with the event mask whenever `fd` is ready."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on `fd`."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget `fd`; call it before the socket is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def poll(self, timeout_seconds: float) -> None:
        """Wait for events, at most so long, and call their callbacks."""
        for fd, mask in self._epoll.poll(max(timeout_seconds, 0.0)):
            callback = self._callbacks.get(fd)  # an earlier callback of this round may have closed it
            if callback is not None:
                callback(mask)

    def call_soon(self, call: Callable[[], None]) -> None:
        """From any thread: have `call` made by the thread that polls."""
        with self._lock:
            if self._closed:
                return
            self._calls.append(call)
            os.eventfd_write(self._wake_fd, 1)

    def _on_wake(self, _: int) -> None:
        os.eventfd_read(self._wake_fd)
        with self._lock:
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def close(self) -> None:
        """Give back the descriptors; registered sockets are their owners' to close."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._epoll.close()
        os.close(self._wake_fd)
