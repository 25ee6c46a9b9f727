"""Errors of every precision against the same polynomial in float64, and which one is chosen where."""

import pytest
import torch
from torch import Tensor

from symdist.hardware import HARDWARE, Hardware
from symdist.rules import Matrix, Numerics, get_rule, run_locally
from symdist.rules.linalg.inverse_root import polar_as_published
from symdist.rules.linalg.precision import describe, with_precision

SHAPES = {"tall": (192, 64), "very tall": (640, 64), "square": (96, 96), "wide": (64, 192)}
# The worst of any shape and condition number.
BOUND = {"float32": 3e-3, "float16": 3e-2, "bfloat16": 3e-1}
RULES = {"muon": {}, "polar": {}, "right_spectral": {}, "left_spectral": {}, "scion": {}}


def conditioned(shape: tuple[int, int], condition: int, *, seed: int = 0) -> Tensor:
    """A float64 matrix whose singular values fall evenly, on a logarithmic scale, from 1 to 10^-condition."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, rank, generator=generator).double()).Q for side in shape)
    return ((u * torch.logspace(0, -condition, rank, dtype=torch.float64)) @ v.mT)[None]


def update(rule: str, values: Tensor, **options: object) -> Tensor:
    rows, columns = values.shape[-2:]
    found = run_locally(get_rule(rule).update(Matrix(values=values, rows=rows, columns=columns), **options))
    return found[0] if isinstance(found, tuple) else found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", range(7))
def test_errors_are_those_of_the_precision(rule: str, precision: str, shape: str, condition: int) -> None:
    m = conditioned(SHAPES[shape], condition)
    # The Gram on the larger side is singular: one-sided rules are for matrices that are long on their own side.
    if (rule, shape) in {("right_spectral", "wide"), ("left_spectral", "tall"), ("left_spectral", "very tall")}:
        m = m.mT
    expected = update(rule, m, precision="float32")
    assert error(update(rule, m.float(), precision=precision), expected) < BOUND[precision]


@pytest.mark.parametrize("hardware", [*HARDWARE, "no bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", range(7))
def test_auto_is_never_worse_than_bfloat16_on_the_matrix(hardware: str, shape: str, condition: int) -> None:
    speeds = HARDWARE.get(hardware, Hardware(bandwidth=1e9, flops=1e11, model_flops=1e11))
    m = conditioned(SHAPES[shape], condition)
    expected = update("muon", m, precision="float32")
    published = error(polar_as_published(m.float(), Numerics(damping=0.0, normalise="matrix")), polar(m, expected))
    rows, columns = m.shape[-2:]
    matrix = Matrix(values=m.float(), rows=rows, columns=columns, hardware=speeds)
    auto = error(run_locally(get_rule("muon").update(matrix)), expected)
    assert auto <= published


def polar(m: Tensor, muon: Tensor) -> Tensor:
    """Muon's update without its scale."""
    return muon / max(1.0, m.shape[-2] / m.shape[-1]) ** 0.5


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("rule", ["muon", "polar"])
def test_any_scale_gives_the_same(precision: str, scale: float, rule: str) -> None:
    m = conditioned((96, 64), 2).float()
    found = update(rule, m * scale, precision=precision)
    assert error(found, update(rule, m, precision=precision).double()) < (1e-4 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("precision", BOUND)
def test_matrices_without_rank(precision: str) -> None:
    assert update("muon", torch.zeros(1, 80, 64), precision=precision).eq(0).all()
    assert update("muon", torch.zeros(0, 80, 64), precision=precision).shape == (0, 80, 64)
    one = conditioned((80, 64), 0)[:, :, :1] @ conditioned((80, 64), 0)[:, :1]
    found, expected = update("muon", one.float(), precision=precision), update("muon", one, precision="float32")
    # bfloat16 rounds the matrix itself, and so gives it full rank; so does Muon as published.
    bound = error(update("muon", one.float(), precision="published"), expected) if precision == "bfloat16" else 3e-2
    assert error(found, expected) < bound
    line = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0))
    assert error(update("muon", line, precision=precision), update("muon", line.double(), precision="float32")) < 2e-1


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("scale", ["nuclear", "nuclear_over_frobenius"])
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e10])
def test_norms_are_right_in_each(precision: str, scale: str, factor: float) -> None:
    m = conditioned((96, 64), 1)
    expected = update("polar", m * factor, alpha=1.0, scale=scale, precision="float32")
    found = update("polar", (m * factor).float(), alpha=1.0, scale=scale, precision=precision)
    assert float(found.double().norm() / expected.norm()) == pytest.approx(1, abs=3e-2)
    centered = update("polar", m.float(), centered=True, precision=precision)
    assert centered.sum(-2).abs().max() < 1e-4


def test_short_rows_keep_their_digits_where_a_rule_lengthens_them() -> None:
    m = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(0))
    m[:, 7] *= 1e-4
    card = Matrix(values=m, rows=128, columns=64, hardware=HARDWARE["h100"])
    expected = run_locally(get_rule("hybrid").update(card, order="polar_then_row", precision="float32"))
    found = run_locally(get_rule("hybrid").update(card, order="polar_then_row"))
    assert error(found[:, 7], expected[:, 7].double()) < 0.05


def chosen(hardware: str, edge: int, length: int, *, parts: int = 1, **more: object) -> str:
    numerics = Numerics(damping=0.0, normalise="matrix", **more)  # type: ignore[arg-type]
    given = {"dtype": torch.float32, "edge": edge, "length": length, "parts": parts, "hardware": HARDWARE[hardware]}
    return describe(with_precision(numerics, "auto", **given))  # type: ignore[arg-type]


def test_the_table_of_choices() -> None:
    assert chosen("h100", 4096, 4096) == "float16, on the matrix"
    assert chosen("h100", 1024, 4096) == "float16, restarts after 2"
    assert chosen("h100", 32, 4096) == "float32"
    assert chosen("cpu", 512, 512) == "bfloat16, on the matrix"
    # Two products of the matrix's size in float32 are fewer than ten in bfloat16.
    assert chosen("cpu", 256, 16384) == "float32"
    # Over many ranks, a restart costs more than it saves.
    assert chosen("h100", 4096, 4096, parts=8) == "float16, restarts after 2"
    assert chosen("h100", 2048, 2048, parts=64) == "float32"
    assert chosen("h100", 4096, 4096, method="exact") == "float32"


@pytest.mark.parametrize("options", [{"method": "exact"}, {"damping": 1e-6}])
def test_narrow_precision_refuses_what_it_cannot_do(options: dict[str, object]) -> None:
    for precision in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match="supports neither method='exact' nor damping above 1e-08"):
            get_rule("polar").options({"precision": precision, **options}, where="group 'mine'")
    get_rule("polar").options({"precision": "auto", **options}, where="group 'mine'")
