"""In test ranks: steps of a Megatron model's weights by given gradients, and the same matrices stepped alone."""

import re
from typing import Any

from tests.symdist_megatron.cases import STEPS, VOCABULARY, recipe
from tests.symdist_megatron.how import How
from tests.symdist_megatron.models import build, draw, optimizer_config, parameters, part_of, rows, weight

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist_megatron import get_symdist_optimizer


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
        "position_embeddings": "position_embedding",
        "output_layer": "tied_embedding" if how.tied else "head",
        "router": "router",
        ".indexer.linear": "indexer",
        "gate_weight": "gate",
        "linear_qkv.weight": "attention",
        "linear_q_up_proj.weight": "attention",
        "linear_k_up_proj.weight": "attention",
        "linear_v_up_proj.weight": "attention",
        ".linear_proj.weight": "attention",
        "in_proj.weight": "mixer" if how.kind == "mamba" else "attention",
        "out_proj.weight": "mixer" if how.kind == "mamba" else "attention",
        "down_proj.weight": "matrix",
        "linear_kv_up_proj.weight": "matrix",
        "eh_proj.weight": "matrix",
        ".experts.": "experts",
        "mlp.linear_fc": "mlp",
        "shared_experts": "mlp",
    }
    found = next((role for word, role in known.items() if word in name), "other")
    return "other" if "norm" in name else found


def _options(name: str, how: How, case: int) -> dict[str, Any]:
    role = role_of(name, how)
    role = {"tied_embedding": "embedding", "position_embedding": "embedding", "gate": "matrix"}.get(role, role)
    options = recipe(case)[role]
    return recipe(case).get("attention_qkv", options) if "linear_qkv." in name else options


def matrices(name: str, full: Tensor, options: dict[str, Any], how: How, config: Any) -> list[tuple[Tensor, Any]]:
    """The matrices of a full weight as its rule sees them, `[out, in]`, and their views; changes show in `full`."""
    view = options.get("view", "as_stored")
    if view == "residual":
        # Of [out, in]: what writes to the stream has it as rows, what reads from it as columns.
        writes = (".linear_proj", "linear_fc2", "weight2", "out_proj")
        view = "as_stored" if any(part in name for part in writes) else "transposed"
        if "experts.weight" in name:
            return [pair for each in full for pair in _of_mlp(name, each.mT, view)]
    if "in_proj" in name:
        sections = rows(name, config)
        assert sections is not None
        parts = full.split([size for size, _ in sections])
        views = [{"heads": heads, "dim": 0} if view == "heads" else view for _, heads in sections]
        return list(zip(parts, views, strict=True))
    if "out_proj" in name and view == "heads":
        sections = rows(name.replace("out_proj", "in_proj"), config)
        assert sections is not None
        # As many as those of the gate.
        return [(full, {"heads": sections[0 if how.kind == "mamba" else 3][1], "dim": 1})]
    if "linear_qkv_down_proj" in name:
        return [(part, view) for part in full.split([config.q_lora_rank, len(full) - config.q_lora_rank])]
    if "linear_qkv" in name:
        queries = how.heads // how.groups
        gates = queries if config.attention_output_gate else 0
        each = full.view(how.groups, (queries + gates + 2) * how.kv_channels, how.hidden)
        if view == "groups":
            return [(part, "as_stored") for part in each]
        cuts = [heads * how.kv_channels for heads in (queries, gates, 1, 1) if heads]
        if view == "heads":
            return [(part, "as_stored") for part in full.view(-1, how.kv_channels, how.hidden)]
        return [(part, view) for part in each.split(cuts, 1)]
    if re.search("linear_[qkv]_up_proj", name) and view == "heads":
        return [(full, {"heads": how.heads, "dim": 0})]
    if ".linear_proj" in name and view in ("heads", "groups"):
        heads = {"heads": how.heads, "dim": 1} if view == "heads" else "as_stored"
        return [(full, heads)]
    if "experts.weight" in name:
        # They are stored [in, out]: whose columns are asked for are the rows here.
        return [pair for each in full for pair in _of_mlp(name, each.mT, "as_stored" if view == "transposed" else view)]
    if "linear_fc" not in name:
        return [(full, view)]
    # Gate and up of a dense MLP are two matrices, as where they are not fused.
    apart = ".experts." not in name and "linear_fc1" in name and view != "neurons"
    return (
        [pair for half in full.chunk(2) for pair in [(half, "as_stored" if view == "apart" else view)]]
        if apart
        else _of_mlp(name, full, view)
    )


def _of_mlp(name: str, full: Tensor, view: str) -> list[tuple[Tensor, Any]]:
    up = "linear_fc1" in name or "weight1" in name
    if view == "neurons":
        return [(full, "gate_up_stacked" if up else "transposed")]
    if view == "apart":
        return [(half, "as_stored") for half in full.chunk(2)] if up else [(full, "as_stored")]
    return [(full, view)]


