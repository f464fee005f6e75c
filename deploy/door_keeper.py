"""The listening socket of the HTTP door, kept by `argosy serve` itself, so that it outlives the front that answers.

With `kill -9` of HAProxy, or of the actor of Ray Serve's that keeps it, the port was closed for the seconds that Ray
takes to notice and start another, and connections were refused. A process that ends closes a socket only if no other
has it: this one holds it, gives it to each HAProxy that starts (`take` in the folder, through a socket of our own),
and whoever connects meanwhile waits.
"""

import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from argosy.cluster.protocol.errors import ConfigError

ASK: Final = "l"  # beside HAProxy's own sockets, whose paths may have as many bytes
TAKE: Final = "take"
DESCRIPTOR: Final = 3  # where HAProxy finds it: its table of them is small
_BACKLOG: Final = 4096
_TAKE_SCRIPT: Final = f"""
import os, socket, sys
path, *command = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as asked:
    asked.settimeout(10)
    asked.connect(path)
    given = socket.recv_fds(asked, 1, 1)[1][0]
if given != {DESCRIPTOR}:
    os.dup2(given, {DESCRIPTOR})
os.set_inheritable({DESCRIPTOR}, True)
os.execv(command[0], command)
"""


class DoorKeeper:
    """Holds the socket while it is open, and gives it to whoever asks in the folder, which only this user can read."""

    def __init__(self, folder: Path, host: str, port: int):
        self._folder, self._address = folder, (host, port)

    def __enter__(self) -> Self:
        host, port = self._address
        try:
            family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            two = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
            self.door = socket.create_server(found[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=two)
        except OSError as error:
            raise ConfigError(f"port {port} on {host} can't be listened at: {error}") from error
        (self._folder / TAKE).write_text(_TAKE_SCRIPT, encoding="utf-8")
        self._asked = socket.socket(socket.AF_UNIX)
        self._asked.bind(str(self._folder / ASK))
        self._asked.listen()
        threading.Thread(target=self._give, name="door-keeper", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        (self._folder / ASK).unlink(missing_ok=True)
        self._asked.shutdown(socket.SHUT_RDWR)  # ends the thread's wait
        self._asked.close()
        self.door.close()

    def _give(self) -> None:
        while True:
            try:
                asker = self._asked.accept()[0]
            except OSError:  # closed: it is over
                return
            with asker:
                try:
                    socket.send_fds(asker, [b"d"], [self.door.fileno()])
                except OSError:  # it has gone, or the door is closed
                    continue


def command(folder: str) -> str:
    """What stands before a program, in the words of a shell, so that it is started with the socket."""
    return f'"{sys.executable}" -I -S "{folder}/{TAKE}" "{folder}/{ASK}"'
