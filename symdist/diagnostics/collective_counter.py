"""Counts the collectives that any library starts through torch.distributed while a block of code runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from symdist.exchange.collectives.transport import CollectiveRecord


@dataclass(frozen=True, kw_only=True)
class Passed(CollectiveRecord):
    """A collective that was started. `CollectiveCounter` explains how `sent` is counted.

    Attributes:
        ranks: The global ranks of its process group.
    """

    ranks: tuple[int, ...]


class CollectiveCounter(TorchDispatchMode):
    """Records in `log` every collective that this thread starts inside the context.

    It intercepts the operators below torch.distributed. It therefore sees torch.distributed's own functions
    (asynchronous or not), functional collectives, DTensor's redistributions, FSDP2 and DDP, each collective once.
    Collectives that are coalesced into one call count as one; barriers and waits do not count.

    `sent` is the number of bytes that this rank sends, counted as `CountingTransport` does. For w ranks:

    - all_reduce of n bytes: 2·n·(w−1)/w, as in a ring.
    - reduce_scatter, all_gather: the whole buffer without one chunk.
    - all_to_all: everything but this rank's own chunk.
    - broadcast: the buffer, on the root only.
    - scatter: everything but its own chunk, on the root only.
    - reduce, gather: the buffer, on all ranks but the root.
    - send: the buffer. recv: nothing.

    In a group of one rank, collectives are counted with nothing sent. With fake tensors nothing moves, and nothing is
    recorded.

    Collectives of other threads are not seen. On CPUs, a backward runs on the thread that calls it and is seen; on GPUs
    autograd has threads of its own, to which it passes the context on, but this is not tested. Inside the context
    torch.compile does not compile, and with `fullgraph=True` it refuses to run unless
    `torch.compiler.set_stance("force_eager")` is active.

    A collective of an unknown kind, such as those on symmetric memory, raises RuntimeError with its name before it
    runs.

    Attributes:
        log: The collectives in the order in which they were started.

    Example:
        >>> with CollectiveCounter() as counter:
        ...     optimizer.step()
        >>> counter.collectives, counter.sent
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Passed] = []

    @property
    def collectives(self) -> int:
        """The number of collectives that were started."""
        return len(self.log)

    @property
    def sent(self) -> float:
        """The number of bytes that this rank sent."""
        return sum(passed.sent for passed in self.log)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fake = any(issubclass(kind, FakeTensor) for kind in types)
        if not fake and any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            # DTensor and similar subclasses then split into operations on local tensors, which arrive here one by one.
            return NotImplemented
        if fake or func.namespace not in _NAMESPACES:
            return func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if name in _NOTHING_SENT:
            return func(*args, **kwargs)
        if name not in _KNOWN:
            raise RuntimeError(
                f"CollectiveCounter cannot count {name}, which it does not know: run this code outside the counter, or "
                "add the operator to _TRAFFIC in symdist/diagnostics/collective_counter.py"
            )
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        group = _group(arguments)
        # Count before the call: after it, an asynchronous collective may already be changing its buffers.
        kind, sent = _KNOWN[name]
        passed = Passed(
            kind=kind,
            size=group.size(),
            sent=sent(_Call(arguments=arguments, size=group.size(), index=group.rank())),
            ranks=tuple(dist.get_process_group_ranks(group)),
        )
        result = func(*args, **kwargs)
        self.log.append(passed)
        return result


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of an operator by name, in schema order, with the group's size and this rank's index in it."""

    arguments: Mapping[str, Any]
    size: int
    index: int

    def argument(self, position: int) -> Any:
        return list(self.arguments.values())[position]

    def nbytes(self, position: int = 0) -> int:
        """Return the bytes of an argument: a tensor, a list of tensors, or a list of such lists."""
        return _nbytes(self.argument(position))

    def is_root(self) -> bool:
        root = self.arguments["src"] if "src" in self.arguments else self.arguments["root_rank"]
        return bool(root == self.index)


_Sent: TypeAlias = Callable[[_Call], float]


def _rows(buffer: Tensor, splits: list[int], call: _Call) -> float:
    """Return the bytes sent in an all_to_all of blocks of rows, which are of equal size if `splits` is empty."""
    if not splits:
        return buffer.nbytes * (call.size - 1) / call.size
    return buffer.nbytes - splits[call.index] * (buffer.nbytes // max(1, len(buffer)))


def _posted(call: _Call) -> float:
    """Return the bytes sent by the sends among several sends and receives."""
    arguments = call.arguments
    return sum(
        tensor.nbytes
        for kind, tensor in zip(arguments["op_list"], arguments["tensors"], strict=True)
        if kind == "isend"
    )


# Kind, bytes that this rank sends, and operators. The c10d operators take outputs before inputs, the functional ones
# inputs only.
_TRAFFIC: tuple[tuple[str, _Sent, str], ...] = (
    (
        "all_reduce",
        lambda call: 2 * call.nbytes() * (call.size - 1) / call.size,
        "c10d::allreduce_ c10d::allreduce_coalesced_ _c10d_functional::all_reduce _c10d_functional::all_reduce_ "
        "_c10d_functional::all_reduce_coalesced _c10d_functional::all_reduce_coalesced_",
    ),
    (
        "all_gather",
        lambda call: call.nbytes(0) - call.nbytes(1),
        "c10d::allgather_ c10d::_allgather_base_ c10d::allgather_coalesced_ c10d::allgather_into_tensor_coalesced_",
    ),
    (
        "all_gather",
        lambda call: call.nbytes() * (call.size - 1),
        "_c10d_functional::all_gather_into_tensor _c10d_functional::all_gather_into_tensor_out "
        "_c10d_functional::all_gather_into_tensor_coalesced",
    ),
    (
        "reduce_scatter",
        lambda call: call.nbytes(1) - call.nbytes(0),
        "c10d::reduce_scatter_ c10d::_reduce_scatter_base_ c10d::reduce_scatter_tensor_coalesced_",
    ),
    (
        "reduce_scatter",
        lambda call: call.nbytes() * (call.size - 1) / call.size,
        "_c10d_functional::reduce_scatter_tensor _c10d_functional::reduce_scatter_tensor_out "
        "_c10d_functional::reduce_scatter_tensor_coalesced",
    ),
    ("all_to_all", lambda call: call.nbytes(1) - call.argument(1)[call.index].nbytes, "c10d::alltoall_"),
    ("all_to_all", lambda call: _rows(call.argument(1), call.argument(4), call), "c10d::alltoall_base_"),
    (
        "all_to_all",
        lambda call: _rows(call.argument(0), call.argument(2), call),
        "_c10d_functional::all_to_all_single",
    ),
    # DTensor moves a shard to another dimension with this operator if the backend supports it.
    ("all_to_all", lambda call: _rows(call.argument(0), [], call), "_dtensor::shard_dim_alltoall"),
    (
        "broadcast",
        lambda call: call.nbytes() if call.is_root() else 0,
        "c10d::broadcast_ _c10d_functional::broadcast _c10d_functional::broadcast_",
    ),
    ("scatter", lambda call: call.nbytes(1) - call.nbytes(0) if call.is_root() else 0, "c10d::scatter_"),
    ("gather", lambda call: 0 if call.is_root() else call.nbytes(1), "c10d::gather_"),
    ("reduce", lambda call: 0 if call.is_root() else call.nbytes(), "c10d::reduce_"),
    ("send", lambda call: call.nbytes(), "c10d::send _c10d_functional::isend"),
    ("recv", lambda call: 0, "c10d::recv_ c10d::recv_any_source_ _c10d_functional::irecv"),
    ("send_recv", _posted, "_c10d_functional::batch_p2p_ops"),
)
_KNOWN = {name: (kind, sent) for kind, sent, names in _TRAFFIC for name in names.split()}
_NOTHING_SENT = {
    "c10d::barrier",
    "c10d::check_for_nan",
    "c10d::monitored_barrier_",
    "_c10d_functional::_wrap_tensor_autograd",
    "_c10d_functional::wait_tensor",
    "_dtensor::mesh_get_process_group",
}
# The tables hold no operators of the last three. Those of c10d_functional and _c10d_functional_autograd decompose into
# _c10d_functional; those of symm_mem move data on their own and are refused.
_NAMESPACES = {"c10d", "_c10d_functional", "_dtensor", "c10d_functional", "_c10d_functional_autograd", "symm_mem"}


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors))


def _group(arguments: Mapping[str, Any]) -> dist.ProcessGroup:
    """Return the process group of a call, which is given as an object or by name."""
    group = arguments["process_group"] if "process_group" in arguments else arguments["group_name"]
    if isinstance(group, str):
        return _resolve_process_group(cast(Any, group))
    return dist.ProcessGroup.unbox(group) if isinstance(group, torch.ScriptObject) else group
