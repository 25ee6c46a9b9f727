"""Models on meshes of every kind give the gradients of the whole batch, lie where they should, or are refused."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from symdist.tools.models import active_parameters, build, shard
from tests.models import parallel_ranks
from tests.models.parallel_ranks import MODELS, Mesh, Trained
from tests.ranks import Ranks

DENSE = ["gemma3-tiny", "qwen3-tiny"]
ROUTED = [name for name in MODELS if name not in DENSE]
CASES: list[tuple[str, Mesh]] = [
    *((name, {"dp_shard": 2, "tp": 2}) for name in MODELS),
    *((name, {"tp": 4}) for name in MODELS),
    *((name, {"dp_shard": 2, "ep": 2}) for name in ROUTED),
    *((name, {"ep": 2, "tp": 2}) for name in ROUTED),
    ("gpt-oss-tiny", {"ep": 4}),
    ("olmoe-tiny", {"dp_shard": 4}),
    ("olmoe-tiny", {"dp_replicate": 4}),
    ("olmoe-tiny", {"dp_replicate": 2, "dp_shard": 2}),
    ("olmoe-tiny", {"dp_replicate": 4, "dp_shard": 1}),
    ("olmoe-tiny", {"dp_replicate": 2, "tp": 2}),
    ("olmoe-tiny", {"dp_replicate": 2, "ep": 2}),
    ("olmoe-tiny", {"dp_replicate": 2, "dp_shard": 1, "ep": 2}),
]
ELSEWISE: list[tuple[str, Mesh, dict[str, Any]]] = [
    ("qwen3-tiny", {"dp_shard": 2, "tp": 2}, {"tie_word_embeddings": True}),
    ("qwen3-tiny", {"dp_shard": 2, "tp": 2}, {"intermediate_size": 6}),
    ("qwen3-moe-tiny", {"tp": 4}, {"attention_bias": True}),
    ("deepseek-v3-tiny", {"tp": 4}, {"q_lora_rank": None}),
    ("olmoe-tiny", {"dp_shard": 2, "ep": 2}, {"num_experts": 2}),
    ("gpt-oss-tiny", {"dp_shard": 2, "ep": 2}, {"favoured": True}),
    ("gpt-oss-tiny", {"ep": 4}, {"favoured": True}),
]
FAKE_MESHES: list[Mesh] = [
    {"dp_shard": 12},
    {"dp_replicate": 3},
    {"dp_replicate": 2, "dp_shard": 4},
    {"tp": 4},
    {"dp_shard": 3, "tp": 4},
    {"dp_shard": 2, "ep": 4},
    {"dp_shard": 8, "ep": 4},
    {"ep": 8},
    {"dp_replicate": 2, "ep": 2, "tp": 2},
    {"dp_replicate": 2, "dp_shard": 3, "ep": 2, "tp": 2},
]


def label(value: Any) -> str:
    return " ".join(f"{key}={size}" for key, size in value.items()) if isinstance(value, dict) else str(value)


@contextmanager
def simulated(shape: Mesh, *, rank: int = 0) -> Iterator[Any]:
    """A mesh of which this process is one rank, and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(shape.values()))
    try:
        yield init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    finally:
        dist.destroy_process_group()


@cache
def reference(name: str, **settings: Any) -> Trained:
    return parallel_ranks.alone(name, **settings)


def agree(found: list[Trained], expected: Trained, *, rtol: float = 1e-5) -> None:
    """Mean loss, weights and gradients; a gradient's error is measured against the largest of its parameter."""
    loss, weights, gradients = expected
    assert sum(rank[0] for rank in found) / len(found) == pytest.approx(loss, rel=rtol)
    for _, held, gotten in found:
        assert held.keys() == weights.keys()
        for key, gradient in gradients.items():
            assert torch.equal(held[key], weights[key]), key
            error = (gotten[key] - gradient).abs().max()
            assert error <= rtol * gradient.abs().max(), f"{key}: {float(error)} of {float(gradient.abs().max())}"


@pytest.mark.parametrize(("name", "shape"), CASES, ids=label)
def test_gradients_are_those_of_the_whole_batch(ranks: Ranks, name: str, shape: Mesh) -> None:
    agree(ranks.run(4, parallel_ranks.together, name, shape, {}), reference(name))


@pytest.mark.parametrize(("name", "shape", "settings"), ELSEWISE, ids=label)
def test_gradients_under_other_settings(ranks: Ranks, name: str, shape: Mesh, settings: dict[str, Any]) -> None:
    agree(ranks.run(4, parallel_ranks.together, name, shape, settings), reference(name, **settings))


@pytest.mark.parametrize("shape", [{"dp_shard": 2, "tp": 2}, {"ep": 4}], ids=label)
def test_layers_can_be_run_again_in_backward(ranks: Ranks, shape: Mesh) -> None:
    agree(ranks.run(4, parallel_ranks.together, "gpt-oss-tiny", shape, {}, None, True), reference("gpt-oss-tiny"))


