"""Names of blocks in the order in which they came into a cache: what doors that did not send the prompts hear of them.

Each name has a number. A door asks with the number after the last that it knows, and twice a second is soon enough: a
conversation goes on when somebody has read the answer.
"""

from typing import Final

NAME_BYTES: Final = 8  # of a block's digest; two that are alike cost a request sent to the wrong replica
MOST_NAMES: Final = 1 << 15


class PrefixNews:
    """The latest names, at least `most_names` of them once so many came."""

    def __init__(self, most_names: int = MOST_NAMES):
        self._most = most_names
        self._names = bytearray()
        self._first = 0  # number of the first that is kept

    def add(self, digest: bytes) -> None:
        """A block with this content can be found now."""
        self._names += digest[:NAME_BYTES]
        if len(self._names) > 2 * self._most * NAME_BYTES:
            del self._names[: self._most * NAME_BYTES]
            self._first += self._most

    def since(self, number: int) -> tuple[bytes, int]:
        """The names from that number on that are kept, end to end, and the number to ask with next.

        All of them for a number that has not come yet: it is another cache's, which this one follows.
        """
        end = self._first + len(self._names) // NAME_BYTES
        start = max(number, self._first) if number <= end else self._first
        return bytes(self._names[(start - self._first) * NAME_BYTES :]), end
