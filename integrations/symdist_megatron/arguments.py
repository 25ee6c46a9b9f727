"""Command-line arguments of symdist in Megatron's training scripts."""

import argparse
from collections.abc import Mapping
from typing import Any

from symdist.exchange import BUCKET_BYTES, HARDWARE
from symdist.routing.recipes import parse_overrides

NAME = "symdist"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--symdist-…` arguments to a parser, and `symdist` to the choices of `--optimizer`.

    `register` does this for Megatron's scripts. Pass this function to Megatron as `extra_args_provider` if `register`
    is called too late for that. Arguments that are already there are left as they are.

    Args:
        parser: Megatron's parser.

    Returns:
        The same parser.

    Example:
        >>> pretrain(..., extra_args_provider=symdist_megatron.add_arguments)
    """
    for action in parser._actions:
        if "--optimizer" in action.option_strings and action.choices is not None and NAME not in action.choices:
            action.choices = [*action.choices, NAME]
    if any("--symdist-recipe" in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group(NAME, "options of --optimizer symdist")
    group.add_argument("--symdist-recipe", default=None, help="name of a recipe, or path of a TOML file")
    group.add_argument(
        "--symdist-override",
        action="append",
        default=[],
        metavar="ROLE.OPTION=VALUE",
        help="option of a role that replaces the recipe's, like router.rule=left_spectral; may be repeated",
    )
    group.add_argument(
        "--symdist-vocabulary",
        type=int,
        default=None,
        help="number of real tokens, without padding of the vocabulary; by default the tokenizer's",
    )
    group.add_argument(
        "--symdist-nonfinite",
        choices=("raise", "skip", "zero"),
        default="raise",
        help="what all ranks do if a gradient on any rank is inf or NaN",
    )
    group.add_argument(
        "--symdist-communication-dtype",
        choices=("bfloat16", "float32", "float64"),
        default=None,
        help="dtype in which matrices are sent to their owner ranks; by default the dtype they are computed in",
    )
    group.add_argument(
        "--symdist-bucket-bytes",
        type=int,
        default=BUCKET_BYTES,
        help="limit on the communication buffers of a rank during a step, in bytes; 1 GiB by default",
    )
    group.add_argument(
        "--symdist-hardware",
        choices=tuple(HARDWARE),
        default="h100",
        help="what a rank can do, by which the strategy of each rule is chosen",
    )
    return parser


def options_of(args: Any, *, vocabulary: int | None) -> Mapping[str, Any]:
    """Convert parsed arguments to keywords of `get_symdist_optimizer`.

    Args:
        args: Megatron's parsed arguments.
        vocabulary: The number of the tokenizer's tokens, used if `--symdist-vocabulary` is not given; None if unknown.

    Returns:
        The keywords and their values.

    Raises:
        ValueError: If there is no recipe, or an override is not of the form ROLE.OPTION=VALUE.
    """
    if args.symdist_recipe is None:
        raise ValueError("--optimizer symdist needs a recipe: add --symdist-recipe, like --symdist-recipe olmoe")
    return {
        "recipe": args.symdist_recipe,
        "overrides": parse_overrides(args.symdist_override, option="--symdist-override"),
        "vocabulary": args.symdist_vocabulary if args.symdist_vocabulary is not None else vocabulary,
        "nonfinite": args.symdist_nonfinite,
        "exchange": {
            "communication_dtype": args.symdist_communication_dtype,
            "bucket_bytes": args.symdist_bucket_bytes,
            "hardware": args.symdist_hardware,
        },
    }
