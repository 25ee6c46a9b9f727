"""Runs a module's own forward with some of its attributes replaced, without changing the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn:
    """Replaces a module as the `self` of its forward: has the given attributes, and otherwise those of the module."""

    def __init__(self, module: nn.Module, attributes: dict[str, Any]):
        self.__dict__.update(attributes, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def forward_with(module: nn.Module, attributes: Callable[[], dict[str, Any]]) -> None:
    """Make a module's forward see other values for some of its attributes.

    The originals stay registered, so names, state dicts and hooks do not change.

    Args:
        module: The module.
        attributes: Returns the attributes to replace; called at every forward.
    """
    forward = type(module).forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(StandIn(module, attributes()), *args, **kwargs)

    module.forward = run
