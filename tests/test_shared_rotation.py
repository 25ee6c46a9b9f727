"""Matrices that share a rotation do what one process does, on every layout; alone in a stage, what each does alone."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, build_optimizer
from symdist.layouts import Group
from symdist.rules import Matrix, get_rule, run_locally
from symdist.tools.models import build
from tests import flat_ranks
from tests import shared_rotation_ranks as shared
from tests.grids import WAYS
from tests.ranks import Ranks

SHARDED = [
    "shard0 on 2",
    "shard0 on 4",
    "shard0 on 8",
    "shard1 on 3",
    "replicated on 3",
    "hsdp on 2 x 3",
    "fsdp over column-wise tp on 2 x 2",
]


@cache
def oracle(base: str) -> list[Tensor]:
    return shared.train(torch.clone, {}, base=base)[0]


def far(found: list[Tensor], base: str) -> float:
    """The largest distance to the oracle, relative to how far that moved."""
    starts = [shared.draw(i, 0) for i in range(len(shared.MATRICES))]
    moved = zip(found, oracle(base), starts, strict=True)
    return max(float((a - b).norm() / (b - start).norm()) for a, b, start in moved)


@pytest.mark.parametrize("strategy", ["auto", "owner"])
@pytest.mark.parametrize("base", shared.BASES)
@pytest.mark.parametrize("way", SHARDED)
def test_sharded_is_alone(many: Ranks, way: str, base: str, strategy: str) -> None:
    results = many.run(WAYS[way].mesh, shared.sharded, way, {"base": base, "strategy": strategy}, {})
    shapes = [shape for _, _, shape, _ in shared.MATRICES]
    whole = [WAYS[way].whole([pieces[i] for pieces, _, _ in results], shape) for i, shape in enumerate(shapes)]
    assert far(whole, base) < 1e-9
    # Weights that are whole as DTensors are first asked for gradients in parts, which no plan foretells.
    assert way == "replicated on 3" or all(foretold for _, _, foretold in results)


def test_sums_are_taken_in_place(many: Ranks) -> None:
    """Where tensor parallelism cuts the side that is not the stream's, nothing but sums need move."""
    way = "shard0 on 2"
    _, strategies, _ = many.run(WAYS[way].mesh, shared.sharded, way, {"base": "row_norm", "strategy": "auto"}, {})[0]
    assert {strategies["embed"], strategies["head"]} == {"reduce"}


@pytest.mark.parametrize("base", ["sinkhorn", "adam"])
def test_small_waves_change_nothing(many: Ranks, base: str) -> None:
    way = "hsdp on 2 x 3"
    results = many.run(WAYS[way].mesh, shared.sharded, way, {"base": base}, {"exchange": {"bucket_bytes": 2000}})
    shapes = [shape for _, _, shape, _ in shared.MATRICES]
    whole = [WAYS[way].whole([pieces[i] for pieces, _, _ in results], shape) for i, shape in enumerate(shapes)]
    assert far(whole, base) < 1e-9
    assert all(foretold for _, _, foretold in results)


@pytest.mark.parametrize("strategy", ["auto", "owner"])
def test_replicas_share_the_work(many: Ranks, strategy: str) -> None:
    for weights, strategies in many.run(3, shared.replicated, {"base": "sinkhorn", "strategy": strategy}):
        assert far(weights, "sinkhorn") < 1e-9
        assert strategy == "auto" or set(strategies.values()) == {"owner"}


@pytest.mark.parametrize("base", ["sinkhorn", "row_norm"])
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("small", [False, True])
def test_flat_is_alone(many: Ranks, world: int, base: str, small: bool) -> None:
    results = many.run(world, shared.flat, {"base": base}, {"exchange": {"bucket_bytes": 2000}} if small else {})
    layouts = shared.flat_layouts(Group(ranks=tuple(range(world)), index=0))
    units = []
    for j, layout in enumerate(layouts):
        given = {"shape": layout.shape, "bounds": layout.bounds}
        units.append(flat_ranks.put_together([pieces[j] for pieces in results], given))
    names = shared.flat_units()[0]
    whole = []
    for i, (_, _, shape, _) in enumerate(shared.MATRICES):
        of_matrix = [unit for unit, (index, _) in zip(units, names, strict=True) if index == i]
        whole.append(torch.stack(of_matrix) if len(shape) == 3 else of_matrix[0])
    assert far(whole, base) < 1e-9


SIGNS = ("sign", "adam")
"""A square matrix of signs may be singular, and what then completes its Q is left to rounding: these get wide ones."""


@pytest.mark.parametrize(
    ("shape", "base"),
    [
        (shape, base)
        for shape in ((6, 17), (11, 5), (7, 7))
        for base in shared.BASES
        if shape == (6, 17) or base not in SIGNS
    ],
)
def test_alone_in_a_stage_a_matrix_has_its_own_rotation(shape: tuple[int, int], base: str) -> None:
    weights = []
    for share in ("matrix", "residual_stage"):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        group = {"rule": "aro", "base": base, "share": share, "role": "attention_o", "lr": 1.0}
        optimizer = SymDist([{"params": [("layers.0.o", weight)], **group}])
        for _ in range(4):
            weight.grad = torch.randn(shape, generator=generator, dtype=torch.float32).double()
            optimizer.step()
        weights.append(weight.detach())
    assert weights[1].norm() > 0.1
    assert (weights[0] - weights[1]).norm() < 1e-9 * weights[1].norm()