@pytest.mark.parametrize("shape", [{"dp_shard": 2, "ep": 2}, {"ep": 4}], ids=label)
def test_experts_compute_in_the_policy_s_type(ranks: Ranks, shape: Mesh) -> None:
    settings = {"dtype": torch.float32, "experts_implementation": "grouped_mm", "num_experts_per_tok": 8}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = ranks.run(4, parallel_ranks.together, "olmoe-tiny", shape, settings, policy)
    agree(found, reference("olmoe-tiny", **settings), rtol=0.05)
    assert {gradient.dtype for gradient in found[0][2].values()} == {torch.float32}


def test_ranks_of_ep_may_have_unequal_numbers_of_tokens(ranks: Ranks) -> None:
    expected = parallel_ranks.small("qwen3-moe-tiny")(input_ids=parallel_ranks.batch()).logits
    for rank, logits in enumerate(ranks.run(4, parallel_ranks.unequal, "qwen3-moe-tiny")):
        torch.testing.assert_close(logits, expected[: rank + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [{"dp_shard": 2, "tp": 2}, {"dp_shard": 2, "ep": 2}, {"tp": 4}], ids=label)
def test_a_model_on_the_meta_device_can_be_filled_later(ranks: Ranks, shape: Mesh) -> None:
    for loss, finite in ranks.run(4, parallel_ranks.filled, "gpt-oss-tiny", shape):
        assert finite
        assert loss == pytest.approx(math.log(48), rel=0.05)


def placed(model: Any) -> dict[str, tuple[Any, Any]]:
    """Names of the mesh dimensions and placements by parameter, of the last layer and what is outside the layers."""
    named = {key.replace("model.layers.1.", ""): value for key, value in model.named_parameters()}
    return {
        key: (value.device_mesh.mesh_dim_names, value.placements) if isinstance(value, DTensor) else ((), ())
        for key, value in named.items()
    }


def test_placements_under_fsdp_and_tp() -> None:
    with simulated({"dp_shard": 2, "tp": 4}) as mesh:
        found = placed(shard(parallel_ranks.small("gpt-oss-tiny"), mesh))
        wide = placed(shard(parallel_ranks.small("olmoe-tiny"), mesh))
        plain = shard(parallel_ranks.small("qwen3-tiny"), mesh)
        assert all(value.device_mesh._get_root_mesh() == mesh for value in plain.parameters())
    both = ("dp_shard", "tp")
    first = (both, (_StridedShard(0, split_factor=4), Shard(0)))
    last = (both, (Shard(0), Shard(1)))
    whole = (("dp_shard",), (Shard(0),))
    for name in ("model.embed_tokens", "lm_head", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert found[f"{name}.weight"] == first, name
    assert found["self_attn.q_proj.bias"] == found["self_attn.sinks"] == wide["self_attn.q_norm.weight"] == first
    assert found["self_attn.o_proj.weight"] == last
    assert found["self_attn.o_proj.bias"] == (both, (Shard(0), Replicate()))
    for name in ("model.norm.weight", "input_layernorm.weight", "mlp.router.weight", "mlp.router.bias"):
        assert found[name] == whole, name
    assert found["mlp.experts.gate_up_proj"] == found["mlp.experts.down_proj_bias"] == whole


def test_placements_under_replicas_and_ep() -> None:
    with simulated({"dp_replicate": 2, "dp_shard": 2, "ep": 2, "tp": 2}) as mesh:
        found = placed(shard(parallel_ranks.small("deepseek-v3-tiny"), mesh))
    strided = _StridedShard(0, split_factor=2)
    data = ("dp_replicate", "dp_shard_ep")
    assert found["self_attn.q_b_proj.weight"] == ((*data, "tp"), (Replicate(), strided, Shard(0)))
    assert found["mlp.shared_experts.down_proj.weight"] == ((*data, "tp"), (Replicate(), Shard(0), Shard(1)))
    for name in ("self_attn.q_a_proj.weight", "self_attn.kv_a_layernorm.weight", "mlp.gate.weight"):
        assert found[name] == (data, (Replicate(), Shard(0))), name
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert found[name] == (("dp_replicate", "dp_shard", "ep"), (Replicate(), strided, Shard(0))), name


def test_experts_are_cut_within_where_there_are_more_ranks_than_experts() -> None:
    with simulated({"dp_shard": 8, "ep": 4}) as mesh:
        found = placed(shard(parallel_ranks.small("qwen3-moe-tiny"), mesh))
    assert found["mlp.experts.down_proj"] == (("dp_shard", "ep"), (Shard(1), Shard(0)))


def test_without_data_parallelism_what_is_whole_stays_a_plain_tensor() -> None:
    with simulated({"tp": 4}) as mesh:
        found = placed(shard(parallel_ranks.small("qwen3-moe-tiny"), mesh))
    assert found["self_attn.q_proj.weight"] == (("tp",), (Shard(0),))
    assert found["self_attn.q_norm.weight"] == found["mlp.experts.down_proj"] == ((), ())


@pytest.mark.parametrize("names", [None, ("shard",), ("dp_shard",)], ids=str)
def test_one_dimension_is_fsdp(names: tuple[str, ...] | None) -> None:
    with simulated({"any": 4}):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=names)
        found = placed(shard(parallel_ranks.small("qwen3-tiny"), mesh))
    assert set(found.values()) == {(names, (Shard(0),))}


@pytest.mark.parametrize("shape", FAKE_MESHES, ids=label)
def test_layouts_alone_are_those_of_fsdp(shape: Mesh) -> None:
    for name in ("gpt-oss-tiny", "deepseek-v3-tiny"):
        for rank in (0, math.prod(shape.values()) - 1):
            with simulated(shape, rank=rank) as mesh:
                placed, laid = (
                    shard(build(name, device="meta", overrides=MODELS[name]), mesh, layouts_only=alone)
                    for alone in (False, True)
                )
                for (key, expected), (other, found) in zip(
                    placed.named_parameters(), laid.named_parameters(), strict=True
                ):
                    assert key == other
                    assert type(found) is type(expected), key
                    assert found.shape == expected.shape
                    assert found.stride() == expected.stride()
                    assert found.requires_grad
                    if isinstance(expected, DTensor):
                        assert isinstance(found, DTensor)
                        assert (found.device_mesh, found.placements) == (expected.device_mesh, expected.placements), key
                        assert found.to_local().shape == expected.to_local().shape, key


def test_layouts_alone_keep_tied_weights_tied_and_take_uneven_sizes() -> None:
    with simulated({"dp_shard": 2, "tp": 3}) as mesh:
        overrides = {"tie_word_embeddings": True}
        model = shard(build("gemma3-tiny", device="meta", overrides=overrides), mesh, layouts_only=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    # The first rank of tp has 1,366 of the 4,096 rows, and half of those.
    assert model.lm_head.weight.to_local().shape == (683, 128)
    assert placed(model)["self_attn.k_proj.weight"][1] == (_StridedShard(0, split_factor=3), Shard(0))


@pytest.mark.parametrize(
    "shape",
    [{"dp_shard": 512, "tp": 8}, {"dp_shard": 4096}, {"dp_replicate": 2, "dp_shard": 16, "ep": 16, "tp": 8}],
    ids=label,
)
def test_thousands_of_ranks_take_seconds(shape: Mesh) -> None:
    start = time.perf_counter()
    with simulated(shape) as mesh:
        model = shard(build("deepseek-v3", device="meta"), mesh, layouts_only=True)
    assert time.perf_counter() - start < 10
    assert active_parameters(model) == active_parameters(build("deepseek-v3", device="meta"))


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        (
            "gemma3-tiny",
            {"tp": 2},
            {"num_key_value_heads": 1},
            "gemma3_text: tp=2 does not divide .*value heads, 1",
        ),
        ("olmoe-tiny", {"tp": 3}, {}, "olmoe: tp=3 does not divide the number of attention heads, 4"),
        ("qwen3-tiny", {"dp_shard": 2, "tp": 4}, {"intermediate_size": 30}, "width of mlp.gate_proj, 30: use a tp"),
        ("qwen3-tiny", {"tp": 2}, {"vocab_size": 51}, "tp=2 does not divide the vocabulary, 51"),
        ("olmoe-tiny", {"tp": 2}, {"clip_qkv": 1.0}, "olmoe: clip_qkv .* use a mesh without tp"),
        ("olmoe-tiny", {"ep": 3}, {}, "olmoe: ep=3 does not divide 8 experts"),
        ("qwen3-tiny", {"dp_shard": 2, "ep": 2}, {}, "qwen3 has no stacked experts to split over ep=2"),
        ("qwen3-tiny", {"dp_shard": 2, "cp": 2}, {}, "unknown mesh dimension cp"),
        ("qwen3-tiny", {"tp": 2, "dp_shard": 2}, {}, "tp, dp_shard must be in this order"),
    ],
)
def test_refused(name: str, shape: Mesh, settings: dict[str, Any], message: str) -> None:
    model = parallel_ranks.small(name, **settings)
    before = list(model.parameters())
    with simulated(shape) as mesh, pytest.raises(ValueError, match=message):
        shard(model, mesh)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_unnamed_dimensions_are_refused() -> None:
    with simulated({"dp_shard": 4}), pytest.raises(ValueError, match="2-dimensional mesh need names"):
        shard(parallel_ranks.small("qwen3-tiny"), init_device_mesh("cpu", (2, 2)))


def test_mixed_precision_needs_data_parallelism() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with simulated({"tp": 4}) as mesh, pytest.raises(ValueError, match="add a dp_shard of size 1"):
        shard(parallel_ranks.small("qwen3-tiny"), mesh, policy=policy)


def test_another_family_is_refused_unless_for_its_layouts() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=48, **sizes))
    with simulated({"dp_shard": 2, "tp": 2}) as mesh:
        with pytest.raises(ValueError, match="llama is not known to be correct under tp=2"):
            shard(model, mesh)
        found = placed(shard(model, mesh, layouts_only=True))
    assert found["mlp.down_proj.weight"] == (("dp_shard", "tp"), (Shard(0), Shard(1)))
