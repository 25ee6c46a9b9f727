"""ARO: what its base maps make of it, how it turns, and that its rotation stays one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist
from symdist.rules import Matrix, get_rule, run_locally
from symdist.rules.linalg.orthonormal import orthonormal

BASES = ("sinkhorn", "row_norm", "sign", "adam", "identity")
SHAPES = [(6, 17), (17, 6), (9, 9)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def remembering(values: Tensor, base: str) -> dict[str, Tensor]:
    return {name: torch.zeros_like(values) for name in get_rule("aro").remembers({"base": base})}


def aro(values: Tensor, state: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    matrix = Matrix(values=values, rows=values.shape[-2], columns=values.shape[-1], state=state)
    return run_locally(get_rule("aro").update(matrix, **options))


def rotation(state: dict[str, Tensor]) -> Tensor:
    """The columns that are kept; what lies beyond them is zero."""
    kept = state["rotation"]
    k = min(kept.shape[-2:])
    assert not kept[..., k:].any()
    return kept[..., :k]


def repeat(values: Tensor, times: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The update of the same matrix after so many steps."""
    state = remembering(values, options["base"])
    update = values
    for _ in range(times):
        update, state = aro(values, state, **options)
    return update, state


def unit(x: Tensor) -> Tensor:
    return x / x.square().mean((-2, -1), keepdim=True).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_power_iteration(shape: tuple[int, int]) -> None:
    m = normal(2, *shape)
    k = min(shape)
    r = torch.eye(shape[0], k, dtype=torch.float64).expand(2, -1, -1)
    for times in (1, 2, 3):
        r = orthonormal(m @ m.mT @ r)
        update, state = repeat(m, times, base="identity")
        assert (rotation(state) - r).abs().max() < 1e-9
        assert (unit(update) - unit(m)).abs().max() < 1e-9
    values, vectors = torch.linalg.eigh(m @ m.mT)
    found = rotation(repeat(m, 2000, base="identity")[1])
    top = vectors.flip(-1)[..., :k]
    assert ((found * top).sum(-2).abs() - 1).abs().max() < 1e-4, values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_norm_comes_to_the_polar_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m = normal(2, *shape).to(dtype)
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    first, _ = repeat(m, 1, base="row_norm")
    last, _ = repeat(m, 2000, base="row_norm")
    wanted = 0.2 * unit(u @ vh)
    assert (first - wanted).abs().max() > 1e-2
    assert (last - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_its_formula(shape: tuple[int, int]) -> None:
    """Two steps with Sinkhorn, said anew: all of R where it is square, without noise to drop."""
    m = [normal(*shape, seed=seed) for seed in (1, 2)]

    def sinkhorn(x: Tensor) -> Tensor:
        for _ in range(5):
            x = x / x.norm(dim=1, keepdim=True) / x.norm(dim=0, keepdim=True)
        return x

    r = torch.eye(shape[0], min(shape), dtype=torch.float64)
    state = remembering(m[0][None], "sinkhorn")
    for each in m:
        q, upper = torch.linalg.qr(each @ sinkhorn(r.mT @ each).mT)
        r = q * upper.diagonal().sign()
        update, state = aro(each[None], state)
        assert (rotation(state)[0] - r).abs().max() < 1e-9
        assert (update[0] - 0.2 * unit(r @ sinkhorn(r.mT @ each))).abs().max() < 1e-9


def test_adam_averages_in_the_rotated_frame() -> None:
    m = [normal(5, 12, seed=seed) for seed in (1, 2, 3)]
    r, v = torch.eye(5, dtype=torch.float64), torch.zeros(5, 12, dtype=torch.float64)
    state = remembering(m[0][None], "adam")
    for each in m:
        x = r.mT @ each
        ahead = x / (0.9 * v + 0.1 * x.square()).sqrt()
        q, upper = torch.linalg.qr(each @ ahead.mT)
        r = q * upper.diagonal().sign()
        x = r.mT @ each
        v = 0.9 * v + 0.1 * x.square()
        update, state = aro(each[None], state, base="adam", beta2=0.9, rms=0.3)
        assert (update[0] - 0.3 * unit(r @ (x / v.sqrt()))).abs().max() < 1e-9
        assert (state["rotated_rms"][0].square() - v).abs().max() < 1e-9 * v.max()


# A square matrix of signs may be singular, and what then completes its Q does not turn: such bases get a wide M.
@pytest.mark.parametrize(
    ("shape", "base"),
    [((6, 17), base) for base in BASES] + [((17, 6), base) for base in ("sinkhorn", "row_norm", "identity")],
)
def test_it_turns_with_the_stream(shape: tuple[int, int], base: str) -> None:
    """Rows turned, and the rotation with them, the update turns; and columns that change places do so in the update."""
    turn, order = torch.linalg.qr(normal(shape[0], shape[0], seed=5)).Q, torch.arange(shape[1]).roll(1)
    k = min(shape)
    plain, turned = (remembering(normal(1, *shape), base) for _ in range(2))
    plain["rotation"][..., :k] = torch.eye(shape[0], dtype=torch.float64)[:, :k]
    turned["rotation"][..., :k] = turn[:, :k]
    for seed in range(4):
        m = normal(1, *shape, seed=seed)
        expected, plain = aro(m, plain, base=base)
        if base == "adam":
            # Its averages stay with their columns.
            found, turned = aro(turn @ m, turned, base=base)
            assert (found - turn @ expected).abs().max() < 1e-9
        else:
            found, turned = aro(turn @ m[..., order], turned, base=base)
            assert (found - turn @ expected[..., order]).abs().max() < 1e-9


@pytest.mark.parametrize("base", ["row_norm", "identity"])
def test_rows_alone_leave_the_columns_free(base: str) -> None:
    turn = torch.linalg.qr(normal(17, 17, seed=5)).Q
    m = normal(1, 6, 17)
    assert (repeat(m @ turn, 3, base=base)[0] - repeat(m, 3, base=base)[0] @ turn).abs().max() < 1e-9


def test_others_know_their_columns() -> None:
    turn = torch.linalg.qr(normal(17, 17, seed=5)).Q
    m = normal(1, 6, 17)
    for base in ("sinkhorn", "sign"):
        assert (repeat(m @ turn, 3, base=base)[0] - repeat(m, 3, base=base)[0] @ turn).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("base", ["sinkhorn", "row_norm", "sign", "identity"])
def test_the_scale_of_the_momentum_is_forgotten(base: str, scale: float) -> None:
    m = normal(2, 6, 17).float()
    assert (repeat(m * scale, 2, base=base)[0] - repeat(m, 2, base=base)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("share", ["matrix", "residual_stage"])
@pytest.mark.parametrize("base", BASES)
def test_a_rotation_stays_one(base: str, share: str) -> None:
    """Of a thousand steps in float32; some with hardly any gradient, or of low rank."""
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((12, 20), (12, 5), (7, 12))]
    names = ("layers.0.o", "layers.0.down", "layers.1.q")
    roles = ("attention_o", "mlp_down", "attention_q")
    groups = [
        {"params": [(name, weight)], "role": role, "view": "transposed" if role == "attention_q" else "as_stored"}
        for name, role, weight in zip(names, roles, weights, strict=True)
    ]
    optimizer = SymDist([{"rule": "aro", "base": base, "share": share, "lr": 1e-3, **group} for group in groups])
    generator = torch.Generator().manual_seed(1)
    for step in range(1000):
        for weight in weights:
            thin = torch.randn(weight.shape[0], 2, generator=generator) @ torch.randn(
                2, weight.shape[1], generator=generator
            )
            full = torch.randn(weight.shape, generator=generator)
            weight.grad = (thin if step % 3 else full) * 10.0 ** -(step % 7)
        optimizer.step()
    whole = []
    for i, weight in enumerate(weights):
        kept = optimizer.state[weight]["rotation"]
        kept = kept.mT if i == 2 else kept
        columns = kept[:, : min(kept.shape)]
        whole.append(columns)
        if share == "matrix":
            assert (columns.mT @ columns - torch.eye(columns.shape[1])).abs().max() < 1e-4
        assert weight.isfinite().all()
    if share == "residual_stage":
        # The first keeps all of it.
        assert (whole[0].mT @ whole[0] - torch.eye(12)).abs().max() < 1e-4
        assert not whole[1].any()
        assert not whole[2].any()


def test_without_a_gradient_nothing_turns() -> None:
    m = normal(1, 6, 9)
    _, state = repeat(m, 2, base="sinkhorn")
    update, after = aro(torch.zeros_like(m), state)
    assert not update.any()
    assert torch.equal(after["rotation"], state["rotation"])


def test_orthonormal_columns_are_those_of_a_qr() -> None:
    for shape in ((12, 5), (7, 7)):
        a = normal(3, *shape)
        q, upper = torch.linalg.qr(a)
        signs = upper.diagonal(dim1=-2, dim2=-1).sign()
        assert (orthonormal(a) - q * signs[:, None, :]).abs().max() < 1e-12
    stiff = normal(1, 30, 8) @ torch.diag(10.0 ** -torch.arange(8.0).double()) @ normal(8, 8, seed=2)
    # Of no full rank: reflections complete it, and leave the others in the stack as they are.
    short = normal(1, 30, 3) @ normal(3, 8, seed=3)
    found = orthonormal(torch.cat([stiff, short, torch.zeros(1, 30, 8).double()]))
    assert (found[:2].mT @ found[:2] - torch.eye(8)).abs().max() < 1e-10
    assert (found[0] - orthonormal(stiff)[0]).abs().max() == 0
    assert (found[1] @ (found[1].mT @ short[0]) - short[0]).abs().max() < 1e-9
    # Whatever its last digits.
    for seed in range(5):
        noisy = short * (1 + 1e-16 * normal(1, 30, 8, seed=seed)) + 1e-16 * normal(1, 30, 8, seed=seed)
        assert (orthonormal(noisy) - found[1]).abs().max() < 1e-9
    assert not found[2].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": "row_norm", "sinkhorn_steps": 3}, "sinkhorn_steps=3 has no effect with base='row_norm'"),
        ({"beta2": 0.9}, "beta2=0.9 has no effect with base='sinkhorn'"),
        ({"base": "adam", "beta2": 1.0}, r"beta2=1\.0 must be in \[0, 1\)"),
        ({"rms": 0.0}, r"rms=0\.0 must be positive"),
        ({"base": "lion"}, "base='lion' is not one of 'sinkhorn', 'row_norm'"),
        ({"view": "gate_up_stacked"}, r"p: the result of rule 'aro' depends on the order of columns, .* 'residual'"),
        ({"strategy": "reduce"}, "rule 'aro' cannot run with strategy 'reduce'"),
    ],
)
def test_what_does_not_fit_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SymDist([{"params": [("p", nn.Parameter(torch.zeros(6, 4)))], "rule": "aro", "lr": 0.1, **options}])
