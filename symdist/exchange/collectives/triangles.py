"""Symmetric matrices packed as triangles, which halves the amount of data to send.

With `h = ⌈d/2⌉` and `k = d − h`, a symmetric matrix `[[A, Bᵀ], [B, C]]` is stored as `B`, `[k, h]`, followed by an `[h,
k + 1]` rectangle. The rectangle has A's lower triangle at its lower left and C's upper triangle at its upper right.
This is the rectangular full packed format of Gustavson, Waśniewski, Dongarra & Langou 2010. It needs only block copies
and no index tensors.
"""

import torch
from torch import Tensor


def packed_size(d: int) -> int:
    """Return how many numbers the triangle of a `[d, d]` matrix has, including the diagonal."""
    return d * (d + 1) // 2


def pack(x: Tensor) -> Tensor:
    """Pack symmetric matrices as triangles.

    Args:
        x: The matrices, `[b, d, d]`; only their lower triangles are read.

    Returns:
        A new tensor, `[b, d·(d+1)/2]`.

    Example:
        >>> gram = torch.eye(3).expand(2, 3, 3)
        >>> torch.equal(unpack(pack(gram), 3), gram)
        True
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
    """Restore the symmetric matrices that `pack` packed.

    Args:
        packed: The triangles, `[b, d·(d+1)/2]`.
        d: The number of rows, and of columns, of a matrix.

    Returns:
        A new tensor with the symmetric matrices, `[b, d, d]`.
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
