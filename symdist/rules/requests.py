"""The requests a rule can make to the ranks that hold the rest of its matrix, and their answers."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from symdist.rules.linalg.inverse_root import InverseRoot, Numerics, inverse_root
from symdist.rules.linalg.orthonormal import orthonormal, orthonormal_operations

T = TypeVar("T")
Axis: TypeAlias = Literal["rows", "columns", "all"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sum:
    """Request to add `values` over the ranks that hold the rest of the matrix.

    Answered with a tensor of the same shape.

    Attributes:
        values: `[b, …]`, one entry per matrix of the stack.
        across: Whether to add over the ranks that hold the other "rows", the other "columns", or "all" other pieces.
    """

    values: Tensor
    across: Axis

    def answer_locally(self) -> Tensor:
        """The answer where this rank holds the whole matrix."""
        return self.values


@dataclass(frozen=True, eq=False, kw_only=True)
class Root:
    """Request to add partial Grams and compute the inverse square root once, for all ranks.

    Answered with an `InverseRoot`.

    Attributes:
        gram: This rank's part of the Gram, `[b, d, d]`.
        across: Over which ranks to add, as for `Sum`.
        numerics: How the root is computed.
        unit: `[b, 1, 1]`, what the matrices were divided by beforehand, the same on all ranks; None (default) for
            nothing. The norms that come with the root are those of the undivided matrices.
    """

    gram: Tensor
    across: Axis
    numerics: Numerics
    unit: Tensor | None = None

    def answer_locally(self) -> InverseRoot:
        """The answer where this rank holds the whole matrix."""
        return inverse_root(self.gram, self.numerics).of_larger(self.unit)


@dataclass(frozen=True, eq=False, kw_only=True)
class Orthonormal:
    """Request to add partial matrices and orthonormalise the columns of the sum once, for all ranks.

    Answered with `[b, m, k]`; a sum that is zero gives a zero matrix.

    Attributes:
        values: This rank's part, `[b, m, k]` with `m ≥ k`.
        across: Over which ranks to add, as for `Sum`.
    """

    values: Tensor
    across: Axis

    def answer_locally(self) -> Tensor:
        """The answer where this rank holds the whole matrix."""
        return orthonormal(self.values)

    def operations(self) -> float:
        """Floating-point operations for one matrix, to leading order."""
        return orthonormal_operations(*self.values.shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class StageSum:
    """Request to add `values` over all matrices of one stage of the residual stream.

    The sum includes every rank that holds some of them. Every matrix is answered with the sum of its stage.

    Attributes:
        values: `[b, m, k]`.
        orthonormal: Whether to answer with the orthonormalised columns of the sum instead; False by default.
    """

    values: Tensor
    orthonormal: bool = False

    def answer_locally(self) -> Tensor:
        """The answer where every matrix is a stage by itself."""
        return orthonormal(self.values) if self.orthonormal else self.values


Request: TypeAlias = Sum | Root | Orthonormal | StageSum
Asking: TypeAlias = Generator[Any, Any, Any]
"""A running rule: it yields requests, is sent their answers, and returns the update, or the update and new state."""


def relayed(asking: Generator[Any, Any, T], relay: Callable[[Any], Generator[Any, Any, Any]]) -> Generator[Any, Any, T]:
    """Run a rule with every request passed through `relay`, which answers it or yields other requests to do so."""
    answer: Any = None
    while True:
        try:
            request = asking.send(answer)
        except StopIteration as last:
            return last.value
        answer = yield from relay(request)


def run_locally(asking: Generator[Any, Any, T]) -> T:
    """Run a rule on a matrix that is whole on this rank, where every request answers itself, and return its result."""
    answer: Any = None
    while True:
        try:
            answer = asking.send(answer).answer_locally()
        except StopIteration as finished:
            return finished.value
