"""API keys: who may come in, and whose cached prefixes they may meet.

Keys come from a file (one a line, '#' begins a comment), never from the command line, where `ps` shows them. Compared
are SHA-256 digests of the bytes, every one of them, in constant time.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from argosy.cluster.protocol.errors import ConfigError, Unauthorized

MIN_KEY_BYTES: Final = 8


class ApiKeys:
    """The keys of this server; none at all means that everybody may come in."""

    def __init__(self, keys: Iterable[bytes] = ()):
        self._digests = [hashlib.sha256(key).digest() for key in dict.fromkeys(keys)]

    @classmethod
    def read(cls, path: str | None) -> "ApiKeys":
        """The keys in a file; no path, no keys. A file without keys is refused: it would open the door."""
        if path is None:
            return cls()
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"api_keys_file={path!r}: can't be read: {error.strerror}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
        if not keys:
            raise ConfigError(f"api_keys_file={path!r}: holds no key; write one key a line")
        if any(len(key) < MIN_KEY_BYTES for key in keys):
            raise ConfigError(f"api_keys_file={path!r}: a key has at least {MIN_KEY_BYTES} characters")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def tenant_of(self, authorization: bytes | None) -> str:
        """The tenant behind an Authorization header: a salt for the prefix cache, "" while there is one tenant only.

        Raises `Unauthorized`.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        found = b""
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = digest
        if not found or scheme.lower() != b"bearer":
            raise Unauthorized
        return hashlib.sha256(b"tenant:" + found).hexdigest()[:32] if len(self._digests) > 1 else ""
