"""The torch.optim.Optimizer contract, in one process: messages, schedules, state, decay, and what is never touched."""

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from symdist import SymDist, build_optimizer, route
from symdist.engines.external_state import slots

Group = dict[str, Any]

RULES: dict[str, Group] = {
    "row": {"rule": "row_norm"},
    "row_centered_columns": {"rule": "row_norm", "centered": True, "view": "transposed"},
    "right": {"rule": "right_spectral", "alpha": 0.5},
    "left": {"rule": "left_spectral", "centered": True},
    "hybrid": {"rule": "hybrid"},
    "polar": {"rule": "polar", "method": "exact"},
    "muon": {"rule": "muon"},
    "muon_bfloat16": {"rule": "muon", "precision": "bfloat16", "nesterov": False},
    "adamw": {"rule": "adamw"},
    "adamw_hold": {"rule": "adamw", "skip_zero_grad_rows": True},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def every_rule(dtype: torch.dtype = torch.float32) -> list[Group]:
    return [
        {
            "params": [(f"{key}.{i}", weight(8, 6, seed=i, dtype=dtype)) for i in range(2)],
            "role": key,
            "lr": 0.1,
            **rule,
        }
        for key, rule in RULES.items()
    ]


def parameters(optimizer: SymDist) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def advance(optimizer: SymDist, seed: int) -> None:
    for i, parameter in enumerate(parameters(optimizer)):
        parameter.grad = normal(*parameter.shape, seed=100 * seed + i, dtype=parameter.dtype)
    optimizer.step()


def snapshot(optimizer: SymDist) -> list[Tensor]:
    """Copies of every weight and of all its state."""
    held = [[p, *optimizer.state[p].values()] for p in parameters(optimizer)]
    return [tensor.detach().clone() for tensors in held for tensor in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


ROW: Group = {"rule": "row_norm", "lr": 0.1, "role": "mine"}
MUON: Group = {"rule": "muon", "lr": 0.1}


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((4, 4), {"lr": 0.1, "role": "mine"}, "group 'mine' has no 'rule'.*build_optimizer"),
        ((4, 4), ROW | {"rule": "lion"}, "group 'mine': there is no rule 'lion'; the rules are adamw, aro, aurora"),
        ((4, 4), ROW | {"momentun": 0.9}, "group 'mine': rule 'row_norm' knows no option 'momentun'; .*momentum"),
        ((4, 4), ROW | {"alpha": 1.0}, "rule 'row_norm' knows no option 'alpha'"),
        ((4, 4), ROW | {"nesterov": True, "betas": (0, 0)}, "knows no option 'betas', 'nesterov'"),
        ((4, 4), {"rule": "row_norm"}, "group of w has no 'lr'"),
        ((4, 4), ROW | {"lr": -1.0}, "group 'mine': lr=-1.0"),
        ((4, 4), ROW | {"lr": float("nan")}, "lr=nan"),
        ((4, 4), ROW | {"weight_decay": -0.1}, "weight_decay=-0.1"),
        ((4, 4), ROW | {"momentum": 1.0}, "group 'mine': momentum=1.0"),
        ((4, 4), ROW | {"skip_zero_grad_rows": "drop"}, "skip_zero_grad_rows='drop' must be true or false"),
        ((4, 4), ROW | {"strategy": "rank0"}, "strategy='rank0'"),
        (
            (4, 4),
            MUON | {"adjust_lr": "nuclear"},
            "adjust_lr='nuclear' is not one of 'spectral', 'match_rms_adamw', 'none'",
        ),
        ((4, 4), MUON | {"side": "top"}, "side='top' is not one of 'auto', 'right', 'left'"),
        ((4, 4), MUON | {"precision": "bfloat16", "method": "exact"}, "neither method='exact' nor"),
        ((4, 4), MUON | {"rule": "hybrid", "order": "polar_then_row", "alpha": 1.0}, "alpha has no effect"),
        ((4, 4), MUON | {"rule": "hybrid", "order": "polar_then_row", "alpha": 0.0}, "alpha has no effect"),
        ((4, 4), MUON | {"rule": "polar", "scale": "none", "alpha": 1.0}, "alpha=1.0 .*remove one"),
        ((4, 4), MUON | {"rule": "hybrid", "scale": "none", "alpha": 1.0}, "alpha=1.0 .*remove one"),
        ((4,), MUON, "w has shape .4,.: rule 'muon' needs a matrix; use rule 'adamw'"),
        ((), ROW, "w has shape .*needs a matrix"),
        ((2, 2, 3, 3), ROW, "w: shape .2, 2, 3, 3. is neither"),
        ((4, 4), ROW | {"view": "rosw"}, "w: view 'rosw' is not one of 'as_stored', 'transposed'"),
        ((5, 4), ROW | {"view": "gate_up_stacked"}, "w: gate_up_stacked needs an even number.*5, 4"),
        ((4, 5), ROW | {"view": "gate_up_interleaved"}, "w: gate_up_interleaved needs an even number.*4, 5"),
        ((10, 4), MUON | {"view": {"heads": 3, "dim": 0}}, "w: dimension 0 of .10, 4. does not split into 3 heads"),
        ((4, 10), MUON | {"view": {"heads": 0, "dim": 1}}, "does not split into 0 heads"),
        ((4, 10), MUON | {"view": {"heads": 2, "dim": 2}}, "w: view .* should be"),
        ((4, 4), ROW | {"padding_rows": 4}, "w: padding_rows=4 needs a matrix of more than 4 rows"),
        ((4, 4), ROW | {"padding_rows": 1, "view": {"heads": 2, "dim": 0}}, "padding_rows=1 .*view {'heads': 2"),
        ((3, 4, 4), ROW | {"padding_rows": 1}, "w: padding_rows=1"),
        ((4, 4), ROW | {"strategy": "owner"}, "w: rule 'row_norm' cannot run with strategy 'owner'.*'local'"),
        ((4, 4), ROW | {"strategy": "reduce"}, "w: rule 'row_norm' cannot run with strategy 'reduce'"),
        ((0, 4), ROW, "w has shape .0, 4., so it is empty"),
        ((4, 4), ROW | {"padding_rows": 1.5}, "padding_rows=1.5 must be a whole number"),
        ((4, 4), ROW | {"centered": "no"}, "centered='no' must be true or false"),
        ((4, 4), ROW | {"eps": 1e-8}, "eps=1e-08 is not one of 'none', 'reference'"),
        ((4, 4), ROW | {"rule": "normuon", "eps": -1.0}, "eps=-1.0 must be 0 or more"),
        ((4, 4), ROW | {"momentum": "x"}, "momentum='x' must be a finite number"),
        ((4, 4), ROW | {"weight_decay": None}, "weight_decay=None"),
        ((4, 4), MUON | {"ns_steps": -1}, "ns_steps=-1 must be 0 or more"),
        ((4, 4), MUON | {"ns_steps": 2.5}, "ns_steps=2.5 must be a whole number"),
        ((4, 4), MUON | {"damping": -1.0}, "damping=-1.0 must be 0 or more"),
        ((4, 4), MUON | {"rule": "polar", "alpha": float("nan")}, "alpha=nan must be a finite number"),
        ((4, 4), MUON | {"rule": "adamw", "betas": (0.9, 1.5)}, "betas=.* must be two numbers"),
        ((4, 4), MUON | {"rule": "adamw", "betas": 0.9}, "betas=0.9 must be two numbers"),
        ((4, 4), MUON | {"rule": "adamw", "view": "bogus"}, "w: view 'bogus' is not one of"),
        ((4, 4), ROW | {"params": [3]}, "'params' must be parameters"),
        ((4, 4), ROW | {"param_names": ["a", "b"]}, "1 params but 2 names"),
        ((4, 4), ROW | {"params": []}, "group 'mine' has no parameters"),
    ],
)
def test_what_cannot_run_is_an_error_that_names_it(shape: tuple[int, ...], group: Group, message: str) -> None:
    given = {"params": [weight(*shape)], **group}
    if given["params"] and "param_names" not in given:
        given["param_names"] = ["w"]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SymDist([given])
    optimizer = SymDist([{"params": [weight(3, 3)], **ROW}])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        optimizer.add_param_group(given)
    assert str(optimizer.state_dict()) == str(before)
    assert len(optimizer.state) == 1
    advance(optimizer, 1)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False), "w is torch.int64"),
        (nn.Parameter(torch.ones(2, 2, device="meta")), "w is on the meta device.*to_empty"),
        (nn.Parameter(torch.ones(2, 2)) * 2, "non-leaf"),
    ],
)
def test_parameters_that_cannot_be_stepped(parameter: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SymDist([{"params": [("w", parameter)], **ROW}])


def test_a_parameter_may_be_given_once() -> None:
    w = weight(3, 3)
    with pytest.raises(ValueError, match="b is the same tensor as a"):
        SymDist([{"params": [("a", w), ("b", w)], **ROW}])
    with pytest.raises(ValueError, match="b is the same tensor as a"):
        SymDist([{"params": [("a", w)], **ROW}, {"params": [("b", w)], **MUON}])


@pytest.mark.parametrize("options", [{"nonfinite": "ignore"}, {"exchange": {"bucket_bytes": 0}}])
def test_options_of_the_optimizer_are_checked(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=next(iter(value)) if isinstance(value, dict) else name):
        SymDist([{"params": [weight(3, 3)], **ROW}], **options)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensors": lambda a, b: [a, b],
    "pairs": lambda a, b: [("a", a), ("b", b)],
    "a generator of pairs": lambda a, b: iter([("a", a), ("b", b)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_group_of_defaults_as_in_torch(form: str) -> None:
    a, b, c, d = (weight(4, 3) for _ in range(4))
    optimizer = SymDist(FORMS[form](a, b), rule="muon", lr=1e-2, weight_decay=0.1, momentum=0.5, nesterov=False)
    (group,) = optimizer.param_groups
    assert group["params"][0] is a
    assert group["params"][1] is b
    assert group["param_names"] == (["param_0", "param_1"] if form == "tensors" else ["a", "b"])
    given = {"rule": "muon", "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.5, "nesterov": False}
    assert {key: optimizer.defaults[key] for key in given} == given
    assert {key: group[key] for key in given} == given
    other = SymDist([{"params": [c, d], **given}])
    for optimizer_, (x, y) in ((optimizer, (a, b)), (other, (c, d))):
        x.grad, y.grad = normal(4, 3, seed=1), normal(4, 3, seed=2)
        optimizer_.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_one_tensor_is_one_parameter_and_a_set_is_refused() -> None:
    a = weight(4, 3)
    assert SymDist(a, rule="muon", lr=0.1).param_groups[0]["params"][0] is a
    with pytest.raises(ValueError, match="'params' is a set, whose order differs between ranks"):
        SymDist({a}, rule="muon", lr=0.1)


def test_groups_over_defaults() -> None:
    a, b, c = weight(4, 3), weight(4, 3), weight(3)
    groups = [{"params": [a], "rule": "row_norm"}, {"params": [b], "lr": 0.3}]
    optimizer = SymDist(groups, rule="muon", lr=1e-2, weight_decay=0.1, nesterov=False)
    first, second = optimizer.param_groups
    assert (first["rule"], first["lr"], first["weight_decay"]) == ("row_norm", 1e-2, 0.1)
    assert "nesterov" not in first
    assert (second["rule"], second["lr"], second["nesterov"]) == ("muon", 0.3, False)
    optimizer.add_param_group({"params": [("c", c)], "rule": "adamw"})
    third = optimizer.param_groups[2]
    assert (third["lr"], third["weight_decay"], third["param_names"]) == (1e-2, 0.1, ["c"])
    assert "nesterov" not in third
    assert groups == [{"params": [a], "rule": "row_norm"}, {"params": [b], "lr": 0.3}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentun": 0.9}, "unexpected keyword argument 'momentun'; did you mean 'momentum'?"),
        ({"betas": (0.9, 0.95)}, "unexpected keyword argument 'betas'"),
        ({"replicas": None}, "unexpected keyword argument 'replicas'"),
    ],
)
def test_an_unknown_keyword_is_a_type_error(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        SymDist([weight(3, 3)], rule="muon", lr=0.1, **options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [("muonn", "param group of param_0: there is no rule 'muonn'"), (None, "param group of param_0 has no 'rule'")],
)
def test_a_misspelt_rule_is_named_before_the_keywords_it_lacks(rule: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SymDist([weight(3, 3)], rule=rule, lr=0.1, momentum=0.9)


def test_an_unknown_role_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="'ruoter', which is no role; did you mean 'router'"):
        build_optimizer(nn.Sequential(nn.Linear(3, 3)), "muon", overrides={"ruoter": {"lr": 1.0}})


def test_lr_scales_a_recipe_and_overrides_stand() -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(3, 5), "norm": nn.LayerNorm(3)})
    own, scaled = (route(model, "muon", lr=lr, overrides={"norm": {"lr": 7.0}}) for lr in (None, 0.5))
    rates = [{group["role"]: group["lr"] for group in groups} for groups in (own, scaled)]
    assert rates[1]["mlp_up"] == 0.5
    assert rates[1]["bias"] == pytest.approx(rates[0]["bias"] * 0.5 / rates[0]["mlp_up"])
    assert rates[1]["norm"] == rates[0]["norm"] == 7.0


def test_repr_is_a_line_a_group() -> None:
    optimizer = SymDist(
        [{"params": [weight(4, 3) for _ in range(9)], "rule": "muon", "role": "matrix"}, {"params": [weight(3)]}],
        rule="adamw",
        lr=0.1,
    )
    assert repr(optimizer).splitlines() == [
        "SymDist (",
        "  (0) matrix: muon, 9 parameters, lr 0.1, weight_decay 0",
        "  (1) params: adamw, 1 parameters, lr 0.1, weight_decay 0",
        ")",
    ]


@pytest.mark.parametrize(
    "build",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=6, cycle_momentum=False),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=6),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1),
    ],
    ids=["lambda", "cosine", "one_cycle", "one_cycle_momentum", "plateau"],
)
def test_schedulers_set_the_step_taken(build: Callable[[SymDist], Any]) -> None:
    optimizer = SymDist([{"params": [weight(6, 4)], "rule": "row_norm", "lr": 0.3}])
    scheduler = build(optimizer)
    lengths, rates = [], []
    for step in range(4):
        before = parameters(optimizer)[0].detach().clone()
        advance(optimizer, step)
        lengths.append(float((parameters(optimizer)[0].detach() - before).norm(dim=1).mean()))
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert lengths == pytest.approx(rates, rel=1e-4)
    assert len(set(rates)) > 1


