"""Inverse roots against eigendecompositions, and Muon's Gram route against the iteration it stands for."""

import numpy
import pytest
import torch
from torch import Tensor

from symdist.rules import InverseRoot, Numerics, inverse_root
from symdist.rules.linalg.inverse_root import polar_as_published

METHODS = ["polar_express", "newton_schulz", "exact"]
# What Muon runs, as published: five steps, written out apart from the code.
MUON_STEPS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def spectrum(*values: float, batch: int = 1, seed: int = 0) -> Tensor:
    """Symmetric matrices with these eigenvalues, float64."""
    d = len(values)
    q = torch.linalg.qr(torch.randn(batch, d, d, generator=torch.Generator().manual_seed(seed)).double()).Q
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.mT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def whitened(gram: Tensor, root: Tensor) -> Tensor:
    """The eigenvalues of `R·C·R`, all one where R is the inverse root of C."""
    return torch.linalg.eigvalsh(root @ gram @ root)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_exact_is_the_eigendecomposition(scale: float) -> None:
    gram = spectrum(0.01, 0.3, 1.0, 2.0, 5.0, batch=3) * scale
    expected = []
    for one in gram.numpy():
        values, vectors = numpy.linalg.eigh(one)
        expected.append(vectors @ numpy.diag(values**-0.5) @ vectors.T)
    root = inverse_root(gram, Numerics(method="exact", damping=0.0))
    assert error(root.matrix, torch.from_numpy(numpy.stack(expected))) < 1e-10
    traces = torch.full((3, 1, 1), (0.01**0.5 + 0.3**0.5 + 1 + 2**0.5 + 5**0.5) * scale**0.5).double()
    assert error(root.nuclear, traces) < 1e-6
    assert error(root.frobenius, torch.full((3, 1, 1), (8.31 * scale) ** 0.5).double()) < 1e-6


