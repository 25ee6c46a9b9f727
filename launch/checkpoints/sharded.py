"""Checkpoints of a sharded training run: written completely or not at all, and checked before they are read.

A checkpoint is a directory ``step-00000100`` that holds the shards and the ``.metadata`` of
``torch.distributed.checkpoint`` (DCP), a ``state.json`` (trainer state and optimizer options), one ``rng-00000.json``
per rank, and a ``manifest.json``. The manifest is written last and lists every other file with its size and mostly
its checksum, so a directory that has one is finished. All ranks must see the same directory.

After each stage all ranks exchange whether they succeeded, so a failure on one rank is raised on all of them, and none
is left waiting in a collective.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, with_config
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from typing_extensions import TypedDict

from launch.checkpoints.directory import describe_files, latest, verify
from launch.checkpoints.manifest import (
    CHOOSE,
    STRICT,
    CheckpointError,
    DamagedCheckpointError,
    FiniteJson,
    Manifest,
    read_json,
    validated,
    write_json,
)
from launch.checkpoints.pickles import PlainPlanner, read_metadata
from launch.checkpoints.publish import publish_together
from launch.checkpoints.rng import read_rng_state, rng_file, rng_state, set_rng_state
from launch.runtime.agreement import on_all_ranks, rank_and_world, with_dcp

__all__ = ["CheckpointError", "Snapshot", "latest", "load", "load_weights", "save", "snapshot", "write"]

_STATE = "state.json"


@with_config(STRICT)
class _Options(TypedDict):
    groups: list[dict[str, FiniteJson]]
    scalars: dict[str, dict[str, FiniteJson]]


@with_config(STRICT)
class _State(TypedDict):
    trainer: dict[str, Any]
    optimizer: _Options


_ANYTHING = TypeAdapter(dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The content of a checkpoint on one rank.

    Attributes:
        step: Optimizer steps done.
        tensors: The tensors of model and optimizer, by flat name.
        plain: Optimizer options and scalar state, JSON-serializable.
        trainer: The loop's values, JSON-serializable.
        rng: States of the random number generators, JSON-serializable.
    """

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
    checksums: bool | None = None,
) -> Path:
    """Write ``directory/step-XXXXXXXX``, then remove the oldest checkpoints; all ranks must call it.

    Args:
        directory: The folder of this run's checkpoints; created if missing.
        step: Optimizer steps done; an older checkpoint of the same step is replaced.
        model: Its parameters and persistent buffers are saved; each rank writes its own shards.
        optimizer: Its state and the options of its groups are saved; missing state is initialized.
        trainer: JSON-serializable values, the same on all ranks.
        identity: JSON-serializable values that tell this run from others.
        keep: How many checkpoints to leave, this one included; those of later steps are neither counted nor removed.
        keep_every: Also leave every checkpoint whose step is a multiple of this; 0 is for none.
        checksums: See `launch.checkpoints.directory.describe_files`.

    Returns:
        The directory of the finished checkpoint.

    Raises:
        ValueError: If ``keep`` is below 1.
        CheckpointError: On all ranks, if any of them could not write, or ``directory`` belongs to another run. Earlier
            checkpoints are then unchanged, and nothing of this one is left.

    Example:
        >>> path = save(
        ...     Path("checkpoints"), 100, model=model, optimizer=optimizer, trainer={"step": 100}, identity={"seed": 1}
        ... )
        >>> trainer = load(path, model=model, optimizer=optimizer, identity={"seed": 1})
    """
    tensors, plain = _collect(model, optimizer)
    snapshot = Snapshot(step=step, tensors=tensors, plain=plain, trainer=trainer, rng=rng_state())
    return write(directory, snapshot, identity=identity, keep=keep, keep_every=keep_every, checksums=checksums)


def snapshot(
    step: int, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, trainer: dict[str, Any], stager: AsyncStager
) -> Snapshot:
    """Return a copy of everything that ``save`` would write, in host memory; all ranks must call it.

    Args:
        step: Optimizer steps done.
        model: The model to copy.
        optimizer: The optimizer to copy.
        trainer: JSON-serializable values, the same on all ranks; not copied.
        stager: Copies the tensors. It reuses its buffers, so each snapshot overwrites the one before.
    """
    tensors, plain = _collect(model, optimizer)
    copied = cast("dict[str, torch.Tensor]", stager.stage(tensors))
    # The options still belong to the optimizer, so they must be copied.
    return Snapshot(step=step, tensors=copied, plain=copy.deepcopy(plain), trainer=trainer, rng=rng_state())


