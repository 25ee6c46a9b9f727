"""In test ranks: steps of a Megatron model's weights by given gradients, and the same matrices stepped alone."""

from typing import Any

from tests.symdist_megatron.models import How, build, draw, optimizer_config, parameters, part_of, weight

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist_megatron import get_symdist_optimizer

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

# What the matrices of each layer get: attention's, the MLP's or experts', and the router's.
LAYERS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (MUON | {"view": "heads", "weight_decay": 0.1}, MUON | {"weight_decay": 0.1}, ROW | {"centered": True}),
    (MUON, ROW | {"view": "neurons", "weight_decay": 0.1}, LEFT | {"centered": True}),
    (POLAR | {"alpha": 1.0}, HYBRID | {"view": "neurons"}, HYBRID | {"centered": True, "alpha": 1.0}),
    (RIGHT | {"weight_decay": 0.1}, RIGHT | {"scale": "nuclear_over_frobenius", "alpha": 0.5}, RIGHT),
    (LEFT, LEFT | {"view": "columns"}, ROW | {"stale_rows": "hold"}),
    (ROW, ROW, ADAMW),
    (ROW | {"view": "columns", "centered": True}, ROW | {"view": "columns"}, POLAR | {"method": "exact"}),
    (HYBRID | {"alpha": 1.0}, HYBRID | {"order": "polar_then_row", "centered": True}, MUON),
    (ADAMW | {"weight_decay": 0.1}, ADAMW, HYBRID | {"order": "polar_then_row"}),
    (MUON | {"view": "groups", "nesterov": False}, MUON | {"view": "apart", "scale": "match_rms"}, LEFT | {"alpha": 1.0}),
    (RIGHT | {"view": "heads", "centered": True}, POLAR | {"method": "newton_schulz", "steps": 20}, POLAR),
    (ROW | {"stale_rows": "hold"}, ROW | {"view": "neurons", "stale_rows": "hold"}, ROW | {"view": "columns"}),
]
VOCABULARIES: list[dict[str, Any]] = [ROW, RIGHT | {"centered": True}, HYBRID, ADAMW, MUON, ROW | {"centered": True}]


PLACES = range(len(LAYERS))


def recipe(place: int) -> dict[str, Any]:
    attention, mlp, router = LAYERS[place]
    found = {
        "embedding": VOCABULARIES[place % len(VOCABULARIES)] | {"centered": False},
        "head": VOCABULARIES[(place + 1) % len(VOCABULARIES)],
        "attention": {key: value for key, value in attention.items() if value != "groups"},
        "mlp": mlp,
        "experts": mlp,
        "router": router,
        "matrix": MUON,
        "other": ADAMW,
    }
    found["embedding"] = {k: v for k, v in found["embedding"].items() if k != "centered"}
    if attention.get("view") == "groups":
        found["attention_qkv"] = attention
    return {role: {**options, "lr": LR} for role, options in found.items()}


def gradient(name: str, shape: tuple[int, ...], step: int, *, hold: bool) -> Tensor:
    """Of a full weight; where rows may hold, some have none."""
    given = draw(f"gradient {name} {step}", shape)
    if hold and step:
        given[..., 1::3, :] = 0
    return given


def role_of(name: str, how: How) -> str:
    """By Megatron's names."""
    known = {
        "word_embeddings": "tied_embedding" if how.tied else "embedding",
        "output_layer": "tied_embedding" if how.tied else "head",
        "router": "router",
        "linear_qkv.weight": "attention",
        "linear_proj.weight": "attention",
        ".experts.": "experts",
        "mlp.linear_fc": "mlp",
        "shared_experts": "mlp",
    }
    found = next((role for word, role in known.items() if word in name), "other")
    return "other" if "norm" in name else found


def matrices(name: str, full: Tensor, options: dict[str, Any], how: How) -> list[tuple[Tensor, Any]]:
    """The matrices of a full weight as its rule sees them, `[out, in]`, and their views; changes show in `full`."""
    view = options.get("view", "rows")
    if "linear_qkv" in name:
        queries = how.heads // how.groups
        each = full.view(how.groups, (queries + 2) * how.kv_channels, how.hidden)
        if view == "groups":
            return [(part, "rows") for part in each]
        cuts = [queries * how.kv_channels, how.kv_channels, how.kv_channels]
        if view == "heads":
            return [(part, "rows") for part in full.view(-1, how.kv_channels, how.hidden)]
        return [(part, view) for part in each.split(cuts, 1)]
    if "linear_proj" in name and view in ("heads", "groups"):
        heads = {"heads": how.heads, "dim": 1} if view == "heads" else "rows"
        return [(full, heads)]
    if "experts.weight" in name:
        return [pair for each in full for pair in _of_mlp(name, each.mT, view)]
    return _of_mlp(name, full, view) if "linear_fc" in name else [(full, view)]


