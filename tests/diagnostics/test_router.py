"""Router measures agree with a count by hand, over any division of the tokens."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import symdist.tools.models as models
from symdist.diagnostics import RouterMonitor

MOE = ["gpt-oss-tiny", "olmoe-tiny", "qwen3-moe-tiny"]


class FixedTopKRouter(nn.Module):
    """Answers as transformers' routers do, from the logits [N, E] it is given: (logits, weights, chosen)."""

    def __init__(self, k: int, experts: int):
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.eye(experts, dtype=torch.float64))

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(given, self.weight.to(given.dtype))
        weights, chosen = logits.softmax(-1).topk(self.k)
        return logits, weights, chosen


class Stack(nn.Module):
    """One router a layer; takes logits [layers, N, E]."""

    def __init__(self, *, layers: int, k: int, experts: int = 16):
        super().__init__()
        self.routers = nn.ModuleList(FixedTopKRouter(k, experts) for _ in range(layers))

    def forward(self, logits: Tensor) -> None:
        for router, layer in zip(self.routers, logits, strict=True):
            router(layer)


def by_hand(logits: np.ndarray, k: int) -> dict[str, float]:
    """The measures of one layer from its logits [N, E]."""
    tokens, experts = logits.shape
    counts = np.zeros(experts)
    for row in logits:
        counts[np.argsort(row)[-k:]] += 1
    load = counts / (tokens * k)
    exponentials = np.exp(logits)
    probabilities = (exponentials / exponentials.sum(1, keepdims=True)).mean(0)
    loaded = load[load > 0]
    return {
        "load_cv": np.sqrt(np.mean((load - load.mean()) ** 2)) / load.mean(),
        "load_entropy": -np.sum(loaded * np.log(loaded)) / np.log(experts),
        "dead": np.mean(load < 0.1 / experts),
        "top_load": load.max(),
        "balance": experts * np.sum(load * probabilities),
        "z": np.mean(np.log(exponentials.sum(1)) ** 2),
    }


def random_logits(*, layers: int = 3, tokens: int = 40, experts: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, tokens, experts, generator=generator, dtype=torch.float64)
    # Some experts are liked, some all but never chosen.
    return logits + torch.linspace(-3, 2, experts)


def one_forward(logits: Tensor, *, k: int) -> RouterMonitor:
    model = Stack(layers=logits.shape[0], k=k, experts=logits.shape[-1])
    monitor = RouterMonitor(model)
    model(logits)
    monitor.accumulate()
    return monitor


@pytest.mark.parametrize("k", [1, 4])
def test_measures_equal_a_count_by_hand(k: int):
    logits = random_logits()
    monitor = one_forward(logits, k=k)
    summary = monitor.summary()
    expected = [by_hand(layer.numpy(), k) for layer in logits]
    assert 0 < expected[0]["dead"] < 1
    assert set(summary["layers"]) == set(summary["mean"]) == set(expected[0])
    for measure, values in summary["layers"].items():
        wanted = [layer[measure] for layer in expected]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, err_msg=measure)
        np.testing.assert_allclose(summary["mean"][measure], np.mean(wanted), rtol=1e-5, err_msg=measure)
    aux, z = monitor.losses()
    np.testing.assert_allclose(aux.item(), np.mean([layer["balance"] for layer in expected]), rtol=1e-5)
    np.testing.assert_allclose(z.item(), np.mean([layer["z"] for layer in expected]), rtol=1e-5)


def test_even_load():
    monitor = one_forward(torch.eye(8).repeat(1, 4, 1) * 30, k=1)
    mean = monitor.summary()["mean"]
    assert mean == pytest.approx(
        {"load_cv": 0, "load_entropy": 1, "dead": 0, "top_load": 1 / 8, "balance": 1, "z": 900}
    )


def test_one_expert_takes_all():
    logits = torch.zeros(2, 10, 8)
    logits[..., 5] = 30
    mean = one_forward(logits, k=1).summary()["mean"]
    assert mean == pytest.approx(
        {"load_cv": 7**0.5, "load_entropy": 0, "dead": 7 / 8, "top_load": 1, "balance": 8, "z": 900}
    )


def test_gradient_of_balance_flows_through_the_probabilities_alone():
    logits = random_logits().requires_grad_()
    model = Stack(layers=3, k=2)
    monitor = RouterMonitor(model)
    model(logits)
    aux, z = monitor.losses()
    # The load as constants: what is left to differentiate is the mean softmax.
    chosen = logits.topk(2).indices.flatten(1)
    load = torch.stack([torch.bincount(layer, minlength=16) for layer in chosen]) / 80
    balance = (16 * (load * logits.softmax(-1).mean(1)).sum(-1)).mean()
    (expected,) = torch.autograd.grad(balance + logits.logsumexp(-1).square().mean(), logits)
    (gradient,) = torch.autograd.grad(aux + z, logits)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_parts_add_up_to_the_whole():
    logits = random_logits()
    whole = one_forward(logits, k=2).summary()

    model = Stack(layers=3, k=2)
    monitor = RouterMonitor(model)
    for part in logits.split([10, 30], dim=1):
        model(part)
        monitor.accumulate()
    assert monitor.summary()["layers"]["balance"] == pytest.approx(whole["layers"]["balance"])
    assert monitor.summary()["mean"] == pytest.approx(whole["mean"])

    monitor.reset()
    model(logits[:, :10])
    monitor.accumulate()
    assert monitor.summary()["mean"]["balance"] != pytest.approx(whole["mean"]["balance"])


