"""What a model's own forward does with each weight, seen by following one forward pass on the meta device.

These are the facts by which `judge.py` judges a routing. Nothing here knows names or roles: a weight is known by what
it is multiplied with, by which of its dimensions is summed over, and by what becomes of the product.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(kw_only=True)
class Use:
    """What a forward pass does with a weight.

    Attributes:
        stored: "out_in" or "in_out", by which of its last two dimensions is summed over; "other" if several are, or
            another one. Empty if it meets no other tensor in a product of matrices.
        looked_up: Whether rows of it are looked up.
        convolved: Whether it is the kernel of a convolution.
        coordinates: Whether it meets other tensors element by element.
        reads: Whether its input is the residual stream.
        elsewhere: Whether its input is something other than the residual stream.
        writes: Whether its output is added to the residual stream.
        chooses: Whether the largest of its outputs are chosen (topk): what a router of experts is for.
        cuts: The rows, of the weight as [out, in], at which its output is split into parts.
        slices: The rows at which slices of its output begin or end: those of parts, or of rotary embeddings.
        alternating: Whether every other output is taken.
        heads: By rows (start, stop), the shape into which this part of the output is viewed: (…, heads, head size).
        periods: Where the output is viewed as heads that are cut in turn: their number, and the sizes of the parts.
        ends: Where the output is viewed as heads of which slices are taken: where these begin or end.
        within: The sizes of heads into which such parts are viewed in turn.
        heads_in: The shapes (heads, head size) that were merged into its input.
    """

    stored: set[str] = field(default_factory=set)
    looked_up: bool = False
    convolved: bool = False
    coordinates: bool = False
    reads: bool = False
    elsewhere: bool = False
    writes: bool = False
    chooses: bool = False
    cuts: set[int] = field(default_factory=set)
    slices: set[int] = field(default_factory=set)
    alternating: bool = False
    heads: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    periods: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)
    within: set[int] = field(default_factory=set)
    heads_in: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A part, `start` to `stop`, of the output of a weight, which lies along dimension `axis`, counted from the end."""

    weight: str
    start: int
    stop: int
    axis: int = -1
    heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """What is known of a tensor.

    Attributes:
        weight: The weight of which it is a view, and whether its last two dimensions are swapped.
        stream: Whether it is the residual stream, perhaps normalized or scaled.
        outputs: The weights whose outputs reach it through functions of single elements only.
        product: The weight whose output it is, or a part of it.
        merged: Heads and head size, if its last dimension was these two.
    """

    weight: tuple[str, bool] | None = None
    stream: bool = False
    outputs: frozenset[str] = frozenset()
    product: _Product | None = None
    merged: tuple[int, int] | None = None


# A mask on meta has no values; it then selects everything.
ALL_NONZERO = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
_NOTHING = _Trace()
_TRACE = "_trace_of_use"
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub", "index_add"}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "grouped_mm"}
_OF_SHAPES_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_OF_SHAPES_ONLY |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_VIEWS = {"__getitem__", "index_select", "to", "float", "type", "type_as", "contiguous", "clone", "detach", "unsqueeze"}
_VIEWS |= {"squeeze", "unbind", "expand", "half", "bfloat16", "chunk", "split", "split_with_sizes", "select", "narrow"}
_CHOICES = {"topk", "argmax", "max", "sort", "argsort"}
_TURNS = {torch.Tensor.mT.__get__, torch.Tensor.T.__get__}  # type: ignore[attr-defined]


