"""What only several ranks can show: missing and broken gradients, clipping, layouts, FSDP2, checkpoints, traffic."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, clip_grad_norm_
from symdist.exchange.collectives.balance import balance
from symdist.rules import Numerics, inverse_root
from tests import parity, sharded
from tests.ranks import Ranks
from tests.sharded import MIXED, WHOLE, draw


def close(found: list[Tensor], expected: list[Tensor], bound: float = 1e-9) -> bool:
    return all((a.double() - b.double()).norm() <= bound * b.norm() for a, b in zip(found, expected, strict=True))


def with_hole(gradient: Tensor, rank: int, world: int) -> Tensor:
    """The gradient without the rows that `rank` of `world` holds."""
    block = -(-gradient.shape[0] // world)
    gradient = gradient.clone()
    gradient[rank * block : (rank + 1) * block] = 0
    return gradient


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (3, 1), (4, 0), (4, 2)])
def test_a_gradient_missing_on_one_rank_is_zero_there(ranks: Ranks, world: int, rank: int) -> None:
    results = ranks.run(world, sharded.missing_on, rank)
    parameters, optimizer = sharded.mixed(None)
    for step in (1, 2):
        for i, parameter in enumerate(parameters):
            holed = step == 2 and i != WHOLE
            parameter.grad = with_hole(draw(i, step), rank, world) if holed else draw(i, step)
        optimizer.step()
    for weights in results:
        assert close(weights, [parameter.detach() for parameter in parameters])


@cache
def broken(ranks: Ranks, world: int, rank: int, which: int, nonfinite: str) -> list:
    return ranks.run(world, sharded.broken_on, rank, which, nonfinite)


WHERE = [(2, 1, 0), (4, 0, 2), (4, 2, 1)]


@pytest.mark.parametrize(("world", "rank", "which"), WHERE)
def test_nan_on_one_rank_raises_on_all(ranks: Ranks, world: int, rank: int, which: int) -> None:
    for index, (message, skipped, moved, _) in enumerate(broken(ranks, world, rank, which, "raise")):
        assert f"a gradient {f'of p{which}' if index == rank else 'held by another rank'} is not finite" in message
        assert not moved
        assert skipped == 0


@pytest.mark.parametrize(("world", "rank", "which"), WHERE)
def test_nan_on_one_rank_skips_on_all(ranks: Ranks, world: int, rank: int, which: int) -> None:
    for message, skipped, moved, _ in broken(ranks, world, rank, which, "skip"):
        assert (message, skipped, moved) == ("", 1, False)


@pytest.mark.parametrize(("world", "rank", "which"), WHERE)
def test_nan_on_one_rank_can_be_zeroed(ranks: Ranks, world: int, rank: int, which: int) -> None:
    parameters, optimizer = sharded.mixed(None)
    for step in (1, 2):
        for i, parameter in enumerate(parameters):
            parameter.grad = draw(i, step)
            if step == 2 and i == which:
                parameter.grad[rank * -(-MIXED[i][0][0] // world), 0] = 0
        optimizer.step()
    for message, skipped, moved, weights in broken(ranks, world, rank, which, "zero"):
        assert (message, skipped, moved) == ("", 0, True)
        assert close(weights, [parameter.detach() for parameter in parameters])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.1, 1e6, float("inf")])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_clipping_is_that_of_the_whole_model(ranks: Ranks, world: int, max_norm: float, dtype: torch.dtype) -> None:
    whole = [nn.Parameter(draw(i, 0).to(dtype)) for i in range(len(MIXED))]
    for i, parameter in enumerate(whole):
        parameter.grad = draw(i, 1).to(dtype)
    whole[1].grad = None
    whole[2].grad = with_hole(draw(2, 1), 0, world).to(dtype)
    norm = torch.stack([p.grad.double().square().sum() for p in whole if p.grad is not None]).sum().sqrt()
    factor = min(1.0, max_norm / float(norm))
    expected = [p.grad.double() * factor for p in whole if p.grad is not None]
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for found, gradients in ranks.run(world, sharded.clipped, max_norm, dtype):
        assert found.shape == ()
        assert abs(float(found) / float(norm) - 1) < 1e-6
        assert close(gradients, expected, bound)
    assert abs(float(clip_grad_norm_(whole, max_norm)) / float(norm) - 1) < 1e-6
    assert close([p.grad for p in whole if p.grad is not None], expected, bound)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_([], max_norm)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("partial", "redistribute the tensor to Replicate, Shard or strided shards"),
        ("strided by too much", "split_factor 4, but the mesh axes to its right cut the dimension into 2 pieces"),
        ("another piece", "re-shard it with torch.distributed.tensor.distribute_tensor"),
    ],
)
def test_layouts_that_are_not_supported_are_named(ranks: Ranks, kind: str, words: str) -> None:
    for message in ranks.run(4, sharded.refused, kind):
        assert message.startswith("some.weight: ")
        assert "placements" in message
        assert words in message


@pytest.mark.parametrize("axis", [0, 1])
def test_replicated_along_one_mesh_dimension(ranks: Ranks, axis: int) -> None:
    expected = parity.alone(torch.float64)
    for weights in ranks.run(4, sharded.on_grid, axis):
        assert weights.keys() == expected.keys()
        assert close(list(weights.values()), list(expected.values()))


@cache
def trained(ranks: Ranks, world: int) -> list:
    return ranks.run(world, sharded.fsdp)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_fully_shard_is_one_process(ranks: Ranks, world: int) -> None:
    model = sharded.Model()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    sharded.train(model, SymDist(sharded.groups_of(model)), range(3))
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert not close(list(expected.values()), start, 1e-2)
    for weights, *_ in trained(ranks, world):
        assert close([weights[name] for name in expected], list(expected.values()), 1e-7)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_checkpoints_are_whole_and_continue(ranks: Ranks, world: int) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in sharded.Model().named_parameters()}
    state: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        adam = len(shape) == 1
        state |= {f"{name}.{key}": shape for key in (("exp_avg", "exp_avg_sq") if adam else ("momentum",))}
        state |= {f"{name}.step": ()} if adam else {}
    results = trained(ranks, world)
    for _, keys, whole, alike in results:
        assert keys == sorted(state)
        assert {key: tuple(x.shape) for key, x in whole.items()} == state
        assert all(x.any() for x in whole.values())
        assert all(torch.equal(x, results[0][2][key]) for key, x in whole.items())
        assert alike


ROW = {"rule": "row_norm"}
RIGHT = {"rule": "right_spectral", "strategy": "reduce"}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_rules_send(ranks: Ranks, world: int) -> None:
    share, copies, n = 2 * 4 * (world - 1) / world, 12, 6
    for sent, kinds in ranks.run(world, sharded.counted, (17, n), ROW, copies):
        assert (sent, kinds) == (0, [])
    for sent, kinds in ranks.run(world, sharded.counted, (17, n), ROW | {"centered": True}, copies):
        assert sent == pytest.approx(2 * n * copies * share)
        assert kinds == ["all_reduce"] * 2
    for sent, kinds in ranks.run(world, sharded.counted, (29, n), RIGHT, copies):
        # How large it is; a Gram's triangle there; its root's and two norms back.
        assert sent == pytest.approx((n * (n + 1) / 2 + 2) * copies * share)
        assert kinds == ["all_reduce", "reduce_scatter", "all_gather"]
    one = [sent for sent, _ in ranks.run(world, sharded.counted, (29, n), RIGHT, 1)]
    # A single Gram: its owner also hands the root out. No rank sends more than 2·n² numbers.
    assert n * n * share / 2 < max(one) <= 2 * (n * n + 3) * 4


@pytest.mark.parametrize("communication_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("world", "shape"), [(2, (16, 8)), (3, (17, 8)), (4, (17, 5)), (4, (3, 8))])
def test_hidden_matrices_go_to_owners_and_back_once(
    ranks: Ranks, world: int, shape: tuple[int, int], communication_dtype: torch.dtype | None
) -> None:
    owner, copies = {"rule": "muon", "strategy": "owner"}, 10
    results = ranks.run(world, sharded.counted, shape, owner, copies, communication_dtype)
    assert all(kinds == ["all_to_all"] * 2 for _, kinds in results)
    numbers = sum(sent for sent, _ in results) / world / (2 if communication_dtype else 4)
    # Each rank keeps what it owns of what it holds, so a little less than 2·m·n/P.
    assert 0 < numbers <= copies * 2 * shape[0] * shape[1] / world
    per_matrix = numbers / copies / shape[0] / shape[1] * world
    assert per_matrix > 2 * (1 - 2 / world) - 1e-9


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_do_not_grow_with_the_layers(ranks: Ranks, world: int) -> None:
    few, many = (ranks.run(world, sharded.counted_mixed, copies) for copies in (8, 16))
    assert few == many
    assert all(kinds == few[0] for kinds in few)
    assert {"all_reduce", "all_to_all", "reduce_scatter", "all_gather"} == set(few[0])
    assert len(few[0]) <= 12


@pytest.mark.parametrize(
    ("world", "edges", "stacks", "even"),
    [
        (3, [5], [1], False),
        (4, [5], [1], False),
        (4, [1], [1], False),
        (4, [9, 5, 4, 3, 2], [1] * 5, False),
        (3, [7, 2], [2, 3], False),
        (4, [4], [8], True),
        (2, [6, 3], [4, 2], True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roots_of_grams_however_they_spread(
    ranks: Ranks, world: int, edges: list[int], stacks: list[int], even: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [
        [torch.randn(b, d + 9, d, generator=generator).double() for d, b in zip(edges, stacks, strict=True)]
        for _ in range(world)
    ]
    grams = [[(x.mT @ x).to(dtype) for x in of_rank] for of_rank in pieces]
    totals = [sum(of_rank[i].double() for of_rank in grams) for i in range(len(edges))]
    expected = [inverse_root(total, Numerics(steps=12)) for total in totals]  # type: ignore[arg-type]
    for answers, kinds, written in ranks.run(world, sharded.roots, grams):
        assert ("all_to_all" not in kinds) == even
        assert len(kinds) == (2 if even else 4)
        assert not written
        for (matrix, nuclear, frobenius), root in zip(answers, expected, strict=True):
            assert matrix.dtype == dtype
            found = [matrix, nuclear, frobenius]
            assert close(found, [root.matrix, root.nuclear, root.frobenius], 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_balance_is_within_grahams_bound(parts: int) -> None:
    for seed in range(20):
        costs = torch.randint(1, 30, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        owners = balance(costs, parts=parts)

        def fullest(owners: tuple[int, ...] | list[int], costs: list[int] = costs) -> int:
            return max(sum(c for c, o in zip(costs, owners, strict=True) if o == part) for part in range(parts))

        best = min(fullest(choice) for choice in itertools.product(range(parts), repeat=6))
        assert fullest(owners) <= (4 / 3 - 1 / (3 * parts)) * best
        assert owners == balance(list(costs), parts=parts)


def test_balance_breaks_ties_by_index() -> None:
    assert balance([1.0] * 7, parts=3) == [0, 1, 2, 0, 1, 2, 0]
    assert balance([1.0, 5.0, 2.0, 2.0], parts=2) == [1, 0, 1, 1]
    assert balance([], parts=4) == []


@pytest.mark.parametrize(("world", "missing"), [(2, None), (3, None), (3, 1), (4, 0)])
def test_gradients_in_parts_are_summed_up(ranks: Ranks, world: int, missing: int | None) -> None:
    present = [rank + 1.0 for rank in range(world) if rank != missing]
    total = sum(present)
    # The second is a mean, and its rank is there when clipping measures.
    mean = (world + 1) / 2
    for (matrix, vector, whole), norm, kinds in ranks.run(world, sharded.gradients_in_parts, missing):
        assert torch.equal(matrix, torch.full((3, 4), total).double())
        assert close([vector], [torch.full((5,), total / world, dtype=torch.float64)], 1e-12)
        assert torch.equal(whole, torch.ones(2, 3).double())
        assert float(norm) == pytest.approx((12 * total**2 + 5 * mean**2 + 6) ** 0.5)
        # Whether any is in parts, which, their sum, and whether that is finite.
        assert kinds == ["all_reduce"] * 4