@pytest.mark.parametrize(("method", "steps"), [("polar_express", 12), ("newton_schulz", 20)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_more_steps_reach_the_root(method: str, steps: int, dtype: torch.dtype, bound: float) -> None:
    gram = spectrum(0.1, 0.3, 1.0, 2.0, 5.0, batch=3)
    exact = inverse_root(gram, Numerics(method="exact", damping=0.0))
    root = inverse_root(gram.to(dtype), Numerics(method=method, steps=steps, damping=0.0))  # type: ignore[arg-type]
    assert error(root.matrix, exact.matrix) < bound
    assert error(root.nuclear, exact.nuclear) < bound


def test_default_steps_are_near() -> None:
    """Five steps leave singular values within about a tenth of one, over a condition number of 1000 in the Gram."""
    gram = spectrum(0.002, 0.02, 0.2, 1.0, 2.0)
    values = whitened(gram, inverse_root(gram, Numerics()).matrix).sqrt()
    assert 0.85 < values.min() < values.max() < 1.15
    assert (values - 1).abs().max() > 1e-3
    longer = whitened(gram, inverse_root(gram, Numerics(steps=8)).matrix).sqrt()
    assert (longer - 1).abs().max() < (values - 1).abs().max() / 2


@pytest.mark.parametrize("damping", [1e-2, 1e-1])
@pytest.mark.parametrize("method", METHODS)
def test_damping_is_a_share_of_the_norm(method: str, damping: float) -> None:
    gram = spectrum(0.5, 1.0, 3.0) * 1e-6
    damped = gram + damping * gram.norm() * torch.eye(3).double()
    numerics = Numerics(method=method, steps=0 if method == "exact" else 20, damping=damping)  # type: ignore[arg-type]
    assert error(inverse_root(gram, numerics).matrix, inverse_root(damped, Numerics(method="exact")).matrix) < 1e-6


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_muon_on_the_gram_is_muon_on_the_matrix(shape: tuple[int, int], scale: float) -> None:
    m = scale * normal(2, *shape)
    x = m / (1.02 * torch.linalg.matrix_norm(m, keepdim=True))
    for a, b, c in MUON_STEPS:
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    numerics = Numerics(damping=0.0, normalise="matrix")
    assert error(inverse_root(m @ m.mT, numerics).matrix @ m, x) < 1e-8
    assert error(m @ inverse_root(m.mT @ m, numerics).matrix, x) < 1e-8


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("normalise", ["gram", "matrix"])
@pytest.mark.parametrize("method", METHODS)
def test_the_scale_may_be_any_that_float32_holds(method: str, normalise: str, scale: float) -> None:
    gram = spectrum(0.1, 1.0, 3.0, batch=2)
    numerics = Numerics(method=method, steps=0 if method == "exact" else 15, normalise=normalise)  # type: ignore[arg-type]
    root = inverse_root((gram * scale).float(), numerics)
    exact = inverse_root(gram, Numerics(method="exact"))
    assert error(root.matrix.double() * scale**0.5, exact.matrix) < 1e-4
    assert error(root.nuclear.double() / scale**0.5, exact.nuclear) < 1e-4
    assert error(root.frobenius.double() / scale**0.5, exact.frobenius) < 1e-4


@pytest.mark.parametrize("normalise", ["gram", "matrix"])
@pytest.mark.parametrize("damping", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_singular_grams_have_finite_roots(method: str, dtype: torch.dtype, damping: float, normalise: str) -> None:
    m = normal(1, 6, 2).to(dtype)
    grams = torch.cat([torch.zeros(1, 6, 6, dtype=dtype), m @ m.mT])
    root = inverse_root(grams, Numerics(method=method, damping=damping, normalise=normalise))  # type: ignore[arg-type]
    assert all(x.isfinite().all() for x in (root.matrix, root.nuclear, root.frobenius))
    assert root.nuclear[0] == root.frobenius[0] == 0
    assert torch.linalg.matrix_norm(root.matrix[1] @ m[0], 2) < 1.2
    assert torch.linalg.matrix_norm(root.matrix[1] @ m[0], 2) > 0.6


def parts(root: InverseRoot) -> tuple[Tensor, Tensor, Tensor]:
    return root.matrix, root.nuclear, root.frobenius


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_its_matrices_one_by_one(method: str) -> None:
    gram = spectrum(0.1, 1.0, 3.0, batch=4) * torch.tensor([1e-6, 1.0, 1e6, 0.0]).double()[:, None, None]
    numerics = Numerics(method=method)  # type: ignore[arg-type]
    together = inverse_root(gram, numerics)
    for i in range(4):
        alone = inverse_root(gram[i : i + 1], numerics)
        for found, expected in zip(parts(together), parts(alone), strict=True):
            assert torch.allclose(found[i : i + 1], expected, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_small_and_empty(method: str) -> None:
    numerics = Numerics(method=method, steps=0 if method == "exact" else 15)  # type: ignore[arg-type]
    one = inverse_root(torch.tensor([[[4.0]], [[1e-8]]], dtype=torch.float64), numerics)
    assert torch.allclose(one.matrix.flatten(), torch.tensor([0.5, 1e4]).double(), rtol=1e-6)
    assert torch.allclose(one.nuclear.flatten(), torch.tensor([2.0, 1e-4]).double(), rtol=1e-6)
    none = inverse_root(torch.zeros(0, 3, 3), numerics)
    assert none.matrix.shape == (0, 3, 3)
    assert none.nuclear.shape == none.frobenius.shape == (0, 1, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_arithmetic_is_float32_or_wider(method: str, dtype: torch.dtype, wide: torch.dtype) -> None:
    gram = spectrum(0.5, 1.0, 3.0).to(dtype)
    before = gram.clone()
    numerics = Numerics(method=method, steps=0 if method == "exact" else 12)  # type: ignore[arg-type]
    root = inverse_root(gram, numerics)
    assert {x.dtype for x in parts(root)} == {wide}
    symmetric = (gram.double() + gram.double().mT) / 2
    assert error(root.matrix, inverse_root(symmetric, Numerics(method="exact")).matrix) < 1e-5
    assert torch.equal(gram, before)


def test_float32_and_exact_takes_the_root_in_float64() -> None:
    m = normal(1, 40, 3)
    gram = (m @ torch.diag_embed(torch.tensor([[1.0, 1e-2, 3e-3]]).double())).float()
    gram = gram.mT @ gram
    root = inverse_root(gram, Numerics(method="exact", damping=0.0)).matrix
    expected = inverse_root(gram.double(), Numerics(method="exact", damping=0.0)).matrix
    assert error(root, expected) < 3e-7


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_iteration_is_near_the_polar_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, _, vh = torch.linalg.svd(normal(3, *shape), full_matrices=False)
    m = ((u * torch.linspace(0.3, 2.0, 8).double()) @ vh).to(dtype)
    before = m.clone()
    x = polar_as_published(m, Numerics(damping=0.0, normalise="matrix"))
    assert x.dtype == dtype
    assert torch.equal(m, before)
    assert error(x, u @ vh) < 0.15
    values = torch.linalg.svdvals(x.double())
    assert 0.75 < values.min() < values.max() < 1.25
    assert polar_as_published(torch.zeros_like(m), Numerics(normalise="matrix")).eq(0).all()