def alone(
    shapes: dict[str, tuple[int, ...]], how: How, case: int, config: Any, *, vocabulary: int | None
) -> dict[str, Tensor]:
    """The full weights after all steps in one process, without Megatron."""
    found = {name: weight(name, shape) for name, shape in shapes.items()}
    groups = []
    slots: list[tuple[str, Tensor, nn.Parameter, list[Tensor]]] = []
    for name, full in found.items():
        role, options = role_of(name, how), _options(name, how, case)
        hold = bool(options.get("skip_zero_grad_rows"))
        gradients = [gradient(name, shapes[name], step, hold=hold) for step in range(STEPS)]
        # Of a vocabulary that is filled up the real rows alone, as if there were no others.
        real = slice(vocabulary if role in ("embedding", "head", "tied_embedding") else None)
        seen = [matrices(name, tensor[real], options, how, config) for tensor in (full, *gradients)]
        for i, (part, view) in enumerate(seen[0]):
            shape = (-1, part.shape[-1]) if part.dim() > 1 else (-1,)
            parameter = nn.Parameter(part.reshape(shape).clone())
            groups.append({**options, "params": [(f"{name} {i}", parameter)], "view": view})
            slots.append((name, part, parameter, [each[i][0].reshape(shape) for each in seen[1:]]))
    optimizer = SymDist(groups)
    for step in range(STEPS):
        for _, _, parameter, gradients in slots:
            parameter.grad = gradients[step]
        optimizer.step()
    for _, part, parameter, _ in slots:
        part.copy_(parameter.detach().view(part.shape))
    return found


def stepped(
    mesh: DeviceMesh,
    how: How,
    cases: list[int],
    vocabulary: int | None = VOCABULARY,
    more: dict[str, Any] | None = None,
) -> dict[int, dict[str, tuple[float, str]]]:
    """For each of some `CASES`, how far each weight here is from what it is alone, beside how far it moved; its rule.

    Padding rows must not have moved at all. `more` are options of the optimizer.
    """
    config, chunks = build(how)
    found: dict[int, dict[str, tuple[float, str]]] = {}
    known = list(parameters(chunks, config))
    everything: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(everything, {name: shape for name, _, shape in known})
    shapes = {name: shape for theirs in everything for name, shape in theirs.items()}
    with torch.no_grad():
        for case in cases:
            for name, parameter, shape in known:
                parameter.copy_(part_of(name, weight(name, shape), config).reshape(parameter.shape))
            optimizer = get_symdist_optimizer(
                optimizer_config(how),
                chunks,
                recipe=recipe(case),
                vocabulary=vocabulary,
                layer_wise=how.layer_wise,
                **(more or {}),
            )
            for step in range(STEPS):
                for name, parameter, shape in known:
                    hold = _options(name, how, case).get("skip_zero_grad_rows")
                    full = gradient(name, shape, step, hold=hold)
                    parameter.main_grad.copy_(part_of(name, full, config).reshape(parameter.shape))
                success, _, _ = optimizer.step()
                assert success
            expected = alone(shapes, how, case, config, vocabulary=vocabulary)
            found[case] = {
                name: (_error(name, parameter, expected[name], config, optimizer), _options(name, how, case)["rule"])
                for name, parameter, _ in known
            }
            for name, parameter, shape in known:
                if vocabulary is not None and name.startswith(("embedding.word", "output_layer")):
                    real = torch.arange(shape[0])[:, None].expand(shape) < vocabulary
                    padding = ~part_of(name, real, config)
                    before = part_of(name, weight(name, shape), config)[padding]
                    assert torch.equal(parameter[padding], before.to(parameter.dtype)), name
    return found


def _error(name: str, parameter: Any, expected: Tensor, config: Any, optimizer: Any) -> float:
    """Of a weight here; of its master, or the part of that which is here, where the model computes in bfloat16."""
    moved = float((expected - weight(name, tuple(expected.shape))).norm())
    assert moved > 0.05, name
    mine = part_of(name, expected, config).reshape(parameter.shape)
    if parameter.dtype == torch.bfloat16:
        main, low = getattr(parameter, "main_param", None), _low(parameter, optimizer)
        if main is None:
            return 0.0
        parameter, mine = main.flatten(), mine.flatten()[low : low + main.numel()]
    return float((parameter.double() - mine).norm()) / moved


def _low(parameter: Any, optimizer: Any) -> int:
    """Where the part of a master that is here begins, by Megatron's own account."""
    for each in optimizer.chained_optimizers:
        if parameter in getattr(each, "model_param_gbuf_map", {}):
            return int(each._get_model_param_range_map(parameter)["param"].start)
    return 0
