"""How a Megatron job would hold a model: tensor, pipeline, expert and data parallelism, and the distributed optimizer.

Rank numbers, the order of parameters and the division of buffers are those of megatron-core (`parallel_state`,
`GPTModel`, `param_and_grad_buffer`). The tests hold them to a real job.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import nn

from symdist.layouts import FlatLayout, Group, Layout
from symdist.layouts.flat import flat_bounds
from symdist.layouts.rank_grid import RankGrid
from symdist.param_groups import with_defaults
from symdist.param_specs import coordinate_wise
from symdist.routing.fused_weights import MatrixSpec, Sections, matrices_of
from symdist.routing.param_site import ParamSite
from symdist.routing.recipes import Recipe
from symdist.routing.route import route_sites
from symdist.routing.sites import find_sites
from symdist.tools.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = ("tp", "pp", "ep", "etp", "dp")
_VOCABULARIES = ("embedding", "tied_embedding", "head")
# In a buffer, parameters start, and buckets end, at multiples of so many elements.
_START = 64
_END = 128


@dataclass(frozen=True, kw_only=True)
class MegatronMesh:
    """The ranks of a Megatron job.

    Attributes:
        tp: Tensor parallelism of dense weights.
        pp: Pipeline stages.
        ep: Expert parallelism.
        etp: Tensor parallelism of experts; None (default) for `tp`, as in Megatron.
        dp: Data parallelism of dense weights, context parallelism included.
        distributed: Whether the distributed optimizer divides state among data-parallel ranks; True by default.
        bucket: The number of elements at which a bucket of the first stage ends; None for a single bucket, as without
            `--overlap-grad-reduce`. 0 (default) is Megatron's own choice with it.
        vocabulary_multiple: The vocabulary is padded to a multiple of this times `tp`
            (`--make-vocab-size-divisible-by`); 128 by default.

    Raises:
        ValueError: If a size is not positive, or experts and dense weights do not share the ranks evenly.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1
    distributed: bool = True
    bucket: int | None = 0
    vocabulary_multiple: int = 128

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "ep", "expert_tp", "dp"):
            if getattr(self, name) < 1:
                raise ValueError(f"megatron: {name}={getattr(self, name)} must be positive")
        if self.tp * self.dp % (self.expert_tp * self.ep):
            raise ValueError(
                f"megatron: a pipeline stage has tp × dp = {self.tp * self.dp} ranks, which etp × ep = "
                f"{self.expert_tp} × {self.ep} does not divide; choose another ep or etp"
            )
        if self.ep == 1 and self.expert_tp != self.tp:
            raise ValueError(f"megatron: etp={self.expert_tp} without ep must be tp={self.tp}")
        strides = self._strides
        if any(high % low for low, high in pairwise(strides)):
            raise ValueError(
                f"megatron: the groups of tp={self.tp}, etp={self.expert_tp} and ep={self.ep} overlap unevenly; "
                "choose sizes of which one divides the next"
            )

    @classmethod
    def parse(cls, text: str, *, distributed: bool = True) -> MegatronMesh:
        """Read the sizes of a job.

        Args:
            text: Sizes of `tp`, `pp`, `ep`, `etp` and `dp`, each at most once, such as `"tp=8,pp=4,ep=8,dp=64"`.
            distributed: See the class.

        Returns:
            The job.

        Raises:
            ValueError: If the text has another form or names something else, or the sizes do not go together.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in _NAMES or not re.fullmatch("[0-9]{1,9}", size) or name in sizes:
                raise ValueError(
                    f"megatron {text!r}: {part.strip()!r} should be NAME=SIZE, with each name once; the names are "
                    f"{', '.join(_NAMES)}"
                )
            sizes[name] = int(size)
        return cls(**sizes, distributed=distributed)

    @property
    def expert_tp(self) -> int:
        """The tensor parallelism of experts."""
        return self.tp if self.etp is None else self.etp

    @property
    def _strides(self) -> list[int]:
        return sorted({1, self.tp, self.expert_tp, self.expert_tp * self.ep, self.tp * self.dp})

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of a mesh along whose dimensions all groups of a stage lie, the last one fastest."""
        strides = self._strides
        inner = [high // low for low, high in pairwise(strides)]
        return {"pp": self.pp} | {f"ranks {i}": size for i, size in enumerate(reversed(inner))}

    @property
    def title(self) -> dict[str, int]:
        """The sizes by the names that Megatron's users know."""
        optional = {"ep": self.ep, "etp": self.expert_tp} if self.ep > 1 else {}
        return {"tp": self.tp, "pp": self.pp, **optional, "dp": self.dp}

    def grid(self, rank: int, *, expert: bool) -> RankGrid:
        """Return the ranks that share a weight with a rank.

        Args:
            rank: The rank.
            expert: Whether the weight belongs to an expert under expert parallelism.

        Returns:
            Its data-parallel and tensor-parallel ranks.
        """
        stage = self.tp * self.dp
        first, place = rank - rank % stage, rank % stage
        tp, ep = (self.expert_tp, self.ep) if expert else (self.tp, 1)
        t, e, d = place % tp, place // tp % ep, place // (tp * ep)
        columns = tuple(
            tuple(first + column + tp * (e + ep * i) for i in range(stage // (tp * ep))) for column in range(tp)
        )
        return RankGrid(
            data=Group(ranks=columns[t], index=d),
            across=Group(ranks=tuple(column[d] for column in columns), index=t),
            columns=columns,
        )


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """A parameter of Megatron's.

    `stage` and `expert_rank` say which pipeline stage and, if it is an expert's, which expert-parallel rank has it;
    `alone`, that it is the only one in its bucket.
    """

    matrices: tuple[MatrixSpec, ...]
    stage: int = 0
    expert_rank: int | None = None
    alone: bool = False

    @property
    def numel(self) -> int:
        """The number of elements on a rank."""
        return self.matrices[0].size


def megatron_weights(model: nn.Module, recipe: Recipe, mesh: MegatronMesh) -> tuple[list[dict[str, Any]], list[Weight]]:
    """Return the param groups and weights of a model in a Megatron job.

    Args:
        model: The model, of `symdist.tools.models.build`, on the meta device.
        recipe: The recipe. Its patterns match the names that parameters have in Megatron.
        mesh: The job.

    Returns:
        The groups, completed; and the weights in the order in which Megatron's optimizers have them.

    Raises:
        ValueError: If a size of the job does not divide the model's, or `route` would refuse the recipe.
    """
    buffers: dict[tuple[int, int | None], list[_Parameter]] = {}
    for parameter in _parameters(model, recipe, mesh):
        buffers.setdefault((parameter.stage, parameter.expert_rank), []).append(parameter)
    # Megatron has one optimizer for dense parameters and one for experts.
    held = [
        (parameter, matrix, bounds)
        for key in sorted(buffers, key=lambda key: (key[1] is not None, key))
        for parameter, bounds in zip(buffers[key], _bounds(buffers[key], mesh), strict=True)
        for matrix in parameter.matrices
    ]
    rows = cast("nn.Embedding", cast("PreTrainedModel", model).get_input_embeddings()).weight.shape[0]
    groups: list[dict[str, Any]] = []
    group_of: dict[str, int] = {}
    for routed in route_sites({matrix.name: (matrix, matrix.site) for _, matrix, _ in held}, recipe):
        for padding in dict.fromkeys(matrix.shape[0] - rows if matrix.vocabulary else 0 for matrix in routed["params"]):
            if padding and routed["role"] in _VOCABULARIES:
                routed = {**routed, "padding_rows": padding}
            group_of.update(dict.fromkeys(routed["param_names"], len(groups)))
            groups.append(with_defaults(routed))
    weights = []
    for stage in range(mesh.pp):
        of_stage = [
            Weight(
                name=matrix.name,
                group=group_of[matrix.name],
                layout=functools.partial(_layout, mesh, parameter, matrix, bounds, groups[group_of[matrix.name]]),
                copies=functools.partial(_copies, mesh) if parameter.alone else None,
            )
            for parameter, matrix, bounds in held
            if parameter.stage == stage
        ]
        # One group after another, as they first occur on the stage.
        order = list(dict.fromkeys(weight.group for weight in of_stage))
        weights += sorted(of_stage, key=lambda weight: order.index(weight.group))
    return groups, weights


def _layout(
    mesh: MegatronMesh,
    parameter: _Parameter,
    matrix: MatrixSpec,
    bounds: tuple[int, ...] | None,
    group: Mapping[str, Any],
    rank: int,
) -> Layout | FlatLayout | None:
    """Return the layout of a matrix as a rank sees it; None if another stage or expert-parallel rank has it."""
    stage, place = divmod(rank, mesh.tp * mesh.dp)
    expert = parameter.expert_rank is not None
    if stage != parameter.stage or (expert and place // mesh.expert_tp % mesh.ep != parameter.expert_rank):
        return None
    grid = _grid(mesh, rank, expert)
    if coordinate_wise(group):
        low, high = (0, parameter.numel) if bounds is None else bounds[grid.data.index :][:2]
        return Layout(shape=(matrix.elements(grid, low, high)[1],))
    return matrix.layout(grid, bounds)


def _copies(mesh: MegatronMesh, rank: int) -> Group:
    """Return the ranks of the first and the last stage that hold the same piece of a tied embedding."""
    stage = mesh.tp * mesh.dp
    first = rank % stage
    return Group(ranks=(first, first + (mesh.pp - 1) * stage), index=int(rank >= stage))


@functools.lru_cache(maxsize=16)
def _grid(mesh: MegatronMesh, rank: int, expert: bool) -> RankGrid:
    return mesh.grid(rank, expert=expert)


def _bounds(parameters: Sequence[_Parameter], mesh: MegatronMesh) -> list[tuple[int, ...] | None]:
    """Return where the ranges of data-parallel ranks meet in each parameter of a buffer; None if they do not divide it.

    Parameters lie in reverse order, and each bucket is divided equally (megatron-core, `_ParamAndGradBuffer`).
    """
    ranks = _grid(mesh, 0, parameters[0].expert_rank is not None).data.size
    if not mesh.distributed or ranks == 1:
        return [None] * len(parameters)
    largest = max(40_000_000, 1_000_000 * ranks) if mesh.bucket == 0 else mesh.bucket
    if parameters[0].stage > 0:
        largest = None
    buckets: list[list[tuple[int, _Parameter]]] = [[]]
    end = 0
    for parameter in reversed(parameters):
        if parameter.alone:
            buckets.append([])
            end = 0
        start = _padded(end, _START)
        buckets[-1].append((start, parameter))
        end = start + parameter.numel
        if parameter.alone or (largest is not None and end >= largest):
            buckets.append([])
            end = 0
    bounds: dict[int, tuple[int, ...]] = {}
    for bucket in filter(None, buckets):
        start, last = bucket[-1]
        part = _padded(start + last.numel, math.lcm(ranks, _END)) // ranks
        for start, parameter in bucket:
            bounds[id(parameter)] = flat_bounds(start, parameter.numel, part=part, ranks=ranks)
    return [bounds[id(parameter)] for parameter in parameters]


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _parameters(model: nn.Module, recipe: Recipe, mesh: MegatronMesh) -> Iterator[_Parameter]:
    """Yield the parameters that `GPTModel` would have, in its order; stages have about equally many layers."""
    config: Any = model.config
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    others: dict[str, tuple[int, ...]] = {}
    sites: dict[str, ParamSite] = {}
    for name, (parameter, site) in find_sites(model).items():
        if found := re.search(r"\.layers\.(\d+)\.(.+)", name):
            sites[found[2]] = site
            layers.setdefault(int(found[1]), {})[found[2]] = tuple(parameter.shape)
        else:
            others[name] = tuple(parameter.shape)
    if unknown := [name for name in others if not re.search(r"(embed_tokens|lm_head|\.norm)\.weight$", name)]:
        raise ValueError(_unknown(unknown))
    if len(layers) < mesh.pp:
        raise ValueError(f"megatron: pp={mesh.pp} stages are more than the {len(layers)} layers")
    describe = functools.partial(_described, recipe, mesh)
    last = mesh.pp - 1
    (embedding,) = (shape for name, shape in others.items() if "embed_tokens" in name)
    vocabulary = (_padded(embedding[0], mesh.vocabulary_multiple * mesh.tp) // mesh.tp, embedding[1])
    shared = config.tie_word_embeddings and mesh.pp > 1
    site = ParamSite(role="tied_embedding" if config.tie_word_embeddings else "embedding")
    word = "embedding.word_embeddings.weight"
    yield describe(word, vocabulary, site, cut=0, vocabulary=True, alone=shared)
    for i, shapes in sorted(layers.items()):
        stage = i * mesh.pp // len(layers)
        for name, shape, more in _of_layer(shapes, sites, config, mesh):
            yield describe(f"decoder.layers.{i}.{name}", shape, stage=stage, **more)
    yield describe("decoder.final_layernorm.weight", embedding[1:], ParamSite(role="norm"), stage=last)
    if shared:
        # The last stage has a copy of its own.
        yield describe(word, vocabulary, site, cut=0, vocabulary=True, alone=True, stage=last)
    elif not config.tie_word_embeddings:
        site = ParamSite(role="head")
        yield describe("output_layer.weight", vocabulary, site, cut=0, vocabulary=True, stage=last)


def _described(
    recipe: Recipe,
    mesh: MegatronMesh,
    name: str,
    shape: tuple[int, ...],
    site: ParamSite,
    *,
    cut: int | None = None,
    sections: Sections | None = None,
    vocabulary: bool = False,
    expert: int | None = None,
    experts: int = 1,
    **more: Any,
) -> _Parameter:
    ranks = mesh.tp if expert is None else mesh.expert_tp
    matrices = matrices_of(
        [name],
        shape,
        site,
        sections=sections or Sections(),
        cut=cut if ranks > 1 else None,
        ranks=ranks,
        recipe=recipe,
        vocabulary=vocabulary,
    )
    expert_rank = None if expert is None or mesh.ep == 1 else expert * mesh.ep // experts
    return _Parameter(matrices=tuple(matrices), expert_rank=expert_rank, **more)


_Described: TypeAlias = tuple[str, tuple[int, ...], dict[str, Any]]


def _unknown(names: Sequence[str]) -> str:
    return (
        f"megatron: it is not known how a Megatron job holds {', '.join(names[:3])}; plan this model with --mesh or "
        "--zero, or call optimizer.trace_collectives() in the job"
    )


# The matrices of a layer that `_attention`, `_feed_forward` and `_of_layer` tell of.
_MATRICES = (
    r"self_attn\.(q|k|v|o|q_a|q_b|kv_b)_proj\.weight|self_attn\.kv_a_proj_with_mqa\.weight|mlp\.(gate|router)\.weight|"
    r"mlp\.(shared_experts\.)?(gate|up|down)_proj\.weight|mlp\.experts\.(gate_up|down)_proj(_bias)?"
)
_LAST = "post_feedforward_layernorm"
_VECTORS = ("input_layernorm", "self_attn.", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.")


def _of_layer(
    shapes: Mapping[str, tuple[int, ...]], sites: Mapping[str, ParamSite], config: Any, mesh: MegatronMesh
) -> Iterator[_Described]:
    """Yield the name, the shape on a rank and what `_described` is told of each parameter of a layer."""
    hidden = config.hidden_size
    vectors = [(name, shape) for name, shape in shapes.items() if len(shape) == 1]
    if unknown := [
        name
        for name, shape in shapes.items()
        if not (re.fullmatch(_MATRICES, name) if len(shape) > 1 else name.startswith((*_VECTORS, _LAST)))
    ]:
        raise ValueError(_unknown(unknown))

    def norms(*words: str) -> Iterator[_Described]:
        for name, shape in vectors:
            if name.startswith(words):
                yield name, shape, {"site": sites[name]}

    yield from norms("input_layernorm")
    yield from _attention({name.removeprefix("self_attn."): shape for name, shape in shapes.items()}, config, mesh)
    yield from norms("self_attn.")
    yield from norms("post_attention_layernorm", "pre_feedforward_layernorm")
    yield from _feed_forward(shapes, "mlp", hidden, mesh)
    router = next((shape for name, shape in shapes.items() if re.fullmatch(r"mlp\.(gate|router)\.weight", name)), None)
    if router is not None:
        count = router[0]
        if count % mesh.ep:
            raise ValueError(f"megatron: ep={mesh.ep} does not divide the {count} experts")
        yield "mlp.router.weight", router, {"site": ParamSite(role="router")}
        inner = math.prod(shapes["mlp.experts.down_proj"]) // count // hidden
        for expert in range(count):
            for name, shape, more in _mlp(
                "expert", f"mlp.experts.local_experts.{expert}", inner, hidden, mesh.expert_tp
            ):
                yield name, shape, {**more, "expert": expert, "experts": count}
            for name in ("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"):
                if name in shapes:
                    holder = f"{name}[{expert}]"
                    yield holder, shapes[name][1:], {"site": sites[name], "expert": expert, "experts": count}
    yield from norms("mlp.")
    yield from _feed_forward(shapes, "mlp.shared_experts", hidden, mesh)
    yield from norms(_LAST)


def _attention(shapes: Mapping[str, tuple[int, ...]], config: Any, mesh: MegatronMesh) -> Iterator[_Described]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rows, inner = shapes["o_proj.weight"]
    output = ParamSite(role="attention_o", heads=heads, head_dim_index=1)
    yield "self_attention.linear_proj.weight", (rows, _share(inner, mesh.tp, "heads")), {"site": output, "cut": 1}
    if "kv_b_proj.weight" in shapes:
        # Multi-head latent attention: the projections down are whole on every rank.
        names = {"q_proj": "linear_q_proj", "q_a_proj": "linear_q_down_proj", "q_b_proj": "linear_q_up_proj"}
        names |= {"kv_a_proj_with_mqa": "linear_kv_down_proj", "kv_b_proj": "linear_kv_up_proj"}
        for name, megatron_name in names.items():
            if f"{name}.weight" in shapes:
                rows, columns = shapes[f"{name}.weight"]
                site = ParamSite(role="matrix", latent=True)
                if name in ("q_proj", "q_b_proj"):
                    site = ParamSite(role="attention_q", heads=heads)
                cut = None if "down" in megatron_name else 0
                rows = rows if cut is None else _share(rows, mesh.tp, "heads")
                yield f"self_attention.{megatron_name}.weight", (rows, columns), {"site": site, "cut": cut}
        return
    queries, size = heads // groups, shapes["k_proj.weight"][0] // groups
    if shapes["q_proj.weight"][0] != heads * size:
        # Such as queries with gates.
        raise ValueError(_unknown(["self_attn.q_proj.weight"]))
    counts = {"q": queries, "k": 1, "v": 1}
    sections = {
        name: (count * size, ParamSite(role=f"attention_{name}", heads=groups * count))
        for name, count in counts.items()
    }
    rows, columns = groups * (queries + 2) * size, shapes["k_proj.weight"][1]
    site = ParamSite(role="attention_qkv", heads=groups * (queries + 2), groups=groups)
    shape = (_share(groups, mesh.tp, "key and value heads") * rows // groups, columns)
    yield (
        "self_attention.linear_qkv.weight",
        shape,
        {
            "site": site,
            "cut": 0,
            "sections": Sections(by_name=sections, repeats=groups),
        },
    )


def _feed_forward(
    shapes: Mapping[str, tuple[int, ...]], name: str, hidden: int, mesh: MegatronMesh
) -> Iterator[_Described]:
    down = shapes.get(f"{name}.down_proj.weight")
    if down is not None:
        yield from _mlp("mlp", name, down[1], hidden, mesh.tp)


def _mlp(kind: str, name: str, inner: int, hidden: int, ranks: int) -> Iterator[_Described]:
    share = _share(inner, ranks, f"neurons of {kind}")
    sections = {half: (share, ParamSite(role=f"{kind}_{half}")) for half in ("gate", "up")}
    up = ParamSite(role=f"{kind}_gate_up", fused="stacked")
    more = {"site": up, "cut": 0, "sections": Sections(by_name=sections, repeats=ranks)}
    yield f"{name}.linear_fc1.weight", (2 * share, hidden), more
    yield f"{name}.linear_fc2.weight", (hidden, share), {"site": ParamSite(role=f"{kind}_down"), "cut": 1}


def _share(size: int, ranks: int, what: str) -> int:
    if size % ranks:
        raise ValueError(f"megatron: {ranks} tensor-parallel ranks do not divide the {size} {what}; choose another tp")
    return size // ranks
