"""Hostile state dicts: each is refused by a ValueError that names what is wrong, and nothing changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from symdist import SymDist

State = dict[str, Any]
NAN, INF = float("nan"), float("inf")
# Every kind of state: momenta, Adam's, NorMuon's rows, ARO's rotations.
RULES = ("muon", "adamw", "normuon", "aro", "row_norm")


def made(steps: int = 2) -> SymDist:
    generator = torch.Generator().manual_seed(0)
    groups = [
        {
            "params": [(f"{rule}.{i}", nn.Parameter(torch.randn(6, 4, generator=generator))) for i in range(2)],
            "rule": rule,
        }
        for rule in RULES
    ]
    optimizer = SymDist(groups, lr=0.1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(6, 4, generator=generator)
        optimizer.step()
    return optimizer


def everything(optimizer: SymDist) -> Any:
    """All that a load could change, by value."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(optimizer.state_dict()), weights, optimizer.skipped_steps


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, of equal types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def refused(hostile: Any, match: str = "", **how: Any) -> None:
    optimizer = made()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=match) as caught:
        optimizer.load_state_dict(hostile, **how)
    assert "\n" not in str(caught.value)
    assert same(everything(optimizer), before)


def state() -> State:
    return copy.deepcopy(made(3).state_dict())


def changed(change: Callable[[State], Any]) -> State:
    hostile = state()
    change(hostile)
    return hostile


def test_the_state_itself_is_loaded() -> None:
    optimizer, saved = made(), state()
    optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict(), saved)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value", [None, [], (), "state", 3, {1}, torch.ones(2), [("state", {})]], ids=repr)
def test_what_is_no_state_dict(value: Any, strict: bool) -> None:
    refused(value, "saved state is a .*, not a dict", strict=strict)
    refused(changed(lambda saved: saved.update(state=value)), "'state' of the saved state is a ", strict=strict)
    if not isinstance(value, list | tuple):
        refused(changed(lambda saved: saved.update(param_groups=value)), "'param_groups' of the saved", strict=strict)
        hostile = changed(lambda saved: saved["param_groups"][1].update(params=value))
        refused(hostile, r"'params' of 'param_groups'\[1\] of the saved state is a .*, not a list", strict=strict)
    hostile = changed(lambda saved: saved["param_groups"].__setitem__(1, value))
    refused(hostile, r"'param_groups'\[1\] of the saved state is a .*, not a dict", strict=strict)
    hostile = changed(lambda saved: saved["state"].__setitem__(2, value))
    refused(hostile, r"'state'\[2\] of the saved state is a .*, not a dict", strict=strict)


GROUPS: dict[str, tuple[Callable[[State], Any], str]] = {
    "no state": (lambda saved: saved.pop("state"), "has a key 'param_groups'"),
    "no groups": (lambda saved: saved.pop("param_groups"), "has a key 'state'"),
    "no keys": (lambda saved: saved.clear(), "has 0 param groups|nothing for"),
    "one group less": (lambda saved: saved["param_groups"].pop(), "none of its param groups lists"),
    "one group more": (
        lambda saved: saved["param_groups"].append(
            {**saved["param_groups"][0], "params": [90, 91], "param_names": ["x", "y"]}
        ),
        "state for x, y, not here",
    ),
    "groups in another order": (
        lambda saved: [saved["param_groups"].reverse(), [group.pop("param_names") for group in saved["param_groups"]]],
        "has rule 'muon'.*the saved one has 'row_norm'",
    ),
    "a group without params": (
        lambda saved: saved["param_groups"][2].pop("params"),
        r"'params' of 'param_groups'\[2\]",
    ),
    "one param less": (lambda saved: saved["param_groups"][2]["params"].pop(), "none of its param groups lists"),
    "one param more": (lambda saved: saved["param_groups"][2]["params"].append(99), "2 parameters.* and 3"),
    "a param twice": (lambda saved: saved["param_groups"][2].update(params=[4, 4]), "lists 4 more than once"),
    "a param of another group": (
        lambda saved: saved["param_groups"][2].update(params=[0, 4]),
        "lists 0 more than once",
    ),
    "a param out of range": (
        lambda saved: saved["param_groups"][2].update(params=[4, 500]),
        "none of its param groups",
    ),
    "a param that is a list": (lambda saved: saved["param_groups"][2].update(params=[4, [5]]), "an entry of 'params'"),
    "a param that is None": (lambda saved: saved["param_groups"][2].update(params=[None, 5]), "an entry of 'params'"),
    "names that are no list": (lambda saved: saved["param_groups"][0].update(param_names="ab"), "'param_names' of"),
    "names that are no texts": (
        lambda saved: saved["param_groups"][0].update(param_names=[{}, ()]),
        "'param_names' of",
    ),
    "a key that is no text": (
        lambda saved: saved["param_groups"][0].update({5: 5}),
        r"the key 5 in 'param_groups'\[0\]",
    ),
    "no rule": (lambda saved: saved["param_groups"][0].update(rule=None), "muon.*None"),
    "a rule that is a tensor": (lambda saved: saved["param_groups"][0].update(rule=torch.ones(3)), "muon"),
    "another rule": (lambda saved: saved["param_groups"][0].update(rule="scion"), "muon.*scion"),
}


