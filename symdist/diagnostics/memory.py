"""Measures the memory that a call needs on top of what was allocated before it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


def peak_bytes(function: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Call a function and return the peak memory of the tensors it creates.

    On a CUDA device this is PyTorch's allocator statistic for the device. On other devices, the storages of the tensors
    that operations return are tracked from creation to release; each is counted once, however many views it has.
    Tensors that existed before the call are not counted. The tracking slows the call down and misses memory inside a
    kernel (such as scratch space of matrix products and decompositions), buffers of gloo and other libraries, storages
    that are resized later, and work on other threads.

    Args:
        function: The function to call.
        device: The device whose memory is measured. The CPU by default; "meta" measures a run without data.

    Returns:
        The largest number of bytes alive at the same time, without what was there before the call.

    Example:
        >>> peak_bytes(optimizer.step, device="cuda")
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _peak_of_allocator(function, device)
    with TensorWatch(device.type) as watch:
        function()
    return watch.peak


def _peak_of_allocator(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class TensorWatch(TorchDispatchMode):
    """Tracks storages from the operation that returns them until they are released, as `peak_bytes` does.

    Args:
        device_type: The type of the device whose storages count.

    Attributes:
        alive: The bytes of what was created under this mode and is not released yet.
        peak: The largest `alive` so far.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.peak = 0
        self.alive = 0
        self._device_type = device_type
        # Weak references, so that tracking keeps nothing alive; by identity, since addresses are reused.
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # DTensor then splits it into operations on local tensors, which arrive here one by one.
            return NotImplemented
        kwargs = kwargs or {}
        for storage in self._storages((args, kwargs)):
            # An input that no operation has returned existed before the call.
            self._known.setdefault(storage, None)
        result = func(*args, **kwargs)
        for storage in self._storages(result):
            if storage not in self._known:
                self._known[storage] = None
                self._grow(storage.nbytes())
                weakref.finalize(storage, self._grow, -storage.nbytes()).atexit = False
        return result

    def _storages(self, tree: Any) -> Iterable[Any]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # Not the tensor's own device: DTensor infers shapes with tensors that only claim to be on this device.
                if storage.device.type == self._device_type:
                    yield storage

    def _grow(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)
