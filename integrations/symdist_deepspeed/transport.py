"""Collectives for state that is offloaded to the CPU where the process groups only know the accelerator."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symdist.exchange import TorchTransport, Transport
from symdist.layouts import Group


def transport_for(tensors: Iterable[Tensor]) -> Transport:
    """The collectives of torch.distributed, through the accelerator where tensors lie where these cannot reach."""
    if torch.cuda.is_available() and any(tensor.device.type == "cpu" for tensor in tensors):
        backend = dist.get_backend()
        if "gloo" not in backend:
            return Staged(torch.device("cuda", torch.cuda.current_device()))
    return TorchTransport()


class Staged:
    """Collectives on copies of the buffers on another device; results come back when they are waited for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._inner = TorchTransport()

    def prepare(self, groups: Iterable[Group]) -> None:
        """See `Transport`."""
        self._inner.prepare(groups)

    def all_reduce(self, buffer: Tensor, *, group: Group) -> "_Staging":
        """See `Transport`."""
        copy = buffer.to(self._device, copy=True)
        return _Staging(handle=self._inner.all_reduce(copy, group=group), out=buffer, copy=copy)

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> "_Staging":
        """See `Transport`."""
        copy = torch.empty_like(out, device=self._device)
        handle = self._inner.reduce_scatter(copy, buffer.to(self._device, copy=True), group=group)
        return _Staging(handle=handle, out=out, copy=copy)

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> "_Staging":
        """See `Transport`."""
        copy = torch.empty_like(out, device=self._device)
        handle = self._inner.all_gather(copy, buffer.to(self._device, copy=True), group=group)
        return _Staging(handle=handle, out=out, copy=copy)

    def all_to_all(
        self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group
    ) -> "_Staging":
        """See `Transport`."""
        copy = torch.empty_like(out, device=self._device)
        there = buffer.to(self._device, copy=True)
        handle = self._inner.all_to_all(copy, there, received=received, sent=sent, group=group)
        return _Staging(handle=handle, out=out, copy=copy)


@dataclass(frozen=True, kw_only=True)
class _Staging:
    """A collective on a copy."""

    handle: Any
    out: Tensor
    copy: Tensor

    def wait(self) -> None:
        """Bring the result back."""
        self.handle.wait()
        self.out.copy_(self.copy)
