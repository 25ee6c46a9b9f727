"""symdist: symmetry-compatible optimizers for language-model pretraining on sharded weights."""

from symdist.clipping import clip_grad_norm_
from symdist.optimizer import SymDist
from symdist.rules import rule, rule_names

__all__ = ["SymDist", "clip_grad_norm_", "rule", "rule_names"]
