"""Registers the optimizer type "SymDist" with DeepSpeed, after a check that this DeepSpeed release fits."""

import functools
import inspect
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2, utils

from symdist import SymDist
from symdist_deepspeed.layout import follow_offloads, keep_linked, read_partitions
from symdist_deepspeed.optimizer import DeepSpeedSymDist
from symdist_deepspeed.options import Options, check_features
from symdist_deepspeed.routing import route_engine
from symdist_deepspeed.tensor_parallel import with_blocks

TYPE = "SymDist"
SUPPORTED = "0.16.0 to 0.19.8"
"""The DeepSpeed releases that the tests have passed on."""

# The names that symdist uses, by class. Most are attributes set in constructors, so the source is searched for them.
_NEEDED: dict[Any, tuple[str, ...]] = {
    DeepSpeedEngine: ("_configure_basic_optimizer", "_configure_optimizer", "basic_optimizer"),
    stage_1_and_2.DeepSpeedZeroOptimizer: (
        "round_robin_bit16_groups",
        "bit16_groups_flat",
        "single_partition_of_fp32_groups",
        "parallel_partitioned_bit16_groups",
        "partition_size",
        "real_dp_process_group",
        "_optimizer_step",
    ),
    stage3.DeepSpeedZeroOptimizer_Stage3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "grad_position",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    bf16_optimizer.BF16_Optimizer: ("bf16_groups", "fp32_groups_flat_partition", "real_dp_process_group"),
    unfused_optimizer.FP16_UnfusedOptimizer: ("fp16_groups", "fp32_groups"),
}


def register() -> None:
    """Let DeepSpeed configs name the optimizer type "SymDist".

    Call it on every rank before `deepspeed.initialize`, and pass no optimizer there. A further call does nothing. The
    config's `"params"` are the fields of `symdist_deepspeed.options.Options`. The optimizer is a `DeepSpeedSymDist`.

    Raises:
        ImportError: If this DeepSpeed lacks something that symdist relies on. The message names it, and the releases
            that have it.

    Example:
        >>> symdist_deepspeed.register()
        >>> config = {
        ...     "train_micro_batch_size_per_gpu": 1,
        ...     "optimizer": {"type": "SymDist", "params": {"recipe": "olmoe", "lr": 0.01}},
        ...     "zero_optimization": {"stage": 3},
        ...     "bf16": {"enabled": True},
        ... }
        >>> engine, optimizer, _, scheduler = deepspeed.initialize(model=model, config=config)
    """
    if getattr(torch.optim, TYPE, None) is DeepSpeedSymDist:
        return
    _check_version()
    # DeepSpeed looks up types that it does not know in torch.optim. But routing needs the model, and only the engine's
    # method has it, so that method is wrapped too.
    setattr(torch.optim, TYPE, DeepSpeedSymDist)
    utils.ZERO_SUPPORTED_OPTIMIZERS.append(DeepSpeedSymDist)
    DeepSpeedEngine._configure_basic_optimizer = _with_routing(DeepSpeedEngine._configure_basic_optimizer)
    DeepSpeedEngine._configure_optimizer = _attaching(DeepSpeedEngine._configure_optimizer)


def _check_version() -> None:
    missing = []
    for owner, names in _NEEDED.items():
        source = inspect.getsource(owner)
        missing += [f"{owner.__name__}.{name}" for name in names if name not in source]
    if not hasattr(utils, "ZERO_SUPPORTED_OPTIMIZERS"):
        missing.append("zero.utils.ZERO_SUPPORTED_OPTIMIZERS")
    if missing:
        raise ImportError(
            f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}, which symdist relies on; "
            f"install one of the releases {SUPPORTED}, which have it"
        )


def _with_routing(configure: Any) -> Any:
    @functools.wraps(configure)
    def configured(engine: Any, model_parameters: Any) -> Any:
        if engine.optimizer_name() != TYPE:
            return configure(engine, model_parameters)
        options = Options.from_params(engine.optimizer_params())
        check_features(engine)
        groups, assignments = route_engine(engine, model_parameters, options)
        return DeepSpeedSymDist(groups, assignments=assignments, options=options)

    return configured


def _attaching(configure: Any) -> Any:
    @functools.wraps(configure)
    def configured(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if isinstance(client_optimizer, SymDist):
            raise ValueError(
                "deepspeed.initialize() was passed a SymDist optimizer, which cannot find the matrices in DeepSpeed's "
                "flat partitions. Pass no optimizer; name it in the DeepSpeed config instead: "
                '"optimizer": {"type": "SymDist", "params": {"recipe": "olmoe"}}'
            )
        configure(engine, client_optimizer, model_parameters)
        optimizer = engine.basic_optimizer
        if isinstance(optimizer, DeepSpeedSymDist):
            tensors = with_blocks(engine, read_partitions(engine), optimizer.names)
            optimizer.attach(tensors, relink=keep_linked(engine.optimizer))
            follow_offloads(engine.optimizer, optimizer.follow)

    return configured
