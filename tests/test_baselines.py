"""The optimizers that recipes are compared with step as they say, or are refused before any rank starts."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from symdist.diagnostics.collective_counter import CollectiveCounter
from symdist.rules.linalg.inverse_root import Numerics, polar_as_published
from symdist.tools.baselines import ADAMW, NAMES, AllGatherMuon, build_baseline, describe_baseline, parts, refusal
from symdist.tools.models import build, shard
from symdist.tools.simulate import simulate
from tests.ranks import Ranks

DION = importlib.util.find_spec("dion") is not None

SHAPES = [(8, 6), (6, 12), (5, 3), (4, 6, 8), (3, 4, 4)]
"""Even and uneven on two and three ranks, tall and wide, matrices and stacks."""


def drawn(seed: int) -> list[Tensor]:
    """A tensor a shape, alike on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def whole_steps() -> list[Tensor]:
    """The same on whole tensors, written out."""
    weights = drawn(0)
    for weight, grad in zip(weights, drawn(1), strict=True):
        momentum = torch.zeros_like(grad)
        for _ in range(2):
            momentum = 0.95 * momentum + 0.05 * grad
            nesterov = 0.95 * momentum + 0.05 * grad
            scale = max(1, grad.shape[-2] / grad.shape[-1]) ** 0.5
            weight -= 0.1 * scale * polar_as_published(nesterov, Numerics(normalise="matrix"))
    return weights


def gathered_steps(mesh: DeviceMesh) -> tuple[list[Tensor], list[tuple[str, float]]]:
    """The weights after two steps with one gradient, and what one step moves."""
    pieces, grads = ([distribute_tensor(whole, mesh, [Shard(0)]) for whole in drawn(seed)] for seed in (0, 1))
    parameters = [nn.Parameter(piece) for piece in pieces]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer = AllGatherMuon(parameters, lr=0.1)
    optimizer.step()
    with CollectiveCounter() as wire:
        optimizer.step()
    return [parameter.data.full_tensor() for parameter in parameters], [(p.kind, p.sent) for p in wire.log]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_gathered_muon_is_muon(ranks: Ranks, world: int) -> None:
    for found, moved in ranks.run(world, gathered_steps):
        for ours, theirs in zip(found, whole_steps(), strict=True):
            # Roundings of the momentum in float32 that one in bfloat16 makes larger.
            torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)
        # DTensor pads uneven shards to equal ones.
        rows = [math.ceil(shape[0] / world) * math.prod(shape[1:]) for shape in SHAPES]
        sent = [("all_gather", 4.0 * count * (world - 1)) for count in rows]
        assert moved == (sent if world > 1 else [])


def one_layer() -> PreTrainedModel:
    """A small model, alike on all ranks: experts whose matrices are tall in one stack and wide in the other."""
    overrides = {"num_hidden_layers": 1, "intermediate_size": 192}
    return build("olmoe-tiny", vocabulary=64, overrides=overrides, device="cpu", seed=0)


