"""Experts stored [in, out], as in Llama 4 and gpt-oss, get the update that the same experts stored [out, in] get."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import build_optimizer
from tests.architectures.tiny import TINY, tiny

SIZES = {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}


def experts(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    found = dict(model.named_parameters())
    (gate_up,) = [
        p
        for name, p in found.items()
        if name.endswith("1.mlp.experts.gate_up_proj") or "1.feed_forward.experts.gate" in name
    ]
    (down,) = [
        p
        for name, p in found.items()
        if name.endswith("1.mlp.experts.down_proj") or "1.feed_forward.experts.down" in name
    ]
    return gate_up, down


def turned(weight: Tensor, *, alternate: bool) -> Tensor:
    """An expert weight stored [in, out] as [out, in]; `alternate` says that gates and ups do, here not any more."""
    out_in = weight.mT
    return torch.cat([out_in[:, ::2], out_in[:, 1::2]], dim=1) if alternate else out_in


@pytest.mark.parametrize(
    "section",
    [
        {"rule": "muon"},
        {"rule": "muon", "view": "neurons"},
        {"rule": "row_norm", "view": "neurons"},
        {"rule": "normuon", "view": "neurons"},
        {"rule": "aurora", "view": "neurons"},
        {"rule": "right_spectral"},
        {"rule": "aro", "view": "residual"},
    ],
    ids=lambda section: "-".join(section.values()),
)
@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss"])
def test_how_experts_are_stored_changes_nothing(
    model_type: str, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, "qwen2_moe", TINY["qwen2_moe"] | SIZES)
    stored, other = tiny(model_type), tiny("qwen2_moe")
    recipe = {"default": {"rule": "adamw", "lr": 0.01}, "experts": {**section, "lr": 0.1, "weight_decay": 0.01}}
    alternate = model_type == "gpt_oss"
    pairs = [
        (weight, twin, alternate and i == 0)
        for i, (weight, twin) in enumerate(zip(experts(stored), experts(other), strict=True))
    ]
    start = []
    with torch.no_grad():
        for weight, twin, alternates in pairs:
            twin.copy_(turned(weight, alternate=alternates))
            start.append(weight.clone())
    optimizers = build_optimizer(stored, recipe), build_optimizer(other, recipe)
    for step in range(3):
        for i, (weight, twin, alternates) in enumerate(pairs):
            generator = torch.Generator().manual_seed(10 * step + i)
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            twin.grad = turned(weight.grad, alternate=alternates).contiguous()
        for optimizer in optimizers:
            optimizer.step()
    for (weight, twin, alternates), before in zip(pairs, start, strict=True):
        moved = (weight - before).norm()
        assert moved > 0.01
        assert (turned(weight, alternate=alternates) - twin).norm() <= 1e-9 * moved
