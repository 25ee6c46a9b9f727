"""Orthonormal columns: the unique Q of a QR, by Cholesky QR where that is accurate and by Householder otherwise."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Passes of Cholesky QR. The first one, with a shift, bounds the condition number; the others reduce it to one.
_PASSES = 3
_TOLERANCE = 1e-10


def orthonormal(a: Tensor) -> Tensor:
    """Compute the Q of `a = Q·R` for each matrix of a stack; R is upper triangular with a positive diagonal.

    The columns are scaled to length one and then orthonormalised by Cholesky QR in float64: `Q = A·L^{-T}` with `L·Lᵀ =
    AᵀA + δI`, followed by two more passes without the shift δ. If a column depends linearly on those before it, within
    the rounding of `a`, it is left out and a unit vector e_j takes its place, so that Q does not depend on the last
    digits of `a`. The cost is about `9·m·k²` operations.

    On a CPU, matrices for which this fails are orthonormalised by Householder reflections instead. An accelerator would
    keep the host waiting for the news; there, one more Cholesky factor finds the dependent columns beforehand, and Q is
    zero if that does not help.

    Source: Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, *Shifted Cholesky QR for computing the QR factorization
    of ill-conditioned matrices*, SIAM J. Sci. Comput. 42, 2020.

    Args:
        a: `[b, m, k]`, `m ≥ k`.

    Returns:
        Q, in the shape and dtype of `a`. For a zero matrix, Q is zero.

    Example:
        >>> q = orthonormal(torch.randn(1, 6, 4))
        >>> torch.allclose(q.mT @ q, torch.eye(4), atol=1e-5)
        True
    """
    m, k = a.shape[-2:]
    x = a.double()
    lengths = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    zero = lengths.amax(-1, keepdim=True) == 0
    x = x / torch.where(lengths > 0, lengths, 1)
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    shift = 11 * (m * k + k * (k + 1)) * torch.finfo(x.dtype).eps / 2
    threshold = 100 * m**0.5 * torch.finfo(a.dtype).eps
    on_host = _on_host(a)
    if not on_host:
        x = _independent(x, zero, shift, threshold)
    q = x
    for i in range(_PASSES):
        gram = q.mT @ q
        # A zero matrix has no Cholesky factor. Use the identity here, and set the result to zero at the end.
        gram = torch.where(zero, eye, gram) + (shift * eye if i == 0 else 0)
        lower, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(lower, q.mT, upper=False).mT
    error = (q.mT @ q - eye).abs().amax((-2, -1), keepdim=True)
    # Both comparisons are false for NaN, so a matrix with NaN counts as failed.
    accurate = (error <= _TOLERANCE) & ((q * x).sum(-2, keepdim=True) > threshold).all(-1, keepdim=True)
    if on_host:
        failed = (~accurate & ~zero).flatten()
        if bool(failed.any()):
            q[failed] = _householder(x[failed], threshold)
    else:
        # The host would have to wait for the answer, to have Householder reflections computed.
        zero = zero | ~accurate
    return torch.where(zero, 0, q).to(a.dtype)


def _on_host(a: Tensor) -> bool:
    return a.device.type == "cpu"


def _independent(x: Tensor, zero: Tensor, shift: float, threshold: float) -> Tensor:
    """Replace columns that depend on those before them by unit vectors, without the host.

    The squares of the diagonal of a Cholesky factor are the squared lengths that columns add to those before.
    """
    eye = torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    gram = torch.where(zero, eye.mT @ eye, x.mT @ x)
    lower, _ = torch.linalg.cholesky_ex(gram + shift * (eye.mT @ eye))
    rest = lower.diagonal(dim1=-2, dim2=-1).square() - shift
    return torch.where((rest <= threshold**2)[..., None, :], eye, x)


def _cholesky_operations(shape: Sequence[int], *_: Any, **__: Any) -> int:
    return math.prod(shape) * shape[-1] // 3


def _solve_operations(lower: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return math.prod(right) * lower[-1]


OPERATIONS: dict[Any, Any] = {
    torch.ops.aten.linalg_cholesky_ex: _cholesky_operations,
    torch.ops.aten.linalg_solve_triangular: _solve_operations,
}
"""Operation counts, by operator, that PyTorch's FlopCounterMode lacks."""


def orthonormal_operations(m: int, k: int) -> float:
    """Return the number of floating-point operations of `orthonormal` on one matrix, to leading order.

    Args:
        m: The number of rows.
        k: The number of columns.

    Returns:
        The number of operations.
    """
    return _PASSES * (3.0 * m * k**2 + k**3 / 3) + 2.0 * m * k**2


def _householder(x: Tensor, threshold: float) -> Tensor:
    """Compute Q by Householder reflections; columns with a diagonal of R up to `threshold` count as dependent."""
    q, r = torch.linalg.qr(x)
    dependent = r.diagonal(dim1=-2, dim2=-1).abs()[..., None, :] <= threshold
    if bool(dependent.any()):
        # Leave dependent columns out of the QR, since their directions would be determined by their last digits alone.
        q, r = torch.linalg.qr(torch.where(dependent, torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device), x))
    signs = r.diagonal(dim1=-2, dim2=-1).sign()
    return q * torch.where(signs == 0, 1, signs)[..., None, :]
