"""Numbers at the ends of their range: nothing overflows on the way, and what has no digits left is not magnified."""

import copy
import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, clip_grad_norm_
from symdist.rules.matrix import at_unit_scale
from tests.attacks import numbers_ranks
from tests.cases import CASES, Case, tensors
from tests.ranks import Ranks

Group = dict[str, Any]
Shape = tuple[int, ...]


def more_cases() -> dict[str, Case]:
    """Options that decide which numbers are computed: precisions, dampings, powers of norms, an eps of 0, averages."""
    tall, wide = (29, 6), (6, 29)
    cases: dict[str, Case] = {}
    polars = ("polar", "right_spectral", "left_spectral", "hybrid")
    for rule in (*polars, "muon", "normuon", "aurora", "scion"):
        precisions = ("float16", "bfloat16", *(("published",) if rule in ("muon", "normuon", "aurora") else ()))
        for precision, shape in itertools.product(precisions, (tall, wide)):
            cases[f"{rule} {precision} {shape}"] = shape, {"rule": rule, "precision": precision}
        cases[f"{rule} undamped"] = tall, {"rule": rule, "damping": 0.0}
        cases[f"{rule} exact"] = tall, {"rule": rule, "damping": 0.0, "method": "exact"}
    for rule, precision, scale in itertools.product(
        polars, ("float32", "float16", "bfloat16"), ("nuclear", "nuclear_over_frobenius")
    ):
        for alpha in (0.5, 1.0, 3.0):
            options = {"rule": rule, "precision": precision, "scale": scale, "alpha": alpha}
            cases[f"{rule} {precision} {scale} {alpha}"] = tall, options
    for base in ("sinkhorn", "row_norm", "sign", "adam", "identity"):
        cases[f"aro {base}"] = (9, 6), {"rule": "aro", "base": base}
    return cases | {
        "hybrid polar first float16": (tall, {"rule": "hybrid", "order": "polar_then_row", "precision": "float16"}),
        "hybrid reference": ((17, 6), {"rule": "hybrid", "eps": "reference"}),
        "row reference": ((17, 6), {"rule": "row_norm", "eps": "reference"}),
        "normuon eps 0": (tall, {"rule": "normuon", "eps": 0.0}),
        "adamw eps 0": ((17, 6), {"rule": "adamw", "eps": 0.0}),
        "adamw slow": ((17, 6), {"rule": "adamw", "betas": (0.99, 0.5)}),
        "aurora, swinging": (tall, {"rule": "aurora", "beta": 1.0, "iterations": 12}),
        "muon, no momentum": (tall, {"rule": "muon", "momentum": 0.0}),
        "muon, slow": (wide, {"rule": "muon", "momentum": 0.999, "nesterov": False}),
        "polar, slow": (wide, {"rule": "polar", "momentum": 0.999}),
    }


GRID = CASES | more_cases()


