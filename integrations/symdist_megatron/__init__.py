"""symdist for Megatron: `register()` makes `--optimizer symdist`; `get_symdist_optimizer` needs no arguments."""

from symdist_megatron.arguments import add_arguments
from symdist_megatron.factory import get_symdist_optimizer
from symdist_megatron.register import register

__all__ = ["add_arguments", "get_symdist_optimizer", "register"]
