"""Rule × view × option cases, each a stored shape and a param group."""

from typing import Any

import torch
from torch import Tensor

Case = tuple[tuple[int, ...], dict[str, Any]]

ROW = {"rule": "row_norm"}
RIGHT = {"rule": "right_spectral"}
LEFT = {"rule": "left_spectral"}
HYBRID = {"rule": "hybrid"}
POLAR = {"rule": "polar"}
MUON = {"rule": "muon"}
ADAMW = {"rule": "adamw"}
ARO = {"rule": "aro"}
NORMUON = {"rule": "normuon"}
AURORA = {"rule": "aurora"}
SCION = {"rule": "scion"}

TURNED = {"transposed": True}

# Row counts do not divide by 2, 3 and 4 at once; some leave ranks empty (2 and 3 rows on 4 ranks). Sections end within
# what ranks hold, and several lie on one rank, the first not on the last and so on.
CASES: dict[str, Case] = {
    "row": ((17, 6), ROW),
    "row_few": ((3, 6), ROW | {"weight_decay": 0.1}),
    "row_centered": ((17, 6), ROW | {"centered": True}),
    "row_columns": ((7, 10), ROW | {"view": "transposed"}),
    "row_columns_centered": ((7, 10), ROW | {"view": "transposed", "centered": True}),
    "row_stacked": ((10, 7), ROW | {"view": "gate_up_stacked"}),
    "row_stacked_centered": ((10, 7), ROW | {"view": "gate_up_stacked", "centered": True}),
    "row_interleaved": ((7, 10), ROW | {"view": "gate_up_interleaved"}),
    "row_experts": ((5, 4, 6), ROW),
    "row_experts_few": ((2, 6, 4), ROW | {"view": "gate_up_stacked"}),
    "row_experts_interleaved": ((5, 4, 6), ROW | {"view": "gate_up_interleaved", "centered": True}),
    "row_hold": ((17, 6), ROW | {"skip_zero_grad_rows": True, "weight_decay": 0.1}),
    "row_columns_hold": ((7, 10), ROW | {"view": "transposed", "skip_zero_grad_rows": True, "weight_decay": 0.1}),
    "row_padding": ((17, 6), ROW | {"centered": True, "padding_rows": 5, "weight_decay": 0.1}),
    "right": ((29, 6), RIGHT | {"weight_decay": 0.1}),
    "right_centered": ((29, 6), RIGHT | {"centered": True, "alpha": 1.0}),
    "right_ratio": ((29, 6), RIGHT | {"alpha": 0.5, "scale": "nuclear_over_frobenius"}),
    "right_exact": ((29, 6), RIGHT | {"method": "exact", "centered": True}),
    "right_padding": ((29, 6), RIGHT | {"centered": True, "padding_rows": 4}),
    "left": ((5, 16), LEFT),
    "left_centered": ((5, 16), LEFT | {"centered": True, "alpha": 1.0, "damping": 1e-5}),
    "left_columns": ((29, 6), LEFT | {"view": "transposed"}),
    "left_experts": ((5, 4, 9), LEFT),
    "hybrid": ((29, 6), HYBRID | {"alpha": 1.0}),
    "hybrid_wide": ((5, 16), HYBRID),
    "hybrid_centered": ((29, 6), HYBRID | {"centered": True, "alpha": 1.0, "scale": "nuclear_over_frobenius"}),
    "hybrid_columns": ((6, 29), HYBRID | {"view": "transposed"}),
    "hybrid_polar_first": ((29, 6), HYBRID | {"order": "polar_then_row", "centered": True}),
    "hybrid_polar_first_columns": ((29, 6), HYBRID | {"order": "polar_then_row", "view": "transposed"}),
    "hybrid_stacked": ((22, 4), HYBRID | {"view": "gate_up_stacked"}),
    "hybrid_interleaved": ((4, 22), HYBRID | {"view": "gate_up_interleaved"}),
    "hybrid_experts": ((3, 5, 14), HYBRID | {"view": "gate_up_interleaved", "alpha": 1.0}),
    "polar_tall": ((29, 6), POLAR | {"alpha": 1.0}),
    "polar_wide": ((6, 29), POLAR),
    "polar_padding_columns": ((10, 8), POLAR | {"view": "transposed", "padding_rows": 3}),
    "polar_cubic": ((29, 6), POLAR | {"method": "newton_schulz", "ns_steps": 20}),
    "polar_exact": ((6, 29), POLAR | {"method": "exact"}),
    "polar_experts": ((3, 11, 5), POLAR),
    "muon_tall": ((29, 6), MUON | {"weight_decay": 0.1}),
    "muon_wide": ((6, 29), MUON | {"adjust_lr": "match_rms_adamw", "nesterov": False}),
    "muon_columns": ((6, 29), MUON | {"view": "transposed"}),
    "muon_heads_out": ((12, 15), MUON | {"view": {"heads": 3, "dim": 0}}),
    "muon_heads_in": ((15, 12), MUON | {"view": {"heads": 3, "dim": 1}}),
    "muon_experts": ((5, 9, 4), MUON | {"adjust_lr": "none"}),
    "polar_gradient": ((29, 6), POLAR | {"alpha": 1.0, "momentum": 0.0}),
    "normuon": ((29, 6), NORMUON | {"weight_decay": 0.1}),
    "normuon_wide": ((6, 29), NORMUON | {"adjust_lr": "match_rms_adamw"}),
    "normuon_columns": ((6, 29), NORMUON | {"view": "transposed", "beta2": 0.5}),
    "normuon_heads": ((12, 15), NORMUON | {"view": {"heads": 3, "dim": 0}}),
    "normuon_stacked": ((22, 4), NORMUON | {"view": "gate_up_stacked"}),
    "normuon_padding": ((29, 6), NORMUON | {"padding_rows": 4}),
    "normuon_experts": ((5, 9, 4), NORMUON),
    "aurora": ((29, 6), AURORA),
    "aurora_wide": ((6, 29), AURORA | {"adjust_lr": "match_rms_adamw"}),
    "aurora_columns": ((6, 29), AURORA | {"view": "transposed", "iterations": 3, "beta": 0.25}),
    "aurora_experts": ((3, 11, 5), AURORA),
    "scion": ((29, 6), SCION | {"weight_decay": 1.0, "momentum": 0.9}),
    "scion_wide": ((6, 29), SCION | {"radius": 3.0}),
    "scion_sign": ((17, 6), SCION | {"norm": "sign"}),
    "scion_rows": ((17, 6), SCION | {"norm": "row_rms"}),
    "scion_columns": ((7, 10), SCION | {"norm": "row", "view": "transposed"}),
    "aro": ((6, 17), ARO | {"weight_decay": 0.1}),
    "aro_tall": ((11, 5), ARO | {"sinkhorn_steps": 3}),
    "aro_columns": ((17, 6), ARO | {"view": "transposed"}),
    "aro_columns_tall": ((4, 9), ARO | {"view": "transposed", "base": "row_norm"}),
    "aro_padding": ((17, 6), ARO | {"view": "transposed", "padding_rows": 5, "weight_decay": 0.1}),
    "aro_adam": ((13, 6), ARO | {"view": "transposed", "base": "adam"}),
    "aro_heads": ((6, 12), ARO | {"view": {"heads": 3, "dim": 1}}),
    "aro_experts": ((5, 9, 4), ARO | {"view": "transposed"}),
    "aro_experts_tall": ((3, 9, 4), ARO | {"base": "row_norm"}),
    "adamw": ((17, 6), ADAMW | {"weight_decay": 0.1}),
    "row_cautious": ((17, 6), ROW | {"weight_decay": 0.3, "cautious_weight_decay": True}),
    "row_cautious_hold": (
        (17, 6),
        ROW | {"weight_decay": 0.3, "cautious_weight_decay": True, "skip_zero_grad_rows": True},
    ),
    "muon_cautious": ((6, 29), MUON | {"weight_decay": 0.3, "cautious_weight_decay": True}),
    "adamw_cautious": ((17, 6), ADAMW | {"weight_decay": 0.3, "cautious_weight_decay": True}),
    "adamw_vector": ((3,), ADAMW),
    "adamw_bias_centered": ((7,), ADAMW | {"centered": True}),
    "adamw_hold": ((17, 6), ADAMW | {"skip_zero_grad_rows": True}),
    "muon_heads_out_turned": ((12, 15), MUON | {"view": {"heads": 3, "dim": 0} | TURNED}),
    "muon_heads_in_turned": ((15, 12), MUON | {"view": {"heads": 3, "dim": 1} | TURNED}),
    "aro_heads_turned": ((6, 12), ARO | {"view": {"heads": 3, "dim": 1} | TURNED}),
    "normuon_heads_turned": ((12, 15), NORMUON | {"view": {"heads": 3, "dim": 0} | TURNED}),
    "row_sections": ((23, 6), ROW | {"view": {"sections": [11, 7, 3, 2]}, "weight_decay": 0.1}),
    "row_sections_centered": ((23, 6), ROW | {"view": {"sections": [11, 7, 3, 2]}, "centered": True}),
    "row_sections_columns": ((23, 6), ROW | {"view": {"sections": [11, 7, 5]} | TURNED}),
    "row_sections_hold": (
        (23, 6),
        ROW | {"view": {"sections": [2, 10, 11]}, "skip_zero_grad_rows": True, "weight_decay": 0.1},
    ),
    "right_sections": ((29, 6), RIGHT | {"view": {"sections": [13, 9, 7]}, "alpha": 1.0}),
    "left_sections": ((12, 16), LEFT | {"view": {"sections": [5, 4, 3]}}),
    "hybrid_sections": ((29, 6), HYBRID | {"view": {"sections": [13, 9, 7]}, "alpha": 1.0}),
    "polar_sections": ((29, 6), POLAR | {"view": {"sections": [2, 17, 3, 7]}}),
    "muon_sections": ((30, 8), MUON | {"view": {"sections": [13, 11, 5, 1]}, "weight_decay": 0.1}),
    "muon_sections_heads": ((25, 8), MUON | {"view": {"sections": [12, 4, 6, 3], "heads": [3, 1, 2, 0]}}),
    "muon_sections_turned": ((25, 8), MUON | {"view": {"sections": [12, 4, 6, 3], "heads": [3, 1, 2, 0]} | TURNED}),
    "muon_sections_cautious": (
        (30, 8),
        MUON | {"view": {"sections": [13, 17]}, "weight_decay": 0.3, "cautious_weight_decay": True},
    ),
    "normuon_sections": ((25, 8), NORMUON | {"view": {"sections": [12, 4, 6, 3], "heads": [3, 0, 2, 0]}}),
    "aurora_sections": ((30, 7), AURORA | {"view": {"sections": [18, 12]}}),
    "scion_sections": ((29, 6), SCION | {"view": {"sections": [17, 8, 4]}}),
    "aro_sections": ((14, 9), ARO | {"view": {"sections": [6, 5, 3]}, "weight_decay": 0.1}),
    "aro_sections_adam": ((27, 6), ARO | {"view": {"sections": [13, 14]} | TURNED, "base": "adam"}),
    "adamw_sections_centered": ((23, 6), ADAMW | {"view": {"sections": [11, 7, 5]}, "centered": True}),
    "adamw_sections": ((23, 6), ADAMW | {"view": {"sections": [11, 7, 5]}}),
}
# Engines keep two tensors of a parameter's shape, so what remembers more is not for them. A recipe, which they go by,
# gives a rule without matrices no view.
KEPT_BY_ENGINES = [
    case for case, (_, group) in CASES.items() if group.get("base") != "adam" and case != "adamw_sections_centered"
]
STEPS = 3
LR = 0.1


def is_row_rule(case: str) -> bool:
    """Whether the rule takes no inverse root, and so magnifies no rounding."""
    return CASES[case][1]["rule"] in ("row_norm", "adamw")


def tensors(case: str, copy: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A weight and three gradients, exactly representable in float32, as float64; some rows have no gradient."""
    shape, group = CASES[case]
    generator = torch.Generator().manual_seed(sum(map(ord, case)) + copy)
    draws = [torch.randn(shape, generator=generator).double() for _ in range(STEPS + 1)]
    if group.get("skip_zero_grad_rows"):
        for gradient in draws[2:]:
            (gradient.mT if group.get("view") == "transposed" else gradient)[1::3] = 0
    return draws[0], draws[1:]
