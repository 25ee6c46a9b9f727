"""Sections: a weight whose rows are matrices of several sizes is stepped as if each were a parameter of its own."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from symdist import SymDist
from symdist.diagnostics.steps import StepMonitor
from symdist.exchange import CountingTransport
from symdist.layouts import FlatLayout, Group
from symdist.layouts.layout import Interleaving, Layout, cut_along
from symdist.matrix_views import bind_view, sections_of
from symdist.toml_file import read_toml
from tests.cases import CASES

ROWS, HEADS = (12, 9, 5, 3), (3, 0, 1, 0)
SHAPE = (29, 6)
Options = dict[str, Any]

# Of every case of a matrix its options, on these sections instead.
OPTIONS = {
    case: {key: value for key, value in group.items() if key != "view"}
    for case, (shape, group) in CASES.items()
    if len(shape) == 2 and not group.get("padding_rows")
}
VIEWS: dict[str, tuple[Options, list[Any]]] = {
    "whole": ({"sections": ROWS}, ["as_stored"] * 4),
    "transposed": ({"sections": list(ROWS), "transposed": True}, ["transposed"] * 4),
    "heads": ({"sections": ROWS, "heads": HEADS}, [{"heads": 3, "dim": 0}, *["as_stored"] * 3]),
}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(view: Any, group: Options, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, SymDist]:
    weight = nn.Parameter(draw(0, dtype=dtype))
    return weight, SymDist([{"params": [("w", weight)], "lr": 0.1, "view": view, **group}], **options)


def apart(views: list[Any], group: Options, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], SymDist]:
    """The sections as parameters."""
    weights = [nn.Parameter(part.clone()) for part in draw(0, dtype=dtype).split(ROWS)]
    groups = [
        {"params": [(f"w[{i}]", weight)], "lr": 0.1, "view": view, **group}
        for i, (weight, view) in enumerate(zip(weights, views, strict=True))
    ]
    return list(weights), SymDist(groups)


def step(optimizer: SymDist, weights: list[Tensor], seed: int) -> None:
    gradient = draw(seed, dtype=weights[0].dtype)
    gradient[1::4] = 0
    for weight, part in zip(weights, gradient.split([len(weight) for weight in weights]), strict=True):
        weight.grad = part.clone()
    optimizer.step()


def joined(optimizer: SymDist, weights: list[Tensor]) -> dict[str, Tensor]:
    """Weight and state, of all sections together."""
    states = [optimizer.state[weight] for weight in weights]
    rows = {key: torch.cat([state[key] for state in states]) for key in states[0] if states[0][key].dim()}
    counts = {key: state[key] for state in states for key in state if not state[key].dim()}
    return {"weight": torch.cat([weight.detach() for weight in weights]), **rows, **counts}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", OPTIONS)
def test_each_section_is_stepped_as_a_parameter(case: str, view: str) -> None:
    given, views = VIEWS[view]
    weight, together = built(given, OPTIONS[case])
    weights, separate = apart(views, OPTIONS[case])
    for seed in (1, 2, 3):
        step(together, [weight], seed)
        step(separate, weights, seed)
    found, expected = joined(together, [weight]), joined(separate, weights)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-12), key
    assert not torch.allclose(found["weight"], draw(0))


@pytest.mark.parametrize("rule", ["muon", "aro", "row_norm"])
def test_sections_are_no_matrix_together(rule: str) -> None:
    """Otherwise the test above would show nothing."""
    moved = []
    for view in ("transposed", {"sections": ROWS, "transposed": True}):
        weight, optimizer = built(view, {"rule": rule})
        step(optimizer, [weight], 1)
        moved.append(weight.detach() - draw(0))
    assert float((moved[0] - moved[1]).norm()) > 0.1 * float(moved[0].norm())


@pytest.mark.filterwarnings("ignore:.*bfloat16")
@pytest.mark.parametrize(
    "narrow", [{"state_dtype": "bfloat16"}, {"weight_rounding": "stochastic", "rounding_seed": 7}, {}]
)
def test_rounding_by_chance_draws_for_each_section(narrow: Options) -> None:
    """The key of a section is that of a parameter of its name."""
    group = {"rule": "muon", **narrow}
    weight, together = built({"sections": ROWS}, group, torch.bfloat16)
    weights, separate = apart(["as_stored"] * 4, group, torch.bfloat16)
    for seed in (1, 2):
        step(together, [weight], seed)
        step(separate, weights, seed)
    found, expected = joined(together, [weight]), joined(separate, weights)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_step_that_is_left_out_changes_no_section() -> None:
    weight, optimizer = built(
        {"sections": ROWS}, {"rule": "adamw", "centered": True}, capturable=True, nonfinite="skip"
    )
    step(optimizer, [weight], 1)
    before = copy.deepcopy(joined(optimizer, [weight]))
    weight.grad = torch.full(SHAPE, float("nan")).double()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in joined(optimizer, [weight]).items())
    assert optimizer.skipped_steps == 1
    step(optimizer, [weight], 2)
    assert float(joined(optimizer, [weight])["step"]) == 2


def test_a_monitor_measures_the_whole_weight() -> None:
    group = {"rule": "muon", "role": "mixer_in"}
    weight, together = built({"sections": ROWS}, group)
    weights, separate = apart(["as_stored"] * 4, group)
    found = []
    for optimizer, of_optimizer in ((together, [weight]), (separate, weights)):
        monitor = StepMonitor(optimizer)
        monitor.arm()
        step(optimizer, of_optimizer, 1)
        found.append({key: value for key, value in monitor.summary().items() if not key.startswith("optimizer_ms")})
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert {"update_rms/mixer_in", "weight_rms/mixer_in", "nu/mixer_in"} == set(found[0])


def test_a_frozen_weight_does_not_move() -> None:
    weight, optimizer = built({"sections": ROWS}, {"rule": "muon", "weight_decay": 0.5})
    weight.requires_grad_(False)
    optimizer.step()
    assert torch.equal(weight, draw(0))
    assert optimizer.plan().jobs == []


def test_each_section_is_reported() -> None:
    _, optimizer = built(*({"sections": ROWS, "heads": HEADS}, {"rule": "muon", "role": "attention"}))
    entries = optimizer.assignments()
    assert [(entry.name, entry.shape, entry.view) for entry in entries] == [
        ("w[0]", (12, 6), {"heads": 3, "dim": 0}),
        ("w[1]", (9, 6), "as_stored"),
        ("w[2]", (5, 6), "as_stored"),
        ("w[3]", (3, 6), "as_stored"),
    ]
    assert optimizer.strategies() == {f"w[{i}]": "local" for i in range(4)}
    assert all(entry.precision for entry in entries)


def test_stages_of_the_residual_stream_take_every_section() -> None:
    """All read the stream, in their columns: one rotation, from sums over all sections and over the other weight."""
    shared = {"rule": "aro", "share": "residual_stage", "view": "transposed", "lr": 0.1}
    found = []
    for sections in (None, ROWS):
        parts = [draw(0)] if sections else list(draw(0).split(ROWS))
        weights = [nn.Parameter(part.clone()) for part in (draw(5, 17, 6), *parts)]
        view = {"sections": list(sections), "transposed": True} if sections else "transposed"
        optimizer = SymDist(
            [
                {"params": [("embed.weight", weights[0])], "role": "embedding", **shared},
                {
                    "params": [(f"layers.0.part{i}.weight", w) for i, w in enumerate(weights[1:])],
                    **shared,
                    **{"role": "attention_q", "view": view},
                },
            ]
        )
        for seed in (1, 2):
            for weight, gradient in zip(
                weights, [draw(seed + 10, 17, 6), *draw(seed).split([len(w) for w in weights[1:]])], strict=True
            ):
                weight.grad = gradient
            optimizer.step()
        found.append(torch.cat([weight.detach() for weight in weights]))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["raw", "by names", "flat"])
def test_views_of_saved_state_are_compared_by_what_they_mean(form: str) -> None:
    model = nn.Linear(6, 29, bias=False, dtype=torch.float64)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")

    def of(view: Any) -> SymDist:
        return SymDist(model.named_parameters(), rule="muon", lr=0.1, view=view)

    optimizer = of({"sections": ROWS, "heads": HEADS})
    step(optimizer, [model.weight], 1)
    state = optimizer.state_dict() if form == "raw" else get_optimizer_state_dict(model, optimizer, options=options)
    same = of({"sections": list(ROWS), "heads": list(HEADS)})
    other = of({"sections": ROWS})
    for new in (same, other):
        before = copy.deepcopy(new.state[model.weight])

        def load(new: SymDist = new) -> None:
            given = copy.deepcopy(state)
            if form == "raw":
                new.load_state_dict(given)
            else:
                set_optimizer_state_dict(model, new, given, options=options)

        if new is same:
            load()
            assert torch.equal(new.state[model.weight]["momentum"], optimizer.state[model.weight]["momentum"])
        else:
            with pytest.raises(ValueError, match=r"the saved run had view=.*'heads': \[3, 0, 1, 0\]"):
                load()
            assert torch.equal(new.state[model.weight]["momentum"], before["momentum"])


def test_tuples_of_a_saved_view_are_lists() -> None:
    weight, optimizer = built({"sections": ROWS}, {"rule": "muon"})
    state = optimizer.state_dict()
    assert state["param_groups"][0]["view"] == {"sections": list(ROWS)}
    state["param_groups"][0]["view"] = {"sections": ROWS}
    optimizer.load_state_dict(state)
    step(optimizer, [weight], 1)


def test_a_view_from_toml(tmp_path: Any) -> None:
    (tmp_path / "view.toml").write_text("view = { sections = [12, 9, 5, 3], heads = [3, 0, 1, 0] }\n")
    view = read_toml(tmp_path / "view.toml", what="view")["view"]
    assert built(view, {"rule": "muon"})[1].param_groups[0]["view"] == {"sections": list(ROWS), "heads": list(HEADS)}


@pytest.mark.parametrize(
    ("shape", "view", "message"),
    [
        ((29, 6), {"sections": [12, 9]}, r"w: sections \[12, 9\] have 21 rows, but the shape is \(29, 6\)"),
        ((6, 29), {"sections": [12, 17]}, "must add up to them"),
        ((2, 29, 6), {"sections": [12, 17]}, "divide the rows of a matrix"),
        ((29,), {"sections": [12, 17]}, "divide the rows of a matrix"),
        ((29, 6), {"sections": []}, "w: sections .* have 0 rows"),
        ((29, 6), {"sections": [29, 0]}, "with 1 or more rows each"),
        ((29, 6), {"sections": [30, -1]}, "with 1 or more rows each"),
        ((29, 6), {"sections": [14.5, 14.5]}, "with 1 or more rows each"),
        ((29, 6), {"sections": 29}, "with 1 or more rows each"),
        ((29, 6), {"sections": "29"}, "with 1 or more rows each"),
        ((29, 6), {"sections": [12, 17], "heads": [3]}, "with a number for each section"),
        ((29, 6), {"sections": [12, 17], "heads": 3}, "with a number for each section"),
        ((29, 6), {"sections": [12, 17], "heads": [3, -1]}, "with a number for each section"),
        ((29, 6), {"sections": [12, 17], "heads": [3, 2]}, "w: section 1, of 17 rows, does not split into 2 heads"),
        ((29, 6), {"sections": [12, 17], "dim": 0}, "should be {'sections'"),
        ((29, 6), {"sections": [12, 17], "transposed": "yes"}, "should be {'sections'"),
        ((12, 6), {"heads": 3, "dim": 0, "transposed": 1}, "should be {'heads': h, 'dim': 0 or 1}, with 'transposed'"),
        ((12, 6), {"heads": 3, "transposed": True}, "should be {'heads'"),
    ],
)
@pytest.mark.parametrize("rule", ["row_norm", "adamw"])
def test_what_does_not_fit_is_named(rule: str, shape: tuple[int, ...], view: Any, message: str) -> None:
    if len(shape) == 1 and rule == "row_norm":
        message = "needs a matrix"
    with pytest.raises(ValueError, match=message):
        SymDist([{"params": [("w", nn.Parameter(torch.ones(shape)))], "rule": rule, "lr": 0.1, "view": view}])


def test_padding_has_no_sections() -> None:
    with pytest.raises(ValueError, match=r"padding_rows=2 needs a matrix .* its view {'sections': \[12, 17\]}"):
        built({"sections": [12, 17]}, {"rule": "row_norm", "padding_rows": 2})


def test_a_strategy_that_a_section_cannot_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"w\[0\]: rule 'muon' cannot run with strategy 'owner'"):
        built({"sections": ROWS}, {"rule": "muon", "strategy": "owner"})


TURNED = {"heads": 3, "dim": 0, "transposed": True}, {"heads": 3, "dim": 1, "transposed": True}


@pytest.mark.parametrize("view", TURNED, ids=["rows", "columns"])
@pytest.mark.parametrize("stack", [(), (2,)], ids=["", "experts"])
def test_heads_read_transposed(view: Any, stack: tuple[int, ...]) -> None:
    """Of a weight stored [in, out] the heads are those of its transpose."""
    stored = draw(0, *stack, 12, 15)
    turned = stored.mT
    usual = {"heads": 3, "dim": 1 - view["dim"]}
    bound, expected = bind_view(view, tuple(stored.shape), name="w"), bind_view(usual, tuple(turned.shape), name="w")
    matrices = bound.matrices(stored)
    assert torch.equal(matrices, expected.matrices(turned))
    assert matrices.shape[1:] == (bound.rows, bound.columns) == (expected.rows, expected.columns)
    assert torch.equal(bound.to_stored(matrices, tuple(stored.shape)), stored)
    weights = [nn.Parameter(stored.clone()), nn.Parameter(turned.clone())]
    for weight, of_weight in zip(weights, (view, usual), strict=True):
        weight.grad = weight.detach() ** 2
        SymDist([{"params": [weight], "rule": "muon", "lr": 0.1, "view": of_weight}]).step()
    assert torch.allclose(weights[0].mT, weights[1], rtol=0, atol=1e-12)


def held(whole: Tensor, layout: Layout | FlatLayout, rows: range) -> Tensor:
    return layout.piece(whole)[rows.start : rows.stop]


@pytest.mark.parametrize("section", [(0, 4), (4, 9), (3, 4), (0, 11), (8, 11)])
@pytest.mark.parametrize("index", range(4))
def test_rows_of_a_layout_are_what_a_rank_holds_of_them(index: int, section: tuple[int, int]) -> None:
    """Of what a rank holds of numbered elements, those of the rows: the same by the layout of the rows alone."""
    numbers = torch.arange(11 * 6).view(11, 6)
    ranks = Group(ranks=(0, 1, 2, 3), index=index)
    layouts: list[Layout | FlatLayout] = [
        cut_along((11, 6), dim=0, sizes=(3, 0, 6, 2), ranks=ranks.ranks, index=index),
        cut_along((11, 6), dim=1, sizes=(2, 2, 2, 0), ranks=ranks.ranks, index=index),
        FlatLayout(shape=(11, 6), group=ranks, bounds=(0, 20, 20, 53, 66)),
        FlatLayout(shape=(11, 6), group=ranks, bounds=(0, 20, 20, 53, 66), rank_order=(2, 0, 3, 1)),
        FlatLayout(
            shape=(11, 6), group=ranks, bounds=(0, 7, 44, 50, 66), rank_order=(1, 0, 2, 3), column_blocks=(4, 2)
        ),
    ]
    for layout in layouts:
        rows, part = layout.rows(*section)
        assert rows.shape == (section[1] - section[0], 6)
        assert rows.at(index) == rows
        whole = numbers[section[0] : section[1]]
        assert torch.equal(held(numbers, layout, part), rows.piece(whole))
        assert tuple(rows.piece(whole).shape) == rows.local_shape


def test_a_rank_with_elements_of_several_blocks_of_columns_is_refused() -> None:
    ranks = Group(ranks=(0, 1), index=0)
    layout = FlatLayout(shape=(4, 6), group=ranks, bounds=(0, 18, 24), column_blocks=(4, 2))
    weight = nn.Parameter(torch.ones(18))
    group = {"params": [("w", weight)], "layouts": [layout], "rule": "muon", "lr": 0.1, "view": {"sections": [1, 3]}}
    with pytest.raises(ValueError, match=r"w: bounds \(0, 18, 24\) give a rank elements of several"):
        SymDist([group])


def test_rows_that_are_not_in_their_order_are_refused() -> None:
    """Columns may be in any: no rule depends on their order, or says so."""
    for dim, shape in ((0, (2, 6)), (1, (4, 3))):
        layout = replace(
            cut_along((4, 6), dim=dim, sizes=[(4, 6)[dim] // 2] * 2, ranks=(0, 1), index=0),
            interleaved=(Interleaving(dim=dim, parts=2 if dim == 0 else 3, ranks=2),),
        )
        weight = nn.Parameter(torch.ones(shape))
        group = {
            "params": [("w", weight)],
            "layouts": [layout],
            "rule": "muon",
            "lr": 0.1,
            "view": {"sections": [3, 1]},
        }
        if dim == 0:
            with pytest.raises(
                ValueError, match=r"w: its rows are sharded .* shard the parameter without interleaving"
            ):
                SymDist([group])
        else:
            assert len(SymDist([group], transport=CountingTransport()).assignments()) == 2


def test_what_a_section_is_read_as() -> None:
    found = sections_of({"sections": [4, 2], "heads": [2, 1], "transposed": True}, (6, 3), name="w")
    assert [(section.start, section.stop, section.view) for section in found] == [
        (0, 4, {"heads": 2, "dim": 0, "transposed": True}),
        (4, 6, "transposed"),
    ]
    assert sections_of("as_stored", (6, 3), name="w") == []


def test_nothing_is_sent_for_what_one_rank_holds() -> None:
    """Sections that end where ranks do are local under flat layouts."""
    ranks = Group(ranks=(0, 1), index=1)
    layout = FlatLayout(shape=(6, 3), group=ranks, bounds=(0, 12, 18))
    counting = CountingTransport()
    group = {"params": [("w", nn.Parameter(torch.ones(6)))], "layouts": [layout], "rule": "muon", "lr": 0.1}
    optimizer = SymDist([group | {"view": {"sections": [4, 2]}}], transport=counting)
    assert optimizer.strategies() == {"w[0]": "local", "w[1]": "local"}
    assert {moved.kind for moved in optimizer.trace_collectives().log} == {"all_reduce"}