def drawn(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def scaled_to(scale: float) -> Callable[[Shape, torch.Generator], Tensor]:
    # Where the normal distribution would leave the range, signs do not.
    return lambda shape, generator: (
        (drawn(shape, generator).sign() if scale > 1e36 else drawn(shape, generator).clamp(-4, 4)) * scale
    )


def of_all_sizes(shape: Shape, generator: torch.Generator) -> Tensor:
    return drawn(shape, generator).sign() * 10 ** (torch.rand(shape, generator=generator) * 66 - 36)


def rank_one(shape: Shape, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return drawn(shape, generator)
    return drawn((*shape[:-1], 1), generator) @ drawn((*shape[:-2], 1, shape[-1]), generator)


def rows_times(factor: float) -> Callable[[Shape, torch.Generator], Tensor]:
    def every_other(shape: Shape, generator: torch.Generator) -> Tensor:
        gradient = drawn(shape, generator)
        gradient[1::2] *= factor
        return gradient

    return every_other


def one_element(shape: Shape, generator: torch.Generator) -> Tensor:
    gradient = torch.zeros(shape)
    gradient.view(-1)[-1] = 1e-3
    return gradient


SCALES = [1e-38, 1e-30, 1e-22, 1e-19, 1e-8, 1.0, 1e8, 1e18, 1e19, 1e20, 1e25, 1e30, 1e33, 1e36, 1e38]
KINDS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    **{f"{scale:g}": scaled_to(scale) for scale in SCALES},
    "of all sizes": of_all_sizes,
    "denormal": scaled_to(1e-42),
    "the smallest": lambda shape, generator: drawn(shape, generator).sign() * 1.4e-45,
    "zero": lambda shape, generator: torch.zeros(shape),
    "equal": lambda shape, generator: torch.ones(shape),
    "rank one": rank_one,
    "rank one, huge": lambda shape, generator: rank_one(shape, generator) * 1e30,
    "one element": one_element,
    "zero rows": rows_times(0.0),
    "tiny rows": rows_times(1e-30),
    "denormal rows": rows_times(1e-42),
    "huge rows": rows_times(1e30),
}
SHAPES: dict[str, Shape] = {
    "as it is": (),
    "one row": (1, 7),
    "one column": (7, 1),
    "1 x 1": (1, 1),
    "an expert": (1, 4, 3),
}


def fault_of(
    case: str, kind: str, *, shape: Shape, nonfinite: Any, clip: float | None, dtype: torch.dtype, **options: Any
) -> str:
    """Step a case three times; return what is wrong after that, or nothing."""
    own, group = GRID[case]
    group = copy.deepcopy(group)
    if shape:
        # Views and padding are for the case's own shape.
        own, group = shape, {key: value for key, value in group.items() if key not in ("view", "padding_rows")}
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(drawn(own, generator).to(dtype))
    with warnings.catch_warnings(action="ignore"):
        optimizer = SymDist([{"params": [("w", weight)], "lr": 0.1, **group, **options}], nonfinite=nonfinite)
    for _ in range(3):
        weight.grad = KINDS[kind](own, generator).to(dtype)
        if not weight.grad.isfinite().all():
            continue
        if clip is not None:
            clip_grad_norm_([weight], clip)
        small = float(weight.grad.abs().max()) <= (1e120 if dtype == torch.float64 else 1e34)
        before = weight.detach().clone()
        try:
            optimizer.step()
        except FloatingPointError:
            if small or nonfinite != "raise":
                return "refused"
            if not weight.equal(before):
                return "refused, but changed"
    if not weight.isfinite().all():
        return "a weight is not finite"
    return "" if all(each.isfinite().all() for each in optimizer.state[weight].values()) else "state is not finite"


def faults(kind: str, cases: Any = GRID, **how: Any) -> dict[str, str]:
    how = {"shape": (), "nonfinite": "raise", "clip": None, "dtype": torch.float32} | how
    return {case: fault for case in cases if (fault := fault_of(case, kind, **how))}


@pytest.mark.parametrize("clip", [None, 1.0, 1e-30, 1e30], ids=lambda clip: f"clipped to {clip}")
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_finite_gradient_makes_a_weight_that_is_not(kind: str, nonfinite: str, clip: float | None) -> None:
    assert not faults(kind, nonfinite=nonfinite, clip=clip)


@pytest.mark.parametrize("shape", list(SHAPES)[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_nor_on_the_smallest_matrices(kind: str, shape: str) -> None:
    assert not faults(kind, shape=SHAPES[shape])


NARROW = {"dtype": torch.bfloat16, "weight_rounding": "stochastic"}
DTYPES: dict[str, Group] = {
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "rounded by chance": NARROW,
    "narrow momentum": NARROW | {"state_dtype": "bfloat16"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nor_in_another_dtype(kind: str, dtype: str) -> None:
    cases = [case for case in GRID if "state_dtype" not in DTYPES[dtype] or GRID[case][1]["rule"] != "adamw"]
    assert not faults(kind, cases, **DTYPES[dtype])


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e-200, 1e-100, 1e100, 1e119, 1e300])
def test_nor_at_the_ends_of_float64(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "scale", lambda shape, generator: drawn(shape, generator).double() * scale)
    assert not faults("scale", dtype=torch.float64)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 3)])
