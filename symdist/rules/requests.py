"""What a rule may ask of the ranks that hold the rest of its matrix, and what it is told."""

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
    """Add `values` over the ranks that hold the other rows, columns, or pieces of the matrix.

    Answered with a tensor of the same shape. `values` is `[b, …]`, one entry a matrix of the stack.
    """

    values: Tensor
    across: Axis

    def answer_locally(self) -> Tensor:
        """The answer where nobody holds another part."""
        return self.values


@dataclass(frozen=True, eq=False, kw_only=True)
class Root:
    """Add the partial Grams `[b, d, d]`, take the inverse square root once, and give it to all.

    Answered with an `InverseRoot`. `unit` `[b, 1, 1]`, where given, is what the matrices were divided by before, alike
    on all ranks: the norms that come with a root are of the matrices as they were.
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
    """Add the parts `values` `[b, m, k]`, `m ≥ k`, orthonormalise the columns of the sum once, and give that to all.

    Answered with `[b, m, k]`; where a sum is zero, with the zero matrix.
    """

    values: Tensor
    across: Axis

    def answer_locally(self) -> Tensor:
        """The answer where this rank holds the whole matrix."""
        return orthonormal(self.values)

    def operations(self) -> float:
        """Floating-point operations of one matrix, to leading order."""
        return orthonormal_operations(*self.values.shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class StageSum:
    """Add `values` `[b, m, k]` over all matrices of the same stage, and all ranks that hold some of them.

    Answered, for every matrix, with the sum of its stage, or with that sum's columns made orthonormal.
    """

    values: Tensor
    orthonormal: bool = False

    def answer_locally(self) -> Tensor:
        """The answer where every matrix is a stage of its own."""
        return orthonormal(self.values) if self.orthonormal else self.values


Request: TypeAlias = Sum | Root | Orthonormal | StageSum
Asking: TypeAlias = Generator[Any, Any, Any]
"""The type of a running rule: it yields requests, is sent their answers, and returns the update, or that and state."""


def relayed(asking: Generator[Any, Any, T], relay: Callable[[Any], Generator[Any, Any, Any]]) -> Generator[Any, Any, T]:
    """A running rule whose every request goes through `relay`, which answers it or passes on what it asks instead."""
    answer: Any = None
    while True:
        try:
            request = asking.send(answer)
        except StopIteration as last:
            return last.value
        answer = yield from relay(request)


def run_locally(asking: Generator[Any, Any, T]) -> T:
    """Run a rule on a matrix that is whole on this rank: every request answers itself."""
    answer: Any = None
    while True:
        try:
            answer = asking.send(answer).answer_locally()
        except StopIteration as finished:
            return finished.value
