"""Binds matrix shards to the engine tensors that they are parts of, and follows these when the engine moves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from symdist.engines.external_state import ENGINE_STATE_NAMES, ExternalStateSymDist


class MatrixShardLike(Protocol):
    """The part of an engine tensor that belongs to one matrix, as a parameter."""

    parameter: Any

    @property
    def copied(self) -> bool:
        """Whether the parameter is a copy, filled for each step, and not a view."""

    @property
    def itself(self) -> bool:
        """Whether the parameter is the engine tensor itself."""

    def bind(self, tensor: Tensor) -> None:
        """Make the parameter a view of its part of `tensor`."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix's part of a tensor shaped like the engine's."""


S = TypeVar("S", bound=MatrixShardLike)


class BoundTensor(Generic[S]):
    """An engine tensor, its state in the engine, and the matrix shards that are its parts.

    Engines move tensors when they load, offload or reshard, so the adapters call `follow` before a step.

    Args:
        tensor: The tensor that the engine optimizes.

    Attributes:
        tensor: The tensor that the engine optimizes.
        shards: The matrix shards, appended by the adapter.
        state: The engine's state of the tensor, by name, as of the last `remember` or `follow`.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shards: list[S] = []
        self.state: dict[str, Any] = {}
        self._address = 0

    def remember(self, state: Mapping[str, Any]) -> None:
        """Record where the tensor and its state are now."""
        self.state, self._address = dict(state), self.tensor.data_ptr()

    def follow(self, state: Mapping[str, Any], symdist: ExternalStateSymDist) -> bool:
        """Bind the shards and their state again if the tensor or its state has moved.

        Args:
            state: The engine's state of the tensor now, by name.
            symdist: The optimizer of the shards.

        Returns:
            Whether the state has moved.
        """
        rebound = self.tensor.data_ptr() != self._address
        moved = any(state[name] is not self.state[name] for name in ENGINE_STATE_NAMES if name in self.state)
        self.remember(state)
        for shard in self.shards if rebound or moved else ():
            if not shard.copied:
                if rebound and not shard.itself:
                    shard.bind(self.tensor)
                self.fill_state(shard, symdist)
        return moved

    def fill_state(self, shard: S, symdist: ExternalStateSymDist) -> None:
        """Set a shard's state in `symdist` to its parts of the engine's state."""
        shard_state = symdist.state[shard.parameter]
        for key, name in symdist.slots(shard.parameter).items():
            shard_state[key] = shard.of(self.state[name])

    def take_gradient(self) -> None:
        """Set the shards' gradients to their parts of the tensor's gradient."""
        gradient = self.tensor.grad
        for shard in self.shards:
            if not shard.itself:
                shard.parameter.grad = None if gradient is None else shard.of(gradient)

    def drop_gradient(self) -> None:
        """Set the shards' gradients to None."""
        for shard in self.shards:
            if not shard.itself:
                shard.parameter.grad = None
