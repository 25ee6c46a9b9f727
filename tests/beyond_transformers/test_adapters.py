"""peft's adapters: what is trained of them is found, and the model around them is what it was."""

from typing import Any

import pytest
import torch
from torch import nn

from symdist import build_optimizer, route
from symdist.routing.sites import find_sites
from tests.beyond_transformers import by_hand

peft = pytest.importorskip("peft")

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "of linear maps": (by_hand.Transformer, {"target_modules": ["wq", "wo", "w1", "w2"]}),
    "of a fused map": (by_hand.GPT, {"target_modules": ["c_attn", "c_proj"]}),
    "with magnitudes": (by_hand.Transformer, {"target_modules": ["wv"], "use_dora": True}),
    "of the embedding": (by_hand.Transformer, {"target_modules": ["tok_embeddings", "wk"]}),
    "beside a trained head": (by_hand.Transformer, {"target_modules": ["wq"], "modules_to_save": ["output"]}),
}


def adapted(kind: str) -> nn.Module:
    make, options = KINDS[kind]
    torch.manual_seed(0)
    return peft.get_peft_model(make(), peft.LoraConfig(r=2, **options)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_and_nothing_else(kind: str) -> None:
    model = adapted(kind)
    roles = {name: site.role for name, (_, site) in find_sites(model).items()}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert roles.keys() == trained
    for name, role in roles.items():
        magnitude = "other" if "magnitude" in name else "adapter"
        assert role == ("head" if "modules_to_save" in name else magnitude), name
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = build_optimizer(model, "muon")
    for seed in range(2):  # The second matrix of an adapter is zero at first, so that it moves first.
        optimizer.zero_grad()
        by_hand.loss_of(model, by_hand.tokens(seed)).backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != (name in trained), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_around_adapters_keeps_its_roles(kind: str) -> None:
    """As where all of it is trained: under peft's names everything is what it is under its own."""
    model = adapted(kind).requires_grad_(True)
    plain = {
        name: (group["role"], str(group["view"]))
        for group in route(KINDS[kind][0](), "olmoe")
        for name in group["param_names"]
    }
    found = {}
    for group in route(model, "olmoe"):
        for name in group["param_names"]:
            key = name.removeprefix("base_model.model.").replace("base_layer.", "")
            for word in ("original_module.", "modules_to_save.default."):
                key = key.replace(word, "")
            found[key] = group["role"], str(group["view"])
    assert {name: found[name] for name in plain} == plain
