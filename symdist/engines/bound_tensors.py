"""Tensors that an engine optimizes and may move, bound to the matrix shards they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from symdist.engines.external_state import ENGINE_STATE_NAMES, ExternalStateSymDist


class MatrixShardLike(Protocol):
    """A matrix's part of an engine's tensor, as a parameter of its own."""

    parameter: Any

    @property
    def copied(self) -> bool:
        """Whether the parameter holds a copy, filled for a step alone, instead of a view."""

    @property
    def itself(self) -> bool:
        """Whether the parameter is the engine's tensor."""

    def bind(self, tensor: Tensor) -> None:
        """Let the parameter be its part of `tensor`."""

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is like the engine's."""


S = TypeVar("S", bound=MatrixShardLike)


class BoundTensor(Generic[S]):
    """An engine's tensor, its state there, and its shards, which go where the engine moves either.

    Engines move tensors when they load, offload or reshard. Both adapters call `follow` before a step.

    Args:
        tensor: What the engine optimizes.

    Attributes:
        shards: Its matrices' parts, appended by the adapter.
        state: The engine's state of it by name, as it was last followed.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shards: list[S] = []
        self.state: dict[str, Any] = {}
        self._address = 0

    def remember(self, state: Mapping[str, Any]) -> None:
        """Note where the tensor and its state lie now."""
        self.state, self._address = dict(state), self.tensor.data_ptr()

    def follow(self, state: Mapping[str, Any], symdist: ExternalStateSymDist) -> bool:
        """Bind the shards anew where the tensor or its state has moved; return whether the state has."""
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
        """Let a shard's state be its parts of the engine's."""
        held = symdist.state[shard.parameter]
        for key, name in symdist.slots(shard.parameter).items():
            held[key] = shard.of(self.state[name])

    def take_gradient(self) -> None:
        """Give the shards their parts of the tensor's gradient."""
        gradient = self.tensor.grad
        for shard in self.shards:
            if not shard.itself:
                shard.parameter.grad = None if gradient is None else shard.of(gradient)

    def drop_gradient(self) -> None:
        """Let the shards' gradients go."""
        for shard in self.shards:
            if not shard.itself:
                shard.parameter.grad = None
