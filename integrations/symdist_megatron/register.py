"""Register the optimizer name "symdist" with Megatron, after a check that this Megatron release fits."""

import copy
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import megatron.core
import megatron.core.optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer, optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from symdist_megatron.arguments import NAME, add_arguments, options_of
from symdist_megatron.factory import WRAPS, get_symdist_optimizer
from symdist_megatron.optimizer import MegatronSymDist

SUPPORTED = "0.16.1 and 0.19.2"
"""Releases of megatron-core on which the tests have passed."""

# The names that symdist uses, by owner. Some are attributes set in constructors, so the source is searched for all.
_NEEDED: dict[Any, tuple[str, ...]] = {
    megatron_optimizer: ("get_megatron_optimizer", WRAPS, "get_standard_config_overrides"),
    distrib_optimizer.DistributedOptimizer: (
        "model_param_group_index_map",
        "shard_fp32_from_float16_groups",
        "shard_fp32_groups",
        "_get_main_param_and_optimizer_states",
        "_set_main_param_and_optimizer_states",
        "step_with_ready_grads",
    ),
    optimizer.Float16OptimizerWithFloat16Params: ("float16_groups", "fp32_from_float16_groups"),
    optimizer.ChainedOptimizer: ("chained_optimizers", "prepare_grads", "step_with_ready_grads"),
    OptimizerParamScheduler: ("load_state_dict", "override_opt_param_scheduler"),
    ProcessGroupCollection: ("setup_process_groups_for_optimizer", "intra_dp_cp_group", "intra_expt_dp_group"),
}


def check_version() -> None:
    """Check that this Megatron has everything that symdist uses.

    Raises:
        ImportError: If it lacks something. The message names it, and the releases that have it.
    """
    missing = [
        f"{owner.__name__.rpartition('.')[2]}.{name}"
        for owner, names in _NEEDED.items()
        for name in names
        if name not in inspect.getsource(owner)
    ]
    if missing:
        raise ImportError(
            f"megatron-core {megatron.core.__version__} lacks {', '.join(missing)}, which symdist relies on; install "
            f"one of the releases that have it, {SUPPORTED}"
        )


def register() -> None:
    """Let Megatron build symdist's optimizer for `--optimizer symdist`, or `optimizer="symdist"` in its config.

    Call it on every rank, before Megatron parses its arguments. A further call does nothing. The scripts then take the
    arguments of `add_arguments`. In code of your own, set `config.symdist` to the keyword arguments of
    `get_symdist_optimizer`, such as `{"recipe": "olmoe"}`, or call that function.

    Raises:
        ImportError: If this Megatron lacks something that symdist relies on. The message names it, and the releases
            that have it.

    Example:
        >>> import symdist_megatron
        >>> symdist_megatron.register()  # in pretrain_gpt.py, which you then run with
        >>> # --optimizer symdist --symdist-recipe olmoe --symdist-override router.rule=left_spectral
    """
    if getattr(megatron_optimizer.get_megatron_optimizer, "knows_symdist", False):
        return
    check_version()
    _replace(megatron_optimizer, "get_megatron_optimizer", _building)
    if hasattr(megatron_optimizer, "_get_megatron_emerging_optimizer"):
        # Code that imported `get_megatron_optimizer` before it was replaced still calls this function.
        _replace(megatron_optimizer, "_get_megatron_emerging_optimizer", _building)
    registry = getattr(megatron_optimizer, "_EMERGING_OPTIMIZERS", None)
    if registry is not None:
        entries = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
        registry[NAME] = entries.EmergingOptimizerEntry(optimizer_cls=MegatronSymDist, default_param_overrides={})
    if _has("megatron.training.arguments"):
        arguments = importlib.import_module("megatron.training.arguments")
        _replace(arguments, "add_megatron_arguments", _with_arguments)
        _replace(arguments, "validate_args", _as_adam)
    if _has("megatron.training.training"):
        training = importlib.import_module("megatron.training.training")
        _replace(training, "get_megatron_optimizer_config", _configuring)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Wrap a function, in its own module and in every module that has imported it under its name."""
    original = getattr(owner, name, None)
    if original is None:
        return
    wrapper = wrap(original)
    wrapper.knows_symdist = True
    setattr(owner, name, wrapper)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, wrapper)


def _building(build: Any) -> Any:
    @functools.wraps(build)
    def built(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        if config.optimizer != NAME:
            return build(config, model_chunks, *args, **kwargs)
        options = getattr(config, NAME, None)
        if options is None:
            raise ValueError(
                'the optimizer config has optimizer="symdist" but no recipe; add --symdist-recipe, set config.symdist '
                '= {"recipe": "olmoe"}, or call symdist_megatron.get_symdist_optimizer'
            )
        arguments = inspect.signature(build).bind(config, model_chunks, *args, **kwargs).arguments
        return get_symdist_optimizer(**{**arguments, **options})

    return built


def _with_arguments(add: Any) -> Any:
    @functools.wraps(add)
    def added(parser: Any) -> Any:
        return add_arguments(add(parser))

    return added


def _as_adam(validate: Any) -> Any:
    """Validate as if for Adam: Megatron assumes that optimizers of other names cannot divide their state by bytes."""

    @functools.wraps(validate)
    def validated(args: Any, *more: Any, **kwargs: Any) -> Any:
        if args.optimizer != NAME:
            return validate(args, *more, **kwargs)
        args.optimizer = "adam"
        try:
            return validate(args, *more, **kwargs)
        finally:
            args.optimizer = NAME

    return validated


def _configuring(configure: Any) -> Any:
    @functools.wraps(configure)
    def configured(args: Any, *more: Any, **kwargs: Any) -> Any:
        if args.optimizer != NAME:
            return configure(args, *more, **kwargs)
        adam = copy.copy(args)
        adam.optimizer = "adam"
        result = configure(adam, *more, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.optimizer = NAME
        config.symdist = options_of(args, vocabulary=_tokens())
        return result

    return configured


def _tokens() -> int | None:
    """Return the vocabulary size of Megatron's tokenizer, or None if there is no tokenizer."""
    if not _has("megatron.training.global_vars"):
        return None
    global_vars = importlib.import_module("megatron.training.global_vars")
    tokenizer = getattr(global_vars, "_GLOBAL_TOKENIZER", None)
    return None if tokenizer is None else int(tokenizer.vocab_size)
