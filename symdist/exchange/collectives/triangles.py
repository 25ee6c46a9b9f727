"""Symmetric matrices as their triangles: half the numbers to send.

With `h = ⌈d/2⌉`, `k = d − h`, a symmetric `[[A, Bᵀ], [B, C]]` is kept as `B` `[k, h]` beside an `[h, k + 1]` rectangle
that has A's lower triangle at its lower left and C's upper triangle at its upper right: the rectangular full packed
format of Gustavson, Waśniewski, Dongarra & Langou 2010. Only blocks move: no index tensors.
"""

import torch
from torch import Tensor


def packed_size(d: int) -> int:
    """Numbers in the triangle of a `[d, d]` matrix."""
    return d * (d + 1) // 2


def pack(x: Tensor) -> Tensor:
    """`[b, d, d]` symmetric matrices as `[b, d·(d+1)/2]`; only their lower triangles are read."""
    d = x.shape[-1]
    k = d // 2
    h = d - k
    a, b, c = x[:, :h, :h], x[:, h:, :h], x[:, h:, h:]
    rectangle = x.new_zeros(x.shape[0], h, k + 1)
    rectangle[:, :, :h] = a.tril()
    rectangle[:, :k, 1:] += c.mT.triu()
    return torch.cat([b.flatten(1), rectangle.flatten(1)], dim=1)


def unpack(packed: Tensor, d: int) -> Tensor:
    """The inverse of `pack`: `[b, d, d]`."""
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
