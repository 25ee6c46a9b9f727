"""Run a module's own forward with some of its attributes replaced, and leave the module as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn:
    """Takes the place of a module in its forward: it has the given attributes, and for all others the module's."""

    def __init__(self, module: nn.Module, attributes: dict[str, Any]):
        self.__dict__.update(attributes, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def forward_with(module: nn.Module, attributes: Callable[[], dict[str, Any]]) -> None:
    """Let `module` run its forward on a stand-in that has these attributes, asked for at every call.

    What they replace stays registered, so names, state dictionaries and hooks are those of the module.
    """
    forward = type(module).forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(StandIn(module, attributes()), *args, **kwargs)

    module.forward = run
