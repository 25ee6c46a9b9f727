"""Plain forms of the CUDA kernels that Megatron's mixers call, under the names of the packages that have them."""

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install() -> None:
    """Let Megatron import them; before it is imported."""
    _module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=RMSNorm)
    _module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=scan, mamba_split_conv1d_scan_combined=mix)
    _module("fla.modules.l2norm", l2norm=unit)
    sys.modules["fla.modules"].l2norm = unit  # type: ignore[attr-defined]
    _module("fla.modules.convolution", causal_conv1d=convolve)
    _module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=delta_rule)


def _module(name: str, **content: Any) -> None:
    words = name.split(".")
    for i in range(1, len(words) + 1):
        full = ".".join(words[:i])
        if full not in sys.modules:
            sys.modules[full] = types.ModuleType(full)
            sys.modules[full].__spec__ = ModuleSpec(full, None, is_package=True)
            sys.modules[full].__path__ = []
    vars(sys.modules[name]).update(content)


class RMSNorm(nn.Module):
    """Of each group of elements."""

    def __init__(self, size: int, eps: float, group_size: int, dtype: Any, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.group = eps, group_size

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps).flatten(-2) * self.weight


def mix(
    zxbcdt: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    headdim: int,
    ngroups: int,
    **_: Any,
) -> Tensor:
    """Mamba 2 (arXiv 2405.21060) from the projection in, `[b, l, z | x | B | C | dt]`, to the gated output."""
    heads, channels = len(A), len(weight)
    inner = heads * headdim
    z, xbc, dt = zxbcdt.split([inner, channels, heads], -1)
    states = (channels - inner) // 2
    x, b, c = convolve(xbc, weight, bias, activation="silu")[0].split([inner, states, states], -1)
    b, c = (each.unflatten(-1, (ngroups, -1)) for each in (b, c))
    y = scan(x.unflatten(-1, (heads, headdim)), F.softplus(dt + dt_bias), A, b, c, D=D)
    return y.flatten(-2) * F.silu(z)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor) -> Tensor:
    """The state-space recurrence of `[b, l, heads, size]`, token by token."""
    of_heads = x.shape[2] // B.shape[2]
    B, C = (each.repeat_interleave(of_heads, 2) for each in (B, C))
    state, found = x.new_zeros(()), []
    for t in range(x.shape[1]):
        state = (
            state * (dt[:, t] * A).exp()[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        )
        found.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(found, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str, **_: Any) -> tuple[Tensor, None]:
    """A causal convolution of each channel of `[b, l, channels]`."""
    assert activation == "silu"
    channels, width = weight.shape
    x = F.conv1d(x.mT, weight[:, None], bias, padding=width - 1, groups=channels)[..., : x.shape[1]]
    return F.silu(x).mT, None


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    """The gated delta rule (arXiv 2412.06464) of `[b, l, heads, size]`, token by token."""
    state, found = q.new_zeros(*q.shape[:1], q.shape[2], k.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - (k[:, t, :, :, None] * state).sum(-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[..., None, :]
        found.append((q[:, t, :, :, None] * state).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(found, 1), None