class Follower(TorchFunctionMode):
    """Follows weights and the residual stream through a forward pass on meta; what is found lies in `uses`."""

    def __init__(self, model: nn.Module, widths: set[int]):
        super().__init__()
        self.uses: dict[str, Use] = {}
        self._widths = widths
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                self.uses[name] = Use()
                _mark(parameter, _Trace(weight=(name, False)))

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta and function in _ANSWERS:
            return _ANSWERS[function](first)
        if function in (torch.split, Tensor.split) and isinstance(sizes := args[1], list) and isinstance(first, Tensor):
            # Numbers of tokens by expert, which are not known: all go to the first one.
            size = first.shape[kwargs.get("dim", args[2] if len(args) > 2 else 0)]
            args = (first, sizes if sum(sizes) == size else [size] + [0] * (len(sizes) - 1), *args[2:])
        result = function(*args, **kwargs)
        name = "turn" if function in _TURNS else getattr(function, "__name__", "")
        tensors = list(_tensors((args, kwargs)))
        if name not in _OF_SHAPES_ONLY and any(_trace(t) is not _NOTHING for t in tensors):
            self._follow(name, args, kwargs, tensors, result)
        return result

    def _follow(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor], result: Any
    ) -> None:
        if name == "linear":
            self._multiply(tensors[0], tensors[1], result, weight_last=True, turned=True)
        elif name in _PRODUCTS:
            for bias in tensors[:-2]:
                if (found := _trace(bias).weight) is not None and name in ("addmm", "baddbmm"):
                    self.uses[found[0]].coordinates = True
            a, b = tensors[-2:] if name in ("addmm", "baddbmm") else tensors[:2]
            a, b = (b, a) if name == "__rmatmul__" else (a, b)
            self._multiply(a, b, result, weight_last=_trace(b).weight is not None, turned=False)
        elif name == "einsum":
            self._einsum(args[0], tensors, result)
        elif name == "embedding":
            traced = _trace(tensors[1]).weight
            if traced is not None:
                self.uses[traced[0]].looked_up = True
                _mark(result, _Trace(stream=result.shape[-1] in self._widths))
        elif name.startswith("conv") and len(tensors) > 1:
            self._convolve(tensors, result)
        elif name == "__setitem__":
            _mark(tensors[0], self._of_elements(name, tensors, tensors[0]))
        elif _trace(tensors[0]).weight is not None and (name in _VIEWS or _keeps_last(name, tensors[0], result)):
            self._view_weight(name, args, kwargs, tensors[0], result)
        else:
            if name in _CHOICES:
                self._choose(args, kwargs, tensors[0])
            self._rest(name, args, kwargs, tensors, result)

    def _multiply(self, a: Tensor, b: Tensor, result: Tensor, *, weight_last: bool, turned: bool) -> None:
        """Note a product with a weight; `turned` if the last dimension of `b`, not the one before, is summed over."""
        weight, other = (b, a) if weight_last else (a, b)
        found = _trace(weight).weight
        if found is None:
            # To mix several streams leaves them streams; attention weights times values are none.
            mixed = _trace(b).stream and not turned and b.shape[-1] in self._widths
            _mark(result, _Trace(stream=mixed))
            return
        name, swapped = found
        use = self.uses[name]
        summed_last = turned or not weight_last
        use.stored.add("out_in" if summed_last != swapped else "in_out")
        width = weight.shape[-1] if summed_last else weight.shape[-2]
        self._note_input(use, _trace(other), width)
        rows = weight.shape[-2] if summed_last else weight.shape[-1]
        axis = -1 if weight_last else -2
        _mark(result, self._output_of(name, rows, axis, _trace(other), width))

    def _einsum(self, equation: str, tensors: list[Tensor], result: Tensor) -> None:
        operands, _, output = equation.replace(" ", "").partition("->")
        letters = operands.split(",")
        weights = [i for i, t in enumerate(tensors) if _trace(t).weight is not None]
        if len(weights) != 1 or len(tensors) != 2:
            for i in weights:
                self.uses[_trace(tensors[i]).weight[0]].coordinates = True  # type: ignore[index]
            return
        (index,) = weights
        weight, other = tensors[index], tensors[1 - index]
        name, swapped = _trace(weight).weight  # type: ignore[misc]
        last_two = letters[index][-2:]
        summed = [letter for letter in letters[index] if letter not in output]
        if len(summed) != 1 or summed[0] not in last_two:
            self.uses[name].stored.add("other")
            return
        summed_last = last_two.index(summed[0]) == 1
        self.uses[name].stored.add("out_in" if summed_last != swapped else "in_out")
        width = weight.shape[-1] if summed_last else weight.shape[-2]
        self._note_input(self.uses[name], _trace(other), width)
        rows = weight.shape[-2] if summed_last else weight.shape[-1]
        kept = last_two[0] if summed_last else last_two[1]
        if kept in output:
            axis = output.index(kept) - len(output)
            _mark(result, self._output_of(name, rows, axis, _trace(other), width))

    def _note_input(self, use: Use, trace: _Trace, width: int) -> None:
        if trace.stream and width in self._widths:
            use.reads = True
        else:
            use.elsewhere = True
        if trace.merged is not None and math.prod(trace.merged) == width:
            use.heads_in.add(trace.merged)

    def _output_of(self, name: str, rows: int, axis: int, source: _Trace, width: int) -> _Trace:
        product = _Product(weight=name, start=0, stop=rows, axis=axis)
        if source.stream and width in self._widths and rows in self._widths and rows != width:
            # Between the width of the embedding and that of the layers.
            self.uses[name].writes = True
            return _Trace(stream=True, product=product)
        return _Trace(outputs=frozenset({name}), product=product)

    def _convolve(self, tensors: list[Tensor], result: Tensor) -> None:
        found = _trace(tensors[1]).weight
        if found is not None:
            self.uses[found[0]].convolved = True
        source = _trace(tensors[0])
        by_channel = tensors[1].shape[1] == 1
        kept = by_channel and source.product is not None and source.product.axis == 1 - tensors[0].ndim
        product = source.product if kept else None
        _mark(result, replace(source, product=product, weight=None) if by_channel else _Trace())

    def _view_weight(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], weight: Tensor, result: Any) -> None:
        found, swapped = _trace(weight).weight  # type: ignore[misc]
        if name in ("t", "turn"):
            swapped = not swapped
        elif name == "transpose":
            dims = {dim % weight.ndim for dim in (*args[1:], *kwargs.values())}
            swapped ^= dims == {weight.ndim - 1, weight.ndim - 2}
        elif name == "permute":
            order = args[1:] if isinstance(args[1], int) else args[1]
            order = [dim % weight.ndim for dim in order]
            swapped ^= order[-2:] == [weight.ndim - 1, weight.ndim - 2]
        for each in _tensors(result):
            _mark(each, _Trace(weight=(found, swapped)))

    def _choose(self, args: Sequence[Any], kwargs: dict[str, Any], scores: Tensor) -> None:
        dim = kwargs.get("dim", -1)
        for output in _trace(scores).outputs:
            # A router may also score experts that every token goes to, and choose among the others.
            rows = {self._rows(output), *self.uses[output].cuts, *self.uses[output].slices}
            if scores.ndim and scores.shape[dim if isinstance(dim, int) else -1] in rows:
                self.uses[output].chooses = True

    def _rows(self, name: str) -> int:
        return self._shapes[name][-1 if self.uses[name].stored == {"in_out"} else -2]

    def _rest(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor], result: Any) -> None:
        results = list(_tensors(result))
        if not results or results[0].dtype in (torch.bool, torch.long, torch.int):
            return
        first = tensors[0]
        for tensor in tensors:
            # A result of the same name is the weight itself, changed in place; a cast to its type is no use of it.
            if (found := _trace(tensor).weight) is not None and name not in ("to", "type_as"):
                self.uses[found[0]].coordinates = True
        if any(each is tensor for each in results for tensor in tensors if _trace(tensor).weight is not None):
            return
        product = _trace(first).product
        if name in ("split", "split_with_sizes", "chunk", "tensor_split", "unbind"):
            products = self._cut(first, product, results, args, kwargs)
            for each, part in zip(results, products, strict=True):
                _mark(each, replace(_trace(first), product=part, weight=None))
            return
        for each in results:
            trace = self._of_elements(name, tensors, each)
            source = _trace(first)
            merged = source.merged if each.shape[-1:] == first.shape[-1:] else None
            if name in ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"):
                product, again = self._reshape(product, tuple(first.shape), tuple(each.shape))
                merged = again or merged
            elif name == "__getitem__":
                product = self._slice(product, first, args[1], each)
            else:
                # A norm may multiply its scale by what it normalizes, instead of the other way round.
                moved = next((t for t in tensors if _trace(t).product is not None), first)
                product = self._moved(name, _trace(moved).product, args, kwargs, moved, tensors, each)
            _mark(each, replace(trace, product=product, merged=merged))

    def _of_elements(self, name: str, tensors: list[Tensor], result: Tensor) -> _Trace:
        traces = [(t, _trace(t)) for t in tensors]
        outputs = frozenset().union(*(trace.outputs for _, trace in traces))
        streams = [t for t, trace in traces if trace.stream]
        if not streams:
            return _Trace(outputs=outputs)
        if name.strip("_") in _SUMS and len(tensors) > 1:
            for output in outputs:
                if self._rows(output) in self._widths:
                    self.uses[output].writes = True
            return _Trace(stream=True)
        width = result.shape[-1] if result.ndim else 1
        wide = any(t.ndim and (t.shape[-1] > 1 or width == 1) for t in streams)
        factor = any(trace.outputs and t.ndim and t.shape[-1] == width > 1 for t, trace in traces if not trace.stream)
        stream = wide and not factor
        return _Trace(stream=stream, outputs=frozenset() if stream else outputs)

    def _cut(
        self,
        first: Tensor,
        product: _Product | None,
        results: list[Tensor],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> list[_Product | None]:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        if product is None or not isinstance(dim, int) or dim % first.ndim != product.axis % first.ndim:
            kept = product if product is not None and results[0].ndim == first.ndim else None
            return [kept] * len(results)
        sizes = [each.shape[dim] for each in results] if results[0].ndim == first.ndim else []
        if product.heads is not None:
            self.uses[product.weight].periods.add((product.heads, tuple(sizes)))
            return [product for _ in results]
        parts: list[_Product | None] = []
        start = product.start
        for size in sizes:
            parts.append(replace(product, start=start, stop=start + size))
            start += size
            if start < product.stop:
                self.uses[product.weight].cuts.add(start)
        return parts or [None] * len(results)

    def _reshape(
        self, product: _Product | None, old: tuple[int, ...], new: tuple[int, ...]
    ) -> tuple[_Product | None, tuple[int, int] | None]:
        if old[-1:] == new[-1:]:
            return (product if product is None or product.axis == -1 else None), None
        for count in range(2, len(old) + 1):
            if math.prod(old[-count:]) == new[-1] and old[-1] > 1:
                return None, (math.prod(old[-count:-1]), old[-1])
        if product is not None and product.axis == -1:
            for count in range(2, len(new) + 1):
                if product.heads is not None:
                    # A last dimension of two is that of pairs, which a rotary embedding turns.
                    if math.prod(new[-count:]) in (old[-1], math.prod(old[-2:])) and new[-1] > 2:
                        self.uses[product.weight].within.add(new[-1])
                        return None, None
                    continue
                if math.prod(new[-count:]) == old[-1]:
                    self.uses[product.weight].heads.setdefault((product.start, product.stop), new[-count:])
                    return replace(product, heads=math.prod(new[-count:-1])), None
        return None, None

    def _slice(self, product: _Product | None, first: Tensor, key: Any, result: Tensor) -> _Product | None:
        if product is None:
            return None
        if result.ndim != first.ndim:
            return product if product.axis == -1 and result.shape[-1:] == first.shape[-1:] else None
        keys = key if isinstance(key, tuple) else (key,)
        if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
            keys = keys[[k is Ellipsis for k in keys].index(True) + 1 :]
            keys = (slice(None),) * (first.ndim - len(keys)) + tuple(keys)
        keys = tuple(keys) + (slice(None),) * (first.ndim - len(keys))
        along = keys[product.axis]
        if not isinstance(along, slice):
            return None
        start, stop, step = along.indices(first.shape[product.axis])
        if step != 1:
            self.uses[product.weight].alternating = True
            return None
        if (start, stop) == (0, first.shape[product.axis]):
            return product
        if product.heads is not None:
            self.uses[product.weight].ends.update({start, stop} - {0})
            return None
        self.uses[product.weight].slices.update({product.start + start, product.start + stop} - {0, product.stop})
        return replace(product, start=product.start + start, stop=product.start + stop)

    def _moved(
        self,
        name: str,
        product: _Product | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        first: Tensor,
        tensors: list[Tensor],
        result: Tensor,
    ) -> _Product | None:
        if product is None:
            return None
        if name in ("transpose", "swapaxes"):
            dims = [dim % first.ndim - first.ndim for dim in (*args[1:], *kwargs.values())]
            order = list(range(-first.ndim, 0))
            i, j = (dim + first.ndim for dim in dims)
            order[i], order[j] = order[j], order[i]
        elif name == "permute":
            given = args[1:] if isinstance(args[1], int) else args[1]
            order = [dim % first.ndim - first.ndim for dim in given]
        elif name == "squeeze" and result.ndim == first.ndim - 1 and first.shape[-1] == 1:
            return replace(product, axis=product.axis + 1) if product.axis < -1 else None
        elif any(_trace(t).product is not None or _trace(t).stream for t in tensors if t is not first):
            return None
        else:
            same = result.ndim == first.ndim or product.axis == -1
            kept = same and result.ndim > 0 and result.shape[product.axis] == first.shape[product.axis]
            return product if kept else None
        return replace(product, axis=order.index(product.axis) - first.ndim)


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What following a forward pass of a model found.

    Attributes:
        uses: What is done with each weight of two or more dimensions, by name. A weight that has a `twin` is not there.
        twins: For each parameter of a layer that is built like an earlier one, the same parameter of the first such
            layer. Only that one was followed.
        error: The error that ended the pass before its end; None if it ran through.
    """

    uses: dict[str, Use]
    twins: dict[str, str]
    error: str | None


def follow(model: nn.Module) -> Followed:
    """Follow one forward pass of a causal language model on meta, on eight tokens. Layers built alike run once."""
    followed = _followed(model, skip=True)
    if followed.error is None:
        return followed
    # Layers may hand each other more than the residual stream: then all have to run.
    whole = _followed(model, skip=False)
    return followed if whole.error is not None else whole


def _followed(model: Any, *, skip: bool) -> Followed:
    embedding = model.get_input_embeddings()
    widths = {getattr(model.config.get_text_config(), "hidden_size", None)}
    widths |= {embedding.weight.shape[1]} if embedding is not None else set()
    follower = Follower(model, {width for width in widths if isinstance(width, int)})
    tokens, error = torch.zeros(2, 8, dtype=torch.long, device="meta"), None
    training, checked = model.training, torch.distributions.Distribution._validate_args
    model.eval()
    torch.distributions.Distribution.set_default_validate_args(False)
    if hasattr(model, "set_default_language"):  # X-MOD runs in one of its languages.
        model.set_default_language(model.config.languages[0])
    with suppress(ValueError):  # Of models without experts. Elsewhere this takes no numbers of tokens by expert.
        model.set_experts_implementation("batched_mm")
    with ExitStack() as stack:
        twins = stack.enter_context(_each_kind_once(model)) if skip else {}
        try:
            with torch.device("meta"), torch.no_grad(), ALL_NONZERO, follower:
                model(input_ids=tokens, use_cache=False)
        except Exception as raised:
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
    model.train(training)
    torch.distributions.Distribution.set_default_validate_args(checked)
    for parameter in model.parameters():
        parameter.__dict__.pop(_TRACE, None)
    uses = {name: use for name, use in follower.uses.items() if name not in twins}
    return Followed(uses=uses, twins=twins, error=error)


@contextmanager
def _each_kind_once(model: nn.Module) -> Iterator[dict[str, str]]:
    """Let a layer that is built like an earlier one of its list return what that returned. Yields the twins."""
    twins: dict[str, str] = {}
    changed: list[nn.Module] = []
    for prefix, layers in list(model.named_modules()):
        if not isinstance(layers, nn.ModuleList):
            continue
        first: dict[Any, tuple[str, nn.Module]] = {}
        returned: dict[str, Any] = {}
        for number, layer in enumerate(layers):
            path = f"{prefix}.{number}"
            kind = _kind(layer)
            if kind in first:
                twin = first[kind][0]
                twins |= {f"{path}.{name}": f"{twin}.{name}" for name, _ in layer.named_parameters()}
                layer.forward = _repeating(returned, twin)
            else:
                first[kind] = path, layer
                layer.forward = _noting(returned, path, layer.forward)
            changed.append(layer)
    try:
        yield twins
    finally:
        for layer in changed:
            del layer.forward


def _kind(layer: nn.Module) -> Any:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _repeating(returned: dict[str, Any], twin: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: returned[twin]


def _noting(returned: dict[str, Any], path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        returned[path] = forward(*args, **kwargs)
        return returned[path]

    return noting


def _keeps_last(name: str, old: Tensor, new: Any) -> bool:
    """Whether a reshaping leaves the last dimension, or only turns."""
    return name in ("transpose", "t", "turn", "permute") or (
        name in ("view", "reshape") and new.shape[-1:] == old.shape[-1:]
    )


def _trace(tensor: Tensor) -> _Trace:
    return tensor.__dict__.get(_TRACE, _NOTHING)


def _mark(tensor: Tensor, trace: _Trace) -> None:
    tensor.__dict__[_TRACE] = trace


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _number(tensor: Tensor) -> Any:
    return 0.0 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 0


# A tensor on meta has no values. A forward pass that asks for one is told zero, or no, and goes on.
_ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__bool__: lambda tensor: False,
    Tensor.__contains__: lambda tensor: False,
    Tensor.item: _number,
    Tensor.__int__: lambda tensor: 0,
    Tensor.__index__: lambda tensor: 0,
    Tensor.__float__: lambda tensor: 0.0,
    Tensor.tolist: lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist(),
}
