"""State dicts in every form: raw, by names, flattened; of models with a layer more or less, and with other wrappers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from symdist import SymDist, build_optimizer

FORMS = ["raw", "by names", "flat"]


class Net(nn.Module):
    def __init__(self, layers: int, *, norm: bool = True):
        super().__init__()
        self.norm = nn.RMSNorm(4) if norm else nn.Identity()
        self.mlp = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(4, 4, bias=False)}) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.mlp:
            x = layer["up_proj"](self.norm(x))
        return x


def stepped(model: nn.Module, recipe: str = "muon") -> SymDist:
    optimizer = build_optimizer(model, recipe)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    return optimizer


def options(form: str, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=form == "flat", strict=strict)


def saved(model: nn.Module, optimizer: SymDist, form: str) -> dict[str, Any]:
    if form == "raw":
        return copy.deepcopy(optimizer.state_dict())
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options(form)))


def same(one: SymDist, other: SymDist) -> bool:
    states = [
        [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]] for optimizer in (one, other)
    ]
    return all(torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in a)


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_loaded(form: str, straight: bool) -> None:
    model = Net(2)
    optimizer = stepped(model)
    state, new = saved(model, optimizer, form), build_optimizer(model, "muon")
    if straight or form == "raw":
        new.load_state_dict(state)
    else:
        set_optimizer_state_dict(model, new, state, options=options(form))
    assert same(new, optimizer)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_more_is_named(form: str) -> None:
    small, large = Net(1), Net(2)
    state, optimizer = saved(small, stepped(small), form), build_optimizer(large, "muon")
    with pytest.raises(ValueError, match=r"mlp\.1\.up_proj\.weight.*strict=False"):
        optimizer.load_state_dict(state)
    before = copy.deepcopy(optimizer.state_dict())
    if form == "flat":
        with pytest.raises(ValueError, match=r"mlp\.1\.up_proj\.weight.*strict=False"):
            set_optimizer_state_dict(large, optimizer, state, options=options(form))
    elif form == "by names":
        with pytest.raises((RuntimeError, KeyError), match=r"mlp\.1\.up_proj\.weight"):
            set_optimizer_state_dict(large, optimizer, state, options=options(form))
    assert str(before) == str(optimizer.state_dict())


@pytest.mark.parametrize("by_pytorch", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_without_strict_a_layer_more_keeps_its_state(form: str, by_pytorch: bool) -> None:
    small, large = Net(1), Net(2)
    old = stepped(small)
    state, optimizer = saved(small, old, form), build_optimizer(large, "muon")
    if by_pytorch and form != "raw":
        set_optimizer_state_dict(large, optimizer, state, options=options(form, strict=False))
    else:
        optimizer.load_state_dict(state, strict=False)
    momenta = [optimizer.state[layer["up_proj"].weight]["momentum"] for layer in large.mlp]
    assert torch.equal(momenta[0], old.state[small.mlp[0]["up_proj"].weight]["momentum"])
    assert momenta[1].eq(0).all()
    assert torch.equal(optimizer.state[large.norm.weight]["exp_avg"], old.state[small.norm.weight]["exp_avg"])


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_less_is_named_too(form: str) -> None:
    small, large = Net(1), Net(2)
    old = stepped(large)
    state, optimizer = saved(large, old, form), build_optimizer(small, "muon")
    with pytest.raises(ValueError, match=r"state for mlp\.1\.up_proj\.weight, not here"):
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(state, strict=False)
    momentum = optimizer.state[small.mlp[0]["up_proj"].weight]["momentum"]
    assert torch.equal(momentum, old.state[large.mlp[0]["up_proj"].weight]["momentum"])


@pytest.mark.parametrize("form", ["raw", "flat"])
def test_what_is_left_out_may_be_a_whole_group(form: str) -> None:
    bare, model = Net(2, norm=False), Net(2)
    state, optimizer = saved(bare, stepped(bare), form), build_optimizer(model, "muon")
    with pytest.raises(ValueError, match=r"nothing for norm\.weight"):
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(state, strict=False)
    assert optimizer.state[model.norm.weight]["exp_avg"].eq(0).all()


@pytest.mark.parametrize("number", [3, 3.0])
def test_a_step_may_be_a_number(number: float) -> None:
    model = Net(1)
    state = saved(model, stepped(model), "raw")
    for each in state["state"].values():
        if "step" in each:
            each["step"] = number
    optimizer = build_optimizer(model, "muon")
    optimizer.load_state_dict(state)
    assert optimizer.state[model.norm.weight]["step"].equal(torch.tensor(3.0))


class Outer(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


def compiled_inside(model: Net) -> nn.Module:
    for layer in model.mlp:
        layer["up_proj"] = torch.compile(layer["up_proj"])  # type: ignore[assignment]
    return model


def checkpointed(model: Net) -> nn.Module:
    for i, layer in enumerate(model.mlp):
        layer["up_proj"] = checkpoint_wrapper(layer["up_proj"])
        model.mlp[i] = layer
    return model


def parallel(model: nn.Module) -> nn.Module:
    return Outer(compiled(model))


WRAPPERS = {
    "compiled": compiled,
    "compiled inside": compiled_inside,
    "checkpointed": checkpointed,
    "parallel": parallel,
}


@pytest.mark.parametrize("form", ["raw", "flat"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_count(wrapper: str, form: str) -> None:
    plain, wrapped = Net(2), WRAPPERS[wrapper](Net(2))
    one, other = stepped(plain), stepped(wrapped)
    assert [group["param_names"] for group in one.param_groups] == [
        group["param_names"] for group in other.param_groups
    ]
    assert [group["role"] for group in one.param_groups] == [group["role"] for group in other.param_groups]
    for source, model, target in ((one, plain, wrapped), (other, wrapped, plain)):
        new = build_optimizer(target, "muon")
        # PyTorch's own naming knows no `module` but DistributedDataParallel's.
        new.load_state_dict(saved(model, source, form if wrapper != "parallel" else "raw"))
        assert same(new, source)


def test_a_single_wrapped_linear_is_found() -> None:
    recipe = {"matrix": {"rule": "muon", "lr": 0.1}, "patterns": [{"match": "weight", "role": "matrix"}]}
    linear = nn.Linear(4, 3, bias=False)
    for model in (linear, torch.compile(linear), checkpoint_wrapper(linear), Outer(linear)):
        assert build_optimizer(model, recipe).param_groups[0]["param_names"] == ["weight"]


def test_order_does_not_count_where_names_are_given() -> None:
    def made(order: tuple[str, str]) -> SymDist:
        groups = [{"params": [(name, nn.Parameter(torch.ones(2, 2))) for name in order], "rule": "muon", "lr": 0.1}]
        return SymDist(groups)

    one, other = made(("a", "b")), made(("b", "a"))
    for i, parameter in enumerate(one.param_groups[0]["params"]):
        parameter.grad = torch.full((2, 2), i + 1.0)
    one.step()
    other.load_state_dict(one.state_dict())
    first, second = (other.state[p]["momentum"][0, 0] for p in other.param_groups[0]["params"])
    assert (first, second) == (2, 1)


def test_other_forms_are_refused() -> None:
    model = Net(1)
    with pytest.raises(ValueError, match="the saved state has a key 'model'"):
        build_optimizer(model, "muon").load_state_dict({"model": {}})
    state = saved(model, stepped(model), "by names")
    state["param_groups"][0]["rule"] = "scion"
    with pytest.raises(ValueError, match="the saved one has 'scion'"):
        build_optimizer(model, "muon").load_state_dict(state)
