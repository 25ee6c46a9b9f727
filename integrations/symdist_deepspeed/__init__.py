"""SymDist for DeepSpeed: after `register()`, a DeepSpeed config may say `"optimizer": {"type": "SymDist"}`."""

from symdist_deepspeed.optimizer import DeepSpeedSymDist
from symdist_deepspeed.register import register

__all__ = ["DeepSpeedSymDist", "register"]
