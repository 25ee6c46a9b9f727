"""PyTorch's generic tests of optimizers, on every rule: its inputs, its errors, and what is meant to be otherwise."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_db

from symdist import SymDist, rule_names

RULES = rule_names()
LR = 0.01
DEVIATIONS = {
    "maximize": "no rule maximises: negate the loss",
    "amsgrad": "adamw is AdamW without the maximum; the other rules have no second moment to keep one of",
    "dampening": "momentum is as each rule's paper has it",
    "ns_coefficients": "the coefficients are those of the method",
    "ns_steps": "called `steps`",
    "foreach": "chosen by device",
    "no lr": "learning rates of different rules have no common default",
    "a bare list": "every group names a rule",
    "no gradients": "a first step without any gradient is an error: the optimizer may be of another model",
    "copies": "process groups do not copy: build another and load its state",
    "complex": "only floating-point parameters have a symmetry that the rules know",
    "vectors": "a rule of matrices refuses a vector by name",
}
"""What torch.optim has and symdist has otherwise, and why."""

SHARED = ("AdamW", "Muon", "SGD")
INFO = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in SHARED}
KNOWN = {"ns_steps": "steps"}
INPUTS = [
    (rule, kind, given.desc, {KNOWN.get(key, key): value for key, value in given.kwargs.items()})
    for rule in RULES
    for kind, info in INFO.items()
    for given in info.optim_inputs_func("cpu")
]


def group(rule: str, parameters: Any, **options: Any) -> dict[str, Any]:
    return {"params": parameters, "rule": rule, "lr": LR, **options}


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((6, 4), (4, 6), (3, 5, 4))]


def give(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def stepped(rule: str, steps: int = 2, **options: Any) -> tuple[list[nn.Parameter], SymDist]:
    parameters = weights()
    optimizer = SymDist([group(rule, parameters, **options)])
    for step in range(steps):
        give(parameters, step)
        optimizer.step()
    return parameters, optimizer


def all_state(optimizer: SymDist) -> list[Tensor]:
    return [each for g in optimizer.param_groups for p in g["params"] for each in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize(("rule", "kind", "desc", "options"), INPUTS, ids=str)
def test_inputs_train_or_are_refused_by_name(rule: str, kind: str, desc: str, options: dict[str, Any]) -> None:
    parameters = weights()
    start = [parameter.detach().clone() for parameter in parameters]
    try:
        optimizer = SymDist([group(rule, parameters, **options)])
    except ValueError as error:
        unknown = [key for key in options if repr(key) in str(error)]
        assert unknown
        # What this rule has no use for, or what none has.
        assert all(key in DEVIATIONS or key in ("momentum", "nesterov", "steps") for key in unknown)
        return

    def loss() -> Tensor:
        return sum((parameter.square().sum() for parameter in parameters), torch.zeros(()))

    first = float(loss())
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss()) < first
    assert not any(map(torch.equal, parameters, start))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_adamw_is_pytorchs(options: dict[str, Any]) -> None:
    mine, theirs = weights(), weights()
    optimizers = (
        SymDist([group("adamw", mine, betas=(0.9, 0.95), **options)]),
        torch.optim.AdamW(theirs, lr=LR, betas=(0.9, 0.95), weight_decay=options.get("weight_decay", 0.0)),
    )
    for step in range(5):
        for parameters, optimizer in zip((mine, theirs), optimizers, strict=True):
            give(parameters, step)
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_for_lr_is_a_number(rule: str) -> None:
    given = torch.tensor(LR)
    number, tensor = stepped(rule)[0], stepped(rule, lr=given)[0]
    assert all(map(torch.equal, number, tensor))
    parameters, optimizer = stepped(rule, lr=given)
    given.fill_(0)
    before = [parameter.detach().clone() for parameter in parameters]
    give(parameters, 9)
    optimizer.step()
    assert all(map(torch.equal, parameters, before)), "a tensor may be changed from outside, as schedulers do"


@pytest.mark.parametrize("rule", RULES)
def test_groups_have_their_own_rate_and_decay(rule: str) -> None:
    parameters = weights()
    start = [parameter.detach().clone() for parameter in parameters]
    groups = [
        group(rule, [parameters[0]], lr=0.0, weight_decay=0.5),
        group(rule, [parameters[1]], weight_decay=0.5),
        group(rule, [parameters[2]]),
    ]
    optimizer = SymDist(groups)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[0], start[0])
    assert torch.allclose(parameters[1], start[1] * (1 - LR * 0.5))
    assert torch.equal(parameters[2], start[2])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_gradients(rule: str) -> None:
    """PyTorch's does nothing; ours is an error the first time, and the step of a zero gradient later."""
    parameters = weights()
    optimizer = SymDist([group(rule, parameters)])
    with pytest.raises(ValueError, match="no parameter on any rank has a gradient"):
        optimizer.step()
    parameters, optimizer = stepped(rule)
    again, other = stepped(rule)
    optimizer.zero_grad()
    for parameter in again:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, all_state(optimizer), all_state(other)))
    assert "no gradients" in DEVIATIONS


