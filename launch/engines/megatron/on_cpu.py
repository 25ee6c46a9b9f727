"""Stand-ins that let megatron-core train on a machine without CUDA; for tests and trials only."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._device import _device_constructors

FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
_installed = False


def install() -> None:
    """Patch torch, import megatron-core and patch it; call this before anything else imports megatron-core.

    Raises:
        RuntimeError: If the machine has CUDA, or megatron-core is already imported.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("The stand-ins are for machines without CUDA.")
    if "megatron.core" in sys.modules:
        raise RuntimeError("install() has to come before megatron.core is imported.")
    _patch_cuda()
    _patch_tensors()
    _patch_collectives()
    if not importlib.util.find_spec("triton"):
        # These kernels are never run here, but megatron-core imports them even without Triton.
        sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = mock.MagicMock()
    # Compiling its many small functions would take seconds each, on every rank.
    with mock.patch.object(torch, "compile", _uncompiled):
        importlib.import_module("megatron.core")
        importlib.import_module("megatron.core.models.gpt.gpt_model")
    _patch_megatron()
    _installed = True


class Idle:
    """Stands in for a CUDA stream or event; every method does nothing, since work on the CPU is done at once."""

    def __init__(self, *_: Any, **__: Any): ...

    def __getattr__(self, name: str) -> Callable[..., "Idle"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self


def _patch_cuda() -> None:
    # Each name gets its own object, because torch.compile's tables of functions require it.
    stream = Idle()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    # Used by overlapped communication, and by the side streams of MoE layers and checkpoints.
    cuda.Stream = type("Stream", (Idle,), {})
    cuda.Event = type("Event", (Idle,), {})
    cuda.stream = lambda _: nullcontext()
    cuda.current_stream = lambda *_: stream
    cuda.default_stream = lambda *_: stream
    cuda.set_device = lambda _: None
    cuda.synchronize = lambda *_: None
    # Activation recomputation and seeding save the state of CUDA's generator.
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()


def _patch_tensors() -> None:
    # Fills the cached set of torch's own functions, which `with torch.device(...)` needs, before they are replaced.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _off_cuda(getattr(torch, name)))
    tensor: Any = Tensor
    module: Any = nn.Module
    tensor.cuda = module.cuda = lambda self, *_, **__: self
    # Megatron's optimizers group parameters by type name, and know no double precision.
    tensor.type = _type(Tensor.type)
    # Otherwise the loss and DistributedOptimizer's gradients would be cast from double precision to single.
    single = Tensor.float
    tensor.float = lambda self, **kw: self if self.dtype == torch.float64 else single(self, **kw)


def _off_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that it creates on the CPU what it would create on a GPU."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return wrapped


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = function(self, *args, **kwargs)
        if isinstance(name, str):
            name = name.replace("torch.", "torch.cuda.").replace("Double", "Float")
        return name

    return wrapped


def _patch_collectives() -> None:
    gather: Any = dist.all_gather
    scatter: Any = dist.reduce_scatter
    all_reduce: Any = dist.all_reduce

    # Gloo needs pieces of equal size; experts under tensor parallelism and layer-wise optimizers have unequal ones.
    @functools.wraps(gather)
    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({piece.shape for piece in tensor_list}) == 1:
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        works = [dist.broadcast(x, group=group, group_src=i, async_op=True) for i, x in enumerate(tensor_list)]
        done = SimpleNamespace(wait=lambda: [work.wait() for work in works])
        if async_op:
            return done
        done.wait()
        return None

    @functools.wraps(scatter)
    def reduce_scatter(output: Tensor, input_list: list[Tensor], *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if len({piece.shape for piece in input_list}) == 1:
            return scatter(output, input_list, *args, group=group, **kwargs)
        pieces = [piece.clone() for piece in input_list]
        for piece in pieces:
            all_reduce(piece, *args, group=group, **kwargs)
        output.copy_(pieces[dist.get_rank(group)])
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return function if function is not None else lambda f: f


def _patch_megatron() -> None:
    core: Any = functools.partial(importlib.import_module, package="megatron.core")
    random: Any = core(".tensor_parallel.random")
    # There is only the CPU's generator: weights must be initialized on the CPU, and dropout must be off.
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # torch's norm replaces those of Apex and Transformer Engine, but Megatron's wrapper refuses sequence parallelism.
    core(".transformer.torch_norm").WrappedTorchNorm.__new__ = _norm
    # Without Transformer Engine it is a mock.
    core(".transformer.moe.moe_utils").te_general_gemm = None
    # Megatron converts splits to lists and arrays only if they come from a GPU.
    core(".transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = _to_cpu
    if importlib.util.find_spec("megatron.core.transformer.moe.grouped_gemm_util"):
        # The legacy GroupedMLP needs the package grouped_gemm, a CUDA extension.
        gg = core(".transformer.moe.grouped_gemm_util")
        gg.ops = gg.grouped_gemm = SimpleNamespace(gmm=_grouped_gemm)
    # Megatron computes it in double precision and casts with `float`, which here keeps double precision.
    core(".optimizer.grad_scaler").MegatronGradScaler.inv_scale = property(lambda self: self.scale.reciprocal())


def _norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> nn.Module:
    norm = getattr(nn, config.normalization)(hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _grouped_gemm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    weights = b.transpose(1, 2) if trans_b else b
    return torch.cat([x @ w for x, w in zip(a.split([int(n) for n in batch_sizes]), weights, strict=True)])