def test_stages_are_those_of_the_residual_stream() -> None:
    """A layer reads from one and writes to the next; the embedding writes to the first, the head reads the last."""
    model = build("qwen3-tiny", vocabulary=64, device="meta").to_empty(device="cpu")
    recipe = {
        "default": {"rule": "aro", "view": "residual", "share": "residual_stage", "lr": 0.1},
        "other": {"rule": "adamw", "lr": 0.1},
    }
    optimizer = build_optimizer(model, recipe)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    layers = model.config.num_hidden_layers
    stages: dict[str, set[str]] = {}
    for wave in optimizer.plan().waves:
        for job in wave:
            for member, stage in zip(job.everyone, job.stages, strict=True):
                stages.setdefault(stage.label, set()).add(names[member])
    expected: list[set[str]] = [{"model.embed_tokens.weight"}, *(set() for _ in range(layers))]
    for i in range(layers):
        block = f"model.layers.{i}."
        expected[i] |= {f"{block}self_attn.{x}_proj.weight" for x in "qkv"}
        expected[i] |= {f"{block}mlp.{x}_proj.weight" for x in ("gate", "up")}
        expected[i + 1] |= {f"{block}self_attn.o_proj.weight", f"{block}mlp.down_proj.weight"}
    expected[layers] |= {"lm_head.weight"}
    assert [stages[label] for label in sorted(stages)] == expected


def test_a_rotation_of_the_stream_turns_all_that_touch_it() -> None:
    """Each update turns with a common rotation of the stream, the remembered rotation turned along."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    updates: list[list[Tensor]] = []
    for rotate in (torch.eye(6, dtype=torch.float64), turn):
        writes, reads = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((6, 9), (8, 6)))
        shared_options: dict[str, Any] = {"rule": "aro", "share": "residual_stage", "lr": 1.0, "momentum": 0.5}
        optimizer = SymDist(
            [
                {"params": [("layers.0.o", writes)], "role": "attention_o", **shared_options},
                {"params": [("layers.1.q", reads)], "role": "attention_q", "view": "transposed", **shared_options},
            ]
        )
        # The rotation is kept by the first: here it has turned along.
        optimizer.state[writes]["rotation"][:, :6] = rotate
        source = torch.Generator().manual_seed(4)
        for _ in range(3):
            writes.grad = rotate @ torch.randn(6, 9, generator=source).double()
            reads.grad = torch.randn(8, 6, generator=source).double() @ rotate.mT
            optimizer.step()
        updates.append([rotate.mT @ writes.detach(), reads.detach() @ rotate])
    for plain, turned in zip(*updates, strict=True):
        assert plain.norm() > 0.1
        assert (plain - turned).norm() < 1e-9 * plain.norm()


def test_what_cannot_share_is_told() -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    group = {"rule": "aro", "share": "residual_stage", "lr": 0.1}
    with pytest.raises(ValueError, match=r"layers\.0\.gizmo \(role 'other'\): its name and role do not show"):
        SymDist([{"params": [("layers.0.gizmo", weight)], "role": "other", **group}])
    with pytest.raises(ValueError, match="do not show its stage"):
        SymDist([{"params": [("o", weight)], "role": "attention_o", **group}])
    towers = [("encoder.layers.0.o", weight), ("decoder.layers.0.o", nn.Parameter(torch.zeros(6, 4)))]
    with pytest.raises(ValueError, match=r"one stack of numbered layers, .* show decoder\.layers, encoder\.layers"):
        SymDist([{"params": towers, "role": "attention_o", **group}])
    wider = [("layers.0.o", weight), ("layers.0.down", nn.Parameter(torch.zeros(7, 4)))]
    with pytest.raises(ValueError, match=r"stage 1 .* several widths: 6 in layers\.0\.o, 7 in layers\.0\.down"):
        SymDist([{"params": wider, "role": "attention_o", **group}])
    experts = [("layers.0.experts.up", nn.Parameter(torch.zeros(3, 4, 6)))]
    with pytest.raises(ValueError, match="stage 0 of the residual stream has only experts"):
        SymDist([{"params": experts, "role": "expert_up", "view": "transposed", **group}])


def test_stages_of_a_pipeline_cannot_share(many: Ranks) -> None:
    for said in many.run((2, 2), shared.on_a_stage):
        assert "share = 'residual_stage': ranks (0, 1, 2, 3) train this model" in said
        assert "use share = 'matrix'" in said


def test_a_rule_may_be_run_by_itself() -> None:
    """Without stages every matrix is its own."""
    values = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    matrix = Matrix(values=values, rows=5, columns=8, state={"rotation": torch.zeros_like(values)})
    update = get_rule("aro").update
    shared_update, _ = run_locally(update(matrix, share="residual_stage"))
    own_update, _ = run_locally(update(matrix, share="matrix"))
    assert torch.allclose(shared_update, own_update, rtol=0, atol=1e-9)
