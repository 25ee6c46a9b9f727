"""SymDist for DeepSpeed: after `register()`, a DeepSpeed config may contain `"optimizer": {"type": "SymDist"}`."""

from symdist_deepspeed.optimizer import DeepSpeedSymDist
from symdist_deepspeed.register import register

__all__ = ["DeepSpeedSymDist", "register"]
