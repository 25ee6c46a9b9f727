"""Small language models of transformers, dense and with experts, their text, and what one process makes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import symdist

STEPS = 5
ROWS = 8
LENGTH = 12
VOCABULARY = 96
CLIP = 0.5

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
# transformers' grouped products know no float64.
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}

SPECTRAL = {
    "embedding": {"rule": "right_spectral", "lr": 0.02},
    "head": {"rule": "hybrid", "centered": True, "lr": 0.01},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "muon", "view": "heads", "lr": 0.01},
    "matrix": {"rule": "muon", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 1e-3},
}
ROWWISE = {
    "embedding": {"rule": "row_norm", "lr": 0.1},
    "head": {"rule": "row_norm", "centered": True, "lr": 0.03},
    "matrix": {"rule": "row_norm", "lr": 0.01, "weight_decay": 0.1},
    "default": {"rule": "adamw", "lr": 1e-3},
}
# The other rules hardly mind by what a gradient is multiplied, mean over ranks or sum: with such an eps this one does,
# and not the rounding of gradients near zero.
ADAMW = {"default": {"rule": "adamw", "lr": 1e-2, "eps": 1e-3}}
RECIPES: dict[str, Any] = {"spectral": SPECTRAL, "rows": ROWWISE, "adamw": ADAMW}
# In float32, as part of the way that a weight went.
WITHIN = {"spectral": 1e-3, "rows": 5e-5, "adamw": 5e-5}

Weights = dict[str, Tensor]
Sizes = dict[str, int]


def build(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """The same weights wherever it is built; those of norms are not all one, which would hide which is whose."""
    config = Qwen3Config(**SMALL) if kind == "dense" else Qwen3MoeConfig(**SMALL, **EXPERTS)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64), alpha=0.05)
    return model.to(dtype)


def loaded(folder: Path, sizes: Sizes, dtype: torch.dtype) -> Any:
    """A saved model, laid out by transformers on all ranks as a `DistributedConfig` of these sizes says."""
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype=dtype, experts_implementation="eager"
    )


def saved(folder: Path) -> Path:
    """Where models of both kinds are, to be loaded."""
    for kind in ("dense", "experts"):
        build(kind).save_pretrained(folder / kind)
    return folder


def rows() -> Tensor:
    """All sequences, as many a step as the batch has."""
    return torch.randint(VOCABULARY, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def batch(step: int, share: slice = slice(None)) -> Tensor:
    return rows().view(STEPS, ROWS, LENGTH)[step][share]


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over tokens, in the dtype of the weights; transformers' own rounds to float32."""
    return nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@contextmanager
def exact() -> Iterator[None]:
    """The norms of transformers round to float32 within; these do not."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        scale = (hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * hidden_states * scale

    with mock.patch.object(Qwen3RMSNorm, "forward", forward), mock.patch.object(Qwen3MoeRMSNorm, "forward", forward):
        yield


def fading(optimizer: Any) -> Any:
    """The schedule that Trainer calls linear."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


@cache
def alone(
    kind: str, recipe: str, *, clip: float = 0.0, fade: bool = False, dtype: torch.dtype = torch.float64
) -> Weights:
    """Weights after training in this process, without any trainer."""
    model = build(kind, dtype)
    optimizer = symdist.build_optimizer(model, RECIPES[recipe])
    schedule = fading(optimizer) if fade else None
    with exact():
        train(model, optimizer, batch, clip=clip, schedule=schedule)
    return weights_of(model)


def train(
    model: nn.Module,
    optimizer: Any,
    given: Callable[[int], Tensor],
    *,
    clip: float = 0.0,
    schedule: Any = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> None:
    """All steps, on what is given of each batch."""
    for step in range(STEPS):
        tokens = given(step)
        backward(loss_of(model(input_ids=tokens), tokens))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


@cache
def begun(kind: str, dtype: torch.dtype) -> Weights:
    return weights_of(build(kind, dtype))


def weights_of(model: nn.Module) -> Weights:
    """Whole weights by their names in the model that nothing wraps."""
    return {plain(name): whole(parameter) for name, parameter in model.named_parameters()}


def plain(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def whole(parameter: Tensor) -> Tensor:
    found = parameter.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found.clone()


def apart(found: Weights, kind: str, expected: Weights) -> dict[str, float]:
    """How far weights are from the expected ones, as part of the way these have come; every one must have come some."""
    start = begun(kind, next(iter(expected.values())).dtype)
    assert found.keys() == expected.keys()
    parts = {}
    for name, weight in expected.items():
        way = (weight - start[name]).norm()
        assert way > 1e-4 * start[name].norm(), f"{name} has not moved in one process"
        assert not torch.equal(found[name], start[name]), f"{name} has not moved"
        parts[name] = float((found[name] - weight).norm() / way)
    return parts


def agree(found: list[Weights], kind: str, recipe: str, expected: Weights) -> None:
    """On every rank, to rounding, which spectral rules magnify."""
    within = WITHIN[recipe] if next(iter(expected.values())).dtype == torch.float32 else 1e-9
    for weights in found:
        parts = apart(weights, kind, expected)
        worst = max(parts, key=parts.__getitem__)
        assert parts[worst] < within, f"{worst}: {parts[worst]:.1e} of the way it went"
