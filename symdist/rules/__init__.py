"""The rules: each turns a momentum matrix into an update, without knowing how the matrix is sharded."""

from symdist.rules import adamw, aro, aurora, hybrid, muon, normuon, row_norm, scion, spectral
from symdist.rules.linalg.inverse_root import InverseRoot, Numerics, inverse_root
from symdist.rules.matrix import Matrix, Places, center_rows
from symdist.rules.registry import ACCUMULATOR_STATE, Rule, get_rule, rule, rule_names
from symdist.rules.requests import Asking, Factored, Orthonormal, Request, Root, StageSum, Sum, relayed, run_locally

__all__ = [
    "ACCUMULATOR_STATE",
    "Asking",
    "Factored",
    "InverseRoot",
    "Matrix",
    "Numerics",
    "Orthonormal",
    "Places",
    "Request",
    "Root",
    "Rule",
    "StageSum",
    "Sum",
    "adamw",
    "aro",
    "aurora",
    "center_rows",
    "get_rule",
    "hybrid",
    "inverse_root",
    "muon",
    "normuon",
    "relayed",
    "row_norm",
    "rule",
    "rule_names",
    "run_locally",
    "scion",
    "spectral",
]
