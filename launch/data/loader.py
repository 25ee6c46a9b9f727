"""Batches of token windows for one rank."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.data.errors import DataError
from launch.data.permutation import permute
from launch.data.windows import Windows


class TokenLoader:
    """Endless iterator over the training windows of one rank; yields int64 tensors `[batch, sequence + 1]`.

    All ranks together read one stream of windows, epoch after epoch, each epoch in its own order. Each batch takes the
    next `world * batch` windows of the stream, and rank r the r-th `batch` of these. The position in the stream is the
    only state, so a run resumes at any world size and batch size without repeating or missing a window.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        sequence: int,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        vocabulary: int | None = None,
        shuffle: bool = True,
    ) -> None:
        """Open the shards.

        Args:
            shards: The shards' files, in order.
            sequence: Tokens per window, less one.
            batch: Windows per batch of this rank.
            rank: This rank's number among the data-parallel ranks.
            world: Number of data-parallel ranks.
            seed: Seed of the order.
            vocabulary: Number of token ids, to check that all tokens are below it; None checks nothing.
            shuffle: Whether to shuffle each epoch.

        Raises:
            DataError: If the shards hold too few windows for one batch of all ranks.
        """
        assert batch >= 1
        assert 0 <= rank < world
        self.batch = batch
        self.rank = rank
        self.world = world
        self.seed = seed
        self.vocabulary = vocabulary
        self.shuffle = shuffle
        self.position = 0
        self._windows = Windows(shards, sequence)
        if self._windows.count < world * batch:
            raise DataError(
                f"{_names(shards)}: {self._windows.count} windows of {sequence} tokens are too few for a "
                f"global batch of {world * batch}; use a larger corpus, shorter sequences or a smaller batch"
            )
        order = "shuffled" if shuffle else "in order"
        self._fingerprint = f"{self._windows.fingerprint()}, sequence {sequence}, {order}"

    @property
    def windows(self) -> int:
        """Number of windows in one epoch, over all ranks."""
        return self._windows.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        first = self.position + self.rank * self.batch
        tokens = self._windows.read(self._order(np.arange(first, first + self.batch)))
        if self.vocabulary is not None and (largest := int(tokens.max())) >= self.vocabulary:
            raise DataError(
                f"token id {largest} is outside the vocabulary of {self.vocabulary}; "
                "set vocabulary to that of the tokenizer the shards were made with"
            )
        self.position += self.world * self.batch
        return tokens

    def _order(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.windows)
        if self.shuffle:
            for epoch in np.unique(epochs):
                now = epochs == epoch
                places[now] = permute(places[now], size=self.windows, seed=self.seed, epoch=int(epoch))
        return places

    def state_dict(self) -> dict[str, Any]:
        """Return the number of windows that all ranks have read so far, and what identifies the stream."""
        return {"position": self.position, "fingerprint": self._fingerprint, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Args:
            state: What `state_dict` returned, at any world size and batch size.

        Raises:
            DataError: If it belongs to another corpus, sequence length, shuffling or seed.
        """
        for name, current in (("fingerprint", self._fingerprint), ("seed", self.seed)):
            if state[name] != current:
                raise DataError(
                    f"the checkpoint's data position belongs to another stream: its {name} is {state[name]}, but that "
                    f"of this run is {current}; resume with the corpus, sequence, shuffling and seed of the saved run, "
                    "or start a new run"
                )
        self.position = state["position"]


def validation_batches(
    shards: Sequence[Path], *, sequence: int, batch: int, rank: int, world: int, limit: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return an iterator over this rank's validation windows, spread evenly over the shards.

    All ranks together get each window once, the same ones at any `world` and `batch`. Every rank gets the same number
    of batches of the same shape, filled up with padding, since a forward pass of sharded weights is collective.

    Args:
        shards: The shards' files, in order.
        sequence: Tokens per window, less one.
        batch: Windows per batch of this rank.
        rank: This rank's number among the data-parallel ranks.
        world: Number of data-parallel ranks.
        limit: Number of windows over all ranks; None takes all.

    Returns:
        An iterator of tokens, int64 `[batch, sequence + 1]`, and weights, float32 `[batch]`: 1, or 0 for padding.

    Raises:
        DataError: If the shards are too short for one window.
    """
    assert batch >= 1
    assert 0 <= rank < world
    assert limit is None or limit >= 1
    windows = _opened(tuple(shards), sequence)
    if not windows.count:
        raise DataError(
            f"{_names(shards)}: too short for one window of {sequence} tokens; "
            "use a larger validation set or shorter sequences"
        )
    total = windows.count if limit is None else min(limit, windows.count)
    indices = (np.arange(total) * windows.count // total)[rank::world]
    steps = math.ceil(math.ceil(total / world) / batch)
    return (_padded(windows, indices[step * batch : (step + 1) * batch], batch) for step in range(steps))


# Once in a process, so that a shard that is replaced under a running job is noticed.
_opened = lru_cache(maxsize=8)(Windows)


def _padded(windows: Windows, indices: np.ndarray, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(batch, windows.sequence + 1, dtype=torch.int64)
    weight = torch.zeros(batch)
    tokens[: len(indices)] = windows.read(indices)
    weight[: len(indices)] = 1
    return tokens, weight


def _names(shards: Sequence[Path]) -> str:
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{shards[0]}{more}"
