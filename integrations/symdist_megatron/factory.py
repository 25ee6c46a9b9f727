"""Build the optimizer for a Megatron model, using the groups and wrappers of Megatron's own factory."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import megatron.core.optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.optimizer.grad_scaler import ConstantGradScaler
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from symdist.exchange import ExchangeLike
from symdist.gradients.nonfinite import NonFinite
from symdist.layouts.rank_grid import find_rank_grid
from symdist.routing.recipes import RecipeLike
from symdist_megatron.joint_step import JointStep
from symdist_megatron.optimizer import MegatronSymDist
from symdist_megatron.options import Options, check_features
from symdist_megatron.peaks import follow_schedulers
from symdist_megatron.rank_grids import RankGrids
from symdist_megatron.routing import Routing, route_model
from symdist_megatron.wrappers import SymDistChain, SymDistDistributedOptimizer, SymDistLayerWise, stepped_by

WRAPS = "_get_megatron_optimizer_based_on_param_groups"
"""Name of Megatron's function that wraps a torch optimizer for some param groups."""


def get_symdist_optimizer(
    config: Any,
    model_chunks: Sequence[Any],
    *,
    recipe: RecipeLike,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    vocabulary: int | None = None,
    nonfinite: NonFinite = "raise",
    exchange: ExchangeLike = None,
    layer_wise: bool = False,
    config_overrides: Any = None,
    use_gloo_process_groups: bool = True,
    pg_collection: Any = None,
    dump_param_to_param_group_map: str | None = None,
) -> SymDistChain:
    """Build the optimizer for a Megatron model; all ranks must call it.

    It takes the place of `megatron.core.optimizer.get_megatron_optimizer`, and its result has the same interface. Each
    rank passes its own model chunks.

    Args:
        config: Megatron's `OptimizerConfig`. Its `lr` and `weight_decay` become those of the recipe's matrices, and all
            others keep their proportion to them. If `lr` is None, the recipe's learning rates are kept.
        model_chunks: This rank's chunks of the model, each wrapped in megatron-core's `DistributedDataParallel`.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        overrides: Options by role that replace the recipe's, such as `{"router": {"rule": "left_spectral"}}`. They are
            not scaled by `config`. None (default) replaces nothing.
        vocabulary: The number of real tokens. Further rows of embedding and head only pad them to a size that tensor
            parallelism divides; they are left out of the update and never change. Give it if there are such rows. None
            (default) treats all rows as tokens.
        nonfinite: What all ranks do if a gradient on any rank is inf or NaN: "raise" (default) FloatingPointError
            before anything changes, "skip" the step (counted in `skipped_steps`), or set the offending elements to
            "zero".
        exchange: Settings of the communication: `symdist.ExchangeOptions`, a mapping of its keys, or None (default) for
            its defaults.
        layer_wise: Whether each data-parallel rank steps whole parameters of its own and holds their state, as in
            Megatron's layer-wise optimizer for plain data parallelism. False by default;
            `use_layer_wise_distributed_optimizer` of `config` also turns it on.
        config_overrides: Passed on to Megatron's function, as are the next three.
        use_gloo_process_groups: See Megatron; True by default.
        pg_collection: Megatron's process groups. None (default) takes its global ones.
        dump_param_to_param_group_map: See Megatron; None by default.

    Returns:
        The chain of optimizers, for Megatron's training loop.

    Raises:
        ValueError: For an unknown recipe, rule, option or role, a parameter without a role, a rule that does not fit
            its parameter, or a Megatron feature that symdist does not support. The message names it and the remedy.

    Example:
        >>> optimizer = symdist_megatron.get_symdist_optimizer(config, model_chunks, recipe="olmoe")
    """
    options = Options(
        recipe=recipe,
        overrides=overrides or {},
        vocabulary=vocabulary,
        nonfinite=nonfinite,
        exchange=exchange,
    )
    chunks = list(model_chunks)
    by_layers = layer_wise or bool(getattr(config, "use_layer_wise_distributed_optimizer", False))
    check_features(config, chunks, layer_wise=by_layers)
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(pg_collection, chunks, use_gloo_process_groups)
    rank_grids = _rank_grids(groups, pg_collection)
    routing = route_model(chunks, options, config, rank_grids=rank_grids)
    # Megatron's factory knows no other name than Adam's. This copy becomes the config of all wrappers.
    config_copy = copy.copy(config)
    config_copy.optimizer, config_copy.lr = "adam", routing.scaled.lr
    with _wrapping(routing, by_layers=by_layers):
        megatron_chain = megatron_optimizer.get_megatron_optimizer(
            config_copy,
            chunks,
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
            dump_param_to_param_group_map=dump_param_to_param_group_map,
        )
    config_copy.optimizer = config.optimizer
    wrappers = megatron_chain.chained_optimizers
    chain = _layer_wise(wrappers, config_copy, pg_collection) if by_layers else SymDistChain(wrappers)
    stepped = [
        (wrapper.optimizer, stepped_by(wrapper, owned=chain.owned))
        for wrapper in chain.chained_optimizers
        if wrapper.optimizer is not None
    ]
    shared = _group(pg_collection, "embd", partial(parallel_state.get_embedding_group, check_initialized=False))
    follow_schedulers()
    chain.attach(JointStep(stepped, routing=routing, rank_grids=rank_grids, options=options, shared=shared))
    return chain


