"""Uploads as `multipart/form-data`, read as they come: small fields into memory, the one file to disk."""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

from argosy.cluster.protocol.errors import InvalidRequest

MAX_FIELD_BYTES: Final = 16 * 1024  # of all small fields together
MAX_PART_HEADER_BYTES: Final = 8 * 1024
MAX_PARTS: Final = 32
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([a-z]+)="((?:[^"\\]|\\.)*)"', re.IGNORECASE)


class Upload:
    """What was sent: the fields, and the file with its name. `num_bytes` counts the file's."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes = 0


def boundary_of(content_type: str) -> bytes:
    """What separates the parts. Raises `InvalidRequest` for anything but `multipart/form-data`."""
    match = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/form-data") or match is None:
        raise InvalidRequest("Content-Type", content_type or "nothing", "must be multipart/form-data with a boundary")
    return (match[1] or match[2]).encode()


async def read_upload(chunks: AsyncIterator[bytes], boundary: bytes, target: Path) -> Upload:
    """Read a whole body; the part called `file` goes to `target`, which only this user can read.

    Raises `InvalidRequest` when the body is no such message, or has no file or two.
    """
    upload = Upload()
    source = _Source(chunks, b"\r\n--" + boundary)
    await source.skip_part()  # what stands before the first part means nothing
    for _ in range(MAX_PARTS):
        if await source.take(2) == b"--":
            if upload.filename is None:
                raise InvalidRequest("file", "nothing", "this field is needed: the file to upload")
            return upload
        name, filename = _names(await source.take_header())
        if name != "file":
            upload.fields[name] = await _small(source, sum(map(len, upload.fields.values())))
            continue
        if upload.filename is not None:
            raise InvalidRequest("file", "twice", "send one file")
        upload.filename = filename or "upload.jsonl"
        with _open_private(target) as out:
            async for piece in source.part():
                out.write(piece)
                upload.num_bytes += len(piece)
            out.flush()
            os.fsync(out.fileno())
    raise InvalidRequest("body", f"more than {MAX_PARTS} parts", "send the file and its purpose")


class _Source:
    """The bytes of the body, cut at the delimiter."""

    def __init__(self, chunks: AsyncIterator[bytes], delimiter: bytes):
        self._chunks, self._delimiter = chunks, delimiter
        self._buffer = bytearray(b"\r\n")  # the first delimiter may stand at the very beginning

    async def part(self) -> AsyncIterator[bytes]:
        """What comes before the next delimiter, which is taken away."""
        keep = len(self._delimiter) - 1
        while (end := self._buffer.find(self._delimiter)) < 0:
            if len(self._buffer) > keep:
                yield bytes(self._buffer[:-keep])
                del self._buffer[:-keep]
            await self._more()
        yield bytes(self._buffer[:end])
        del self._buffer[: end + len(self._delimiter)]

    async def skip_part(self) -> None:
        """Pass over what comes before the next delimiter."""
        async for _ in self.part():
            pass

    async def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        while len(self._buffer) < num_bytes:
            await self._more()
        taken = bytes(self._buffer[:num_bytes])
        del self._buffer[:num_bytes]
        return taken

    async def take_header(self) -> str:
        """The header of a part, whose first line break was taken already."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_PART_HEADER_BYTES:
                raise InvalidRequest("body", "a part", f"its header has more than {MAX_PART_HEADER_BYTES} bytes")
            await self._more()
        return (await self.take(end + 4)).decode("utf-8", "replace")

    async def _more(self) -> None:
        chunk = await anext(self._chunks, None)
        if chunk is None:
            raise InvalidRequest("body", "multipart/form-data", "ends before its last boundary")
        self._buffer += chunk


async def _small(source: _Source, num_before: int) -> str:
    value = bytearray()
    async for piece in source.part():
        value += piece
        if num_before + len(value) > MAX_FIELD_BYTES:
            raise InvalidRequest("body", "form fields", f"have more than {MAX_FIELD_BYTES} bytes together")
    return value.decode("utf-8", "replace")


def _names(header: str) -> tuple[str, str | None]:
    """The name of a part and of its file."""
    for line in header.split("\r\n"):
        kind, _, value = line.partition(":")
        if kind.strip().lower() == "content-disposition":
            found = {match[1].lower(): re.sub(r"\\(.)", r"\1", match[2]) for match in _PARAMETER.finditer(value)}
            if "name" in found:
                return found["name"], found.get("filename")
    raise InvalidRequest("body", "a part", "has no name in its Content-Disposition")


def _open_private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
