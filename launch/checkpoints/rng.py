"""States of a process's random number generators, as JSON-serializable values, one file per rank."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from launch.checkpoints.manifest import CHOOSE, DamagedCheckpointError, read_json


def rng_file(path: Path, rank: int) -> Path:
    """Return the file with the states of ``rank`` in the checkpoint at ``path``."""
    return path / f"rng-{rank:05d}.json"


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, including the current CUDA device's."""
    numbers = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numbers, "torch": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def read_rng_state(path: Path, rank: int) -> dict[str, Any]:
    """Read the states of ``rank`` from the checkpoint at ``path``, and check them; no generator changes.

    Raises:
        DamagedCheckpointError: If the file is missing or damaged, or holds no states.
    """
    file = rng_file(path, rank)
    state = read_json(file, TypeAdapter(dict[str, Any]))
    try:
        # Draws the order of data and the like, no secrets.
        _set(state, python=random.Random(), numpy=np.random.RandomState(), of_torch=torch.Generator())  # nosec B311
        # NumPy itself would read past the end of the words.
        words = state["numpy"]["state"]
        if len(words["key"]) != 624 or not 0 <= words["pos"] <= 624:
            raise ValueError("NumPy's has 624 words, and a position among them")
        if "cuda" in state:
            on_card = _decode(state["cuda"])
            if torch.cuda.is_available():
                torch.Generator("cuda").set_state(on_card)
    except Exception as error:  # whatever a generator does with what is not its state
        raise DamagedCheckpointError(f"{file} is damaged: it holds no generator's state ({error}); {CHOOSE}") from error
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned; a CUDA state is ignored on a machine without CUDA."""
    _set(state, python=random, numpy=np.random, of_torch=torch.default_generator)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _set(state: dict[str, Any], *, python: Any, numpy: Any, of_torch: torch.Generator) -> None:
    version, words, gauss = state["python"]
    python.setstate((version, tuple(words), gauss))
    numpy.set_state(state["numpy"])
    of_torch.set_state(_decode(state["torch"]))


def _encode(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