def test_closure_and_zero_grad() -> None:
    w = weight(4, 3)
    optimizer = SymDist([{"params": [w], **ROW}])
    seen = []

    def closure() -> float:
        optimizer.zero_grad()
        assert w.grad is None
        seen.append(torch.is_grad_enabled())
        loss = w.square().sum()
        loss.backward()
        return loss  # type: ignore[return-value]

    losses = [optimizer.step(closure) or 0.0 for _ in range(3)]
    assert seen == [True] * 3
    assert losses[0] > losses[1] > losses[2]
    assert optimizer.step() is None


def test_a_group_added_in_training_runs_as_if_always_there() -> None:
    late, early = (SymDist([{"params": [weight(4, 3)], **ROW}]) for _ in range(2))
    advance(late, 0)
    advance(early, 0)
    late.add_param_group({"params": weight(3, 5), **MUON})
    fresh = SymDist([{"params": [weight(3, 5)], **MUON}])
    for step in (1, 2):
        parameters(early)[0].grad = normal(4, 3, seed=100 * step)
        parameters(fresh)[0].grad = normal(3, 5, seed=100 * step + 1)
        early.step()
        fresh.step()
        advance(late, step)
    assert same(snapshot(late), snapshot(early) + snapshot(fresh))
    assert set(late.strategies()) == {"param_0", "param_1"}


