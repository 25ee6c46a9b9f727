"""The dry run: checks what a run would do, and whether it can, without ranks, weights or GPUs."""

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.checkpoints.directory import latest, verify_sizes
from launch.checkpoints.manifest import CheckpointError
from launch.data import survey
from launch.loop.config import Config
from launch.records.run_log import already_finished, check_folder
from symdist.routing.recipes import Recipe
from symdist.rules import get_rule
from symdist.tools.megatron import MegatronMesh
from symdist.tools.plan import plan_step
from symdist.tools.plan_tables import plan_table, summary
from symdist.tools.preview import Preview, preview
from symdist.tools.tables import in_bytes, route_table, show, totals


def dry_run(config: Config) -> None:
    """Check configuration, data, disk and checkpoint directory, and print routing and plan.

    The environment variables NNODES and NPROC (both 1 by default) set the number of nodes and of ranks per node.

    Raises:
        ValueError: If the run would stop with one, for example because the batch does not split over the ranks.
        CheckpointError: If the checkpoint to resume from cannot be used.
    """
    ranks = _count("NNODES") * _count("NPROC")
    config.check(ranks=ranks)
    data_ranks = config.data_ranks(ranks)
    micro = config.batch // (data_ranks * config.accumulation)
    show(
        f"config: {config.model}, recipe {config.recipe}, {config.steps:,} steps of {config.batch} × {config.sequence} "
        f"tokens on {ranks} ranks: {data_ranks} data-parallel, {config.accumulation} micro-batches of {micro}",
        f"data: {_data(config)}",
    )
    recipe = config.adjusted_recipe()
    layout = config.simulated(ranks)
    model_options = {
        "vocabulary": config.data.vocabulary,
        "overrides": config.model_settings(),
    }
    # A Megatron job is shown as one process would have it, since each of its ranks has only some of the parameters.
    alone = layout is None or isinstance(layout["mesh"], MegatronMesh)
    shown: Mapping[str, Any] = {"mesh": {"dp_shard": 1}} if layout is None or alone else layout
    routing = preview(config.model, recipe, built=model_options, **shown)
    show(*(f"checkpoints: {line}" for line in _checkpoints(config, _checkpoint_bytes(routing))))
    show(route_table(routing, title=f"{config.model}, recipe {recipe.name}", fold=True))
    if layout is None:
        show(
            "Strategies and plan are not known beforehand for this engine; call optimizer.trace_collectives() in the "
            "job to see them."
        )
        return
    show("Strategies on these ranks, by role:" if alone else totals(routing))
    show(*_plan(config, recipe, model_options, layout))
    show("nothing was started")


def _count(name: str) -> int:
    text = os.environ.get(name, "1")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}={text!r} in the environment must be a number of 1 or more")
    return int(text)


def _data(config: Config) -> str:
    text, tokens = survey(config.data)
    if tokens is None:
        return text
    needed = config.steps * config.batch * config.sequence
    if tokens < config.batch * (config.sequence + 1):
        raise ValueError(
            f"the corpus has {tokens:,} training tokens, but a step needs {config.batch * (config.sequence + 1):,}; "
            "give more text or a smaller --batch"
        )
    return f"{text}; the run reads {needed:,}, {needed / tokens:.2f} times the corpus"


def _checkpoint_bytes(routing: Preview) -> int:
    """Return the bytes of weights and optimizer state in float32."""
    total = 0
    for parameter in routing.parameters:
        tensors = 1 + len(get_rule(parameter.rule).state_names())
        total += 4 * tensors * math.prod(parameter.shape)
    return total


def _checkpoints(config: Config, size: int) -> list[str]:
    """Describe the checkpoint folder: what it holds, and whether it is writable and has enough space."""
    if config.resume == "auto" and already_finished(config.output, steps=config.steps):
        return [f"{config.output} has finished its {config.steps} steps already; there is nothing to do"]
    check_folder(config.output, resume=config.resume)
    folder = config.output / "checkpoints"
    place = _writable(folder)
    free = shutil.disk_usage(place).free
    num_saved = -(-config.steps // config.checkpoint_every) if config.checkpoint_every else 1
    num_kept = min(num_saved, config.keep)
    if config.checkpoint_every and config.keep_every:
        num_kept += config.steps // math.lcm(config.checkpoint_every, config.keep_every)
    # Old checkpoints are removed only after the new one is written.
    needed = size * (num_kept + 1)
    if free < 2 * size:
        raise ValueError(
            f"{place} has {in_bytes(free)} free, but two checkpoints of {in_bytes(size)} must fit, since the old one "
            "is removed only after the new one is written; free space or give another --output"
        )
    lines = [f"{in_bytes(size)} each, in {folder}, which is writable"]
    lines.append(
        f"{num_kept} kept and one being written need {in_bytes(needed)}, and {in_bytes(free)} are free on the disk"
    )
    if free < needed:
        lines.append("the disk will be full before the run ends; free space, or lower --keep or --keep-every")
    return [*lines, _starting_point(config, folder)]


def _starting_point(config: Config, folder: Path) -> str:
    if config.resume is None:
        return "the run starts from the beginning"
    path = latest(folder) if config.resume == "auto" else Path(config.resume)
    if path is None:
        return "there is none yet: the run starts from the beginning"
    try:
        verify_sizes(path)
    except CheckpointError as error:
        if config.resume != "auto":
            raise
        return f"{error}; the run would rename it and take the one before"
    return f"the run continues from {path}"


def _writable(folder: Path) -> Path:
    """Return the folder or its nearest existing parent; raise ValueError if it is not writable."""
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".symdist-"):
            pass
    except OSError as error:
        raise ValueError(f"{place} cannot be written to ({error.strerror}); give another --output") from None
    return place


def _plan(config: Config, recipe: Recipe, model_options: Mapping[str, Any], layout: Mapping[str, Any]) -> list[Any]:
    plan = plan_step(config.model, recipe, built=model_options, **layout)
    return [plan_table(plan), *summary(plan)[:2]]
