"""What a model says of itself besides its names: the width of the residual stream, vocabularies, counts of heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.param_names import class_name, unwrapped
from symdist.routing.words import POSITIONS

ModuleChain: TypeAlias = list[tuple[str, nn.Module]]
"""The modules around a parameter, from the root to its own, each with the attribute that holds it; without wrappers."""

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim")
_EXPERTS = (
    *("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts", "n_experts"),
    "num_routed_experts",
)


def config_of(module: nn.Module) -> Any:
    """Return the config of the text model that a module holds; None if it holds none.

    Args:
        module: The module.

    Returns:
        The config: of models of several kinds of input, the part that describes their text model.
    """
    try:
        config = getattr(module, "config", None)
        return None if isinstance(config, dict) else getattr(config, "text_config", None) or config
    except Exception:  # A property may raise anything before the model is complete.
        return None


def sources(chain: ModuleChain) -> Iterator[Any]:
    """Yield the modules around a parameter, nearest first, each followed by its config if it has one.

    Args:
        chain: The modules around the parameter.

    Yields:
        Modules and configs.
    """
    for _, module in reversed(chain):
        yield module
        config = config_of(module)
        if config is not None:
            yield config


class ModelFacts:
    """What is known of a model as a whole. It remembers what it has read, so make a new one if the model changes.

    Args:
        models: The model, or the parts of one; none by default.

    Attributes:
        vocabularies: The sizes of its vocabularies.
        tables: The numbers of rows of all its tables, padded or not.
    """

    def __init__(self, models: Iterable[nn.Module] = ()):
        self.vocabularies: set[int] = set()
        self.tables: set[int] = set()
        self._widths: list[int | None] = []
        self._width_by_module: dict[int, int | None] = {}
        self._numbers: dict[tuple[int, str], int | None] = {}
        # Kept alive, for configs that are made anew at each access may otherwise have the id of an earlier one.
        self._sources: dict[int, Any] = {}
        for model in models:
            self._read(model)

    def _read(self, model: nn.Module) -> None:
        configs = {id(config): config for module in model.modules() if (config := config_of(module)) is not None}
        for config in configs.values():
            keys = [key for key in getattr(config, "__dict__", None) or dir(config) if "vocab" in key]
            self.vocabularies |= {size for key in keys if (size := self.number(config, key)) is not None}
        declared = getattr(unwrapped(model), "get_input_embeddings", None)
        try:
            inputs = [declared()] if declared is not None else []
        except (AttributeError, NotImplementedError):
            inputs = []
        named: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if is_table(m)]
        self.tables |= {whole_shape(table.weight)[0] for _, table in named}
        tables = [m for m in inputs if is_table(m)] or [m for name, m in named if not POSITIONS.search(name)]
        shapes = [whole_shape(table.weight) for table in tables]
        if not self.vocabularies and shapes:
            # Without a config, the table of tokens is as long as a head, or else the first.
            layers: list[Any] = [module for module in model.modules() if is_linear(module)]
            linear = {whole_shape(layer.weight)[0] for layer in layers}
            self.vocabularies.add(next((rows for rows, _ in shapes if rows in linear), shapes[0][0]))
        self._widths.append(self._width_without_config(model, shapes))

    def _width_without_config(self, model: nn.Module, tables: Sequence[tuple[int, ...]]) -> int | None:
        """Return the width of the stream as weights show it: of tables, head and norms, the one most matrices have.

        An embedding or head alone may be narrower, with a projection beside it.
        """
        shapes = [whole_shape(parameter) for parameter in model.parameters()]
        matrices = [shape for shape in shapes if len(shape) == 2 and shape[0] not in self.vocabularies]
        looked_up = [shape[1] for shape in tables if shape[0] in self.vocabularies] or [s[1] for s in tables[:1]]
        heads = [shape[1] for shape in shapes if len(shape) == 2 and shape[0] in self.vocabularies]
        norms = [
            whole_shape(parameter)[0]
            for module in model.modules()
            if "norm" in class_name(module).lower()
            for parameter in module.parameters(recurse=False)
            if len(whole_shape(parameter)) == 1
        ]
        candidates = list(dict.fromkeys([*looked_up, *heads, *(norms if looked_up else [])]))
        return max(candidates, key=lambda width: sum(width in shape for shape in matrices), default=None)

    def number(self, source: Any, name: str) -> int | None:
        """Return a whole number that a module or config has under a name; None if it has none.

        Args:
            source: A module, or the config of one.
            name: The attribute.

        Returns:
            The number.
        """
        key = id(source), name
        if key not in self._numbers:
            self._sources[id(source)] = source
            try:
                value = getattr(source, name, None)
            except Exception:  # A config whose layers differ may raise anything where asked for what they do not share.
                value = None
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            self._numbers[key] = value if is_count else None
        return self._numbers[key]

    def numbers(self, around: Iterable[Any], names: Sequence[str]) -> list[int]:
        """Return the numbers that modules or configs have under any of the names.

        Args:
            around: The modules and configs, see `sources`.
            names: The names.

        Returns:
            The numbers, each once: those of the first module or config first, and of each in the order of the names.
        """
        found = (self.number(source, name) for source in around for name in names)
        return list(dict.fromkeys(value for value in found if value is not None))

    def expert_counts(self, chain: ModuleChain) -> set[int]:
        """Return the numbers of routed experts that the modules around a parameter, or their configs, name."""
        return set(self.numbers(sources(chain), _EXPERTS))

    def width(self, chain: ModuleChain) -> int | None:
        """Return the width of the residual stream around a parameter; None if nothing tells it.

        It is that of the nearest config around the parameter, so that each tower of a model has its own. Without
        configs, embedding, head and norms show it.

        Args:
            chain: The modules around the parameter.

        Returns:
            The width.
        """
        key = id(chain[-1][1])
        if key not in self._width_by_module:
            self._width_by_module[key] = self._find_width(chain)
        return self._width_by_module[key]

    def _find_width(self, chain: ModuleChain) -> int | None:
        for _, module in reversed(chain):
            config = config_of(module)
            found = (self.number(config, name) for name in _WIDTHS) if config is not None else ()
            width = next((value for value in found if value is not None), None)
            if width is not None:
                return width
        return next(filter(None, self._widths), None)


def is_table(module: Any) -> bool:
    """Return whether a module looks up rows of a weight, as `nn.Embedding` does."""
    if not (isinstance(module, nn.Embedding) or class_name(module).endswith("Embedding")):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and len(whole_shape(weight)) == 2


def is_linear(module: Any) -> bool:
    """Return whether a module multiplies by a weight `[out, in]`, as `nn.Linear` and those made after it do."""
    sized = isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    # Not one that the module passes on, as adapters do with the weight of what they adapt.
    weight = module._parameters.get("weight") if isinstance(module, nn.Module) else None
    return sized and isinstance(weight, Tensor) and len(whole_shape(weight)) == 2
