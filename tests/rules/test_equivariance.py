"""Every rule has the symmetry it claims: its update turns with the group of its weight, and with nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, rule_names
from symdist.rules import Matrix, get_rule, run_locally

Options = dict[str, Any]

ROW: Options = {"rule": "row_norm"}
RIGHT = {"rule": "right_spectral"}
LEFT: Options = {"rule": "left_spectral"}
HYBRID: Options = {"rule": "hybrid"}
POLAR = {"rule": "polar"}
MUON = {"rule": "muon"}
RATIO: Options = {"alpha": 0.5, "scale": "nuclear_over_frobenius"}
NORMUON: Options = {"rule": "normuon"}
AURORA: Options = {"rule": "aurora"}
SCION: Options = {"rule": "scion"}
POLAR_FIRST = HYBRID | {"order": "polar_then_row"}

SPECTRAL: dict[str, Options] = {
    "right": RIGHT,
    "right_alpha": RIGHT | {"alpha": 1.0},
    "left": LEFT,
    "left_ratio": LEFT | RATIO,
    "polar": POLAR | {"alpha": 1.0},
    "polar_exact": POLAR | {"method": "exact"},
    "polar_cubic": POLAR | {"method": "newton_schulz", "damping": 1e-4},
    "muon": MUON,
    "muon_left": MUON | {"side": "left", "adjust_lr": "match_rms_adamw"},
    "scion": SCION | {"radius": 3.0},
}
BY_ROWS: dict[str, Options] = {
    "row": ROW,
    "row_eps": ROW | {"eps": "reference"},
    "hybrid": HYBRID | {"alpha": 1.0},
    "hybrid_left": HYBRID | {"side": "left", "damping": 1e-4} | RATIO,
    "hybrid_polar_first": POLAR_FIRST,
    "normuon": NORMUON,
    "normuon_eps": NORMUON | {"eps": 0.1, "adjust_lr": "match_rms_adamw"},
    "aurora": AURORA,
    "aurora_long": AURORA | {"iterations": 4, "beta": 0.25},
    "scion_row": SCION | {"norm": "row", "radius": 3.0},
    "scion_row_rms": SCION | {"norm": "row_rms"},
}
CENTERED: dict[str, Options] = {
    key: options | {"centered": True}
    for key, options in {
        "row": ROW,
        "right": RIGHT,
        "left": LEFT | {"alpha": 1.0},
        "polar": POLAR | RATIO,
        "hybrid": HYBRID | {"alpha": 1.0},
        "hybrid_polar_first": POLAR_FIRST,
    }.items()
}
EVERY: dict[str, Options] = SPECTRAL | BY_ROWS | {f"centered_{key}": options for key, options in CENTERED.items()}
SHAPES = [(12, 5), (5, 12), (7, 7)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def rotation(n: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def permutation(n: int) -> Tensor:
    order = torch.arange(n).roll(1)
    order[:2] = order[:2].flip(0)
    return torch.eye(n, dtype=torch.float64)[order]


def step(gradient: Tensor, **group: Any) -> Tensor:
    """The update that one step at lr 1, without momentum, subtracts."""
    weight = nn.Parameter(torch.zeros_like(gradient))
    if group["rule"] != "adamw":
        group |= {"momentum": 0.0}
    optimizer = SymDist([{"params": [weight], "lr": 1.0, **group}])
    weight.grad = gradient.clone()
    optimizer.step()
    return -weight.detach()


def distance(found: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0.1
    return float((found - expected).norm() / expected.norm())


def angle(a: Tensor, b: Tensor) -> float:
    return float((a / a.norm() - b / b.norm()).norm())


@pytest.mark.parametrize("view", ["as_stored", "transposed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EVERY)
def test_rows_permute_and_columns_rotate(name: str, shape: tuple[int, int], view: str) -> None:
    g, p, q = normal(*shape), permutation(shape[0]), rotation(shape[1])
    turn = (lambda x: x.mT.contiguous()) if view == "transposed" else (lambda x: x)
    update = turn(step(turn(g), view=view, **EVERY[name]))
    assert angle(update, g) > 0.01
    assert distance(turn(step(turn(p @ g @ q), view=view, **EVERY[name])), p @ update @ q) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_rules_rotate_on_both_sides(name: str, shape: tuple[int, int]) -> None:
    g, left, right = normal(*shape), rotation(shape[0], seed=2), rotation(shape[1])
    assert distance(step(left @ g @ right, **SPECTRAL[name]), left @ step(g, **SPECTRAL[name]) @ right) < 1e-7


@pytest.mark.parametrize("name", ["row", "row_eps", "hybrid", "hybrid_polar_first", "normuon", "aurora", "scion_row"])
def test_row_rules_know_their_rows(name: str) -> None:
    g, left = normal(12, 5), rotation(12, seed=2)
    assert distance(step(left @ g, **BY_ROWS[name]), left @ step(g, **BY_ROWS[name])) > 0.05


def heads_of(x: Tensor, heads: int, dim: int) -> list[Tensor]:
    return list(x.chunk(heads, dim=dim))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("options", [MUON, POLAR | {"alpha": 1.0}, RIGHT, LEFT | {"alpha": 1.0}])
def test_every_head_turns_on_its_own(options: Options, dim: int) -> None:
    view = {"heads": 3, "dim": dim}
    g = normal(*((12, 9) if dim == 0 else (9, 12)))
    updates = heads_of(step(g, view=view, **options), 3, dim)
    assert all(
        distance(update, step(head, **options)) < 1e-9
        for head, update in zip(heads_of(g, 3, dim), updates, strict=True)
    )
    turned, expected = [], []
    for i, head in enumerate(heads_of(g, 3, dim)):
        left, right = rotation(head.shape[0], seed=i), rotation(head.shape[1], seed=i + 10)
        turned.append(left @ head @ right)
        expected.append(left @ updates[i] @ right)
    order = [2, 0, 1]
    found = step(torch.cat([turned[i] for i in order], dim=dim), view=view, **options)
    assert distance(found, torch.cat([expected[i] for i in order], dim=dim)) < 1e-7


def fused(gate: Tensor, up: Tensor, view: str) -> Tensor:
    if view == "gate_up_stacked":
        return torch.cat([gate, up], dim=-2)
    return torch.stack([gate, up], dim=-2).flatten(-3, -2).mT.contiguous()


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("view", ["gate_up_stacked", "gate_up_interleaved"])
@pytest.mark.parametrize("name", [*BY_ROWS, "centered_row", "centered_hybrid"])
def test_gate_and_up_of_a_neuron_stay_together(name: str, view: str, stack: tuple[int, ...]) -> None:
    gate, up, p, q = normal(*stack, 7, 5), normal(*stack, 7, 5, seed=3), permutation(7), rotation(5)
    options = EVERY[name]
    pairs = torch.cat([gate, up], dim=-1)
    u_gate, u_up = step(pairs, **options).chunk(2, dim=-1)
    assert distance(step(fused(gate, up, view), view=view, **options), fused(u_gate, u_up, view)) < 1e-9
    found = step(fused(p @ gate @ q, p @ up @ q, view), view=view, **options)
    assert distance(found, fused(p @ u_gate @ q, p @ u_up @ q, view)) < 1e-7
    if name == "row":
        assert torch.allclose(u_gate.square().sum(-1) + u_up.square().sum(-1), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", EVERY)
def test_experts_permute_and_do_not_touch_each_other(name: str) -> None:
    g, options = normal(4, 8, 5), EVERY[name]
    update = step(g, **options)
    assert distance(update, torch.stack([step(expert, **options) for expert in g])) < 1e-9
    order = [3, 1, 0, 2]
    assert distance(step(g[order], **options), update[order]) < 1e-9
    other = g.clone()
    other[1] = 100 * normal(8, 5, seed=9)
    changed = step(other, **options)
    assert distance(changed[[0, 2, 3]], update[[0, 2, 3]]) < 1e-12
    assert angle(changed[1], update[1]) > 0.1


@pytest.mark.parametrize("view", ["as_stored", "transposed", "gate_up_stacked"])
@pytest.mark.parametrize("name", CENTERED)
def test_centred_rules_ignore_the_gauge(name: str, view: str) -> None:
    g, options = normal(8, 6), CENTERED[name] | {"view": view}
    shift = {
        "as_stored": 10 * normal(1, 6, seed=4),
        "transposed": 10 * normal(8, 1, seed=4),
        "gate_up_stacked": 10 * normal(2, 6, seed=4).repeat_interleave(4, dim=0),
    }[view]
    update = step(g, **options)
    assert distance(step(g + shift, **options), update) < 1e-7
    sums = {"as_stored": update.sum(0), "transposed": update.sum(1), "gate_up_stacked": update.view(2, 4, 6).sum(1)}[
        view
    ]
    assert sums.abs().max() < 1e-12
    assert distance(step(g + shift, **options | {"centered": False}), update) > 0.1


def test_a_centred_bias_leaves_the_routing_alone() -> None:
    g = normal(7)
    assert step(g, rule="adamw", centered=True).sum().abs() < 1e-12
    assert step(g, rule="adamw").sum().abs() > 0.5


@pytest.mark.parametrize("name", [*CENTERED, "plain_row", "plain_right"])
def test_padding_takes_no_part(name: str) -> None:
    options = CENTERED.get(name, ROW if name == "plain_row" else RIGHT)
    g = normal(12, 5)
    update = step(g, padding_rows=3, **options)
    assert distance(update[:9], step(g[:9], **options)) < 1e-9
    assert not update[9:].any()


@pytest.mark.parametrize(
    "options", [ROW, ROW | {"centered": True}, RIGHT, LEFT, {"rule": "aro"}, NORMUON, AURORA, SCION]
)
def test_padding_takes_no_part_as_columns(options: Options) -> None:
    """A vocabulary's rows are columns where its rule has the other side for rows."""
    g = normal(17, 5)
    update = step(g, padding_rows=3, view="transposed", **options)
    assert distance(update[:14], step(g[:14], view="transposed", **options)) < 1e-9
    assert not update[14:].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e3, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        RIGHT,
        LEFT | {"view": "transposed"},
        POLAR | {"centered": True},
        POLAR | {"method": "newton_schulz"},
        POLAR | RATIO,
        MUON,
        ROW,
        ROW | {"centered": True},
        HYBRID | {"alpha": 1.0},
        POLAR_FIRST,
        NORMUON,
        AURORA,
        SCION,
        SCION | {"norm": "sign"},
        SCION | {"norm": "row_rms"},
    ],
)
def test_the_gradients_scale_is_forgotten(options: Options, dtype: torch.dtype, scale: float) -> None:
    g = normal(29, 6).to(dtype)
    assert distance(step(scale * g, **options), step(g, **options)) < (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("rule", ["right_spectral", "left_spectral", "polar"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_nu_restores_the_scale(rule: str, alpha: float) -> None:
    g = normal(6, 6)
    assert distance(step(2 * g, rule=rule, alpha=alpha), 2**alpha * step(g, rule=rule, alpha=alpha)) < 1e-9


def row_normed(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def polar_of(x: Tensor, alpha: float = 0.0, ratio: bool = False) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = (s > 1e-10 * s[0]).double()
    nu = s.sum() / s.norm() if ratio else s.sum()
    return nu**alpha * (u * kept) @ vh


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["row", "polar", "alpha", "ratio", "hybrid", "hybrid_polar_first"])
def test_updates_are_their_formulas(name: str, shape: tuple[int, int], centered: bool) -> None:
    def project(x: Tensor) -> Tensor:
        return x - x.mean(0) if centered else x

    g = normal(*shape)
    m = project(g)
    exact = {"method": "exact", "centered": centered, "damping": 0.0}
    side = "right" if shape[0] > shape[1] else "left"
    if name == "row":
        assert distance(step(g, centered=centered, **ROW), project(row_normed(m))) < 1e-12
    elif name in ("polar", "alpha", "ratio"):
        given: Options = {"polar": {}, "alpha": {"alpha": 1.0}, "ratio": RATIO}[name]
        expected = project(polar_of(m, given.get("alpha", 0.0), ratio=name == "ratio"))
        for rule in ("polar", f"{side}_spectral"):
            assert distance(step(g, rule=rule, **exact, **given), expected) < 1e-6
    elif name == "hybrid":
        expected = project(polar_of(project(row_normed(m)), 1.0))
        assert distance(step(g, alpha=1.0, **exact, **HYBRID), expected) < 1e-6
    else:
        assert distance(step(g, **exact, **POLAR_FIRST), project(row_normed(polar_of(m)))) < 1e-6


def test_polar_with_alpha_one_is_spectral_descent() -> None:
    """PolarGrad of the momentum; of the gradient itself, without momentum, stochastic spectral descent."""
    g, h = normal(9, 5), normal(9, 5, seed=1)
    for momentum, expected in ((0.5, 0.25 * g + 0.5 * h), (0.0, h)):
        weight = nn.Parameter(torch.zeros_like(g))
        optimizer = SymDist(
            [{"params": [weight], "lr": 1.0, "momentum": momentum, "method": "exact", "alpha": 1.0, **POLAR}]
        )
        weight.grad = g
        optimizer.step()
        before = weight.detach().clone()
        weight.grad = h
        optimizer.step()
        assert distance(before - weight.detach(), polar_of(expected, 1.0)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_scion_has_the_norm_of_its_radius(shape: tuple[int, int]) -> None:
    m, n = shape
    g = normal(*shape)
    exact = SCION | {"radius": 2.0, "method": "exact", "damping": 0.0}
    assert distance(step(g, **exact), 2 * (m / n) ** 0.5 * polar_of(g)) < 1e-6
    assert distance(step(g, norm="sign", **exact), 2 * g.sign() / n) < 1e-12
    rms = step(g, norm="row_rms", **exact).square().mean(1).sqrt()
    assert (rms - 2).abs().max() < 1e-9
    lengths = step(g, norm="row", **exact).norm(dim=1)
    assert (lengths - 2 / n**0.5).abs().max() < 1e-9


def test_sign_goes_by_signed_permutations() -> None:
    g = normal(6, 9)
    left = permutation(6) * torch.tensor([1.0, -1, 1, 1, -1, 1]).double()
    right = permutation(9) * torch.tensor([1.0, 1, -1, 1, 1, 1, -1, 1, 1]).double()
    options = SCION | {"norm": "sign"}
    assert distance(step(left @ g @ right, **options), left @ step(g, **options) @ right) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_is_its_formula(shape: tuple[int, int]) -> None:
    gradients = [normal(*shape, seed=seed) for seed in range(3)]
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    options = NORMUON | {"method": "exact", "beta2": 0.9, "momentum": 0.5}
    optimizer = SymDist([{"params": [weight], "lr": 1.0, **options}])
    buffer, average = torch.zeros(shape).double(), torch.zeros(shape[0], 1).double()
    for g in gradients:
        before = weight.detach().clone()
        weight.grad = g
        optimizer.step()
        buffer = 0.5 * buffer + g
        q = polar_of(g + 0.5 * buffer)
        average = 0.9 * average + 0.1 * q.square().mean(1, keepdim=True)
        x = q / (average.sqrt() + 1e-10)
        expected = x * q.norm() / x.norm() * max(1.0, shape[0] / shape[1]) ** 0.5
        assert distance(before - weight.detach(), expected) < 1e-6


def test_aurora_evens_out_the_rows_of_tall_matrices() -> None:
    g = torch.diag(torch.linspace(0.1, 3.0, 40).double()) @ normal(40, 6)
    exact = {"method": "exact", "adjust_lr": "none"}
    uneven = [step(g, **MUON, **exact)] + [step(g, iterations=k, **AURORA, **exact) for k in (1, 2, 6)]
    spread = [float(u.norm(dim=1).std() / u.norm(dim=1).mean()) for u in uneven]
    assert spread == sorted(spread, reverse=True)
    assert spread[2] < 0.5 * spread[0]
    for u in uneven:
        assert (u.mT @ u - torch.eye(6)).abs().max() < 1e-6
    # By hand, with β of the squares.
    d = 1 / g.norm(dim=1, keepdim=True)
    u = polar_of(d * g)
    d = d * (6 / 40 / u.square().sum(1, keepdim=True)) ** 0.5
    assert distance(uneven[2], polar_of(d * g)) < 1e-6
    for shape in ((5, 12), (7, 7)):
        assert distance(step(normal(*shape), **AURORA), step(normal(*shape), **MUON)) < 1e-12


def test_damping_is_relative() -> None:
    g = normal(16, 256).float()
    tops = [
        float(torch.linalg.matrix_norm(step(scale * g, rule="left_spectral", centered=True), 2))
        for scale in (1.0, 1e-4, 1e-6, 1e-7)
    ]
    assert all(0.9 < top < 1.2 and abs(top - tops[0]) < 1e-3 for top in tops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*EVERY, "bfloat16", "adamw", "aro", "aro_adam", "sign"])
def test_no_rule_writes_to_its_input(name: str, dtype: torch.dtype) -> None:
    options = EVERY | {"bfloat16": MUON | {"precision": "bfloat16"}, "adamw": {"rule": "adamw", "centered": True}}
    options |= {"aro": {"rule": "aro"}, "aro_adam": {"rule": "aro", "base": "adam"}, "sign": SCION | {"norm": "sign"}}
    given = dict(options[name])
    rule = get_rule(given.pop("rule"))
    values = normal(2, 9, 5).to(dtype)
    before = values.clone()
    state = {name: torch.rand(2, 9, 5, dtype=dtype) for name in rule.remembers({**rule.defaults, **given})}
    kept = {name: held.clone() for name, held in state.items()}
    update = run_locally(
        rule.update(Matrix(values=values, rows=9, columns=5, state=state), **{**rule.defaults, **given})
    )
    if isinstance(update, tuple):
        update, new = update
        assert all(torch.equal(state[name], held) and not torch.equal(new[name], held) for name, held in kept.items())
    assert torch.equal(values, before)
    assert not torch.equal(update, before)


def test_no_rule_is_left_out() -> None:
    # ARO has a file of its own.
    assert {options["rule"] for options in EVERY.values()} | {"adamw", "aro"} == set(rule_names())
