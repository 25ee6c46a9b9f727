"""symdist for DeepSpeed: `register()` makes `"type": "SymDist"` of a DeepSpeed config work."""

from symdist_deepspeed.optimizer import DeepSpeedSymDist
from symdist_deepspeed.register import register

__all__ = ["DeepSpeedSymDist", "register"]
