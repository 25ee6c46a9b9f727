"""Checkpoints of a sharded training run: written whole or not at all, and checked before they are read.

A checkpoint is a directory ``step-00000100`` that holds the shards and the ``.metadata`` of
``torch.distributed.checkpoint``, a ``state.json`` (trainer state and optimizer options), one
``rng-00000.json`` a rank, and a ``manifest.json``. The manifest is written last and names every other file
with its size and checksum, so a directory that has one was finished. Every rank must see the same directory.

Each stage ends in one exchange of outcomes between all ranks, whatever happened on any of them; a failure on
one rank is therefore raised on all, and none is left waiting in a collective.
"""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from launch.checkpoints.directory import (
    CHOOSE,
    CheckpointError,
    describe_files,
    latest,
    verify,
    write_json,
)
from launch.checkpoints.publish import publish_together
from launch.checkpoints.rng import rng_state, set_rng_state
from launch.runtime.agreement import on_all_ranks, rank_and_world, with_dcp

__all__ = ["CheckpointError", "Snapshot", "latest", "load", "save", "snapshot", "write"]

_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All of a checkpoint's content: the tensors of model and optimizer, and what JSON can hold."""

    step: int
    tensors: dict[str, torch.Tensor]
    plain: dict[str, Any]
    trainer: dict[str, Any]
    rng: dict[str, Any]


def save(
    directory: Path,
    step: int,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    identity: dict[str, Any],
    keep: int = 3,
    keep_every: int = 0,
) -> Path:
    """Write ``directory/step-XXXXXXXX``, then remove the oldest earlier ones; called by all ranks.

    Args:
        directory: where the checkpoints of this run live; made when missing.
        step: optimizer steps done; an older checkpoint of the same step is replaced.
        model: its parameters and persistent buffers are saved, each rank writing its own shards.
        optimizer: its state and its groups' options are saved; a state not made yet is made.
        trainer: JSON-able values, the same on all ranks.
        identity: JSON-able values that tell this run from others.
        keep: how many checkpoints to leave, this one included. Those of later steps are neither counted
            nor removed.
        keep_every: of earlier checkpoints those stay too whose step it divides; 0 is for none.

    Returns:
        The directory of the finished checkpoint.

    Raises:
        ValueError: where ``keep`` is below 1.
        CheckpointError: on all ranks, where any of them could not write, or where ``directory`` belongs to
            another run. Earlier checkpoints are then as they were, and nothing of this one is left.
    """
    tensors, plain = _collect(model, optimizer)
    snapshot = Snapshot(step=step, tensors=tensors, plain=plain, trainer=trainer, rng=rng_state())
    return write(directory, snapshot, identity=identity, keep=keep, keep_every=keep_every)


def snapshot(
    step: int, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, trainer: dict[str, Any], stager: AsyncStager
) -> Snapshot:
    """Return a copy of all that ``save`` would write, in the memory of the host; called by all ranks.

    ``stager`` keeps its buffers: the copy before is overwritten.
    """
    tensors, plain = _collect(model, optimizer)
    copied = cast("dict[str, torch.Tensor]", stager.stage(tensors))
    # The options are the optimizer's own until they are copied.
    return Snapshot(step=step, tensors=copied, plain=copy.deepcopy(plain), trainer=trainer, rng=rng_state())