def test_state_is_complete_before_the_first_step() -> None:
    optimizer = SymDist(every_rule(torch.bfloat16))
    before = {key: (x.shape, x.dtype) for p in parameters(optimizer) for key, x in optimizer.state[p].items()}
    keys = [set(optimizer.state[p]) for p in parameters(optimizer)]
    assert all(keys)
    held = [x for p in parameters(optimizer) for x in optimizer.state[p].values()]
    assert all(not x.any() and x.dtype == torch.float32 for x in held)
    advance(optimizer, 0)
    assert before == {key: (x.shape, x.dtype) for p in parameters(optimizer) for key, x in optimizer.state[p].items()}
    assert keys == [set(optimizer.state[p]) for p in parameters(optimizer)]
    assert all(x.any() for p in parameters(optimizer) for x in optimizer.state[p].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resuming_from_a_file_continues_bit_for_bit(dtype: torch.dtype) -> None:
    first = SymDist(every_rule(dtype))
    for step in range(3):
        advance(first, step)
    first.param_groups[0]["lr"] = 0.03
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SymDist(every_rule(dtype))
    advance(second, 9)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for mine, theirs in zip(parameters(second), parameters(first), strict=True):
            mine.copy_(theirs)
    assert second.param_groups[0]["lr"] == 0.03
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for p in parameters(second) for x in wide_state(second, p)} == {wide}
    for step in range(3, 6):
        advance(first, step)
        advance(second, step)
    assert same(snapshot(first), snapshot(second))


