"""The requests that a rule can make to the ranks holding the rest of its matrix, and the answers to them."""

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

    The answer is a tensor of the same shape.

    Attributes:
        values: `[b, …]`, one entry per matrix of the stack.
        across: Over which ranks to add: those that hold the other "rows", those that hold the other "columns", or those
            that hold "all" other pieces.
    """

    values: Tensor
    across: Axis

    def answer_locally(self) -> Tensor:
        """Return the answer for a matrix that is whole on this rank."""
        return self.values


@dataclass(frozen=True, eq=False, kw_only=True)
class Root:
    """Request to add partial Grams and to compute the inverse square root of the sum once, for all ranks.

    The answer is an `InverseRoot`.

    Attributes:
        gram: This rank's part of the Gram, `[b, d, d]`.
        across: Over which ranks to add, as for `Sum`.
        numerics: How the root is computed.
        unit: `[b, 1, 1]`, the factors that the matrices were divided by beforehand, the same on all ranks; None
            (default) if they were not divided. The norms in the answer are those of the undivided matrices.
        segment: Which part of the root, if `numerics` has restarts; the first by default. The answer then has no norms.
        spare: A tensor like `gram` that the answer may overwrite; None by default.
    """

    gram: Tensor
    across: Axis
    numerics: Numerics
    unit: Tensor | None = None
    segment: int = 0
    spare: Tensor | None = None

    @property
    def operations(self) -> float:
        """How many operations in float32 take as long as the root of one matrix, to leading order."""
        return self.numerics.operations(self.gram.shape[-1], self.segment)

    def answer_locally(self) -> InverseRoot:
        """Return the answer for a matrix that is whole on this rank."""
        return inverse_root(self.gram, self.numerics, self.segment, spare=self.spare).of_larger(self.unit)


@dataclass(frozen=True, eq=False, kw_only=True)
class Orthonormal:
    """Request to add partial matrices and to orthonormalise the columns of the sum once, for all ranks.

    The answer is `[b, m, k]`. If a sum is zero, so is its answer.

    Attributes:
        values: This rank's part, `[b, m, k]` with `m ≥ k`.
        across: Over which ranks to add, as for `Sum`.
    """

    values: Tensor
    across: Axis

    def answer_locally(self) -> Tensor:
        """Return the answer for a matrix that is whole on this rank."""
        return orthonormal(self.values)

    def operations(self) -> float:
        """Return the number of floating-point operations for one matrix, to leading order."""
        return orthonormal_operations(*self.values.shape[1:])


@dataclass(frozen=True, eq=False, kw_only=True)
class StageSum:
    """Request to add `values` over all matrices of one stage of the residual stream.

    The sum includes the matrices on all ranks. The answer for every matrix is the sum of its stage.

    Attributes:
        values: `[b, m, k]`.
        orthonormal: Whether the answer is the sum with its columns orthonormalised; False by default.
    """

    values: Tensor
    orthonormal: bool = False

    def answer_locally(self) -> Tensor:
        """Return the answer where every matrix is the only one of its stage."""
        return orthonormal(self.values) if self.orthonormal else self.values


@dataclass(frozen=True, eq=False, kw_only=True)
class Factored:
    """Tells observers that a polar factor was computed; nothing is sent, and the answer is None.

    Attributes:
        values: This rank's part of the matrices, `[b, rows here, columns here]`, divided by `unit`.
        polar: Their polar factors, in the same shape.
        unit: `[b, 1, 1]`, the factors that the matrices were divided by; None if they were not divided.
        parts: The number of ranks that hold parts of a matrix.
    """

    values: Tensor
    polar: Tensor
    unit: Tensor | None
    parts: int

    def nuclear(self) -> Tensor:
        """Return numbers whose mean over the ranks with parts is `‖M‖_* = ⟨M, polar(M)⟩`, `[b]`."""
        here = (self.values * self.polar).sum((-2, -1)) * self.parts
        return here if self.unit is None else here * self.unit.flatten()

    def answer_locally(self) -> None:
        """Return the answer."""


Request: TypeAlias = Sum | Root | Orthonormal | StageSum | Factored
Asking: TypeAlias = Generator[Any, Any, Any]
"""A running rule. It yields requests, receives their answers, and returns the update, or the update and new state."""


def relayed(asking: Generator[Any, Any, T], relay: Callable[[Any], Generator[Any, Any, Any]]) -> Generator[Any, Any, T]:
    """Run a rule and pass each of its requests through `relay`.

    Args:
        asking: The running rule.
        relay: A generator function that takes a request and returns the answer. It may yield requests of its own to
            find the answer; these are passed on to the caller.

    Returns:
        The return value of the rule.
    """
    answer: Any = None
    while True:
        try:
            request = asking.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = yield from relay(request)


def run_locally(asking: Generator[Any, Any, T]) -> T:
    """Run a rule on matrices that are whole on this rank, where every request is answered without communication.

    Args:
        asking: The running rule.

    Returns:
        The return value of the rule.

    Example:
        >>> momentum = torch.randn(1, 6, 4)
        >>> matrix = Matrix(values=momentum, rows=6, columns=4)
        >>> update = run_locally(get_rule("row_norm").update(matrix))
    """
    answer: Any = None
    while True:
        try:
            answer = asking.send(answer).answer_locally()
        except StopIteration as stop:
            return stop.value
