"""The three products that the spectral rules are made of: general, symmetric, and the Gram, which is symmetric.

A symmetric product needs only the tiles on and below its diagonal. `symmetric` is an operator of PyTorch, so that plans
can count it at its own cost. Which kernel runs it depends on device, dtype and size alone.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Kernel: TypeAlias = Callable[..., Any]

_TILE = 128
_SMALLEST = 256
"""Below this size, the whole product is as fast as one triangle in tiles."""
_SMALLEST_CPU = 512
"""Below this size, copies between tiles take a CPU as long as half a product saves."""
_SMALLEST_TRITON = 1024
"""Up to this size, the vendors' whole products are faster than a triangle in Triton."""


def triangle_share(d: int) -> float:
    """Return the share of a symmetric `[d, d]` product that is computed: the tiles on and below the diagonal."""
    return (d + _TILE) / (2 * d) if d >= _SMALLEST else 1.0


def product(a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 0.0, out: Tensor | None = None) -> Tensor:
    """Compute `a·b + beta·c`, accumulated in float32 or wider.

    Args:
        a: `[n, m, k]`.
        b: `[n, k, l]`, in the dtype of `a`.
        c: `[n, m, l]`, in the dtype of `a`; None (default) for `a·b`.
        beta: The factor of c; 0 by default.
        out: `[n, m, l]`, where to write the result: new memory costs a CPU a sixth of the time of the product. None
            (default) for a new tensor.

    Returns:
        `[n, m, l]`, in the dtype of `a`.
    """
    if a.dtype == torch.float16 and a.device.type == "cpu":
        # Few CPUs multiply in float16; the others take thirty times as long as for float32.
        wide = a.float() @ b.float()
        return (wide if c is None else wide.add_(c, alpha=beta)).half()
    return torch.bmm(a, b, out=out) if c is None else torch.baddbmm(c, a, b, beta=beta, out=out)


def symmetric(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `alpha·a·b + beta·c` where the result is symmetric.

    It is, for example, if `b = aᵀ`, or if a, b and c are polynomials in one symmetric matrix.

    Args:
        a: `[n, d, k]`.
        b: `[n, k, d]`, in the dtype of `a`.
        c: `[n, d, d]`, symmetric, in the dtype of `a`; None (default) for `alpha·a·b`.
        alpha: The factor of the product; 1 by default.
        beta: The factor of c; 0 by default.
        out: `[n, d, d]`, where to write the result; none of the arguments. None (default) for a new tensor.

    Returns:
        `[n, d, d]`, in the dtype of `a`; up to rounding symmetric.
    """
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[-2], b.shape[-1])
    torch.ops.symdist.symmetric(out, a, b, c, alpha, beta)
    return out


def _whole(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    if c is not None:
        torch.baddbmm(c, a, b, alpha=alpha, beta=beta, out=out)
        return
    torch.bmm(a, b, out=out)
    if alpha != 1:
        out.mul_(alpha)


def _on_cpu(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    if a.dtype == torch.float16:
        wide = torch.empty_like(out, dtype=torch.float32)
        _whole(wide, a.float(), b.float(), None if c is None else c.float(), alpha, beta)
        out.copy_(wide)
    elif a.shape[-2] < _SMALLEST_CPU:
        _whole(out, a, b, c, alpha, beta)
    else:
        # One matrix at a time, whose tiles stay in the cache.
        for i in range(a.shape[0]):
            _in_bands(out[i], a[i], b[i], None if c is None else c[i], alpha, beta)


def _in_bands(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    """Compute a band of rows at a time, up to the diagonal, and mirror it."""
    d = a.shape[0]
    for low in range(0, d, _TILE):
        high = min(low + _TILE, d)
        band = out[low:high, :high]
        if c is None:
            torch.mm(a[low:high], b[:, :high], out=band)
            if alpha != 1:
                band.mul_(alpha)
        else:
            torch.addmm(c[low:high, :high], a[low:high], b[:, :high], alpha=alpha, beta=beta, out=band)
        if low:
            out[:low, low:high] = band[:, :low].mT


def _on_cuda(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    d = a.shape[-2]
    if _quack_takes(a, b) and (kernel := _quack(a.device)) is not None:
        kernel(a, b, C=c, out=out, alpha=float(alpha), beta=float(beta))
    elif d >= _SMALLEST_TRITON and a.dtype != torch.float64 and (kernel := _triton()) is not None:
        kernel(a, b, c, alpha=alpha, beta=beta, out=out)
    else:
        _whole(out, a, b, c, alpha, beta)


def _on_meta(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    """Compute nothing."""


def _quack_takes(a: Tensor, b: Tensor) -> bool:
    """Return whether shapes and strides suit quack's kernel: half precision, in multiples of 16 bytes."""
    d, k = a.shape[-2:]
    aligned = d % 8 == 0 and k % 8 == 0 and all(1 in tensor.stride()[-2:] for tensor in (a, b))
    return a.dtype in (torch.float16, torch.bfloat16) and d >= _SMALLEST and aligned


@functools.cache
def _quack(device: torch.device) -> Kernel | None:
    """Return the symmetric product of quack-kernels, if it is installed and the card is a Hopper or later."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    if importlib.util.find_spec("quack") is None:
        return None
    kernel: Kernel = importlib.import_module("quack.gemm_interface").gemm_symmetric
    return kernel


@functools.cache
def _triton() -> Kernel | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from symdist.rules.linalg import triton_symmetric  # Only where there is Triton.

    return triton_symmetric.symmetric


_LIBRARY = torch.library.Library("symdist", "DEF")
_LIBRARY.define("symmetric(Tensor(a!) out, Tensor a, Tensor b, Tensor? c, float alpha, float beta) -> ()")
_LIBRARY.impl("symmetric", _whole, "CompositeExplicitAutograd")
_LIBRARY.impl("symmetric", _on_cpu, "CPU")
_LIBRARY.impl("symmetric", _on_cuda, "CUDA")
_LIBRARY.impl("symmetric", _on_meta, "Meta")


def _symmetric_operations(out: Sequence[int], a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * math.prod(a) * b[-1] * triangle_share(b[-1]))


OPERATIONS: dict[Any, Any] = {torch.ops.symdist.symmetric: _symmetric_operations}
"""Operation counts, by operator, for PyTorch's FlopCounterMode."""
