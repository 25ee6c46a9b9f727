"""SymDist for Megatron: `register()` adds `--optimizer symdist`; `get_symdist_optimizer` builds it in your own code."""

from symdist_megatron.arguments import add_arguments
from symdist_megatron.factory import get_symdist_optimizer
from symdist_megatron.register import register

__all__ = ["add_arguments", "get_symdist_optimizer", "register"]
