"""Weights and momentum in bfloat16, rounded by chance."""

import copy

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist
from symdist.rounding import StochasticRounding
from tests import rounding_ranks
from tests.ranks import Ranks


def test_a_number_is_rounded_up_as_often_as_it_is_far_up() -> None:
    low, high = 1.0, 1.0 + 2.0**-7
    for share in (0.0, 0.1, 0.5, 0.9):
        value = torch.full((100_000,), low + share * (high - low))
        for signed in (value, -value):
            rounded = torch.empty_like(signed, dtype=torch.bfloat16)
            StochasticRounding(seed=0, step=0).store([rounded], [signed], keys=["x"])
            assert set(rounded.abs().unique().tolist()) <= {low, high}
            assert rounded.abs().float().sub(low).div(high - low).mean().item() == pytest.approx(share, abs=0.01)


def test_chance_depends_on_seed_step_and_tensor_alone() -> None:
    value = torch.rand(1000)

    def rounded(seed: int, step: int, key: str) -> Tensor:
        target = torch.empty(1000, dtype=torch.bfloat16)
        StochasticRounding(seed=seed, step=step).store([target], [value], keys=[key])
        return target

    first = rounded(0, 0, "a")
    assert torch.equal(first, rounded(0, 0, "a"))
    assert not any(torch.equal(first, other) for other in (rounded(1, 0, "a"), rounded(0, 1, "a"), rounded(0, 0, "b")))


def trained(
    steps: int, *, start: SymDist | None = None, dtype: torch.dtype = torch.bfloat16, **options: object
) -> tuple[nn.Parameter, SymDist]:
    """A matrix that steps towards zero, far less at a time than bfloat16 resolves."""
    weight = nn.Parameter(torch.linspace(1, 2, 64 * 48).view(64, 48).to(dtype))
    optimizer = SymDist([{"params": [("weight", weight)], "rule": "row_norm"}], lr=1e-3, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        weight.grad = weight.detach().clone()
        optimizer.step()
    return weight, optimizer


def test_small_updates_are_not_lost() -> None:
    exact, _ = trained(50, dtype=torch.float32)
    with pytest.warns(UserWarning, match="weight_rounding='stochastic'"):
        lost, _ = trained(50)
    by_chance, _ = trained(50, weight_rounding="stochastic")
    start = torch.linspace(1, 2, 64 * 48).view(64, 48)
    moved = (start - exact.detach()).mean()
    assert (start - lost.detach().float()).mean() < 0.1 * moved
    assert (start - by_chance.detach().float()).mean() == pytest.approx(moved.item(), rel=0.05)


@pytest.mark.filterwarnings("error")
def test_who_rounds_by_chance_is_not_warned() -> None:
    trained(1, weight_rounding="stochastic")


@pytest.mark.parametrize("rule", ["row_norm", "muon", "adamw"])
def test_a_resumed_run_rounds_as_if_it_had_not_stopped(rule: str) -> None:
    options = {"lr": 1e-3, "weight_rounding": "stochastic", "rounding_seed": 3}
    if rule != "adamw":
        options["state_dtype"] = "bfloat16"

    def made(weight: Tensor) -> tuple[nn.Parameter, SymDist]:
        parameter = nn.Parameter(weight.detach().clone())
        return parameter, SymDist([("weight", parameter)], rule=rule, **options)  # type: ignore[arg-type]

    def run(weight: nn.Parameter, optimizer: SymDist, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()

    start = torch.randn(20, 12, generator=torch.Generator().manual_seed(9)).bfloat16()
    whole, optimizer = made(start)
    run(whole, optimizer, range(5))
    stopped, optimizer = made(start)
    run(stopped, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, optimizer = made(stopped)
    optimizer.load_state_dict(saved)
    run(resumed, optimizer, range(2, 5))
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("strategy", ["reduce", "owner"])
def test_replicas_round_alike(ranks: Ranks, strategy: str) -> None:
    assert all(ranks.run(4, rounding_ranks.replicas_agree, strategy))


def test_momentum_takes_half_the_memory_and_little_from_the_result() -> None:
    full, wide = trained(30, dtype=torch.float32)
    half, narrow = trained(30, dtype=torch.float32, state_dtype="bfloat16")
    assert narrow.state[half]["momentum"].nbytes * 2 == wide.state[full]["momentum"].nbytes
    start = torch.linspace(1, 2, 64 * 48).view(64, 48)
    assert (half - full).norm() < 0.01 * (full - start).norm()


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"weight_rounding": "up"}, torch.bfloat16, "'up' is not 'nearest' or 'stochastic'"),
        ({"weight_rounding": "stochastic"}, torch.float16, "weight is float16"),
        ({"state_dtype": "float16"}, torch.float32, "must be 'bfloat16'"),
        ({"state_dtype": "bfloat16"}, torch.float64, "weight is float64"),
        ({"rounding_seed": -1}, torch.bfloat16, "must be a whole number"),
    ],
)
def test_what_cannot_be_rounded_is_refused(options: dict[str, object], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(0, dtype=dtype, **options)  # type: ignore[arg-type]


def test_adamw_keeps_its_moments() -> None:
    with pytest.raises(TypeError, match="state_dtype"):
        SymDist([nn.Parameter(torch.ones(2))], rule="adamw", lr=0.1, state_dtype="bfloat16")


def test_who_has_nothing_to_round_is_told() -> None:
    with pytest.warns(UserWarning, match="rounds only bfloat16 weights"):
        trained(0, dtype=torch.float32, weight_rounding="stochastic")
