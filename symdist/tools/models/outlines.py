"""Outlines of the models of transformers: any causal language model that it knows, without weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from symdist.toml_file import read_toml
from symdist.tools.models.build import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that do not change which weights there are. By some of them, transformers would download code and run it.
_WITHOUT_WEIGHTS = (
    *("auto_map", "custom_pipelines", "quantization_config", "dtype", "torch_dtype", "_name_or_path"),
    # Of labels, however many, transformers makes a table.
    *("num_labels", "id2label", "label2id"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
# Building takes time for each layer and module. The largest models have a few thousand modules.
_MOST_LAYERS = 2000
_MOST_MODULES = 100_000
_MESSAGE = 300


def outline(source: str | Path) -> PreTrainedModel:
    """Build a causal language model of transformers on the meta device. Nothing is downloaded, and no other code run.

    Args:
        source: What the model is: the path of a `config.json`, or of a folder that has one; a model type of
            transformers, such as "deepseek_v32", for its default configuration; or the name of a model on the Hugging
            Face Hub whose `config.json` is in the local cache.

    Returns:
        The model; all its weights are float32.

    Raises:
        ValueError: If the source is none of these, the file holds no configuration, transformers does not know the
            model type or cannot build it, it is no causal language model, or it has too many layers. The message is one
            line.
        ImportError: If transformers is not installed.

    Example:
        >>> sum(parameter.numel() for parameter in outline("deepseek_v32").parameters())
        671877944832
    """
    transformers, name = import_transformers(), str(source)
    if name in transformers.CONFIG_MAPPING:
        kind, settings = name, dict[str, Any]()
    else:
        kind, settings = _read(_find(source, transformers), transformers)
    config_class = transformers.CONFIG_MAPPING[kind]
    with _undisturbed(), torch.random.fork_rng(devices=[]), torch.device("meta"), _few_modules():
        try:
            config = config_class.from_dict(settings)
            if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                raise _NoLanguageModelError
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
        except _NoLanguageModelError:
            raise ValueError(
                f"{name}: {kind} is no causal language model in transformers {transformers.__version__}; give one that "
                "AutoModelForCausalLM can build"
            ) from None
        except _TooManyModulesError:
            raise ValueError(f"{name}: it has more than {_MOST_MODULES:,} modules; give smaller sizes") from None
        except Exception as error:  # transformers raises errors of any kind; each is about the configuration.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MESSAGE]
            said = "by default" if not settings else "from it"
            remedy = "give a config.json" if not settings else "correct it"
            raise ValueError(f"{name}: transformers cannot build {kind} {said} ({reason}); {remedy}") from None
    # Some models create the one or other weight on the CPU, or in another dtype.
    return model.to(device="meta", dtype=torch.float32)


def _find(source: str | Path, transformers: Any) -> Path:
    """Return the path of a configuration."""
    path = Path(source)
    if path.is_dir():
        return path / "config.json"
    if path.suffix == ".json":
        return path
    if path.exists():
        raise ValueError(
            f"{path} is no configuration of transformers; give a folder with a config.json, or a .json file"
        )
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = str(source)
    try:
        cached = try_to_load_from_cache(name, "config.json") if "/" in name else None
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    close = difflib.get_close_matches(name, list(transformers.CONFIG_MAPPING), n=3)
    raise ValueError(
        f"{name!r} is no file, no model type of transformers {transformers.__version__}"
        + (f" (close are {', '.join(close)})" if close else "")
        + ", and no model in the local cache of the Hugging Face Hub; download its config.json and give the path"
    )


def _read(path: Path, transformers: Any) -> tuple[str, dict[str, Any]]:
    """Return the model type and the settings of a configuration."""
    settings = _cleaned(read_toml(path, what="configuration"))
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError(f"configuration {path} names no model_type; give the config.json of a model of transformers")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"configuration {path}: transformers {transformers.__version__} has no model type {kind!r}, and code that "
            "comes with a model is not run; install a transformers that has it"
        )
    for key, number in _layer_counts(settings):
        if number > _MOST_LAYERS:
            raise ValueError(f"configuration {path}: {key}={number:,} must be at most {_MOST_LAYERS:,}")
    return kind, settings


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cleaned(item) for key, item in value.items() if key not in _WITHOUT_WEIGHTS}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _layer_counts(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value)
        elif isinstance(value, int) and key.endswith(("layer", "layers", "depth", "num_blocks")):
            yield key, value


class _NoLanguageModelError(Exception):
    """A configuration of something else than a causal language model."""


class _TooManyModulesError(Exception):
    """A model that would take too long to build."""


@contextmanager
def _few_modules() -> Iterator[None]:
    """Stop what builds more modules than any model has, whichever setting asks for them."""
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > _MOST_MODULES:
            raise _TooManyModulesError

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep transformers from the network, and from remarks about what has no effect on the weights."""
    from huggingface_hub import constants
    from transformers.utils import logging

    offline, level = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
