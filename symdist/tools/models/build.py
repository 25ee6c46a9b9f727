"""From a preset, or a TOML file of the same form, to a transformers model with random weights."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER = Path(__file__).parent

# family -> (config class, model class). Gemma3 is the text model: `Gemma3Config` has vision too.
_FAMILIES = {
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM"),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}

# Settings transformers reads from a config although no field of the config class names them.
_UNDECLARED = {"attn_implementation", "experts_implementation"}
_UNDECLARED_BY_FAMILY = {"qwen3-moe": {"head_dim"}}

# What every model trained from random weights wants. The token ids that transformers puts in belong to the
# published tokenizers; kept, the padding id would freeze one row of the embedding at zero.
_DEFAULTS = {"use_cache": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def build(
    name_or_path: str | Path,
    *,
    vocabulary: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
    seed: int | None = None,
) -> PreTrainedModel:
    """Build a causal language model with random weights; nothing is downloaded.

    Args:
        name_or_path: a preset (see `names`), or the path of a `.toml` file of the same form.
        vocabulary: number of tokens; the preset's own where left out.
        device: where the weights are made, torch's default device where left out. On `"meta"` they take no
            memory; `model.to_empty(device=...)` and `model.init_weights()` fill them later. After
            `fully_shard` on CPUs every rank draws its shards by itself: give each rank its own torch seed
            before that, or all shards come out alike.
        dtype: of the weights, all of them.
        overrides: settings of the transformers config, stronger than the file's. `attn_implementation` and
            `experts_implementation` may be among them; left out, transformers takes scaled dot product
            attention (plain attention for gpt-oss, whose sinks that cannot express) and grouped matrix
            products for experts.
        seed: makes the weights a function of configuration, kind of device and seed, and leaves the caller's
            random state as it was. Left out, the weights are drawn from the caller's random state.

    Raises:
        ValueError: the preset, the file, the family or a setting is unknown, or a setting is of the wrong type.
        ImportError: transformers is not installed.
    """
    family, settings = _read(name_or_path)
    settings |= overrides or {}
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary

    transformers = _transformers()
    # What transformers checks its configurations with; installed with it.
    from huggingface_hub.errors import StrictDataclassError

    config_class, model_class = (getattr(transformers, attribute) for attribute in _FAMILIES[family])
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    known |= _UNDECLARED | _UNDECLARED_BY_FAMILY.get(family, set())
    # transformers stores a setting it does not know and never reads it: a misspelt size would go unnoticed.
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{name_or_path}: {config_class.__name__} has no setting {', '.join(unknown)}")

    try:
        config = config_class(**(_DEFAULTS | settings))
    except StrictDataclassError as error:
        raise ValueError(f"{name_or_path}: {' '.join(str(error).split())}") from None
    place = torch.get_default_device() if device is None else torch.device(device)
    forked = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=forked, enabled=seed is not None), place:
        if seed is not None:
            torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype)
    # Some families make a router in float32 whatever is asked for, and FSDP2 wants one dtype among the weights it
    # gathers together.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order: the units FSDP wraps below the root."""
    return list(cast(nn.ModuleList, model.base_model.layers))


def active_parameters(model: PreTrainedModel) -> int:
    """Number of parameters one token uses: the chosen experts and all the rest, embedding included."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            stored = sum(parameter.numel() for parameter in module.parameters())
            unused = cast(int, module.num_experts) - model.config.num_experts_per_tok
            total -= stored // cast(int, module.num_experts) * unused
    return total


def _read(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """Family and config settings of a preset or of the user's own file."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in names():
            known = ", ".join(names())
            raise ValueError(f"no model {str(name_or_path)!r}: the path of a .toml file, or one of {known}")
        path = _FOLDER / f"{name_or_path}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"model file {path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"model file {path} is not valid TOML: {error}") from None
    if set(table) != {"family", "config"}:
        raise ValueError(f"{path}: expected `family` and the table `config`, found {sorted(table)}")
    if table["family"] not in _FAMILIES:
        raise ValueError(f"{path}: no family {table['family']!r}: one of {', '.join(_FAMILIES)}")
    return table["family"], table["config"]


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("building a model needs transformers: pip install 'symdist[tools]'") from error
