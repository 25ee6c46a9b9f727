"""The memory a call needs on top of what was there before it."""

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
    """Call `function` and return the most bytes of tensors made during the call that were alive at one moment.

    On a CUDA device the allocator's own count, of everything PyTorch allocates there. On any other the storages of
    the tensors that operations return, each counted once however many views it has, from its creation to its end;
    what was alive before the call is not counted. Not seen there: memory inside a kernel (scratch of matrix products
    and decompositions), the buffers of gloo and other libraries, storages resized after they were made, and work on
    other threads. The call runs slower while it is watched.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _peak_of_allocator(function, device)
    with _Watch(device.type) as watch:
        function()
    return watch.peak


def _peak_of_allocator(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _Watch(TorchDispatchMode):
    """Follows storages from the operation that returns them to their end."""

    def __init__(self, device_type: str):
        super().__init__()
        self.peak = 0
        self._device_type = device_type
        self._alive = 0
        # By identity and weakly: an address can be used again, and nothing may live longer for being watched.
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # Let it break down into operations on its pieces, which come back here one by one.
            return NotImplemented
        kwargs = kwargs or {}
        for storage in self._storages((args, kwargs)):
            # Given to an operation before any returned it: older than the call.
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
                # Not the tensor's device: DTensor works out shapes on tensors that only claim to be here.
                if storage.device.type == self._device_type:
                    yield storage

    def _grow(self, size: int) -> None:
        self._alive += size
        self.peak = max(self.peak, self._alive)