def test_reduce_adds_the_other_ranks_and_leaves_the_own_totals():
    logits = random_logits()
    whole = one_forward(logits, k=2).summary()["mean"]
    mine, other = (one_forward(part, k=2) for part in logits.split([10, 30], dim=1))
    alone = mine.summary()["mean"]
    received: list[Tensor] = []
    other.summary(reduce=lambda flat: received.append(flat.clone()))
    assert received[0].dim() == 1
    for _ in range(2):
        assert mine.summary(reduce=lambda flat: flat.add_(received[0]))["mean"] == pytest.approx(whole)
    assert mine.summary()["mean"] == alone != pytest.approx(whole)


@pytest.mark.parametrize("name", MOE)
def test_models_are_found_and_counted(name: str):
    """The load counts every token of every layer, and reset and close do what they say."""
    model = models.build(name, seed=0).eval()
    monitor = RouterMonitor(model)
    assert monitor.layers == 4
    with pytest.raises(RuntimeError, match="run the model"):
        monitor.accumulate()
    tokens = torch.arange(60).view(3, 20)
    with torch.no_grad():
        model(input_ids=tokens)
        monitor.accumulate()
        flat: list[Tensor] = []
        monitor.summary(reduce=flat.append)
        totals = flat[0].view(4, -1)
        assert totals[:, :8].sum(1).tolist() == [60 * 2] * 4
        assert totals[:, -1].tolist() == [60] * 4
        # transformers' own account of the router logits: layers one after another.
        theirs = torch.stack(model(input_ids=tokens, output_router_logits=True).router_logits)
    expected = [by_hand(layer.view(60, 8).double().numpy(), 2)["balance"] for layer in theirs]
    assert monitor.summary()["layers"]["balance"] == pytest.approx(expected, rel=1e-4)
    monitor.reset()
    with pytest.raises(RuntimeError, match="accumulated nothing"):
        monitor.summary()
    monitor.close()
    model(input_ids=tokens)
    with pytest.raises(RuntimeError, match="run the model"):
        monitor.losses()


@pytest.mark.parametrize("name", MOE)
def test_losses_train_the_router_under_gradient_accumulation(name: str):
    model = models.build(name, seed=0)
    monitor = RouterMonitor(model)
    routers = [p for key, p in model.named_parameters() if key.endswith(("gate.weight", "router.weight"))]
    parts = torch.randint(0, 4096, (2, 2, 16), generator=torch.Generator().manual_seed(1))

    single = []
    for part in parts:
        loss = model(input_ids=part, labels=part).loss
        aux, z = monitor.losses()
        single.append(torch.autograd.grad(loss + 0.1 * aux + 0.01 * z, routers))
    for part in parts:
        loss = model(input_ids=part, labels=part).loss
        aux, z = monitor.losses()
        (loss + 0.1 * aux + 0.01 * z).backward()
        monitor.accumulate()
    for router, first, second in zip(routers, *single, strict=True):
        torch.testing.assert_close(router.grad, first + second)
        assert router.grad.abs().max() > 0
    plain = torch.autograd.grad(model(input_ids=parts[0], labels=parts[0]).loss, routers)
    assert not torch.allclose(plain[0], single[0][0], rtol=1e-2)
    flat: list[Tensor] = []
    monitor.summary(reduce=flat.append)
    assert flat[0].view(4, -1)[:, -1].tolist() == [2 * 2 * 16] * 4


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False])
def test_losses_under_fsdp_are_those_of_the_plain_model(one_rank, before: bool):
    tokens = torch.arange(40).view(2, 20)

    def step(model: nn.Module, monitor: RouterMonitor) -> list[Tensor]:
        loss = model(input_ids=tokens, labels=tokens).loss
        aux, z = monitor.losses()
        (loss + aux + z).backward()
        gradient = model.get_submodule("model.layers.0.mlp.gate").weight.grad
        return [aux, z, gradient]

    plain, sharded = (models.build("olmoe-tiny", seed=0) for _ in range(2))
    expected = step(plain, RouterMonitor(plain))
    monitor = RouterMonitor(sharded) if before else None
    for block in models.blocks(sharded):
        fully_shard(block, mesh=one_rank)
    fully_shard(sharded, mesh=one_rank)
    aux, z, gradient = step(sharded, monitor or RouterMonitor(sharded))
    torch.testing.assert_close([aux, z, gradient.full_tensor()], expected)


def test_dense_model_has_nothing_to_say():
    model = models.build("qwen3-tiny", overrides={"num_hidden_layers": 1})
    monitor = RouterMonitor(model)
    model(input_ids=torch.arange(8)[None])
    monitor.accumulate()
    assert monitor.layers == 0
    assert monitor.summary() == {}
    assert [loss.item() for loss in monitor.losses()] == [0, 0]
