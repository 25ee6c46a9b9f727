"""Rules, options and views for the parts of a Megatron model: said without Megatron, which only the ranks import."""

from typing import Any

STEPS = 3
LR = 0.1
VOCABULARY = 37
ROW: dict[str, Any] = {"rule": "row_norm"}
RIGHT: dict[str, Any] = {"rule": "right_spectral"}
LEFT: dict[str, Any] = {"rule": "left_spectral"}
HYBRID: dict[str, Any] = {"rule": "hybrid"}
POLAR: dict[str, Any] = {"rule": "polar"}
MUON: dict[str, Any] = {"rule": "muon"}
ADAMW: dict[str, Any] = {"rule": "adamw"}
ARO: dict[str, Any] = {"rule": "aro", "view": "residual"}
NORMUON: dict[str, Any] = {"rule": "normuon"}
AURORA: dict[str, Any] = {"rule": "aurora"}
SCION: dict[str, Any] = {"rule": "scion"}

# What attention gets, the MLP or the experts, and the router.
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (MUON | {"view": "heads", "weight_decay": 0.1}, MUON | {"weight_decay": 0.1}, ROW | {"centered": True}),
    (MUON, ROW | {"view": "neurons", "weight_decay": 0.1}, LEFT | {"centered": True}),
    (POLAR | {"alpha": 1.0}, HYBRID | {"view": "neurons"}, HYBRID | {"centered": True, "alpha": 1.0}),
    (RIGHT | {"weight_decay": 0.1}, RIGHT | {"scale": "nuclear_over_frobenius", "alpha": 0.5}, RIGHT),
    (LEFT, LEFT | {"view": "transposed"}, ROW | {"skip_zero_grad_rows": True}),
    (ROW, ROW, ADAMW),
    (ROW | {"view": "transposed", "centered": True}, ROW | {"view": "transposed"}, POLAR | {"method": "exact"}),
    (HYBRID | {"alpha": 1.0}, HYBRID | {"order": "polar_then_row", "centered": True}, MUON),
    (ADAMW | {"weight_decay": 0.1}, ADAMW, HYBRID | {"order": "polar_then_row"}),
    (
        MUON | {"view": "groups", "nesterov": False},
        MUON | {"view": "apart", "adjust_lr": "match_rms_adamw"},
        LEFT | {"alpha": 1.0},
    ),
    (RIGHT | {"view": "heads", "centered": True}, POLAR | {"method": "newton_schulz", "ns_steps": 20}, POLAR),
    (
        ROW | {"skip_zero_grad_rows": True},
        ROW | {"view": "neurons", "skip_zero_grad_rows": True},
        ROW | {"view": "transposed"},
    ),
    (ARO | {"weight_decay": 0.1}, ARO | {"base": "row_norm"}, NORMUON),
    (
        NORMUON | {"view": "heads", "weight_decay": 0.1, "cautious_weight_decay": True},
        AURORA,
        SCION | {"norm": "row", "radius": 3.0},
    ),
]
_OLDER: list[dict[str, Any]] = [ROW, RIGHT | {"centered": True}, HYBRID, ADAMW, MUON, ROW | {"centered": True}]
# Embeddings, the next ones heads.
VOCABULARIES = [*_OLDER, *_OLDER, ARO, SCION | {"norm": "sign", "radius": 3.0}]


def recipe(case: int) -> dict[str, Any]:
    attention, mlp, router = CASES[case]
    found = {
        "embedding": VOCABULARIES[case % len(VOCABULARIES)] | {"centered": False},
        "head": VOCABULARIES[(case + 1) % len(VOCABULARIES)],
        "attention": {key: value for key, value in attention.items() if value != "groups"},
        "mlp": mlp,
        "experts": mlp,
        "router": router,
        # What other kinds of models have besides.
        "mixer": {key: value for key, value in attention.items() if value != "groups"},
        "indexer": router,
        "matrix": MUON,
        "other": ADAMW,
    }
    found["embedding"] = {k: v for k, v in found["embedding"].items() if k != "centered"}
    if attention.get("view") == "groups":
        found["attention_qkv"] = attention
    return {role: {**options, "lr": LR} for role, options in found.items()}