@pytest.mark.parametrize("rule", RULES)
def test_state_is_there_and_deterministic(rule: str) -> None:
    one, other = stepped(rule)[1], stepped(rule)[1]
    assert all(one.state[p] for p in one.param_groups[0]["params"])
    assert all(map(torch.equal, all_state(one), all_state(other)))
    assert str(one.state_dict()) == str(other.state_dict())


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_state_goes_through_a_file(rule: str, weights_only: bool) -> None:
    parameters, optimizer = stepped(rule)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = stepped(rule, steps=1)
    with torch.no_grad():
        for a, b in zip(again, parameters, strict=True):
            a.copy_(b)
    other.load_state_dict(torch.load(file, weights_only=weights_only))
    for each, stepping in ((parameters, optimizer), (again, other)):
        give(each, 7)
        stepping.step()
    assert all(map(torch.equal, all_state(optimizer), all_state(other)))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_no_tensor_is_loaded(rule: str) -> None:
    _, optimizer = stepped(rule)
    state = copy.deepcopy(optimizer.state_dict())
    for each in state["state"].values():
        if "step" in each:
            each["step"] = each["step"].item()
    other = stepped(rule, steps=1)[1]
    other.load_state_dict(state)
    assert all(
        torch.equal(a, b)
        for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
        for a, b in zip(optimizer.state[p].values(), other.state[q].values(), strict=True)
    )


@pytest.mark.parametrize("rule", RULES)
def test_hooks_are_called(rule: str) -> None:
    parameters, optimizer = stepped(rule)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": seen.append("after saving")})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: (seen.append("before loading"), state["inner"])[1])
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    give(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert "more" in state
    optimizer.load_state_dict({"inner": state})
    assert seen == [
        *("before step", "after step", "before saving", "after saving"),
        *("before loading", "after loading"),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_copies_are_refused(rule: str) -> None:
    optimizer = stepped(rule)[1]
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="build another and load_state_dict"):
            act(optimizer)
    assert "copies" in DEVIATIONS


@pytest.mark.parametrize("rule", RULES)
def test_what_has_no_elements_is_said(rule: str) -> None:
    empty = nn.Parameter(torch.empty(0, 4))
    if rule == "adamw":
        other = nn.Parameter(torch.ones(2))
        other.grad = torch.ones(2)
        SymDist([group(rule, [empty, other])]).step()
        assert (other < 1).all()
        return
    with pytest.raises(ValueError, match="so it is empty"):
        SymDist([group(rule, [empty])])


@pytest.mark.parametrize("rule", RULES)
def test_errors(rule: str) -> None:
    a, b = weights()[:2]
    vector = nn.Parameter(torch.ones(3))
    complex_weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    refused: list[tuple[Any, str]] = [
        ([group(rule, {a, b})], "'params' is a set, whose order differs"),
        ([group(rule, [("a", a), b])], "mixes .* 'a', with a Parameter without a name"),
        ([group(rule, [a, ("b", b)])], "mixes .* 'b', with a Parameter without a name"),
        ([group(rule, [a, a])], "param_1 is the same tensor as param_0"),
        ([group(rule, [a]), group(rule, [a])], "is the same tensor as"),
        (
            [group(rule, [a], lr=torch.tensor([LR, LR]))],
            r"lr is a tensor of shape \(2,\); a learning rate is one number",
        ),
        ([group(rule, [a], lr=-1.0)], "lr=-1.0 must be a finite number, 0 or more"),
        ([group(rule, [a], weight_decay=-1)], "weight_decay=-1 must be"),
        ([group(rule, [a], params_of="x")], "knows no option 'params_of'"),
        ([{"params": [a], "rule": rule}], "has no 'lr'"),
        ([a, b], "has no 'rule'; give one, as in rule='muon'"),
        ([group(rule, [complex_weight])], "only floating-point"),
        ([group(rule, [])], "has no parameters"),
    ]
    if rule != "adamw":
        refused.append(([group(rule, [vector])], "needs a matrix; use rule 'adamw'"))
    for groups, message in refused:
        with pytest.raises(ValueError, match=message):
            SymDist(groups)


@pytest.mark.parametrize("kind", SHARED)
def test_pytorchs_own_error_inputs_are_errors(kind: str) -> None:
    """Under `adamw`, with what is only PyTorch's left out: each is refused, or means nothing here, for a reason."""
    passed = []
    for given in INFO[kind].optim_error_inputs_func("cpu", torch.float32):
        params, options = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
        if not (options.keys() <= {"lr", "betas", "weight_decay", "momentum"}):
            continue
        entries = [nn.Parameter(torch.ones(2, 2))] if params is None else params
        entries = (
            entries if isinstance(entries, list) and entries and isinstance(entries[0], dict) else [{"params": entries}]
        )
        rule = "muon" if "momentum" in options or "2D" in str(given.error_regex) else "adamw"
        try:
            SymDist([{"rule": rule, "lr": LR, **options, **entry} for entry in entries])
        except ValueError:
            continue
        passed.append(given.error_regex)
    # One tensor is a group of one, three dimensions are a stack of matrices, and each group may have names or not.
    fine = {
        "Muon only supports 2D parameters",
        "params argument given to the optimizer should be an iterable of Tensors or dicts",
        "all optimizer param groups should be with/without names. cannot add param group with names to the optimizer",
    }
    assert {str(each) for each in passed} <= fine


BOOKKEEPING = {"lr_mult": 2.0, "wd_mult": 0.5, "initial_lr": 0.3, "param_names": ["a", "b"], "_trainer": [1, 2]}


def test_a_trainers_bookkeeping_is_carried() -> None:
    a, b = weights()[:2]
    optimizer = SymDist([group("muon", [a, b], **BOOKKEEPING)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    give([a, b], 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.15)
    optimizer.param_groups[0]["wd_mult"] = 7.0
    state = copy.deepcopy(optimizer.state_dict())
    assert {key: state["param_groups"][0][key] for key in BOOKKEEPING} == BOOKKEEPING | {"wd_mult": 7.0}
    other = SymDist([group("muon", weights()[:2], **BOOKKEEPING)])
    other.load_state_dict(state)
    assert other.param_groups[0]["wd_mult"] == 7.0
    assert other.param_groups[0]["param_names"] == ["a", "b"]
