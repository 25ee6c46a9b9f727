"""Token shards as one numbered sequence of windows of equal length."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from launch.data.shards import open_shard

_FINGERPRINT_TOKENS = 4096


class Windows:
    """Windows of `sequence + 1` tokens with stride `sequence`; the remainder at the end of a shard is skipped.

    The last token of a window is the first of the next one, so each token is predicted once.

    Args:
        shards: The shards' files, in order.
        sequence: Tokens per window, less one.
    """

    def __init__(self, shards: Sequence[Path], sequence: int) -> None:
        assert sequence >= 1
        self.sequence = sequence
        self._shards = [open_shard(path) for path in shards]
        counts = [(shard.size - 1) // sequence for shard in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = sum(counts)

    def read(self, indices: np.ndarray) -> torch.Tensor:
        """Return the windows with numbers `indices` (`[n]`) as an int64 tensor `[n, sequence + 1]`."""
        rows = np.empty((len(indices), self.sequence + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            shard = int(np.searchsorted(self._ends, index, side="right"))
            start = int(index - (self._ends[shard - 1] if shard else 0)) * self.sequence
            row[:] = self._shards[shard].read(start, start + self.sequence + 1)
        return torch.from_numpy(rows)

    def fingerprint(self) -> str:
        """Return a hash of the shards' lengths, first and last tokens, which is cheap for a corpus of any size."""
        total = hashlib.sha256()
        for shard in self._shards:
            total.update(str(shard.size).encode())
            num_read = min(_FINGERPRINT_TOKENS, shard.size)
            for part in (shard.read(0, num_read), shard.read(shard.size - num_read)):
                total.update(part.astype("<u4").tobytes())
        return total.hexdigest()[:20]
