"""Orthonormal columns: the Q of a QR, made unique, by products where these are safe and by reflections where not."""

import torch
from torch import Tensor

# Passes of Cholesky QR: the first, shifted one bounds the condition number, the others bring it to one.
_PASSES = 3
_TOLERANCE = 1e-10


def orthonormal(a: Tensor) -> Tensor:
    """The Q of `a = Q·R` with R upper triangular and its diagonal positive: `[b, m, k]`, `m ≥ k`, each by itself.

    By Cholesky QR, `Q = A·L^{-T}` with `L·Lᵀ = AᵀA + δI`, δ relative to `‖A‖_F²`, and twice more without a shift, all
    in float64; a matrix of which that does not make an orthonormal one by Householder reflections. Beyond the rank of a
    matrix, the columns are some that complete the others. A zero matrix stays zero. Costs about `9·m·k²` operations.

    Source: Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, *Shifted Cholesky QR for computing the QR factorization
    of ill-conditioned matrices*, SIAM J. Sci. Comput. 42, 2020.
    """
    if a.is_meta:
        return torch.empty_like(a)
    m, k = a.shape[-2:]
    x = a.double()
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    zero = norm == 0
    x = x / torch.where(zero, 1, norm)
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    unit = torch.finfo(x.dtype).eps / 2
    shift = 11 * (m * k + k * (k + 1)) * unit
    q = x
    for i in range(_PASSES):
        gram = q.mT @ q
        # A zero matrix is given something to factor, and is set to zero at the end.
        gram = torch.where(zero, eye, gram) + (shift * eye if i == 0 else 0)
        lower, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(lower, q.mT, upper=False).mT
    error = (q.mT @ q - eye).abs().amax((-2, -1), keepdim=True)
    # Written so that what is not a number fails too.
    failed = (~(error <= _TOLERANCE) & ~zero).flatten()
    if bool(failed.any()):
        q[failed] = _householder(x[failed])
    return torch.where(zero, 0, q).to(a.dtype)


def orthonormal_operations(m: int, k: int) -> float:
    """Floating-point operations of `orthonormal` on one `[m, k]`, to leading order."""
    return _PASSES * (3.0 * m * k**2 + k**3 / 3) + 2.0 * m * k**2


def _householder(x: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x)
    signs = r.diagonal(dim1=-2, dim2=-1).sign()
    return q * torch.where(signs == 0, 1, signs)[..., None, :]
