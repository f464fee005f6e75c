"""What a command does about standard streams that are closed, full, read no longer, or lack the letters it writes."""

import errno
import io
import os
import select
import sys
from typing import Final

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


def open_what_is_closed() -> None:
    """Have nothing to read, and nobody who reads, where a stream was closed before we started (`>&-`).

    Its number would go to the next socket or file, which Ray's and our own words would then be written into.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            flags = os.O_WRONLY if number else os.O_RDONLY
            os.set_inheritable(os.open(os.devnull, flags), True)  # takes the lowest number, which is this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def write_what_can_be_written() -> None:
    """Bars and answers may have letters that the terminal's encoding lacks: question marks there, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_output_closed() -> bool:
    """Whether nobody reads our standard output any more; what was still to be written to it is dropped then."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)  # errors are always told
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
        return False
    drop_output()
    return True


def is_for_want_of_room(error: OSError) -> bool:
    """Whether a disk was full; what was still to be written to standard output is dropped then."""
    if error.errno not in _NO_ROOM:
        return False
    drop_output()
    return True


def drop_output() -> None:
    """Python flushes once more when it ends: let that go nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