def wide_state(optimizer: SymDist, parameter: nn.Parameter) -> list[Tensor]:
    return [x for key, x in optimizer.state[parameter].items() if key != "step"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": [weight(4, 3)], **MUON}], "'mine' has rule 'row_norm'.*'muon'"),
        ([{"params": [weight(4, 3), weight(4, 3)], **ROW}], "1 parameters; the saved one has 'row_norm' and 2"),
        ([{"params": [weight(4, 4)], **ROW}], r"w: needs state 'momentum' of shape \(4, 3\); .* \(4, 4\)"),
        ([{"params": [weight(4, 3)], **ROW, "centered": True}], "centered"),
        ([{"params": [weight(4, 3)], **ROW, "view": "transposed"}], "view"),
        ([{"params": [weight(4, 3)], **ROW, "skip_zero_grad_rows": True}], "skip_zero_grad_rows"),
        (
            [{"params": [weight(4, 3)], **ROW}, {"params": [weight(2, 2)], **ROW}],
            "has 2 param groups, this optimizer 1",
        ),
    ],
)
def test_another_runs_state_is_refused_whole(groups: list[Group], message: str) -> None:
    optimizer = SymDist([{"params": [("w", weight(4, 3))], **ROW}])
    advance(optimizer, 0)
    before, options = snapshot(optimizer), str(optimizer.param_groups)
    other = SymDist([group | {"lr": 9.0} for group in groups])
    advance(other, 1)
    for saved, problem in (
        (other.state_dict(), message),
        (optimizer.state_dict() | {"state": {}}, "saved state has none"),
    ):
        with pytest.raises(ValueError, match=problem):
            optimizer.load_state_dict(saved)
        assert same(snapshot(optimizer), before)
        assert str(optimizer.param_groups) == options


