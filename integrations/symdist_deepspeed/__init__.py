"""symdist for DeepSpeed: importing this registers `"type": "SymDist"` for the optimizer of a DeepSpeed config."""

from symdist_deepspeed.optimizer import DeepSpeedSymDist
from symdist_deepspeed.register import register

__all__ = ["DeepSpeedSymDist", "register"]

register()
