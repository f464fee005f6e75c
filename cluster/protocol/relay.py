"""A rank that passes the driver's frames on to the other ranks of its node.

    driver ==TCP==> relay rank --unix--> rank          one step crosses the network once for each node
                              \\--unix--> rank          what these say goes back the same way, frame by frame

Frames are not decoded on the way. The relay's owner forwards when it takes a message itself: the ranks of a node run a
step together, so none of them could use it earlier. When a neighbour goes away the driver is told which.
"""

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.channel import Channel, Listener, parse_address
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError
from argosy.cluster.protocol.messages import FromRank, Hello, WorkerError


class RelayChannel(Channel):
    """A rank's channel to the driver that others share. The folder of `relay_address` is made here, private to us."""

    def __init__(self, sock: socket.socket, receive: Any, relay_address: str):
        super().__init__(sock, receive)
        self._folder = Path(str(parse_address(relay_address)[1])).parent
        _make_private(self._folder)
        self._listener = Listener.bind(relay_address)
        self._neighbours: dict[int, Channel] = {}  # in the order in which they came
        self._closing = threading.Event()
        threading.Thread(target=self._accept, name="relay-accept", daemon=True).start()

    def recv_frame(self, timeout_seconds: float | None = None) -> memoryview:
        """The body of the next frame, which the neighbours have got as well."""
        frame = super().recv_frame(timeout_seconds)
        if self._neighbours:
            whole = _whole(frame)
            for neighbour in list(self._neighbours.values()):
                with contextlib.suppress(ChannelClosed):  # its reader tells the driver
                    neighbour.send_frame(whole)
        return frame

    def close(self) -> None:
        """End the connection, the neighbours' too, and remove the folder."""
        if self._closing.is_set():
            return
        self._closing.set()
        super().close()
        self._listener.close()
        for neighbour in list(self._neighbours.values()):
            neighbour.close()
        with contextlib.suppress(OSError):  # others still use it
            self._folder.rmdir()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                neighbour = Channel(self._listener.accept(), FromRank)
                threading.Thread(target=self._pass_up, args=(neighbour,), name="relay-up", daemon=True).start()

    def _pass_up(self, neighbour: Channel) -> None:
        """Everything that a neighbour says, until it goes away."""
        global_rank = -1
        try:
            while True:
                frame = neighbour.recv_frame()
                if global_rank < 0:
                    hello = neighbour.decode(frame)
                    if not isinstance(hello, Hello):
                        raise ChannelClosed("it did not say hello")
                    global_rank = hello.global_rank
                    self._neighbours[global_rank] = neighbour
                self.send_frame(_whole(frame))
        except ChannelClosed as error:
            neighbour.close()
            self._neighbours.pop(global_rank, None)
            if global_rank >= 0 and not self._closing.is_set():
                with contextlib.suppress(ChannelClosed):  # the driver is gone, too
                    self.send(WorkerError(global_rank=global_rank, epoch=-1, code="worker_lost", message=str(error)))


def _whole(frame: memoryview) -> bytes:
    return len(frame).to_bytes(4, "little") + bytes(frame)


def _make_private(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):  # looked at below
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
        raise ConfigError(f"{folder} is not a private folder of this user; remove it")