def test_loading_does_not_share_memory_with_what_was_loaded() -> None:
    first, second = (SymDist(every_rule()) for _ in range(2))
    advance(first, 0)
    second.load_state_dict(first.state_dict())
    before = snapshot(first)
    advance(second, 1)
    assert same(snapshot(first), before)


@pytest.mark.parametrize(
    ("option", "value"), [("eps", "reference"), ("skip_zero_grad_rows", True), ("padding_rows", 1)]
)
def test_a_rules_option_does_not_change_after_construction(option: str, value: Any) -> None:
    optimizer = SymDist([{"params": [weight(4, 4)], **ROW}])
    optimizer.param_groups[0][option] = value
    before = parameters(optimizer)[0].detach().clone()
    parameters(optimizer)[0].grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=f"'mine': {option} changed after construction"):
        optimizer.step()
    assert torch.equal(parameters(optimizer)[0], before)


@pytest.mark.parametrize(
    "options", [{"rule": "muon"}, {"rule": "adamw"}, {"rule": "row_norm", "skip_zero_grad_rows": True}]
)
def test_cautious_weight_decay_takes_what_goes_inward(options: dict[str, Any]) -> None:
    """Decoupled decay of those weights alone that the update does not take away from zero, by the weights before."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    gradient[2] = 0
    stepped = []
    for decay, cautious in ((0.0, False), (0.5, True), (0.5, False)):
        weight = nn.Parameter(start.clone())
        optimizer = SymDist(
            [{"params": [weight], "lr": 0.1, "weight_decay": decay, "cautious_weight_decay": cautious, **options}]
        )
        weight.grad = gradient.clone()
        optimizer.step()
        stepped.append(weight.detach())
    plain, found, everywhere = stepped
    held = torch.ones(6, 1, dtype=torch.float64)
    if "skip_zero_grad_rows" in options:
        held[2] = 0
    inward = ((start - plain) * start >= 0).double() * held
    assert 0 < inward.mean() < 1
    assert torch.allclose(found, plain - 0.1 * 0.5 * inward * start, rtol=0, atol=1e-12)
    assert not torch.allclose(found, everywhere)


def test_cautious_weight_decay_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="cautious_weight_decay=1 must be true or false"):
        SymDist([{"params": [nn.Parameter(torch.zeros(2, 2))], "rule": "muon", "lr": 0.1, "cautious_weight_decay": 1}])


def test_engines_keep_two_tensors() -> None:
    assert slots("adamw") == {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    assert slots("aro") == {"momentum": "exp_avg", "rotation": "exp_avg_sq"}
    with pytest.raises(ValueError, match="rule 'aro' remembers momentum, rotation, rotated_rms, and the checkpoints"):
        slots("aro", {"base": "adam"})