def write(
    directory: Path,
    snapshot: Snapshot,
    *,
    identity: dict[str, Any],
    keep: int,
    keep_every: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a snapshot as ``save`` does. ``group`` has all ranks, so that it can be done in another thread."""
    rank, _ = rank_and_world()

    def write_all(writing: Path, failed: str, remedy: str) -> dict[str, Any]:
        def write_own() -> dict[str, Any]:
            own = [*writing.glob(f"__{rank}_*.distcp"), writing / f"rng-{rank:05d}.json"]
            write_json(own[-1], snapshot.rng)
            if rank == 0:
                own += [writing / ".metadata", writing / _STATE]
                write_json(own[-1], {"trainer": snapshot.trainer, "optimizer": snapshot.plain})
            return describe_files(own)

        def save_all() -> None:
            writer = dcp.FileSystemWriter(writing)
            dcp.save(snapshot.tensors, storage_writer=writer, process_group=group)

        with_dcp(save_all, failed, remedy)
        return on_all_ranks(write_own, failed, remedy, group)

    return publish_together(
        directory, snapshot.step, write_all, identity=identity, keep=keep, keep_every=keep_every, group=group
    )


def load(
    path: Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> dict[str, Any]:
    """Restore a checkpoint into ``model`` and ``optimizer``; called by all ranks, changes nothing on disk.

    The number of ranks may differ from the run that saved; the generators of random numbers are then left
    as they are.

    Returns:
        The ``trainer`` values given to ``save``, and ``"rng_restored"``: whether the states of Python's,
        NumPy's and torch's generators were restored too.

    Raises:
        CheckpointError: on all ranks, where the directory is missing, unfinished, damaged or not of this
            format, comes from a run of another identity, or holds other tensors than the model and the
            optimizer need. Weights and existing optimizer state are untouched then.
    """
    rank, world = rank_and_world()
    failed = f"cannot read {path}"
    saved_world = on_all_ranks(lambda: verify(path, identity=identity, rank=rank, world=world), failed, CHOOSE)
    tensors, plain = _collect(model, optimizer)
    reader = _Reader(path)
    names = [group["params"] for group in plain["groups"]]

    def fitting() -> dict[str, Any]:
        state = json.loads((path / _STATE).read_text())
        problem = _mismatch(reader.read_metadata(), tensors)
        if problem is None and [group["params"] for group in state["optimizer"]["groups"]] != names:
            problem = "its optimizer groups hold other parameters"
        if problem is not None:
            raise CheckpointError(
                f"checkpoint {path} does not fit this model and optimizer: {problem}; build both as the saving run did"
            )
        return state

    state = on_all_ranks(fitting, failed, CHOOSE)
    with_dcp(lambda: dcp.load(tensors, storage_reader=reader), failed, CHOOSE)
    _restore(model, optimizer, tensors=tensors, plain=state["optimizer"])
    if saved_world == world:
        set_rng_state(json.loads((path / f"rng-{rank:05d}.json").read_text()))
    return state["trainer"] | {"rng_restored": saved_world == world}


def _collect(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split the state of both into tensors by flat name, for DCP, and the rest, for JSON.

    DCP would pickle whatever is not a tensor, and unpickle it without restriction.
    """
    weights = get_model_state_dict(model)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    tensors: dict[str, Any] = {f"model.{name}": value for name, value in weights.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for name, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def _restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, tensors: dict, plain: dict) -> None:
    """Apply the options, and let load hooks run; DCP has already filled all tensors in place."""
    weights = {name: value for name, value in tensors.items() if name.startswith("model.")}
    set_model_state_dict(model, {name.removeprefix("model."): value for name, value in weights.items()})
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    for name, values in state["state"].items():
        values.update(plain["scalars"].get(name, {}))
    for group, saved in zip(state["param_groups"], plain["groups"], strict=True):
        # JSON has made lists of tuples such as AdamW's betas.
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})
    exact = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    set_optimizer_state_dict(model, optimizer, state)
    # Optimizer.load_state_dict rounds floating state to its parameter's dtype, float32 momenta of bfloat16
    # weights included.
    for parameter, values in exact.items():
        optimizer.state[parameter].update(values)


def _mismatch(metadata: Metadata, tensors: dict[str, torch.Tensor]) -> str | None:
    """Say how the stored tensors differ from the wanted ones; DCP itself ignores surplus and casts dtypes."""
    stored: dict[str, Any] = metadata.state_dict_metadata
    lacking, surplus = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    if lacking or surplus:
        return f"it lacks {lacking[:5] or 'nothing'} and has {surplus[:5] or 'nothing'} besides"
    for name, wanted in tensors.items():
        there = (tuple(stored[name].size), stored[name].properties.dtype)
        if there != (tuple(wanted.shape), wanted.dtype):
            return f"{name} is {there[0]} of {there[1]} there, {tuple(wanted.shape)} of {wanted.dtype} here"
    return None


class _Reader(dcp.FileSystemReader):
    """Reads shards as DCP does, but unpickles ``.metadata`` with DCP's own record types only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as stream:
            return _MetadataUnpickler(stream).load()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        harmless = (torch.Size, torch.serialization._get_layout, pathlib.PosixPath, pathlib.WindowsPath)
        from_dcp = isinstance(found, type) and found.__module__.startswith("torch.distributed.checkpoint.")
        if found in harmless or from_dcp or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint needs")
