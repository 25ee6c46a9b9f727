"""The collectives that pass through torch.distributed while a block of code runs, whoever starts them."""

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
    """A collective that was started, with the global ranks of its group; see `CollectiveCounter` for `sent`."""

    ranks: tuple[int, ...]


class CollectiveCounter(TorchDispatchMode):
    """Notes in `log` every collective that this thread starts while the context is open.

    It watches the operators below torch.distributed, so it sees torch.distributed's own functions, asynchronous or
    not, functional collectives, DTensor's redistributions, FSDP2 and DDP, each once. `sent` is what this rank sends,
    counted as `CountingTransport` does: for a sum over w ranks 2·n·(w−1)/w of n bytes, as in a ring; for a
    reduce_scatter or all_gather the whole buffer less one chunk; for an all_to_all all but the own chunk; for a
    broadcast the root's buffer, for a scatter all of the root's but its own chunk, and nothing elsewhere; for a reduce
    or gather the buffer of everyone but the root; for a send its buffer, for a recv nothing. What is coalesced into one
    call is one collective. In a group of one they count, with nothing sent. Barriers and waits are no collectives.

    Not seen: what other threads start. A backward on CPUs runs on the thread that called it and is seen; for GPUs
    autograd has threads of its own, to which it hands the watch on, but this was not tried. Nothing moves for fake
    tensors, and nothing is noted. Under the watch torch.compile does not compile, and with fullgraph=True refuses to
    run, unless `torch.compiler.set_stance("force_eager")` is open around it.

    Inside the context a collective of a kind that is not known here, such as those on symmetric memory, raises
    RuntimeError with its name before it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Passed] = []

    @property
    def collectives(self) -> int:
        """How many collectives were started."""
        return len(self.log)

    @property
    def sent(self) -> float:
        """Bytes this rank sent."""
        return sum(passed.sent for passed in self.log)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fake = any(issubclass(kind, FakeTensor) for kind in types)
        if not fake and any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            # Let DTensor and its like break down into operations on their pieces, which come back here one by one.
            return NotImplemented
        if fake or func.namespace not in _NAMESPACES:
            return func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if name in _NOTHING_SENT:
            return func(*args, **kwargs)
        if name not in _KNOWN:
            raise RuntimeError(f"symdist.diagnostics.collective_counter cannot count {name}: add it to the table there")
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        group = _group(arguments)
        # Before the call: an asynchronous one may already be at work on its buffers after it.
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
    """The arguments by name, in the order of the schema; the group's size, and this rank's index in it."""

    arguments: Mapping[str, Any]
    size: int
    index: int

    def argument(self, position: int) -> Any:
        return list(self.arguments.values())[position]

    def nbytes(self, position: int = 0) -> int:
        """Bytes of the argument's tensors, a tensor or a list of them or of lists."""
        return _nbytes(self.argument(position))

    def is_root(self) -> bool:
        root = self.arguments["src"] if "src" in self.arguments else self.arguments["root_rank"]
        return bool(root == self.index)


_Sent: TypeAlias = Callable[[_Call], float]


def _rows(buffer: Tensor, splits: list[int], call: _Call) -> float:
    """An all_to_all of blocks of rows, of equal ones where no splits are given."""
    if not splits:
        return buffer.nbytes * (call.size - 1) / call.size
    return buffer.nbytes - splits[call.index] * (buffer.nbytes // max(1, len(buffer)))


def _posted(call: _Call) -> float:
    """What is sent of several sends and receives."""
    arguments = call.arguments
    return sum(
        tensor.nbytes
        for kind, tensor in zip(arguments["op_list"], arguments["tensors"], strict=True)
        if kind == "isend"
    )


# What this rank sends in each. The c10d ones have their outputs before their inputs, the functional ones inputs alone.
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
    # What DTensor moves a shard to another dimension by, where the backend can.
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
# Of the last three nothing is known: the first two break down into _c10d_functional, the other moves data by itself.
_NAMESPACES = {"c10d", "_c10d_functional", "_dtensor", "c10d_functional", "_c10d_functional_autograd", "symm_mem"}


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors))


def _group(arguments: Mapping[str, Any]) -> dist.ProcessGroup:
    """The process group of a call, which is given as an object or by name."""
    given = arguments["process_group"] if "process_group" in arguments else arguments["group_name"]
    if isinstance(given, str):
        return _resolve_process_group(cast(Any, given))
    return dist.ProcessGroup.unbox(given) if isinstance(given, torch.ScriptObject) else given
