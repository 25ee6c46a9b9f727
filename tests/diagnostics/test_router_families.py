"""The routers of every model with experts that transformers has are measured by what their experts get."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxFFN

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


@pytest.mark.parametrize("family", tiny_moe.families())
def test_every_block_of_experts_of_a_default_model_has_a_router(family: str) -> None:
    if family in ("dots1", "gemma4_text", "hunyuan_v1_moe", "lfm2_moe"):
        model_config = tiny_moe.config(family)
    else:
        model_config = CONFIG_MAPPING[family]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    routers = [m for m in model.modules() if type(m).__name__.endswith(("Router", "Gating", "MoEV1Gate"))]
    assert RouterMonitor(model).layers == len(routers) > 0


class Grouped(nn.Module):
    """Chooses groups of experts first, then experts in these, with a correction; all in the block itself."""

    def __init__(self, *, experts: int = 8, k: int = 2, groups: int = 4, width: int = 6):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))
        self.register_buffer("correction", torch.randn(experts))
        self.k, self.groups = k, groups
        self.counts = torch.zeros(experts, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        corrected = (scores + self.correction).unflatten(-1, (self.groups, -1))
        kept = corrected.amax(-1).topk(self.groups // 2).indices
        mask = torch.zeros(corrected.shape[:-1]).scatter(-1, kept, 1).bool()
        chosen = corrected.masked_fill(~mask[..., None], -torch.inf).flatten(-2).topk(self.k).indices
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + (scores[..., i] * (chosen == i).any(-1))[..., None] * expert(x)
            self.counts[i] += (chosen == i).sum()
        return x + out


class Hidden(nn.Module):
    """Chooses by a way that shows nothing: the largest first, then the largest of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 8, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        for _ in range(2):
            first = scores.argmax(-1)
            outputs = [self.experts[i](row) for i, row in zip(first.flatten().tolist(), x.view(-1, 6), strict=True)]
            x = x + torch.stack(outputs).view_as(x)
            scores = scores.scatter(-1, first[..., None], 0)
        return x


def counts_of(monitor: RouterMonitor) -> list[list[int]]:
    flat: list[Tensor] = []
    monitor.summary(reduce=flat.append)
    rows = flat[0].view(monitor.layers, -1)
    return rows[:, : (rows.shape[1] - 2) // 2].int().tolist()


def test_a_choice_within_the_block_is_seen_and_layers_may_differ_in_experts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Grouped(experts=8), Grouped(experts=12, k=3))
    monitor = RouterMonitor(model)
    x = torch.randn(3, 5, 6)
    for _ in range(2):
        model(x)
        monitor.accumulate()
    assert counts_of(monitor) == [[*model[0].counts.tolist(), 0, 0, 0, 0], model[1].counts.tolist()]
    monitor.reset()
    model(x)
    monitor.accumulate()
    together = monitor.summary()["layers"]
    for i, layer in enumerate(model):
        alone = RouterMonitor(layer)
        layer(x if i == 0 else model[0](x))
        alone.accumulate()
        assert {name: values[i] for name, values in together.items()} == pytest.approx(
            {name: values[0] for name, values in alone.summary()["layers"].items()}
        )
    _, z = monitor.losses()
    expected = [g.gate(t).logsumexp(-1).square().mean() for g, t in zip(model, (x, model[0](x)), strict=True)]
    assert z.item() == pytest.approx(torch.stack(expected).mean().item())


def test_a_choice_that_cannot_be_seen_is_an_error_that_names_the_router() -> None:
    model = nn.Sequential(Grouped(), Hidden())
    monitor = RouterMonitor(model)
    model(torch.randn(2, 5, 6))
    assert monitor.layers == 2
    for call in (monitor.losses, monitor.accumulate):
        with pytest.raises(RuntimeError, match=r"router 1\.gate\.weight: which experts it chooses cannot be seen"):
            call()


def test_a_block_that_chooses_from_what_its_router_returns() -> None:
    """DBRX's router returns logits alone; the block around it chooses, and its experts' output is not looked at."""
    config = DbrxFFNConfig(hidden_size=8, ffn_hidden_size=8, moe_num_experts=6, moe_top_k=2)
    block = DbrxFFN(SimpleNamespace(ffn_config=config))
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    monitor, given = RouterMonitor(nn.Sequential(block)), []
    block.experts.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    block(torch.randn(1, 20, 8))
    monitor.accumulate()
    assert counts_of(monitor) == [torch.bincount(given[0].flatten(), minlength=6).tolist()]


def test_frozen_weights_are_measured_and_stay_frozen() -> None:
    model = Grouped().requires_grad_(False)
    monitor = RouterMonitor(model)
    model(torch.randn(2, 5, 6))
    monitor.accumulate()
    assert counts_of(monitor) == [model.counts.tolist()]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_deepspeed_has_cut_are_found_by_their_full_shape() -> None:
    model = Grouped()
    whole = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in whole:
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    monitor = RouterMonitor(model)
    assert {parameter.numel() for parameter in whole} == {0}
    for parameter, data in whole.items():
        parameter.data = data
    model(torch.randn(2, 5, 6))
    monitor.accumulate()
    assert counts_of(monitor) == [model.counts.tolist()]


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = Grouped()
    monitor = RouterMonitor(nn.Sequential(model))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7))
    assert _get_current_function_mode_stack() == []
    model(torch.randn(2, 5, 6))
    monitor.accumulate()
    assert counts_of(monitor) == [model.counts.tolist()]
    monitor.close()
    assert not model._forward_hooks
    assert not model.gate._forward_pre_hooks


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_recomputed_and_compiled_forwards(family: str) -> None:
    """Activation checkpointing runs the routers again in the backward, and torch.compile traces what is observed."""
    model = tiny_moe.build(family)

    def step(forward: Any) -> tuple[list[list[int]], Tensor]:
        monitor = RouterMonitor(model)
        for _ in range(2):
            model.zero_grad()
            loss = forward(input_ids=TOKENS, labels=TOKENS).loss
            balance, z = monitor.losses()
            monitor.accumulate()
            (loss + balance + z).backward()
        monitor.close()
        return counts_of(monitor), next(p.grad for name, p in model.named_parameters() if "layers.1." in name)

    counts, gradient = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = step(model)
    assert again == counts
    torch.testing.assert_close(recomputed, gradient)
    model.gradient_checkpointing_disable()
    compiled, traced = step(torch.compile(model, backend="eager"))
    assert compiled == counts
    torch.testing.assert_close(traced, gradient)


@pytest.mark.parametrize("name", ["qwen3 experts", "deepseek_v3", "gpt_oss"])
def test_torchtitan_counts_the_same_itself(name: str) -> None:
    pytest.importorskip("torchtitan")
    from tests.beyond_transformers import titan

    model = titan.trainable(name, slice(0, 3), torch.bfloat16 if name == "gpt_oss" else torch.float32)
    monitor = RouterMonitor(model)
    model(*titan.batch(0))
    monitor.accumulate()
    theirs = [buffer.int().tolist() for name, buffer in model.named_buffers() if "tokens_per_expert" in name]
    assert len(theirs) >= 2
    assert counts_of(monitor) == theirs
