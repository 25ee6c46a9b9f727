"""The choice of precision: in which dtype the products of a root are computed, and after which steps it restarts."""

from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from symdist.hardware import Hardware
from symdist.rules.linalg.inverse_root import Numerics
from symdist.rules.linalg.products import triangle_share

Precision: TypeAlias = Literal["auto", "float32", "float16", "bfloat16"]

_SMALLEST = 64
"""Below this size of a Gram, products in float32 take no longer, since starting them takes longer than they do."""
_NEGLIGIBLE_DAMPING = 1e-8
"""Damping up to this is below the rounding of float16 and bfloat16, and is left out there."""
_EVERY = tuple(range(1, 64))
"""Restarts after every step: all steps are on the matrix itself, as bfloat16 needs it."""
_SECOND_AND_FOURTH = tuple(range(2, 64, 2))
_SECOND = (2, *range(5, 64, 3))
"""Restarts of float16. The first two steps bring small singular values up by most of what they are to grow.

Measured on condition numbers up to 1e6, errors are 0.027 with restarts after the second and the fourth step and 0.030
with one after the second, where bfloat16 on the matrix has 0.25; a first Gram for three steps has 0.048, for four 0.3.
"""

_COLLECTIVES = 4
"""The collectives by which few roots are shared among ranks, see `symdist.exchange.collectives.reduce`."""


def check_precision(options: Any) -> None:
    """Check that `precision` fits the other options of a rule.

    Args:
        options: The options by name, with "precision", "method" and "damping".

    Raises:
        ValueError: If `precision` names a narrow dtype together with `method` "exact" or with damping that matters.
    """
    precision = options["precision"]
    narrow = precision not in ("auto", "float32")
    if narrow and (options["method"] == "exact" or options["damping"] > _NEGLIGIBLE_DAMPING):
        raise ValueError(
            f"precision={precision!r} supports neither method='exact' nor damping above {_NEGLIGIBLE_DAMPING:g} "
            f"(method={options['method']!r}, damping={options['damping']}); change these options or use "
            "precision='float32'"
        )


def with_precision(
    numerics: Numerics,
    precision: Precision,
    *,
    dtype: torch.dtype,
    edge: int,
    length: int,
    parts: int,
    hardware: Hardware,
) -> Numerics:
    """Choose the dtype of a root's products, and after which steps it restarts.

    All ranks choose alike, because the choice depends on nothing but the arguments. "auto" takes the fastest of what is
    at least as exact as bfloat16 on the matrix itself: float32, float16 with restarts, and bfloat16 with a restart
    after each step. Where a Gram is a sum over ranks, each restart costs one more of them.

    Args:
        numerics: How the root is computed; what follows from the precision is chosen here.
        precision: What the user asked for. "float32" means the dtype of the weights if that is wider.
        dtype: The dtype of the rule's arithmetic.
        edge: The size of the Gram.
        length: The other size of the matrix.
        parts: The number of ranks that hold parts of the matrix, and over which its Gram is summed; 1 if it is whole.
        hardware: The speeds of a rank.

    Returns:
        The numerics with the choice made.
    """
    candidates = [numerics]
    if precision != "float32" and numerics.method != "exact" and numerics.damping <= _NEGLIGIBLE_DAMPING:
        # Who asks for float16 wants its digits, whatever the matrix; "auto" need only be as exact as bfloat16.
        if precision == "float16":
            narrow = [replace(numerics, arithmetic="float16", restarts=_SECOND_AND_FOURTH, split=True)]
        else:
            narrow = [replace(numerics, arithmetic="float16", restarts=restarts) for restarts in (_EVERY, _SECOND)]
        if parts == 1 or precision != "auto":
            # As it comes back from another rank, a root is rounded whole, which makes bfloat16 three times less exact.
            narrow.append(replace(numerics, arithmetic="bfloat16", restarts=_EVERY))
        speeds = {name: hardware.speed(getattr(torch, name)) for name in ("float16", "bfloat16")}
        narrow = [
            replace(one, speed=speeds[one.arithmetic] / hardware.flops, triangle=triangle_share(edge)) for one in narrow
        ]
        if precision != "auto":
            candidates = [one for one in narrow if one.arithmetic == precision]
        if precision == "auto" and edge >= _SMALLEST and dtype != torch.float64:
            candidates += narrow

    def seconds(one: Numerics) -> float:
        """Return the time that a matrix takes the busiest rank, if ranks share the roots of many but it waits alone."""
        segments = range(len(one.segments()))
        piece = 2.0 * edge**2 * length / parts * (one.triangle + 1 + one.split / len(segments)) / one.speed
        roots = sum(one.operations(edge, i) for i in segments) / parts
        # A sum of Grams, and the roots that come back: a triangle each, in float32.
        sent = 2 * 2.0 * edge**2 * (parts - 1) / parts
        waits = _COLLECTIVES * hardware.latency * (parts > 1)
        return (piece * len(segments) + roots) / hardware.flops + (sent / hardware.bandwidth + waits) * len(segments)

    # The first of equals is the most exact.
    return min(candidates, key=seconds)


def describe(numerics: Numerics) -> str:
    """Describe a choice in a few words, for tables: the dtype, and after which steps the root restarts."""
    arithmetic = f"{numerics.arithmetic} twice" if numerics.split else numerics.arithmetic
    last = len(numerics.coefficients())
    restarts = [str(restart) for restart in numerics.restarts if restart < last]
    if not restarts:
        return arithmetic
    return f"{arithmetic}, " + (
        "on the matrix" if len(restarts) == last - 1 else f"restarts after {', '.join(restarts)}"
    )