def write(
    directory: Path,
    snapshot: Snapshot,
    *,
    identity: dict[str, Any],
    keep: int,
    keep_every: int,
    checksums: bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a snapshot as ``save`` does; all ranks must call it.

    Args:
        directory: See ``save``.
        snapshot: This rank's content of the checkpoint.
        identity: See ``save``.
        keep: See ``save``.
        keep_every: See ``save``.
        checksums: See ``save``.
        group: A process group of all ranks, needed to write from another thread; the default group if None.

    Returns:
        The directory of the finished checkpoint.

    Raises:
        ValueError: See ``save``.
        CheckpointError: See ``save``.
    """
    rank, _ = rank_and_world()

    def write_all(writing: Path, failed: str, remedy: str) -> dict[str, Any]:
        def write_own() -> dict[str, Any]:
            paths = [*writing.glob(f"__{rank}_*.distcp"), rng_file(writing, rank)]
            write_json(paths[-1], snapshot.rng)
            if rank == 0:
                paths += [writing / ".metadata", writing / _STATE]
                write_json(paths[-1], {"trainer": snapshot.trainer, "optimizer": snapshot.plain})
            return describe_files(paths, checksums=checksums)

        def save_all() -> None:
            writer = dcp.FileSystemWriter(writing)
            dcp.save(snapshot.tensors, storage_writer=writer, process_group=group)

        with_dcp(save_all, failed, remedy)
        return on_all_ranks(write_own, failed, remedy, group)

    return publish_together(
        directory, snapshot.step, write_all, identity=identity, keep=keep, keep_every=keep_every, group=group
    )


def load(
    path: Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    trainer: TypeAdapter[Any] = _ANYTHING,
) -> dict[str, Any]:
    """Restore a checkpoint into ``model`` and ``optimizer``; all ranks must call it, and nothing on disk changes.

    The number of ranks may differ from that of the run that saved; the random number generators are then not restored.

    Args:
        path: The checkpoint's directory.
        model: The model to restore, built as in the run that saved.
        optimizer: The optimizer to restore, built as in the run that saved.
        identity: JSON-serializable values that tell this run from others.
        trainer: What the ``trainer`` values must be.

    Returns:
        The ``trainer`` values given to ``save``, plus ``"rng_restored"``: whether the states of Python's, NumPy's and
        torch's generators were restored too.

    Raises:
        CheckpointError: On all ranks, if the directory is missing, unfinished, damaged, of another format or another
            run's, or holds other tensors than the model and the optimizer need. Weights and existing optimizer state
            are then unchanged, except if a file of tensors is not what the rest of the checkpoint says it is, or the
            optimizer refuses an option's value.
    """
    rank, world = rank_and_world()
    failed = f"cannot read {path}"
    manifest = on_all_ranks(lambda: verify(path, identity=identity, rank=rank, world=world), failed, CHOOSE)
    tensors, plain = _collect(model, optimizer)
    same_world = manifest["world_size"] == world

    def read_state() -> tuple[_State, Any]:
        state = read_json(path / _STATE, TypeAdapter(_State))
        _check_trainer(state["trainer"], trainer, manifest, path)
        problem = _mismatch(path, tensors) or _other_options(state["optimizer"], plain)
        if problem is not None:
            raise CheckpointError(
                f"checkpoint {path} does not fit this model and optimizer: {problem}; build both as in the run that "
                "saved it"
            )
        return state, read_rng_state(path, rank) if same_world else None

    state, rng = on_all_ranks(read_state, failed, CHOOSE)
    _read_tensors(path, tensors, failed)
    try:
        _restore(model, optimizer, tensors=tensors, plain=cast("dict[str, Any]", state["optimizer"]))
    except ValueError as error:
        # The same on all ranks, since all read the same file.
        raise DamagedCheckpointError(f"{path / _STATE} is damaged: {error}; {CHOOSE}") from error
    if rng is not None:
        set_rng_state(rng)
    return state["trainer"] | {"rng_restored": same_world}


def load_weights(path: Path, *, model: torch.nn.Module) -> int:
    """Restore only the weights of a checkpoint, of any run of this model; all ranks must call it.

    Args:
        path: The checkpoint's directory.
        model: The model to restore.

    Returns:
        The step at which the checkpoint was written.

    Raises:
        CheckpointError: As ``load``, but whatever run the checkpoint is of.
    """
    rank, world = rank_and_world()
    failed = f"cannot read {path}"
    tensors: dict[str, Any] = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}

    def check() -> Manifest:
        manifest = verify(path, identity=None, rank=rank, world=world)
        if problem := _mismatch(path, tensors, surplus=False):
            raise CheckpointError(f"checkpoint {path} does not fit this model: {problem}; choose another checkpoint")
        return manifest

    manifest = on_all_ranks(check, failed, CHOOSE)
    _read_tensors(path, tensors, failed)
    set_model_state_dict(model, {name.removeprefix("model."): value for name, value in tensors.items()})
    return manifest["step"]


def _check_trainer(values: dict[str, Any], kind: TypeAdapter[Any], manifest: Manifest, path: Path) -> None:
    validated(values, kind, path / _STATE)
    if values.get("step", manifest["step"]) != manifest["step"]:
        raise DamagedCheckpointError(
            f"{path / _STATE} is of step {values['step']}, but the manifest of step {manifest['step']}; {CHOOSE}"
        )


def _read_tensors(path: Path, tensors: dict[str, torch.Tensor], failed: str) -> None:
    """Fill tensors in place."""
    with_dcp(lambda: dcp.load(tensors, storage_reader=_Reader(path), planner=PlainPlanner()), failed, CHOOSE, read=True)


def _collect(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split the state of both into tensors by flat name, for DCP, and the rest, for JSON.

    DCP would pickle everything that is not a tensor, and unpickle it without restrictions, which is unsafe.
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
    """Restore options and run the load hooks; DCP has already filled all tensors in place."""
    weights = {name: value for name, value in tensors.items() if name.startswith("model.")}
    set_model_state_dict(model, {name.removeprefix("model."): value for name, value in weights.items()})
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    for name, values in state["state"].items():
        values.update(plain["scalars"].get(name, {}))
    for group, saved in zip(state["param_groups"], plain["groups"], strict=True):
        # JSON turned tuples, such as AdamW's betas, into lists.
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})
    exact = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    set_optimizer_state_dict(model, optimizer, state)
    # Optimizer.load_state_dict casts state to its parameter's dtype, which would round the float32 momenta of bfloat16
    # weights.
    for parameter, values in exact.items():
        optimizer.state[parameter].update(values)


def _other_options(stored: _Options, plain: dict[str, Any]) -> str | None:
    """Describe how the stored options differ from this optimizer's, but for their values; None if they do not."""
    if [group.get("params") for group in stored["groups"]] != [group["params"] for group in plain["groups"]]:
        return "its param groups hold other parameters"
    there = {f"group {i}": group for i, group in enumerate(stored["groups"])} | stored["scalars"]
    here = {f"group {i}": group for i, group in enumerate(plain["groups"])} | plain["scalars"]
    if differing := there.keys() ^ here.keys():
        return f"{', '.join(sorted(differing)[:5])} has values on one side only"
    for name, options in here.items():
        if differing := there[name].keys() ^ options.keys():
            return f"{name} has {', '.join(sorted(differing)[:5])} on one side only"
        for key, value in options.items():
            if _kind(value) != _kind(there[name][key]):
                return f"{key} of {name} is {there[name][key]!r} in the checkpoint, but {value!r} in this run"
    return None


def _kind(value: Any) -> str:
    """Return what a value is in JSON."""
    if isinstance(value, bool | None):
        return "nothing" if value is None else "boolean"
    kinds: tuple[tuple[str, Any], ...] = (
        ("number", (int, float, torch.Tensor)),
        ("text", str),
        ("list", (list, tuple)),
        ("table", dict),
    )
    return next((kind for kind, types in kinds if isinstance(value, types)), type(value).__name__)


def _mismatch(path: Path, tensors: dict[str, torch.Tensor], *, surplus: bool = True) -> str | None:
    """Describe how the stored tensors differ from the wanted ones; DCP itself ignores extra ones and casts dtypes.

    Args:
        path: The checkpoint.
        tensors: The wanted tensors.
        surplus: Whether stored tensors that nobody wants count.
    """
    stored: dict[str, Any] = read_metadata(path).state_dict_metadata
    lacking, extra = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    if lacking or (extra and surplus):
        return f"missing tensors: {lacking[:5] or 'none'}, surplus tensors: {extra[:5] or 'none'}"
    for name, tensor in tensors.items():
        if not isinstance(stored[name], TensorStorageMetadata):
            return f"{name} is not stored as a tensor"
        saved = (tuple(stored[name].size), stored[name].properties.dtype)
        if saved != (tuple(tensor.shape), tensor.dtype):
            return (
                f"{name} has shape {saved[0]} and {saved[1]} in the checkpoint, but {tuple(tensor.shape)} and "
                f"{tensor.dtype} in this run"
            )
    return None


class _Reader(dcp.FileSystemReader):
    """Reads shards as DCP does, but their ``.metadata`` so that it can run no code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))
