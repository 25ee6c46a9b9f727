"""The routers of every model with experts that transformers has are measured by what their experts get."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from symdist.diagnostics import RouterMonitor
from symdist.routing.sites import find_sites
from tests.diagnostics import tiny_moe

TOKENS = torch.arange(24).view(2, 12) * 7 % 64


class Oracle:
    """What the experts of a model get, and what its routers read, in the last forward."""

    def __init__(self, model: nn.Module):
        self.routers: list[str] = []
        self.counts: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.modules = dict(model.named_modules())
        for name, (parameter, site) in find_sites(model).items():
            if site.role == "router":
                self.routers.append(name)
                self._watch(name, parameter)

    def _watch(self, name: str, weight: nn.Parameter) -> None:
        path = name.removesuffix(".weight")
        block = path.rpartition(".")[0]
        while not (experts := [m for m in self.modules[block].children() if "Expert" in type(m).__name__]):
            block = block.rpartition(".")[0]

        def given(module: nn.Module, inputs: Any, keywords: Any) -> None:
            self.counts[name] = _given(weight.shape[0], [*inputs, *keywords.values()])

        def read(module: nn.Module, inputs: Any) -> None:
            if inputs and inputs[0].shape[-1] == weight.shape[1]:
                self.tokens[name] = inputs[0].detach().reshape(-1, weight.shape[1])

        experts[0].register_forward_pre_hook(given, with_kwargs=True)
        # LongCat's router reads its tokens and uses the weight of a linear layer that it never calls.
        for module in (self.modules[path.rpartition(".")[0]], self.modules[path]):
            module.register_forward_pre_hook(read)


def _given(experts: int, inputs: list[Any]) -> Tensor:
    """How many tokens each expert gets, from what the experts are called with."""
    for value in inputs:
        if isinstance(value, list):
            # JetMoe's get the tokens in the order of the experts, and the number for each.
            return torch.tensor(value)
        if isinstance(value, Tensor) and not value.is_floating_point():
            return torch.bincount(value.flatten(), minlength=experts)
    # Llama 4's all get all tokens, multiplied by zero where they are not chosen.
    return inputs[0].detach().view(experts, -1, inputs[0].shape[-1]).any(-1).sum(1)


def unsettle(model: nn.Module) -> None:
    """Give corrections, biases and tables of routers values that change the choice."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("correction_bias", "expert_bias", "router.bias", "gate.bias", "balancing_biases")):
                tensor.copy_(torch.randn_like(tensor))
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.rand(tensor.shape[0], 8).topk(tensor.shape[1]).indices)


@pytest.mark.parametrize("family", tiny_moe.families())
def test_counts_are_those_of_the_experts(family: str) -> None:
    model = tiny_moe.build(family)
    unsettle(model)
    oracle, monitor = Oracle(model), RouterMonitor(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected: dict[str, Tensor] = {}
    for _ in range(2):
        model.train()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        balance, z = monitor.losses()
        assert z.item() == pytest.approx(mean_z(oracle), rel=1e-3, abs=1e-6)
        monitor.accumulate()
        expected = {name: count + expected.get(name, 0) for name, count in oracle.counts.items()}
        (loss + balance + z).backward()
        for name in oracle.counts:
            assert model.get_parameter(name).grad.abs().max() > 0, name
        optimizer.step()
        optimizer.zero_grad()
    flat: list[Tensor] = []
    monitor.summary(reduce=flat.append)
    totals = flat[0].view(monitor.layers, -1)
    experts = (totals.shape[1] - 2) // 2
    assert len(oracle.routers) == len(expected) == monitor.layers > 0
    for row, name in zip(totals, oracle.routers, strict=True):
        assert row[:experts].tolist() == expected[name][:experts].tolist()
        assert not expected[name][experts:].any()
        assert row[-1].item() == 2 * TOKENS.numel()


def mean_z(oracle: Oracle) -> float:
    zs = []
    for name, tokens in oracle.tokens.items():
        router = oracle.modules[name.removesuffix(".weight")]
        logits = functional.linear(tokens, router.weight, getattr(router, "bias", None))
        # Inkling's routers also weigh the shared experts, which are not chosen.
        zs.append(logits[:, : getattr(router, "num_experts", None)].logsumexp(-1).square().mean())
    return torch.stack(zs).mean().item()
