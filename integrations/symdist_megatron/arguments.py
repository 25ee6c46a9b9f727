"""The command-line arguments of symdist in Megatron's training scripts."""

import argparse
from collections.abc import Mapping
from typing import Any

from symdist.exchange import BUCKET_BYTES
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
    group.add_argument("--symdist-recipe", default=None, help="a recipe's name, or a TOML file of the same form")
    group.add_argument(
        "--symdist-override",
        action="append",
        default=[],
        metavar="ROLE.OPTION=VALUE",
        help="an option of a role in place of the recipe's, as in router.rule=left_spectral; may be given again",
    )
    group.add_argument(
        "--symdist-vocabulary",
        type=int,
        default=None,
        help="the number of real tokens, without those that only fill the vocabulary up; the tokenizer's by default",
    )
    group.add_argument(
        "--symdist-nonfinite",
        choices=("raise", "skip", "zero"),
        default="raise",
        help="what all ranks do together where a gradient is inf or NaN on any",
    )
    group.add_argument(
        "--symdist-communication-dtype",
        choices=("bfloat16", "float32", "float64"),
        default=None,
        help="what matrices travel as to the ranks that own them; by default as they are computed",
    )
    group.add_argument(
        "--symdist-bucket-bytes",
        type=int,
        default=BUCKET_BYTES,
        help="bound on the buffers of a step in flight on a rank; 1 GiB by default",
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
        raise ValueError("--optimizer symdist needs a recipe: --symdist-recipe olmoe")
    return {
        "recipe": args.symdist_recipe,
        "overrides": parse_overrides(args.symdist_override, option="--symdist-override"),
        "vocabulary": args.symdist_vocabulary if args.symdist_vocabulary is not None else vocabulary,
        "nonfinite": args.symdist_nonfinite,
        "exchange": {
            "communication_dtype": args.symdist_communication_dtype,
            "bucket_bytes": args.symdist_bucket_bytes,
        },
    }
