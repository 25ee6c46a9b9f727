"""The optimizers that recipes are compared with step as they say, or are refused before any rank starts."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from symdist.diagnostics.collective_counter import CollectiveCounter
from symdist.rules.linalg.inverse_root import Numerics, polar_in_bfloat16
from symdist.tools.baselines import ADAMW, NAMES, AllGatherMuon, build_baseline, describe_baseline, parts, refusal
from symdist.tools.models import build
from symdist.tools.simulate import simulate
from tests.ranks import Ranks

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
            weight -= 0.1 * scale * polar_in_bfloat16(nesterov, Numerics(normalise="matrix"))
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


def test_every_parameter_is_stepped_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.Optimizer, "step", lambda self: None)
    with simulate("olmoe-tiny", "muon", mesh={"dp_shard": 2}) as simulated:
        model = simulated.model
        every = sorted(map(id, model.parameters()))
        found = parts(model)
        assert (len(found.matrices), len(found.stacks), len(found.others)) == (16, 8, len(every) - 24)
        for name in (ADAMW, "torch.optim.Muon", "all-gather-muon"):
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


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "muon_fsdp2", None)
    model = build("olmoe-tiny", device="meta")
    assert refusal("muon-fsdp2", model, 2) == "not installed: pip install muon-fsdp2"
