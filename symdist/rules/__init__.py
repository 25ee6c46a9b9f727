"""The rules: each is mathematics on a matrix, and none knows how that matrix is sharded."""

from symdist.rules import adamw, aro, hybrid, muon, row_norm, spectral
from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.registry import ACCUMULATOR_STATE, Rule, get_rule, rule, rule_names
from symdist.rules.requests import Asking, Orthonormal, Request, Root, Sum, answer_alone
from symdist.rules.roots import InverseRoot, Numerics, inverse_root

__all__ = [
    "ACCUMULATOR_STATE",
    "Asking",
    "InverseRoot",
    "Matrix",
    "Numerics",
    "Orthonormal",
    "Request",
    "Root",
    "Rule",
    "Sum",
    "adamw",
    "answer_alone",
    "aro",
    "center_rows",
    "get_rule",
    "hybrid",
    "inverse_root",
    "muon",
    "row_norm",
    "rule",
    "rule_names",
    "spectral",
]