def _of_mlp(name: str, full: Tensor, view: str) -> list[tuple[Tensor, Any]]:
    up = "linear_fc1" in name or "weight1" in name
    if view == "neurons":
        return [(full, "gate_up_stacked" if up else "columns")]
    if view == "apart":
        return [(half, "rows") for half in full.chunk(2)] if up else [(full, "rows")]
    return [(full, view)]


def alone(shapes: dict[str, tuple[int, ...]], how: How, place: int, *, vocabulary: int | None) -> dict[str, Tensor]:
    """The full weights after all steps in one process, without Megatron."""
    found = {name: weight(name, shape) for name, shape in shapes.items()}
    groups = []
    slots: list[tuple[str, Tensor, nn.Parameter, list[Tensor]]] = []
    for name, full in found.items():
        role = role_of(name, how)
        options = recipe(place)["embedding" if role == "tied_embedding" else role]
        if "linear_qkv" in name:
            options = recipe(place).get("attention_qkv", options)
        hold = options.get("stale_rows") == "hold"
        gradients = [gradient(name, shapes[name], step, hold=hold) for step in range(STEPS)]
        seen = [matrices(name, tensor, options, how) for tensor in (full, *gradients)]
        for i, (part, view) in enumerate(seen[0]):
            shape = (-1, part.shape[-1]) if part.dim() > 1 else (-1,)
            parameter = nn.Parameter(part.reshape(shape).clone())
            own = {**options, "params": [(f"{name} {i}", parameter)], "view": view}
            if vocabulary is not None and role in ("embedding", "head", "tied_embedding"):
                own["padding_rows"] = full.shape[0] - vocabulary
            groups.append(own)
            slots.append((name, part, parameter, [each[i][0].reshape(shape) for each in seen[1:]]))
    optimizer = SymDist(groups)
    for step in range(STEPS):
        for _, _, parameter, gradients in slots:
            parameter.grad = gradients[step]
        optimizer.step()
    for _, part, parameter, _ in slots:
        part.copy_(parameter.detach().view(part.shape))
    return found


def stepped(mesh: DeviceMesh, how: How, places: list[int], vocabulary: int | None = VOCABULARY) -> dict[int, dict[str, float]]:
    """For each place of `LAYERS`, how far each weight here is from what it is alone, beside how far it moved.

    Padding rows must not have moved at all.
    """
    config, chunks = build(how)
    found: dict[int, dict[str, float]] = {}
    known = list(parameters(chunks, config))
    everything: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(everything, {name: shape for name, _, shape in known})
    shapes = {name: shape for theirs in everything for name, shape in theirs.items()}
    with torch.no_grad():
        for place in places:
            for name, parameter, shape in known:
                parameter.copy_(part_of(name, weight(name, shape), config).reshape(parameter.shape))
            optimizer = get_symdist_optimizer(
                optimizer_config(how, weight_decay=0.0), chunks, recipe=recipe(place), vocabulary=vocabulary
            )
            for step in range(STEPS):
                for name, parameter, shape in known:
                    role = role_of(name, how)
                    options = recipe(place)["embedding" if role == "tied_embedding" else role]
                    hold = options.get("stale_rows") == "hold"
                    full = gradient(name, shape, step, hold=hold)
                    parameter.main_grad.copy_(part_of(name, full, config).reshape(parameter.shape))
                success, _, _ = optimizer.step()
                assert success
            expected = alone(shapes, how, place, vocabulary=vocabulary)
            found[place] = {name: _error(name, parameter, expected[name], config) for name, parameter, _ in known}
    return found


def _error(name: str, parameter: Tensor, expected: Tensor, config: Any) -> float:
    start = weight(name, tuple(expected.shape))
    moved = float((expected - start).norm())
    assert moved > 0.05, name
    mine = part_of(name, expected, config).reshape(parameter.shape)
    return float((parameter.double() - mine).norm()) / moved
