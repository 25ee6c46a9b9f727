"""symdist for Megatron: `register()` makes `--optimizer symdist`; `get_symdist_optimizer` needs no arguments."""

from symdist_megatron.factory import get_symdist_optimizer

__all__ = ["get_symdist_optimizer"]
