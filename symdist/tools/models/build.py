"""Builds a `transformers` model with random weights from a preset, or from a TOML file of the same form."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from symdist.toml_file import read_toml
from symdist.tools.models.settings import check_fit, configure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER = Path(__file__).parent

# family -> (config class, model class). For Gemma3 these are the text-only classes; `Gemma3Config` includes vision.
_FAMILIES = {
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM"),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}

# Settings for training from random weights. The default token ids of transformers belong to the published tokenizers;
# the padding id, if kept, would freeze one row of the embedding at zero.
_DEFAULTS = {"use_cache": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def names() -> list[str]:
    """Return the names of the presets, sorted.

    Returns:
        Names that `build` accepts.
    """
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
    """Build a causal language model with random weights. Nothing is downloaded.

    Args:
        name_or_path: A preset (see `names`), or the path of a `.toml` file of the same form.
        vocabulary: The number of tokens; the preset's own by default.
        device: Where the weights are created; torch's default device by default. On `"meta"` they take no memory;
            `model.to_empty(device=...)` and `model.init_weights()` fill them later. After `fully_shard` on CPUs, every
            rank draws its shards on its own, so give each rank a different torch seed first, or all shards are equal.
        dtype: The dtype of all weights; float32 by default.
        overrides: Settings of the transformers config that replace the file's. None by default. They may include
            `attn_implementation` and `experts_implementation`; without them, transformers chooses scaled dot product
            attention (eager attention for gpt-oss, whose sinks the former cannot express) and grouped matrix products
            for experts.
        seed: With a seed, the weights depend only on the configuration, the kind of device and the seed, and the
            caller's random state does not change. By default, the weights are drawn from the caller's random state.

    Returns:
        The model.

    Raises:
        ValueError: If the preset, the file, the family or a setting is unknown, a setting has the wrong type, is out of
            range or does not fit another, or the weights take more memory than the device has.
        ImportError: If transformers is not installed.

    Example:
        >>> model = build("olmoe-tiny", device="cpu", overrides={"num_hidden_layers": 2}, seed=0)
    """
    family, given = _read(name_or_path)
    settings = {**given, **(overrides or {})}
    if vocabulary is not None:
        settings["vocab_size"] = vocabulary
    transformers, where = import_transformers(), str(name_or_path)
    config_class, model_class = (getattr(transformers, attribute) for attribute in _FAMILIES[family])
    # The file's own settings are checked as well where others replace them.
    for checked in (given, settings):
        config = configure(config_class, family, checked, defaults=_DEFAULTS, where=where)
    check_fit(config, dtype=dtype, where=where)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = model_class._from_config(config, dtype=dtype)
        except Exception as error:  # transformers raises errors of any kind; each is about the settings.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{where}: transformers cannot build it ({reason}); correct its settings") from None
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type != "meta":
        _check_memory(model, dtype, target, where=where)
        forked = [target] if target.type == "cuda" else []
        with torch.random.fork_rng(devices=forked, enabled=seed is not None), target:
            if seed is not None:
                torch.manual_seed(seed)
            model = model_class._from_config(config, dtype=dtype)
    # Some families always create the router in float32, but FSDP2 needs the same dtype for all weights that it gathers
    # together.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model in order; `shard` wraps each of them by FSDP2.

    Args:
        model: The model.

    Returns:
        The layers.
    """
    return list(cast(nn.ModuleList, model.base_model.layers))


def active_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters that one token uses.

    These are the experts chosen for a token and all parameters outside of experts, the embedding included.

    Args:
        model: The model, not sharded.

    Returns:
        The number of parameters.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            stored = sum(parameter.numel() for parameter in module.parameters())
            unused = cast(int, module.num_experts) - model.config.num_experts_per_tok
            total -= stored // cast(int, module.num_experts) * unused
    return total


def _read(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the family and the config settings of a preset or a file."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in names():
            known = ", ".join(names())
            raise ValueError(
                f"there is no model {str(name_or_path)!r}; give the path of a .toml file, or one of {known}"
            )
        path = _FOLDER / f"{name_or_path}.toml"
    table = read_toml(path, what="model file")
    if set(table) != {"family", "config"} or not isinstance(table["config"], dict):
        raise ValueError(f"{path}: it must hold `family` and the table `config` only, but holds {sorted(table)}")
    if not isinstance(table["family"], str) or table["family"] not in _FAMILIES:
        raise ValueError(f"{path}: there is no family {table['family']!r}; choose from {', '.join(_FAMILIES)}")
    return table["family"], table["config"]


def _check_memory(model: nn.Module, dtype: torch.dtype, target: torch.device, *, where: str) -> None:
    """Refuse weights that the device cannot hold. The system would end the process, without a word."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    if target.type == "cuda":
        memory = torch.cuda.get_device_properties(target).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights * dtype.itemsize > memory:
        raise ValueError(
            f"{where}: {weights:,} weights take {weights * dtype.itemsize / 1e9:,.0f} GB, and {target} has "
            f"{memory / 1e9:,.0f} GB; give smaller sizes, or build it on the meta device and shard it first"
        )


def import_transformers() -> Any:
    """Import transformers.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("building a model needs transformers: pip install 'symdist[tools]'") from error
