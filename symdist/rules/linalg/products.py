"""The three products that the spectral rules are made of: general, symmetric, and the Gram, which is symmetric.

A symmetric product needs only the tiles on and below its diagonal. `symmetric` is an operator of PyTorch, so that plans
can count it at its own cost. Which kernel runs it depends on device, dtype and size alone.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Kernel: TypeAlias = Callable[..., Tensor]

_TILE = 128
_SMALLEST = 256
"""Below this size, the whole product is as fast as one triangle in tiles."""
_SMALLEST_TRITON = 1024
"""Up to this size, the vendors' whole products are faster than a triangle in Triton."""


def triangle_share(d: int) -> float:
    """Return the share of a symmetric `[d, d]` product that is computed: the tiles on and below the diagonal."""
    return (d + _TILE) / (2 * d) if d >= _SMALLEST else 1.0


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute `a·b`, accumulated in float32 or wider.

    Args:
        a: `[n, m, k]`.
        b: `[n, k, l]`, in the dtype of `a`.

    Returns:
        `[n, m, l]`, in the dtype of `a`.
    """
    if a.dtype == torch.float16 and a.device.type == "cpu":
        # Few CPUs multiply in float16; the others take thirty times as long as for float32.
        return (a.float() @ b.float()).half()
    return a @ b


def symmetric(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Compute `alpha·a·b + beta·c` where the result is symmetric.

    It is, for example, if `b = aᵀ`, or if a, b and c are polynomials in one symmetric matrix.

    Args:
        a: `[n, d, k]`.
        b: `[n, k, d]`, in the dtype of `a`.
        c: `[n, d, d]`, symmetric, in the dtype of `a`; None (default) for `alpha·a·b`.
        alpha: The factor of the product; 1 by default.
        beta: The factor of c; 0 by default.

    Returns:
        `[n, d, d]`, in the dtype of `a`; up to rounding symmetric.
    """
    return torch.ops.symdist.symmetric(a, b, c, alpha, beta)


def _whole(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    if c is None:
        return a @ b if alpha == 1 else (a @ b).mul_(alpha)
    return torch.baddbmm(c, a, b, alpha=alpha, beta=beta)


def _tiled(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Compute a band of rows at a time, up to the diagonal, and mirror it."""
    d = a.shape[-2]
    result = a.new_empty(a.shape[0], d, d)
    for low in range(0, d, _TILE):
        high = min(low + _TILE, d)
        part = None if c is None else c[:, low:high, :high]
        band = _whole(a[:, low:high], b[:, :, :high], part, alpha, beta)
        result[:, low:high, :high] = band
        if low:
            result[:, :low, low:high] = band[:, :, :low].mT
    return result


def _on_cpu(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    if a.dtype == torch.float16:
        return _on_cpu(a.float(), b.float(), None if c is None else c.float(), alpha, beta).half()
    # oneDNN copies bfloat16 operands whose rows are not contiguous, which costs more than the triangle saves.
    contiguous = b.stride(-1) == 1 or a.dtype != torch.bfloat16
    return (_tiled if a.shape[-2] >= _SMALLEST and contiguous else _whole)(a, b, c, alpha, beta)


def _on_cuda(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    kernel = _triton() if a.shape[-2] >= _SMALLEST_TRITON and a.dtype != torch.float64 else None
    if kernel is None:
        return _whole(a, b, c, alpha, beta)
    return kernel(a, b, c, alpha=alpha, beta=beta)


def _on_meta(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[-2], b.shape[-1])


@functools.cache
def _triton() -> Kernel | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from symdist.rules.linalg import triton_symmetric  # Only where there is Triton.

    return triton_symmetric.symmetric


_LIBRARY = torch.library.Library("symdist", "DEF")
_LIBRARY.define("symmetric(Tensor a, Tensor b, Tensor? c, float alpha, float beta) -> Tensor")
_LIBRARY.impl("symmetric", _whole, "CompositeExplicitAutograd")
_LIBRARY.impl("symmetric", _on_cpu, "CPU")
_LIBRARY.impl("symmetric", _on_cuda, "CUDA")
_LIBRARY.impl("symmetric", _on_meta, "Meta")


def _symmetric_operations(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * math.prod(a) * b[-1] * triangle_share(b[-1]))


OPERATIONS: dict[Any, Any] = {torch.ops.symdist.symmetric: _symmetric_operations}
"""Operation counts, by operator, for PyTorch's FlopCounterMode."""
