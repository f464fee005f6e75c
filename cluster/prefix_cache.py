"""Which full blocks hold which token prefix.

A block's name is SHA-256 over its parent's name and its token ids; the first parent is the hash of the salt, so tenants
with different salts can't see each other's prefixes by timing. On a hit the token ids are compared as well.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final, TypeAlias

from argosy.cluster.prefix_news import PrefixNews

BlockHash: TypeAlias = tuple[bytes, bytes]
"""Digest of a full block, and its token ids as bytes."""

_DOMAIN: Final = b"argosy.prefix.1\0"
_SUFFIXES: Final = (b"", *(group.to_bytes(1, "little") for group in range(1, 256)))  # by group of layers


def root_digest(salt: str) -> bytes:
    """The parent of the first block."""
    return hashlib.sha256(_DOMAIN + salt.encode("utf-8", "surrogatepass")).digest()


def extend_hashes(
    hashes: list[BlockHash], token_ids: Sequence[int], block_size: int, salt: str, num_blocks: int
) -> None:
    """Name further full blocks of `token_ids` until there are `num_blocks` names."""
    parent = hashes[-1][0] if hashes else root_digest(salt)
    new_ids = array("i", token_ids[len(hashes) * block_size : num_blocks * block_size])
    block_bytes, all_bytes = new_ids.itemsize * block_size, new_ids.tobytes()
    for start in range(0, len(all_bytes), block_bytes):
        packed = all_bytes[start : start + block_bytes]
        parent = hashlib.sha256(parent + packed).digest()
        hashes.append((parent, packed))


class PrefixCache:
    """Names to block ids and back. Holds no references: what is free and what is held is the pool's affair."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self.news: PrefixNews | None = None  # once somebody wants to hear what comes in

    def __len__(self) -> int:
        return len(self._block_of)

    def knows(self, block_id: int) -> bool:
        """Whether the block's content has a name."""
        return block_id in self._hash_of

    def hash_of(self, block_id: int) -> BlockHash | None:
        """The name of the block's content."""
        return self._hash_of.get(block_id)

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks that hold the longest known prefix of `hashes`."""
        found = []
        for block_hash in hashes:
            if (block_id := self.get(block_hash)) is None:
                break
            found.append(block_id)
        return found

    def get(self, block_hash: BlockHash, group: int = 0) -> int | None:
        """The block in which a group of layers has this content."""
        block_id = self._block_of.get(_name(block_hash[0], group))
        return block_id if block_id is not None and self._hash_of[block_id][1] == block_hash[1] else None

    def register(self, block_id: int, block_hash: BlockHash, group: int = 0) -> None:
        """The block now holds what the name says. The first holder of a content stays the one that is found."""
        if group:
            block_hash = _name(block_hash[0], group), block_hash[1]
        if block_hash[0] not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash[0]] = block_id
            self._hash_of[block_id] = block_hash

    def register_place(self, block_ids: Sequence[int], block_hash: BlockHash) -> None:
        """The blocks of one place of a table, one a group of layers, now hold what the name says; below 0: no block."""
        digest, packed = block_hash
        block_of, hash_of = self._block_of, self._hash_of
        if self.news is not None and digest not in block_of:
            self.news.add(digest)
        for block_id, suffix in zip(block_ids, _SUFFIXES, strict=False):
            name = digest + suffix
            if block_id >= 0 and name not in block_of and block_id not in hash_of:
                block_of[name] = block_id
                hash_of[block_id] = (name, packed)

    def forget(self, block_id: int) -> BlockHash | None:
        """The block's content is gone, or not to be trusted. The name that it had."""
        if (block_hash := self._hash_of.pop(block_id, None)) is not None:
            del self._block_of[block_hash[0]]
        return block_hash

    def check(self) -> None:
        """Both directions say the same."""
        assert len(self._block_of) == len(self._hash_of)
        for digest, block_id in self._block_of.items():
            assert self._hash_of[block_id][0] == digest, block_id


def _name(digest: bytes, group: int) -> bytes:
    """The name of a content in the blocks of one group of layers; each group has a copy for its own layers."""
    return digest + _SUFFIXES[group]
