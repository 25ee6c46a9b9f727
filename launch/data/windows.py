"""Token shards seen as one numbered row of windows of equal length."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from launch.data.shards import read_shard

_FINGERPRINT_TOKENS = 4096


class Windows:
    """Windows of `sequence + 1` tokens at stride `sequence`; what is left at the end of a shard is skipped.

    A window's last token is the next one's first, so that every token of a shard is predicted once.
    """

    def __init__(self, shards: Sequence[Path], sequence: int) -> None:
        assert sequence >= 1
        self.sequence = sequence
        self._shards = [read_shard(path) for path in shards]
        counts = [(tokens.size - 1) // sequence for tokens in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = sum(counts)

    def read(self, indices: np.ndarray) -> torch.Tensor:
        """Return the windows numbered `indices` (`[n]`) as an int64 tensor `[n, sequence + 1]`."""
        rows = np.empty((len(indices), self.sequence + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            shard = int(np.searchsorted(self._ends, index, side="right"))
            start = int(index - (self._ends[shard - 1] if shard else 0)) * self.sequence
            row[:] = self._shards[shard][start : start + self.sequence + 1]
        return torch.from_numpy(rows)

    def fingerprint(self) -> str:
        """Hash of the shards' lengths, beginnings and ends, in order: cheap on a corpus of any size."""
        total = hashlib.sha256()
        for tokens in self._shards:
            total.update(str(tokens.size).encode())
            for part in (tokens[:_FINGERPRINT_TOKENS], tokens[-_FINGERPRINT_TOKENS:]):
                total.update(part.astype("<u4").tobytes())
        return total.hexdigest()[:20]
