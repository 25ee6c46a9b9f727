"""A prepared corpus, and the check that its shards hold what they held when it was prepared."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.data.errors import DataError
from launch.data.shards import open_shard


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: token shards ready for loading."""

    train: tuple[Path, ...]
    """Shards to train on."""
    validation: tuple[Path, ...]
    """Shards to validate on, with other documents."""
    vocabulary: int
    """Every token id is below this."""
    tokenizer: Path | None
    """The tokenizer's JSON file; None for a corpus that came as `.bin` shards."""
    checksums: tuple[str, ...] = ()
    """SHA-256 of the shards, training first; empty for `.bin` shards that nobody has read yet."""

    @property
    def shards(self) -> tuple[Path, ...]:
        """All shards, training first."""
        return (*self.train, *self.validation)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary and the shards' contents."""
        total = hashlib.sha256(f"{self.vocabulary} {len(self.train)} {len(self.validation)}".encode())
        for checksum in self.checksums:
            total.update(bytes.fromhex(checksum))
        return total.hexdigest()

    def verify(self, *, rank: int = 0, world: int = 1) -> dict[int, str]:
        """Read the shards that fall to one of several ranks, and check their ids and checksums.

        Args:
            rank: The rank's number.
            world: Number of ranks that share the reading.

        Returns:
            The checksums of these shards, by number.

        Raises:
            DataError: If an id is outside the vocabulary, or a shard is not what was prepared.
        """
        found = {}
        for index in range(rank, len(self.shards), world):
            path = self.shards[index]
            found[index], largest = open_shard(path).scan()
            if self.checksums and found[index] != self.checksums[index]:
                raise DataError(
                    f"{path}: changed since it was prepared, its checksum is another; remove the folder {path.parent}, "
                    "and the run will build it again"
                )
            if largest >= self.vocabulary:
                raise DataError(
                    f"{path}: token id {largest} is outside the vocabulary of {self.vocabulary}; set vocabulary to "
                    f"that of the tokenizer the shards were made with (at least {largest + 1})"
                )
        return found

    def verified(self, shares: Sequence[Mapping[int, str]]) -> "Corpus":
        """Return the corpus with the checksums that all ranks found.

        Args:
            shares: What `verify` returned on each rank.

        Raises:
            DataError: If ranks of several nodes read different shards under one name.
        """
        checksums: dict[int, str] = {}
        for index, checksum in (item for share in shares for item in share.items()):
            if checksums.setdefault(index, checksum) != checksum:
                raise DataError(f"{self.shards[index]}: nodes have different files of this name; copy one to all")
        return replace(self, checksums=tuple(checksums[index] for index in range(len(self.shards))))
