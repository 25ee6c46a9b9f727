"""Symmetric matrices packed as triangles, to send half the numbers.

With `h = ⌈d/2⌉`, `k = d − h`, a symmetric `[[A, Bᵀ], [B, C]]` is stored as `B` `[k, h]` followed by an `[h, k + 1]`
rectangle, with A's lower triangle at its lower left and C's upper triangle at its upper right. This is the rectangular
full packed format of Gustavson, Waśniewski, Dongarra & Langou 2010. It needs block copies only, no index tensors.
"""

import torch
from torch import Tensor


def packed_size(d: int) -> int:
    """Return how many numbers the triangle of a `[d, d]` matrix has, diagonal included."""
    return d * (d + 1) // 2


def pack(x: Tensor) -> Tensor:
    """Pack symmetric matrices.

    Args:
        x: `[b, d, d]`; only the lower triangles are read.

    Returns:
        `[b, d·(d+1)/2]`, a new tensor.
    """
    d = x.shape[-1]
    k = d // 2
    h = d - k
    a, b, c = x[:, :h, :h], x[:, h:, :h], x[:, h:, h:]
    rectangle = x.new_zeros(x.shape[0], h, k + 1)
    rectangle[:, :, :h] = a.tril()
    rectangle[:, :k, 1:] += c.mT.triu()
    return torch.cat([b.flatten(1), rectangle.flatten(1)], dim=1)


def unpack(packed: Tensor, d: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: `[b, d·(d+1)/2]`.
        d: The edge of the matrices.

    Returns:
        The symmetric matrices, `[b, d, d]`, a new tensor.
    """
    n = packed.shape[0]
    k = d // 2
    h = d - k
    b, rectangle = packed.split([k * h, h * (k + 1)], dim=1)
    rectangle = rectangle.view(n, h, k + 1)
    a = rectangle[:, :, :h].tril()
    c = rectangle[:, :k, 1:].triu()
    x = packed.new_empty(n, d, d)
    x[:, :h, :h] = a + a.tril(-1).mT
    x[:, h:, h:] = c + c.triu(1).mT
    x[:, h:, :h] = b.view(n, k, h)
    x[:, :h, h:] = b.view(n, k, h).mT
    return x
