"""Random order of a range of any size, computed position by position.

A shuffled list of the windows of a 10^12-token corpus would take gigabytes on each rank. A Feistel network is a
bijection of the integers of 2k bits for any round function. Applying it again when the result falls outside the wanted
range (cycle walking) makes it a bijection of that range. It needs constant memory and can start at any position, so
resuming costs nothing. The domain is below four times the range, so a position takes fewer than four applications on
average. An affine map i -> a*i + b would be cheaper, but keeps neighboring positions at a constant distance, so every
batch would be an arithmetic progression.
"""

import numpy as np

_ROUNDS = 6


def permute(positions: np.ndarray, *, size: int, seed: int, epoch: int) -> np.ndarray:
    """Map positions to their places in the permutation given by seed and epoch.

    Args:
        positions: Integers in `[0, size)`, `[n]`.
        size: Length of the range.
        seed: Seed of the permutation.
        epoch: Number of the epoch; each has its own permutation.

    Returns:
        The places, int64 `[n]` in `[0, size)`; the map is one-to-one over the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64(2**half - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << np.uint64(half)) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix all bits by multiplications modulo 2^64 and shifts, as in the last part of 64-bit hash functions."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