def drawn_for(model: nn.Module, seed: int) -> list[Tensor]:
    """A whole gradient a parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


def dion_steps(mesh: DeviceMesh) -> dict[str, Tensor]:
    """The weights after two steps with two gradients."""
    model = shard(one_layer(), mesh)
    (optimizer,) = build_baseline("dion", model)
    # Compiling takes a minute.
    with torch.compiler.set_stance("force_eager"):
        for seed in (1, 2):
            for parameter, grad in zip(model.parameters(), drawn_for(model, seed), strict=True):
                parameter.grad = distribute_tensor(grad, mesh, cast(DTensor, parameter).placements)
            optimizer.step()
    return {name: cast(DTensor, parameter.data).full_tensor() for name, parameter in model.named_parameters()}


def dion_written_out() -> dict[str, Tensor]:
    """The same on whole tensors: Muon scaled by √(m/n), and AdamW with the package's betas."""
    model = one_layer()
    found = parts(model)
    adamw = torch.optim.AdamW(found.others.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    momenta = {name: torch.zeros_like(weight) for name, weight in found.hidden.items()}
    for seed in (1, 2):
        for parameter, grad in zip(model.parameters(), drawn_for(model, seed), strict=True):
            parameter.grad = grad
        adamw.step()
        for name, weight in found.hidden.items():
            assert weight.grad is not None
            momenta[name] = 0.95 * momenta[name] + weight.grad
            nesterov = 0.95 * momenta[name] + weight.grad
            scale = (weight.shape[-2] / weight.shape[-1]) ** 0.5
            update = scale * polar_as_published(nesterov, Numerics(normalise="matrix"))
            weight.data = weight.data * (1 - 1e-3 * 0.01) - 1e-3 * update
    return {name: parameter.data for name, parameter in model.named_parameters()}


@pytest.mark.skipif(not DION, reason="dion is not installed")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_muon_of_dion_is_muon(ranks: Ranks, world: int) -> None:
    model = one_layer()
    before, expected, hidden = dict(model.named_parameters()), dion_written_out(), parts(model).hidden
    assert {tuple(weight.shape) for weight in hidden.values()} == {(128, 128), (8, 384, 128), (8, 128, 192)}
    for found in ranks.run(world, dion_steps):
        for name, weight in expected.items():
            if name in hidden:
                # In bfloat16, each of the two is five percent from the exact polynomial.
                assert (found[name] - weight).norm() < 0.1 * (before[name] - weight).norm(), name
            else:
                torch.testing.assert_close(found[name], weight, msg=name)


def test_every_parameter_is_stepped_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.Optimizer, "step", lambda self: None)
    with simulate("olmoe-tiny", "muon", mesh={"dp_shard": 2}) as simulated:
        model = simulated.model
        every = sorted(map(id, model.parameters()))
        found = parts(model)
        assert (len(found.matrices), len(found.stacks), len(found.others)) == (16, 8, len(every) - 24)
        for name in (ADAMW, "torch.optim.Muon", *(["dion"] if DION else []), "all-gather-muon"):
            groups = [group for optimizer in build_baseline(name, model) for group in optimizer.param_groups]
            assert sorted(id(parameter) for group in groups for parameter in group["params"]) == every
            assert describe_baseline(name, model)


def test_what_a_baseline_cannot_step_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "narrow.toml"
    sizes = "vocab_size = 64\nhidden_size = 16\nnum_hidden_layers = 1\nhead_dim = 4\nnum_attention_heads = 4\n"
    path.write_text(f'family = "qwen3"\n[config]\n{sizes}num_key_value_heads = 4\nintermediate_size = 3\n')
    monkeypatch.setitem(sys.modules, "muon_fsdp2", sys)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    for ranks, refused in ((1, []), (2, ["muon-fsdp2"]), (4, ["torch.optim.Muon", "muon-fsdp2"])):
        with simulate(path, "muon", mesh={"dp_shard": ranks}) as simulated:
            reasons = {name: refusal(name, simulated.model, ranks) for name in NAMES}
        assert [name for name, reason in reasons.items() if reason] == refused
        for name in refused:
            assert "model.layers.0.mlp.gate_proj.weight [3, 16]" in str(reasons[name])
            assert f"on {ranks} ranks" in str(reasons[name])


PACKAGES = [("muon-fsdp2", "muon_fsdp2", "muon-fsdp2"), ("dion", "dion", "git+https://github.com/microsoft/dion")]


@pytest.mark.parametrize(("name", "module", "install"), PACKAGES)
def test_a_package_that_is_missing_says_how_to_get_it(
    name: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    model = build("olmoe-tiny", device="meta")
    assert refusal(name, model, 2) == f"not installed: pip install {install}"


@pytest.mark.parametrize("name", ["muon-fsdp2", "dion"])
def test_a_package_that_compiles_needs_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    model = build("olmoe-tiny", device="meta")
    reason = refusal(name, model, 2)
    assert reason is not None
    assert "no-such-compiler" in reason
    assert "TORCHDYNAMO_DISABLE=1" in reason
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert refusal(name, model, 2) is None
