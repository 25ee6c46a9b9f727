"""symdist: symmetry-compatible optimizers for language-model pretraining on sharded weights."""

from symdist.build import build_optimizer
from symdist.exchange import ExchangeOptions
from symdist.gradients.clipping import clip_grad_norm_
from symdist.optimizer import SymDist
from symdist.param_groups import ParamGroup
from symdist.routing.recipes import load_recipe, recipe_names
from symdist.routing.route import UnroutedError, route
from symdist.rules import rule, rule_names

__all__ = [
    "ExchangeOptions",
    "ParamGroup",
    "SymDist",
    "UnroutedError",
    "build_optimizer",
    "clip_grad_norm_",
    "load_recipe",
    "recipe_names",
    "route",
    "rule",
    "rule_names",
]
