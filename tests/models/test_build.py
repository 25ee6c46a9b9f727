"""Presets build at their sizes, train, and refuse what they do not know."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import symdist.tools.models as models

TINY = ["deepseek-v3-tiny", "gemma3-tiny", "gpt-oss-tiny", "olmoe-tiny", "qwen3-moe-tiny", "qwen3-tiny"]


def attention(hidden: int, heads: int, kv: int, head: int) -> int:
    return 2 * hidden * heads * head + 2 * hidden * kv * head


def totals(
    *,
    layers: int,
    hidden: int,
    vocabulary: int,
    shared: int,
    expert: int = 0,
    experts: int = 0,
    used: int = 0,
    dense: tuple[int, int] = (0, 0),
) -> tuple[int, int, int]:
    outside = 2 * vocabulary * hidden + hidden + math.prod(dense)
    return (
        layers + dense[0],
        outside + layers * (shared + experts * expert),
        outside + layers * (shared + used * expert),
    )


# DeepSeek-V3's attention and norms: queries and keys/values go through latents, which have norms.
LATENT = (
    7168 * 1536
    + 1536
    + 1536 * 128 * (128 + 64)
    + 7168 * (512 + 64)
    + 512
    + 512 * 128 * (128 + 128)
    + 128 * 128 * 7168
    + 2 * 7168
)


# (layers, all parameters, parameters a token uses), counted from the sizes.
# Beside attention and feed-forward, a layer has its norms of the hidden size (two; four in Gemma3), those of
# the heads (q and k; over all heads in OLMoE), and in gpt-oss biases, sinks and a router with bias.
SIZES = {
    "qwen3-0.6b": totals(
        layers=20,
        hidden=1024,
        vocabulary=151936,
        shared=attention(1024, 16, 8, 128) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128,
    ),
    "gemma3-1b": totals(
        layers=18,
        hidden=1152,
        vocabulary=262144,
        shared=attention(1152, 4, 1, 256) + 3 * 1152 * 6912 + 4 * 1152 + 2 * 256,
    ),
    "olmoe-1b-7b": totals(
        layers=12,
        hidden=2048,
        vocabulary=50304,
        shared=attention(2048, 16, 16, 128) + 32 * 2048 + 2 * 2048 + 2 * 2048,
        expert=3 * 2048 * 1024,
        experts=32,
        used=8,
    ),
    "gpt-oss-small": totals(
        layers=12,
        hidden=2048,
        vocabulary=201088,
        shared=attention(2048, 64, 8, 64) + (64 + 2 * 8) * 64 + 2048 + 64 + 16 * 2048 + 16 + 2 * 2048,
        expert=3 * 2048 * 2048 + 2 * 2048 + 2048,
        experts=16,
        used=4,
    ),
    "qwen3-moe-30b-a3b": totals(
        layers=48,
        hidden=2048,
        vocabulary=151936,
        shared=attention(2048, 32, 4, 128) + 128 * 2048 + 2 * 2048 + 2 * 128,
        expert=3 * 2048 * 768,
        experts=128,
        used=8,
    ),
    "qwen3-235b-a22b": totals(
        layers=94,
        hidden=4096,
        vocabulary=151936,
        shared=attention(4096, 64, 4, 128) + 128 * 4096 + 2 * 4096 + 2 * 128,
        expert=3 * 4096 * 1536,
        experts=128,
        used=8,
    ),
    "deepseek-v3": totals(
        layers=58,
        hidden=7168,
        vocabulary=129280,
        shared=LATENT + 256 * 7168 + 3 * 7168 * 2048,
        expert=3 * 7168 * 2048,
        experts=256,
        used=8,
        dense=(3, LATENT + 3 * 7168 * 18432),
    ),
    "olmoe-tiny": totals(
        layers=4,
        hidden=128,
        vocabulary=4096,
        shared=attention(128, 4, 4, 32) + 8 * 128 + 2 * 128 + 2 * 128,
        expert=3 * 128 * 128,
        experts=8,
        used=2,
    ),
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_presets_are_these():
    assert models.names() == sorted({*SIZES, *TINY})


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_its_size(name: str):
    model = models.build(name, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (len(models.blocks(model)), parameters(model), models.active_parameters(model)) == SIZES[name]


@pytest.mark.parametrize("name", models.names())
def test_head_is_its_own_and_vocabulary_can_be_set(name: str):
    model = models.build(name, device="meta", vocabulary=1000)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding is not head
    assert embedding.shape == head.shape == (1000, model.config.hidden_size)


def test_expert_tensors_keep_their_orientation():
    stacked = dict(models.build("olmoe-1b-7b", device="meta").named_parameters())
    assert stacked["model.layers.11.mlp.experts.gate_up_proj"].shape == (32, 2048, 2048)
    assert stacked["model.layers.11.mlp.experts.down_proj"].shape == (32, 2048, 1024)
    transposed = dict(models.build("gpt-oss-tiny", device="meta").named_parameters())
    assert transposed["model.layers.3.mlp.experts.gate_up_proj"].shape == (8, 128, 256)


@pytest.mark.parametrize("name", TINY)
def test_tiny_trains(name: str):
    model = models.build(name, seed=0)
    tokens = torch.arange(24).view(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key
        # Token 0 and token 1 are padding in some published tokenizers; here they are tokens like any other.
        assert (model.get_input_embeddings().weight.grad[:2] != 0).any(1).all()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_seed_decides_the_weights_and_leaves_the_random_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = models.build("olmoe-tiny", seed=7).lm_head.weight
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, models.build("olmoe-tiny", seed=7).lm_head.weight)
    assert not torch.equal(first, models.build("olmoe-tiny", seed=8).lm_head.weight)
    unseeded = [models.build("olmoe-tiny").lm_head.weight for _ in range(2)]
    assert not torch.equal(*unseeded)


@pytest.mark.parametrize("name", TINY)
def test_meta_model_can_be_filled(name: str):
    model, reference = models.build(name, device="meta"), models.build(name, seed=0)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(1e6)
    torch.manual_seed(0)
    model.init_weights()
    for (key, buffer), (_, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), key
    for (key, parameter), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        # Drawn in another order, so equal in scale alone, as far as so many numbers tell.
        rtol = max(0.1, 5 / math.sqrt(parameter.numel()))
        torch.testing.assert_close(parameter.std(), expected.std(), rtol=rtol, atol=0, msg=key)


def test_dtype_and_overrides():
    model = models.build(
        "olmoe-tiny",
        device="meta",
        dtype=torch.bfloat16,
        overrides={"num_hidden_layers": 2, "experts_implementation": "eager"},
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(models.blocks(model)) == 2
    assert model.config._experts_implementation == "eager"


def test_own_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('family = "qwen3"\n[config]\nvocab_size = 50\nhidden_size = 32\nnum_hidden_layers = 1\n')
    model = models.build(path, device="meta")
    assert model.get_input_embeddings().weight.shape == (50, 32)
    assert len(models.blocks(models.build(str(path), device="meta"))) == 1


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"(?s)'olmo'.*olmoe-tiny"):
        models.build("olmo", device="meta")


def test_unknown_setting_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"OlmoeConfig has no setting hiden_size, moe_intermediate_size"):
        models.build("olmoe-tiny", overrides={"hiden_size": 64, "moe_intermediate_size": 64})
    path = tmp_path / "mine.toml"
    path.write_text('family = "qwen3"\n[config]\nlayers = 2\n')
    with pytest.raises(ValueError, match="Qwen3Config has no setting layers"):
        models.build(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [('family = "llama9"\n[config]\n', "there is no family 'llama9'"), ("[config]\n", "it must hold `family`")],
)
def test_malformed_file(tmp_path, text: str, message: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        models.build(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 10**11}, "vocab_size=100000000000 must be between 1 and 16,777,216"),
        ({"hidden_size": 0}, "hidden_size=0 must be between 1 and"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must be between 1 and 1,000"),
        ({"initializer_range": math.nan}, "initializer_range=nan must be between"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_parameters=.* must be between 1 and"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads=3 must divide hidden_size=128"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"hidden_size": 136, "num_attention_heads": 8, "num_key_value_heads": 8}, "17 dimensions, but positions"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and the number of experts, 8"),
        ({"intermediate_size": 9}, "width of 9 must be multiples of 4"),
        ({"pad_token_id": 4096}, "pad_token_id=4096 must be below vocab_size=4096"),
        ({"num_local_experts": 4, "num_experts": 4}, "num_local_experts is another name of num_experts"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation='someone/kernel' is not one of eager"),
        ({"hidden_act": "nope"}, "transformers cannot build it .KeyError.*nope"),
        ({"return_dict": False}, "has no setting return_dict"),
        ({"vocab_size": "abc"}, "'vocab_size' expected int, got str"),
        ({"hidden_size": 2**17, "vocab_size": 2**24}, "weights take .* GB, and cpu has"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        models.build("olmoe-tiny", overrides=settings)
    assert "\n" not in str(caught.value)


def test_a_files_own_settings_are_checked_where_others_replace_them(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('family = "qwen3"\n[config]\nvocab_size = "abc"\n')
    with pytest.raises(ValueError, match="'vocab_size' expected int, got str"):
        models.build(path, device="meta", vocabulary=100)


def test_import_is_light_and_a_missing_transformers_names_the_extra():
    code = """
import sys
import symdist.tools.models
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
symdist.tools.models.build("olmoe-tiny")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: building a model needs transformers: pip install 'symdist[tools]'" in result.stderr
