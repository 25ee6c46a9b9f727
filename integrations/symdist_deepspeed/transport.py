"""Collectives for state on the CPU, for process groups that can only communicate from the accelerator."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symdist.exchange import TorchTransport, Transport
from symdist.layouts import Group


def transport_for(tensors: Iterable[Tensor]) -> Transport:
    """Choose the transport for tensors on these devices.

    Args:
        tensors: The tensors that are stepped.

    Returns:
        `Staged` if a tensor is on the CPU, there is a GPU, and the default process group has no gloo backend; otherwise
        `TorchTransport`.
    """
    if torch.cuda.is_available() and any(tensor.device.type == "cpu" for tensor in tensors):
        backend = dist.get_backend()
        if "gloo" not in backend:
            return Staged(torch.device("cuda", torch.cuda.current_device()))
    return TorchTransport()


class Staged:
    """A transport that runs each collective on copies of its buffers on another device.

    Results are copied back when the collective's handle is waited for.

    Args:
        device: The device that the process groups can communicate from.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._inner = TorchTransport()

    def prepare(self, groups: Iterable[Group]) -> None:
        """See `Transport`."""
        self._inner.prepare(groups)

    def gather_objects(self, value: Any, *, group: Group) -> list[Any]:
        """See `Transport`."""
        return self._inner.gather_objects(value, group=group)

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
        staged = buffer.to(self._device, copy=True)
        handle = self._inner.all_to_all(copy, staged, received=received, sent=sent, group=group)
        return _Staging(handle=handle, out=out, copy=copy)

    def broadcast(self, buffer: Tensor, *, group: Group) -> "_Staging":
        """See `Transport`."""
        copy = buffer.to(self._device, copy=True)
        return _Staging(handle=self._inner.broadcast(copy, group=group), out=buffer, copy=copy)


@dataclass(frozen=True, kw_only=True)
class _Staging:
    """The handle of a collective that runs on a copy."""

    handle: Any
    out: Tensor
    copy: Tensor

    def wait(self) -> None:
        """Wait for the collective and copy its result back."""
        self.handle.wait()
        self.out.copy_(self.copy)
