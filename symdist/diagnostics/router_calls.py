"""Sees what routers compute: the product of their weight with the tokens, and which experts are chosen by it.

Routers return logits, probabilities or neither, in any order, and the experts' indices or none at all. But all multiply
by their weight, and nearly all choose by `topk`. So these two operations are observed as they run, whichever function
or module they run in.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from symdist.layouts.fsdp1 import whole_shape
from symdist.routing.sites import ModuleChain, find_sites, walk

_TOP_K = (torch.topk, Tensor.topk)
_COLUMNS = (Tensor.__getitem__, Tensor.split, torch.split, Tensor.narrow, torch.narrow, Tensor.chunk, torch.chunk)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# How far out a block may be: around a linear layer in a network in a router.
_LEVELS = 4


class RouterCalls:
    """Records the last call of a router, by hooks on the module that holds its weight and on those around it.

    Args:
        name: The name of the router's weight.
        shape: The shape of the whole weight.
        chain: The modules around it.

    Attributes:
        name: The name of the router's weight.
        last: From the last call, the logits `[N, E]` with their autograd graph, and the chosen experts `[N, k]`. None
            before the first call, and if one of them could not be seen.
        problem: Why it could not.
    """

    def __init__(self, name: str, shape: torch.Size, chain: ModuleChain):
        self.name = name
        self.last: tuple[Tensor, Tensor] | None = None
        self.problem = "run the model's forward after creating the monitor"
        self._holder, self._leaf, self._shape = chain[-1][1], name.rpartition(".")[2], shape
        # The index of the innermost module in which both logits and choice are seen, once a call has shown it.
        self._enough: int | None = None
        self._watching: dict[int, _Operations] = {}
        self._handles: list[RemovableHandle] = []
        for i, module in enumerate(_up_to_block(chain)):
            # Local functions, since copies of a model share these; they would copy a method with what it recorded.
            self._handles += [
                module.register_forward_pre_hook(self._opener(i)),
                module.register_forward_hook(self._closer(i), always_call=True),
            ]

    def close(self) -> None:
        """Remove the hooks and release the tensors of the last call."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.last, self.problem = None, "the monitor is closed; create another, and run the model's forward"

    def _opener(self, index: int) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            if self._enough in (None, index):
                if index in self._watching:
                    # Left over from a forward that was interrupted.
                    self._watching[index].ended = True
                self._watching[index] = _Operations(self._holder, self._leaf, self._shape)
                self._watching[index].__enter__()

        return enter

    def _closer(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            operations = self._watching.pop(index, None)
            if operations is None:
                return
            operations.__exit__(None, None, None)
            # The outputs are None after an exception. A module further in may have shown enough meanwhile.
            if outputs is None or self._enough not in (None, index):
                return
            try:
                self.last = _last_call(operations, outputs, checked=self._enough is not None)
                self._enough = index
            except _UnseenError as reason:
                self.last, self.problem = None, str(reason)

        return leave


def router_calls(model: nn.Module) -> list[RouterCalls]:
    """Record the calls of all routers of a model: the modules with weights to which routing gives the role "router".

    Args:
        model: The model, sharded or not.

    Returns:
        The records, in the order of the model.

    Raises:
        ValueError: If FSDP has joined parameters into one flat parameter.
    """
    with _trainable_and_whole(model):
        routers = {id(p): name for name, (p, site) in find_sites(model).items() if site.role == "router"}
        held = [(id(p), torch.Size(whole_shape(p)), chain) for _, p, chain in walk([model])]
    return [RouterCalls(routers[key], shape, chain) for key, shape, chain in held if key in routers]


@contextmanager
def _trainable_and_whole(model: nn.Module) -> Iterator[None]:
    """Show frozen weights as trainable and those that DeepSpeed has cut in full shape, as routing looks for these."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    shapes = [(p, p.data, tuple(getattr(p, "ds_shape", p.shape))) for p in model.parameters()]
    cut = [(p, data, shape) for p, data, shape in shapes if tuple(data.shape) != shape]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for parameter, data, shape in cut:
            parameter.data = data.new_empty(()).expand(shape)
        yield
    finally:
        for parameter, data, _ in cut:
            parameter.data = data
        for parameter in frozen:
            parameter.requires_grad_(False)


def _up_to_block(chain: ModuleChain) -> list[nn.Module]:
    """Return the modules around a router's weight, from its own to the block that has the experts."""
    around: list[nn.Module] = []
    for _, module in reversed(chain[-_LEVELS:]):
        if isinstance(module, _CONTAINERS):
            break
        around.append(module)
        if any("expert" in name for name, _ in module.named_children()):
            break
    return around


class _UnseenError(Exception):
    """What could not be seen of a call."""


def _last_call(operations: _Operations, outputs: Any, *, checked: bool) -> tuple[Tensor, Tensor]:
    """Return logits and choice of a call, from what ran in a module and what it returned.

    `checked` is whether indices that the module returns are known to be experts.
    """
    if not operations.products:
        raise _UnseenError("no product of its weight with the tokens can be seen")
    if len(operations.products) > 1:
        raise _UnseenError(f"its weight is used {len(operations.products)} times in one call")
    logits = operations.products[0]
    by_width = {part.shape[-1]: part for part in (*operations.parts, logits)}
    tokens = logits.shape[:-1].numel()
    returned = [t for t in _tensors(outputs) if t.dim() > 1 and t.dtype in (torch.int32, torch.int64)]
    choices = [choice for choice in operations.choices if _among_experts(*choice, by_width, tokens)]
    # A router that first chooses among one group of all experts chooses twice. It returns its last choice.
    final = [choice for choice in choices if len(choices) == 1 or any(choice[1] is t for t in returned)]
    if len(final) == 1:
        logits, indices = by_width[final[0][0].shape[-1]], final[0][1]
    elif choices:
        raise _UnseenError(
            f"it chooses experts {len(choices)} times in one call; let it return the indices of its last choice"
        )
    else:
        # Without `topk`, as where a table says which experts a token gets.
        found = [t for t in returned if t.shape[:-1].numel() == tokens and t.shape[-1] < logits.shape[-1]]
        if len(found) != 1 or not (checked or bool(((found[0] >= 0) & (found[0] < logits.shape[-1])).all())):
            raise _UnseenError(
                "which experts it chooses cannot be seen; let it choose by torch.topk or return indices [tokens, k]"
            )
        indices = found[0]
    return logits.reshape(-1, logits.shape[-1]), indices.reshape(tokens, -1)


def _among_experts(scores: Tensor, indices: Tensor, widths: Container[int], tokens: int) -> bool:
    """Return whether a choice was among the experts, once for each token."""
    rows = indices.shape[:-1]
    return scores.shape[-1] in widths and scores.shape[:-1] == rows and rows.numel() == tokens


class _Operations(TorchFunctionMode):
    """Notes products with a router's weight and choices of the largest numbers among what runs.

    Attributes:
        products: The products with the weight, `[…, E]`.
        parts: Columns of these products; the others are those of experts that every token uses.
        choices: The arguments of `topk`, and the indices that it returned.
        ended: Whether to note no more.
    """

    def __init__(self, holder: nn.Module, leaf: str, shape: torch.Size):
        super().__init__()
        self._holder, self._leaf, self._shape = holder, leaf, shape
        # The weight in other dtypes, transposed, or normalized.
        self._forms: list[Tensor] = []
        self.products: list[Tensor] = []
        self.parts: list[Tensor] = []
        self.choices: list[tuple[Tensor, Tensor]] = []
        self.ended = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not self.ended:
            self._note(func, list(_tensors([*args, *(kwargs or {}).values()])), results)
        return results

    def _note(self, func: Any, operands: list[Tensor], results: Any) -> None:
        if func in _TOP_K:
            self.choices.append((operands[0], results[1]))
        elif func in _COLUMNS:
            if any(operands[0] is product for product in self.products):
                self.parts += [part for part in _tensors(results) if part.shape[:-1] == operands[0].shape[:-1]]
        elif any(map(self._is_weight, operands)):
            for result in _tensors(results):
                if len(operands) == 1 or result.shape == self._shape:
                    self._forms.append(result)
                elif result.is_floating_point() and result.shape[-1:].numel() in self._shape:
                    self.products.append(result)

    def _is_weight(self, tensor: Tensor) -> bool:
        if any(tensor is form for form in self._forms):
            return True
        # Not kept, since FSDP puts another tensor in its place for each forward. Its shape comes first, because merely
        # reading a parameter of another module would make DeepSpeed gather it.
        return tensor.shape == self._shape and tensor is getattr(self._holder, self._leaf)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, and in the tuples, lists and mappings that it consists of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