@pytest.mark.parametrize("fault", GROUPS)
def test_groups(fault: str) -> None:
    change, match = GROUPS[fault]
    refused(changed(change), match)


NO_RATE = [
    NAN,
    INF,
    -INF,
    -1e-9,
    -1,
    "0.1",
    None,
    True,
    [0.1],
    {},
    1j,
    torch.ones(2),
    torch.tensor(NAN),
    torch.tensor(True),
    10**400,
]
NO_SHARE = [NAN, INF, -0.1, 1.0, 2, "0.9", None, True, [0.9], torch.tensor(0.9)]
NO_FLAG = [None, 0, 1, "true", NAN, [True], torch.tensor(True)]
NO_COUNT = [None, -1, 1.5, NAN, "1", True, [1], torch.tensor(1)]
NO_CHOICE = [None, 3, "other", ["auto"], {}, torch.ones(2), NAN]
# By rule and option. That an option is fixed at construction is reason enough to refuse another value.
OPTIONS: dict[tuple[str, str], list[Any]] = {
    ("muon", "lr"): NO_RATE,
    ("adamw", "lr"): NO_RATE,
    ("muon", "weight_decay"): NO_RATE,
    ("muon", "momentum"): NO_SHARE,
    ("aro", "momentum"): NO_SHARE,
    ("muon", "nesterov"): NO_FLAG,
    ("adamw", "betas"): [
        None,
        0.9,
        (0.9,),
        (0.9, 1.0),
        (NAN, 0.9),
        ("a", "b"),
        "ab",
        [0.9, 0.9, 0.9],
        torch.ones(2),
        (-0.1, 0.9),
    ],
    ("adamw", "eps"): [NAN, INF, -1e-8, "1e-8", None, True, [1e-8], torch.tensor(1e-8), 10**400],
    ("row_norm", "cautious_weight_decay"): NO_FLAG,
    ("row_norm", "skip_zero_grad_rows"): [*NO_FLAG, True],
    ("row_norm", "padding_rows"): [*NO_COUNT, 1],
    ("row_norm", "rounding_step"): NO_COUNT,
    ("row_norm", "rounding_seed"): NO_COUNT,
    ("row_norm", "weight_rounding"): NO_CHOICE,
    ("row_norm", "strategy"): NO_CHOICE,
    ("row_norm", "view"): [None, "transposed", 3, {"heads": 2, "dim": 0}, torch.ones(3)],
    ("row_norm", "role"): [None, 3, ["a"], NAN],
    ("row_norm", "initial_lr"): [NAN, INF],
    ("normuon", "beta2"): [*NO_SHARE, 0.5],
    ("normuon", "precision"): [*NO_CHOICE, "float16"],
    ("aro", "sinkhorn_steps"): [*NO_COUNT, 3],
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("rule", "option"), OPTIONS)
def test_options(rule: str, option: str, strict: bool) -> None:
    optimizer, saved = made(), state()
    before, i = everything(optimizer), RULES.index(rule)
    for value in OPTIONS[rule, option]:
        group = {**saved["param_groups"][i], option: value}
        hostile = {**saved, "param_groups": [*saved["param_groups"][:i], group, *saved["param_groups"][i + 1 :]]}
        with pytest.raises(ValueError, match=rf"{rule}.*{option}"):
            optimizer.load_state_dict(hostile, strict=strict)
        assert same(everything(optimizer), before), value


def test_a_rate_may_be_a_tensor() -> None:
    optimizer, saved = made(), state()
    saved["param_groups"][0]["lr"] = torch.tensor(0.25)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_the_dtype_of_state_is_the_optimizers() -> None:
    def one(**options: Any) -> SymDist:
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1, **options}])
        weight.grad = torch.eye(4, 3)
        optimizer.step()
        return optimizer

    wide, narrow = one(), one(state_dtype="bfloat16")
    for target, source, dtype in ((wide, narrow, torch.float32), (narrow, wide, torch.bfloat16)):
        option = target.param_groups[0]["state_dtype"]
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert target.param_groups[0]["state_dtype"] == option
        assert target.state[target.param_groups[0]["params"][0]]["momentum"].dtype == dtype
        target.step()


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse()


TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "None": lambda tensor: None,
    "a list": lambda tensor: tensor.tolist(),
    "a text": lambda tensor: "momentum",
    "a number": lambda tensor: 1.0,
    "a flag": lambda tensor: True,
    "another shape": lambda tensor: tensor.mT.contiguous(),
    "one row": lambda tensor: tensor[:1],
    "empty": lambda tensor: tensor[:0],
    "NaN": lambda tensor: tensor.clone().fill_(NAN),
    "one NaN": lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), NAN),
    "inf": lambda tensor: tensor.clone().fill_(INF),
    "whole numbers": lambda tensor: tensor.long(),
    "flags": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "sparse": sparse,
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
}
NAMES = [(0, "momentum"), (2, "exp_avg"), (2, "exp_avg_sq"), (4, "row_sq"), (6, "rotation")]


@pytest.mark.parametrize("fault", TENSORS)
@pytest.mark.parametrize(("i", "name"), NAMES)
def test_state(i: int, name: str, fault: str) -> None:
    hostile = state()
    hostile["state"][i][name] = TENSORS[fault](hostile["state"][i][name])
    refused(hostile, f"{name}")


@pytest.mark.parametrize(("i", "name"), NAMES)
def test_state_that_is_missing(i: int, name: str) -> None:
    refused(changed(lambda saved: saved["state"][i].pop(name)), rf"{RULES[i // 2]}\.0: needs state '{name}'")
    refused(changed(lambda saved: saved["state"].pop(i)), rf"{RULES[i // 2]}\.0: needs state")


@pytest.mark.parametrize(("i", "name", "value"), [(2, "exp_avg_sq", -1e-3), (4, "row_sq", -1.0), (6, "rotation", 1e30)])
def test_state_that_no_training_gives(i: int, name: str, value: float) -> None:
    refused(changed(lambda saved: saved["state"][i][name][2].fill_(value)), rf"{RULES[i // 2]}\.0: state '{name}'")


@pytest.mark.parametrize(
    "value", [-1, -1.0, NAN, INF, 10**400, -(10**400), torch.tensor(-2.0), torch.tensor([1.0]), "3"]
)
def test_counts_of_steps(value: Any) -> None:
    refused(changed(lambda saved: saved["state"][2].update(step=value)), "step")


@pytest.mark.parametrize("key", [-1, 10, 10**9, "adamw.9", None, (1, 2)])
def test_state_of_nothing(key: Any) -> None:
    hostile = changed(lambda saved: saved["state"].update({key: saved["state"][0]}))
    refused(hostile, "state for .*, which none of its param groups lists")


def test_flattened_state() -> None:
    def flat(saved: State) -> State:
        names = [name for group in saved["param_groups"] for name in group["param_names"]]
        result = {f"state.{names[i]}.{key}": value for i, each in saved["state"].items() for key, value in each.items()}
        for group in saved["param_groups"]:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            result |= {
                f"param_groups.{name}.{key}": value for name in group["param_names"] for key, value in options.items()
            }
        return result

    made().load_state_dict(flat(state()))
    for key, value, match in (
        ("param_groups.muon.0.lr", NAN, "muon.*lr=nan"),
        ("state.muon.1.momentum", [1.0], "'momentum' of 'state'\\['muon.1'\\] .* is a list"),
        ("state.adamw.0.exp_avg_sq", torch.full((6, 4), -1.0), r"adamw\.0: state 'exp_avg_sq'"),
        ("optimizer", {}, "a key 'optimizer'"),
        (3, {}, "a key 3"),
    ):
        refused(flat(state()) | {key: value}, match)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(torch.tensor([NAN, 1.0])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, inner in items for each in places(inner, (*path, key)))]


@pytest.fixture(scope="module")
def target() -> tuple[SymDist, State]:
    return made(), state()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_junk_anywhere_is_refused_or_harmless(target: tuple[SymDist, State], data: st.DataObject) -> None:
    """Whatever stands in one place: a refusal that changes nothing, or a load after which a step is finite."""
    optimizer, saved = target
    hostile = copy.deepcopy(saved)
    *path, last = data.draw(st.sampled_from(places(saved)[1:]))
    at: Any = hostile
    for key in path:
        at = at[key]
    at[last] = data.draw(JUNK)
    before = everything(optimizer)
    try:
        optimizer.load_state_dict(hostile)
    except ValueError:
        assert same(everything(optimizer), before)
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"])
        optimizer.load_state_dict(copy.deepcopy(saved))
