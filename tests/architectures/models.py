"""Every causal language model of the installed transformers, at its default configuration, on the meta device."""

import os
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True, kw_only=True)
class Unbuilt:
    """An architecture whose default configuration does not build.

    Attributes:
        reason: The error.
        module: The module whose code raised it.
    """

    reason: str
    module: str


def build(model_type: str) -> nn.Module | Unbuilt:
    """Build a model at its default configuration on meta, or say why transformers does not."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    except Exception as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        module = innermost.filename.rpartition("site-packages/")[2].removesuffix(".py").replace("/", ".")
        return Unbuilt(reason=f"{type(error).__name__}: {' '.join(str(error).split())}", module=module)
    finally:
        logging.set_verbosity(verbosity)


def all_models() -> Iterator[tuple[str, nn.Module | Unbuilt]]:
    """Yield every architecture, one at a time, so that few are held at once."""
    for model_type in MODEL_TYPES:
        yield model_type, build(model_type)