def test_an_empty_matrix_is_refused_by_name(shape: Shape) -> None:
    for case in GRID:
        group = {key: value for key, value in GRID[case][1].items() if key not in ("view", "padding_rows")}
        weight = nn.Parameter(torch.ones(shape))
        groups = [{"params": [("w", weight)], "lr": 0.1, **group}]
        if group["rule"] == "adamw":
            # Its weights may have any shape, none included.
            weight.grad = torch.ones(shape)
            SymDist(groups).step()
            continue
        with pytest.raises(ValueError, match=r"w has shape \(.*\), so it is empty; leave it out"):
            SymDist(groups)


ONE_A_RULE = list({group["rule"]: case for case, (_, group) in CASES.items()}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cases", [ONE_A_RULE, list(GRID)], ids=["one a rule", "all"])
def test_a_dead_matrix_passes_through_denormal_numbers(cases: list[str], dtype: torch.dtype) -> None:
    """Averages of so short a memory halve in every step, and get to zero through all denormal numbers."""
    halving = {"momentum": 0.5, "betas": (0.5, 0.5), "beta2": 0.5}
    start = 1e-35 if dtype == torch.float32 else 1e-306
    for case in cases:
        shape, group = GRID[case]
        generator = torch.Generator().manual_seed(1)
        weight = nn.Parameter(drawn(shape, generator).to(dtype))
        known = SymDist([{"params": [weight], "lr": 0.1, **copy.deepcopy(group)}]).param_groups[0]
        options = {key: value for key, value in halving.items() if known.get(key) is not None}
        optimizer = SymDist([{"params": [weight], "lr": 1e-4, **copy.deepcopy(group), **options}])
        weight.grad = drawn(shape, generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
        averages = [value for key, value in optimizer.state[weight].items() if key not in ("step", "rotation")]
        for average in averages:
            average.mul_(start)
        for _ in range(70):
            optimizer.step()
        assert weight.isfinite().all(), case
        assert all(each.isfinite().all() for each in optimizer.state[weight].values()), case
        # The rule's own averages last longer: they are fed while the momentum has digits.
        assert averages[0].abs().max() <= start * 1e-9, case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_matrix_dead_for_ten_thousand_steps_moves_no_more(dtype: torch.dtype) -> None:
    """Momentum then sticks at a few times the smallest number, which 0.95 times itself is rounded to."""
    moved = []
    for case, (shape, group) in GRID.items():
        generator = torch.Generator().manual_seed(1)
        weight = nn.Parameter(drawn(shape, generator).to(dtype))
        with warnings.catch_warnings(action="ignore"):
            optimizer = SymDist([{"params": [("w", weight)], "lr": 0.1, **copy.deepcopy(group), "weight_decay": 0.0}])
        weight.grad = drawn(shape, generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
        for key, value in optimizer.state[weight].items():
            smallest = torch.finfo(value.dtype).smallest_normal * torch.finfo(value.dtype).eps
            if key not in ("step", "rotation"):
                stuck = torch.randint(-10, 11, value.shape, generator=generator) * smallest
                value.copy_(stuck.abs() if key.endswith(("_sq", "_rms")) else stuck)
        before = weight.detach().clone()
        for _ in range(3):
            optimizer.step()
        assert weight.isfinite().all(), case
        if not weight.equal(before):
            moved.append(case)
    assert not moved


def test_norms_are_right_where_their_squares_overflow() -> None:
    for dtype, value in ((torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float16, 6e4), (torch.float32, 1e-38)):
        weights = [nn.Parameter(torch.zeros(40, 50, dtype=dtype)) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.full_like(weight, value)
        expected = float(weights[0].grad[0, 0]) * 4000**0.5  # type: ignore[index]
        assert float(clip_grad_norm_(weights, float("inf"))) == pytest.approx(expected, rel=1e-6)
        for bound in (1e30, 1.0, 1e-3):
            clip_grad_norm_(weights, bound)
            expected = min(expected, bound)
            # A factor of bfloat16 has eight bits.
            assert float(clip_grad_norm_(weights, float("inf"))) == pytest.approx(expected, rel=1e-2)


def test_the_mean_of_many_large_rows_is_one() -> None:
    """The sum of these rows would be inf, as would the momentum's from smaller ones."""
    for rule in ("row_norm", "right_spectral"):
        ends = []
        for scale in (1.0, 1e34):
            weight = nn.Parameter(torch.zeros(90_000, 2))
            optimizer = SymDist(
                [{"params": [("w", weight)], "rule": rule, "centered": True, "lr": 0.1, "momentum": 0.0}]
            )
            weight.grad = (torch.rand(90_000, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5) * scale
            optimizer.step()
            ends.append(weight.detach())
        assert (ends[0] - ends[1]).norm() < 1e-3 * ends[0].norm()


def test_many_parts_of_large_numbers_are_scaled_down() -> None:
    """The largest magnitudes of thousands of parts, which are summed for lack of a maximum, overflow."""
    x = torch.full((1, 2, 3), 1e34)
    asking = at_unit_scale(x)
    next(asking)
    with pytest.raises(StopIteration) as stop:
        asking.send(torch.full((1, 1, 1), float("inf")))
    scaled, unit = stop.value.value
    assert torch.equal(scaled * unit, x)
    assert scaled.max() <= 1


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_ratio_of_norms_has_no_scale(precision: str) -> None:
    ends = []
    for scale in (1.0, 1e-25, 1e25, 1e33):
        weight = nn.Parameter(torch.zeros(64, 24))
        group = {"rule": "polar", "scale": "nuclear_over_frobenius", "alpha": 1.0, "precision": precision}
        optimizer = SymDist([{"params": [("w", weight)], "lr": 0.1, **group}])
        weight.grad = drawn((64, 24), torch.Generator().manual_seed(0)).clamp(-4, 4) * scale
        optimizer.step()
        ends.append(weight.detach())
    assert all((end - ends[0]).norm() < 2e-2 * ends[0].norm() for end in ends)


def test_no_power_of_a_norm_ends_a_float16_weight() -> None:
    weight = nn.Parameter(torch.ones(6, 4).half())
    with pytest.warns(UserWarning, match="float16"):
        optimizer = SymDist([{"params": [("w", weight)], "rule": "polar", "alpha": 1.0, "lr": 1.0}])
    weight.grad = torch.full((6, 4), 6e4).half()
    for _ in range(20):
        optimizer.step()
    assert weight.isfinite().all()
    assert weight.abs().max() == torch.finfo(torch.float16).max


def test_adamw_goes_on_after_a_gradient_whose_square_overflows() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = SymDist([{"params": [("w", weight)], "rule": "adamw", "lr": 0.1, "betas": (0.5, 0.5)}])
    moved = []
    for gradient in (1e33, *[1.0] * 300):
        weight.grad = torch.full((4, 3), gradient)
        before = weight.detach().clone()
        optimizer.step()
        moved.append(float((before - weight.detach()).max()))
    assert moved[0] == pytest.approx(0.1, rel=1e-3)
    assert moved[-1] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("last", numbers_ranks.LAST)
def test_shards_of_another_size(ranks: Ranks, last: str) -> None:
    """Rows are split over three ranks, and those of the last are zero, denormal, tiny or huge; some hold no row."""
    expected, norm = numbers_ranks.stepped(None, last, 3)
    for found, found_norm in ranks.run(3, numbers_ranks.stepped, last, 3):
        assert found_norm == pytest.approx(norm, rel=1e-6)
        for case, one, whole in zip(CASES, found, expected, strict=True):
            assert one.isfinite().all(), case
            assert (one - whole).norm() <= 0.02 * whole.norm(), case


# PyTorch's AdamW has an absolute eps and squares in float32; nuclear norms are of the gradient's scale by their name.
SCALED = [case for case, (_, group) in CASES.items() if group["rule"] == "adamw" or group.get("alpha")]
REFERENCE: Group = {"rule": "row_norm", "eps": "reference"}


def steps(group: Group, weight: Tensor, gradients: list[Tensor], clip: float | None = None) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = SymDist([{"params": [("w", parameter)], "lr": 0.1, **group}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        if clip is not None:
            clip_grad_norm_([parameter], clip)
        optimizer.step()
    return parameter.detach() - weight


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e18, 1e30])
@pytest.mark.parametrize("case", [case for case in CASES if case not in SCALED])
def test_no_update_hangs_on_the_gradients_scale(case: str, scale: float) -> None:
    group = CASES[case][1] | {"weight_decay": 0.0}
    weight, gradients = tensors(case)
    expected = steps(group, torch.zeros_like(weight).float(), [each.float() for each in gradients])
    found = steps(group, torch.zeros_like(weight).float(), [(each * scale).float() for each in gradients])
    assert found.isfinite().all()
    assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_the_published_eps_does_hang_on_it() -> None:
    weight, gradients = tensors("row")
    expected = steps(REFERENCE, weight, gradients)
    assert (steps(REFERENCE, weight, [each * 1e-8 for each in gradients]) - expected).norm() > 0.3 * expected.norm()


@pytest.mark.parametrize("clip", [None, 1.0, 1e-30])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e25, 1e33])
@pytest.mark.parametrize("case", CASES)
def test_finite_gradients_leave_weights_finite(case: str, scale: float, clip: float | None) -> None:
    weight, gradients = tensors(case)
    group = CASES[case][1] | ({"alpha": 0.0} if CASES[case][1].get("alpha") else {})
    moved = steps(group, weight.float(), [(each.sign() * scale).float() for each in gradients], clip)
    assert moved.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cases", [ONE_A_RULE, list(CASES)], ids=["one a rule", "all"])
def test_an_idle_expert_stays_finite(cases: list[str], dtype: torch.dtype) -> None:
    """A thousand steps without a gradient: from 1e-30 on, momentum is denormal after 400, and stuck after 700."""
    groups, parameters = [], []
    for case in cases:
        group = CASES[case][1]
        weight, gradients = tensors(case)
        parameters.append(nn.Parameter(weight.to(dtype)))
        parameters[-1].grad = (gradients[0] * 1e-30).to(dtype)
        groups.append({"params": [(case, parameters[-1])], "lr": 1e-4, **copy.deepcopy(group)})
    with pytest.warns(UserWarning, match="bfloat16") if dtype == torch.bfloat16 else nullcontext():
        optimizer = SymDist(groups)
    for step in range(1000):
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    for parameter in parameters:
        assert parameter.isfinite().all()
        assert all(state.isfinite().all() for state in optimizer.state[parameter].values())


@pytest.mark.parametrize("value", [3e38, -2e34])
def test_what_would_overflow_counts_as_not_finite(value: float) -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3)
    weight.grad[1, 2] = value
    optimizer = SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1}])
    with pytest.raises(FloatingPointError, match=r"of w is not finite; no weight was changed\. .*larger than 1e\+34"):
        optimizer.step()
    assert weight.eq(1).all()
    SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1}], nonfinite="zero").step()
    assert weight.isfinite().all()
    assert not weight.eq(1).all()


def test_weights_of_few_digits_are_warned_of() -> None:
    narrow, wide = nn.Parameter(torch.ones(4, 4).bfloat16()), nn.Parameter(torch.ones(4, 4))
    groups = [{"params": [("wide", wide), ("narrow", narrow)], "rule": "muon", "lr": 0.1}]
    with pytest.warns(
        UserWarning, match=r"1 weights, the first of them narrow, are bfloat16.*MixedPrecisionPolicy"
    ) as told:
        SymDist(groups)
    assert told[0].filename == __file__
    narrow.requires_grad_(False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SymDist(groups)
