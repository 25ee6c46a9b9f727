"""Parameters that are replaced, or laid out anew, after the optimizer was made: it follows them, or says why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, build_optimizer
from tests import follow_ranks
from tests.fsdp1_ranks import batch, language
from tests.ranks import Ranks

GROUP = {"rule": "muon", "lr": 0.1}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("recipe", ["small-moe", "adamw", "normuon", "aro"])
@pytest.mark.parametrize(("after", "by"), [(0, "trainer"), (0, "first step"), (2, "trainer"), (2, "next step")])
def test_a_model_may_be_sharded_at_any_time(ranks: Ranks, world: int, recipe: str, after: int, by: str) -> None:
    expected = follow_ranks.alone(recipe)
    start = dict(language().named_parameters())
    for found in ranks.run(world, follow_ranks.followed, recipe, after, by):
        for name, weight in found.items():
            assert (weight - expected[name]).abs().max() < 1e-9, name
            assert not torch.equal(weight, start[name].detach())


@pytest.mark.parametrize("by", ["state dict", "plan", "checkpoint"])
def test_every_public_call_finds_out(ranks: Ranks, by: str) -> None:
    expected = follow_ranks.alone("small-moe")
    for found in ranks.run(2, follow_ranks.followed, "small-moe", 0, by):
        assert all((weight - expected[name]).abs().max() < 1e-9 for name, weight in found.items())


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_refuse_what_one_cannot_know(ranks: Ranks, rank: int) -> None:
    for i, (said, moved) in enumerate(ranks.run(3, follow_ranks.other_values, rank, True)):
        assert ("b was replaced after the first step" in said) if i == rank else ("another rank" in said)
        assert ("set_optimizer_state_dict" in said) == (i == rank)
        assert not moved


def test_values_do_not_matter_before_the_first_step(ranks: Ranks) -> None:
    assert all(said == "" and moved for said, moved in ranks.run(3, follow_ranks.other_values, 1, False))


def test_shards_that_were_stepped_are_not_cut_anew(ranks: Ranks) -> None:
    for said in ranks.run(2, follow_ranks.laid_out_again):
        assert "w was sharded in another way after the first step" in said
        assert "get_optimizer_state_dict" in said


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero"])
def test_a_first_step_without_any_gradient_asks_what_it_was_built_of(ranks: Ranks, nonfinite: str) -> None:
    for first, then in ranks.run(3, follow_ranks.without_gradients, "nowhere", nonfinite):
        assert "no parameter on any rank has a gradient in the first step" in first
        assert "symdist.build_optimizer(model, recipe)" in first
        assert then == ""
    assert all(said == ("", "") for said in ranks.run(3, follow_ranks.without_gradients, "one rank", nonfinite))


def test_later_steps_may_have_none() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = SymDist([{"params": [weight], **GROUP}])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    SymDist([{"params": [frozen], **GROUP}]).step()


def to_double(model: nn.Module) -> None:
    model.double()


def new_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


def to_empty_and_filled(model: nn.Module) -> None:
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


@pytest.mark.parametrize("change", [to_double, new_parameters, to_empty_and_filled])
@pytest.mark.parametrize("after", [0, 2])
def test_one_process_follows_what_happens_to_a_model(change: Callable[[nn.Module], None], after: int) -> None:
    expected = follow_ranks.alone("small-moe", torch.float32)
    model = language(dtype=torch.float32)
    optimizer = build_optimizer(model, "small-moe")
    for number in range(follow_ranks.STEPS):
        if number == after:
            change(model)
        follow_ranks.step(model, optimizer, None, number)
    wide = torch.float64 if change is to_double else torch.float32
    for name, parameter in model.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-4
        assert {state.dtype for key, state in optimizer.state[parameter].items() if key != "step"} == {wide}


def test_new_parameters_in_the_groups_are_taken_over_with_their_state() -> None:
    def trained(swap: int | None) -> Tensor:
        weight = nn.Parameter(torch.arange(12.0).view(4, 3))
        optimizer = SymDist([{"params": [("w", weight)], **GROUP}])
        for step in range(4):
            if step == swap:
                weight = nn.Parameter(weight.detach().clone())
                optimizer.param_groups[0]["params"] = [weight]
            weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        assert set(optimizer.state) == {weight}
        return weight.detach()

    assert torch.equal(trained(None), trained(0))
    assert torch.equal(trained(None), trained(2))


def test_others_are_refused_by_name() -> None:
    def optimizer() -> SymDist:
        return SymDist([{"params": [("w", nn.Parameter(torch.ones(4, 3)))], **GROUP}])

    def refused(params: list[Any]) -> str:
        changed = optimizer()
        changed.param_groups[0]["params"] = params
        with pytest.raises(ValueError, match="param_groups are not those") as error:
            changed.zero_grad()
        return str(error.value)

    assert "w, of shape (4, 3), has become one of shape (12,)" in refused([nn.Parameter(torch.ones(12))])
    assert "there were 1 of them, now there are 2" in refused([nn.Parameter(torch.ones(4, 3)) for _ in range(2)])
    assert "there were 1 of them, now there are 0" in refused([])
    changed = optimizer()
    changed.param_groups[0]["params"] = [nn.Parameter(torch.ones(4, 3, device="meta"))]
    with pytest.raises(ValueError, match=r"w has moved to the meta device; materialize it"):
        changed.state_dict()


def test_an_optimizer_of_another_model_is_found_out() -> None:
    model, other = language(), language()
    optimizer = build_optimizer(model, "adamw")
    other(batch(0)).backward()
    with pytest.raises(ValueError, match="for another model"):
        optimizer.step()