@contextmanager
def _wrapping(routing: Routing, *, by_layers: bool) -> Iterator[None]:
    """Make Megatron's factory, which knows the process groups, wrap optimizers with `_wrapper`."""
    original = getattr(megatron_optimizer, WRAPS)
    setattr(megatron_optimizer, WRAPS, partial(_wrapper, routing, by_layers))
    try:
        yield
    finally:
        setattr(megatron_optimizer, WRAPS, original)


def _layer_wise(wrappers: list[Any], config: Any, pg_collection: Any) -> SymDistLayerWise:
    """Build Megatron's layer-wise optimizer from plain wrappers; it assigns their parameters to ranks."""
    chained = list(wrappers)
    if config.bf16 and "model_chunks" in inspect.signature(LayerWiseDistributedOptimizer.__init__).parameters:
        # Since 0.18 it wraps the torch optimizers itself.
        chained = [wrapper.optimizer for wrapper in wrappers]
    groups = pg_collection if pg_collection is not None else ProcessGroupCollection.use_mpu_process_groups()
    chain = SymDistLayerWise(chained, config, groups, init_state_fn_list=[_nothing] * len(chained))
    for wrapper, plain in zip(chain.chained_optimizers, wrappers, strict=True):
        for name in ("grad_stats_parallel_group", "tp_group", "expert_tp_group"):
            setattr(wrapper, name, getattr(plain, name))
    return chain


def _wrapper(
    routing: Routing,
    by_layers: bool,
    *,
    config: Any,
    model_chunks: list[Any],
    param_groups: list[dict[str, Any]],
    per_model_buffers: Any = None,
    model_parallel_group: Any = None,
    intra_dist_opt_group: Any = None,
    data_parallel_group: Any = None,
    data_parallel_group_gloo: Any = None,
    data_parallel_group_idx: Any = None,
    distributed_optimizer_instance_id: int = 0,
    pg_collection: Any = None,
) -> MegatronOptimizer:
    """Wrap param groups in the Megatron optimizer that the config asks for."""
    base = MegatronSymDist(param_groups, routing=routing) if param_groups else None
    scaler = ConstantGradScaler(config.loss_scale) if config.loss_scale else None
    wrapper: Any
    if config.use_distributed_optimizer:
        wrapper = SymDistDistributedOptimizer(
            base,
            config,
            scaler,
            _nothing,
            model_chunks=model_chunks,
            per_model_buffers=per_model_buffers,
            data_parallel_group=data_parallel_group,
            data_parallel_group_gloo=data_parallel_group_gloo,
            data_parallel_group_idx=data_parallel_group_idx,
            distributed_optimizer_instance_id=distributed_optimizer_instance_id,
        )
        wrapper.grad_stats_parallel_group = intra_dist_opt_group
    else:
        if config.bf16 and not by_layers:
            wrapper = Float16OptimizerWithFloat16Params(base, config, scaler, _nothing)
        else:
            wrapper = FP32Optimizer(base, config, _nothing)
        wrapper.grad_stats_parallel_group = model_parallel_group
    # Megatron uses these groups to count a gradient that several ranks hold only once in norms and clipping.
    wrapper.tp_group = _group(pg_collection, "tp", parallel_state.get_tensor_model_parallel_group)
    wrapper.expert_tp_group = _group(pg_collection, "expt_tp", parallel_state.get_expert_tensor_parallel_group)
    return wrapper


def _nothing(optimizer: Any, config: Any = None) -> None:
    """Do nothing where Megatron would create the state, which symdist creates itself."""


def _group(pg_collection: Any, name: str, default: Callable[[], Any]) -> Any:
    """Return a process group of the collection, or else Megatron's global one."""
    group = None if pg_collection is None else vars(pg_collection).get(name)
    return group if group is not None else default()


def _rank_grids(groups: Mapping[str, Any], pg_collection: Any) -> RankGrids:
    dense, expert = groups["intra_dp_cp_group"], groups["intra_expt_dp_group"]
    tensor = _group(pg_collection, "tp", parallel_state.get_tensor_model_parallel_group)
    expert_tensor = _group(pg_collection, "expt_tp", parallel_state.get_expert_tensor_parallel_group)
    dense_grid = find_rank_grid(dense, tensor)
    # A collection may lack the experts' groups if the model has no experts.
    expert_grid = find_rank_grid(expert, expert_tensor) if expert is not None else dense_grid
    return RankGrids(
        dense=dense_grid,
        expert=expert_grid,
        expert_rank=_group(pg_collection, "ep", parallel_state.get_expert_model_parallel_group).rank(),
    )
