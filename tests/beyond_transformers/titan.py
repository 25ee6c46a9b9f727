"""torchtitan's models, built small by its own code, and what checkpoints of transformers call their weights."""

import dataclasses
import re
import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols.module import Module

# The smallest that torchtitan has of each; only a large one has latent queries.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("debugmodel", {}),
    "llama3 tied": ("1B", {}),
    "qwen3": ("debugmodel", {}),
    "qwen3 apart": ("debugmodel_non_fused_qkv", {}),
    "qwen3 experts": ("debugmodel_moe", {}),
    "deepseek_v3": ("debugmodel", {}),
    "deepseek_v3 latent": ("236B", {"num_mtp_layers": 1}),
    "gpt_oss": ("debugmodel", {}),
    "kimi_k2_7": ("debugmodel", {}),
    "muse_glimmer": ("debugmodel_mm", {}),
    "qwen3_5": ("debugmodel", {}),
    "qwen3_5 experts": ("debugmodel_moe", {}),
}
VOCABULARY = 128
LENGTH = 16


class PlainAttention(Module):
    """Causal attention in the dtype of its inputs: torchtitan's own kernels have no backward on a CPU."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, out_transform: Any = None, **_: Any
    ) -> Tensor:
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
        scores = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return out if out_transform is None else out_transform(out, scores.logsumexp(-1).transpose(1, 2))


class NoKernels(ModuleType):
    """Stands for a package of kernels for cards, of which a model on meta needs the names only."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"apply": None})


def models_of(family: str) -> Any:
    """torchtitan's package of a family of models.

    qwen3_5 imports `fla`, whose kernels run on cards. Installed, transformers would take them on a CPU, too; so that it
    never sees the stand-in, this is gone as soon as torchtitan has it.
    """
    inside = ("", ".modules", ".modules.conv", ".modules.conv.triton", ".modules.conv.triton.ops", ".ops")
    rules = (".ops.gated_delta_rule", ".ops.gated_delta_rule.chunk", ".ops.gated_delta_rule.fused_recurrent")
    names = [f"fla{name}" for name in (*inside, *rules, ".modules.conv.causal_conv1d")]
    if family != "qwen3_5" or "fla" in sys.modules:
        return import_module(f"torchtitan.models.{family}")
    sys.modules.update((name, NoKernels(name)) for name in names)
    try:
        return import_module(f"torchtitan.models.{family}")
    finally:
        for name in names:
            del sys.modules[name]


def spec(name: str) -> Any:
    """torchtitan's specification of a model, whose attention runs on a CPU."""
    flavor, options = MODELS[name]
    found = models_of(name.split()[0]).model_registry(flavor, **options)
    found.model.layers = found.model.layers[:6]
    for layer in found.model.layers:
        if getattr(layer, "attention", None) is not None:
            layer.attention.inner_attention = PlainAttention.Config()
    return found


@cache
def on_meta(name: str) -> Any:
    """The model, or its first layers, without values."""
    with torch.device("meta"):
        return spec(name).model.build()


def trainable(name: str, layers: slice, dtype: torch.dtype = torch.float64) -> Any:
    """The model with some of its layers and a small vocabulary, as torchtitan initializes it; everywhere the same."""
    config = spec(name).model
    config.layers = config.layers[layers]
    embedding = getattr(config.tok_embeddings, "embedding", config.tok_embeddings)
    config.vocab_size = embedding.num_embeddings = config.lm_head.out_features = VOCABULARY
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states()
    return model.to(dtype)


def published(name: str) -> dict[str, list[str]]:
    """What the weights are called in transformers' checkpoints, by torchtitan's names; both with `{}` for numbers.

    Query, key and value are one weight of some models, which torchtitan saves as three. Weights whose names its adapter
    makes in code are left out.
    """
    found = spec(name)
    adapter = found.state_dict_adapter(found.model, None)
    held = {abstract(parameter) for parameter, _ in on_meta(name).named_parameters()}
    by_name: dict[str, list[str]] = {}
    for theirs, ours in {**adapter.from_hf_map, **getattr(adapter, "vision_from_hf_map", {})}.items():
        if ours is not None:
            key = abstract(ours)
            key = key if key in held else re.sub(r"\.w[qkv]\.", ".wqkv.", key)
            by_name.setdefault(key, []).append(theirs)
    return by_name


def abstract(name: str) -> str:
    """A weight's name with `{}` for numbers, and without the letters for its dimensions that torchtitan appends.

    Blocks that predict further tokens are numbered with the others in checkpoints.
    """
    return re.sub(r"_[A-Z]+$", "", re.sub(r"\.\d+\.", ".{}.", name)).replace("mtp_layers.", "layers.")


def batch(seed: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens and their positions."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=draw), torch.arange(LENGTH).expand(rows, LENGTH)


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the next token, in the dtype of the logits."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
