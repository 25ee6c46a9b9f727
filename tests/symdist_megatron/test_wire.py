"""What a step sends under Megatron is what its trace says, collective by collective."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from symdist.exchange import CountingTransport
from symdist.tools.megatron import MegatronMesh
from symdist.tools.models import build
from symdist.tools.simulate import simulate
from tests.ranks import Ranks
from tests.symdist_megatron.cases import recipe
from tests.symdist_megatron.how import How

Worlds = Callable[[int], Ranks]
COUNTED = "tests.symdist_megatron.wire_ranks:counted"
HOW = How(dtype="float32", layers=4)
LAYOUTS: dict[str, How] = {
    "tp4": replace(HOW, tp=4, etp=4),
    "tp2 dp2": replace(HOW, tp=2, etp=2),
    "tp2 dp2, distributed": replace(HOW, tp=2, etp=2, distributed=True),
    "tp2 ep2": replace(HOW, tp=2, ep=2),
    "ep2 dp2, distributed": replace(HOW, ep=2, distributed=True),
    "pp2 dp2, distributed": replace(HOW, pp=2, distributed=True),
    "pp2 dp2, tied": replace(HOW, pp=2, tied=True),
    "pp2 tp2, tied": replace(HOW, pp=2, tp=2, etp=2, tied=True),
    "pp2 dp2, tied, distributed": replace(HOW, pp=2, tied=True, distributed=True),
    "dp4": HOW,
    "dp4, distributed": replace(HOW, distributed=True),
}


def model_of(how: How) -> Any:
    """The same model, as `transformers` has it."""
    settings = {
        "hidden_size": how.hidden,
        "num_hidden_layers": how.layers,
        "num_attention_heads": how.heads,
        "num_key_value_heads": how.groups,
        "head_dim": how.kv_channels,
        "intermediate_size": how.ffn,
        "moe_intermediate_size": how.ffn // 2,
        "num_experts": how.experts,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": how.tied,
    }
    return build("qwen3-moe-tiny", vocabulary=37, overrides=settings, device="meta")


@pytest.mark.parametrize("case", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_is_what_is_sent(worlds: Worlds, layout: str, case: int) -> None:
    how = LAYOUTS[layout]
    found = worlds(4).run(4, COUNTED, how, recipe(case), {"vocabulary": 37})
    for planned, started in found:
        assert planned == started
    assert all(started for _, started in found)
    data = 4 // (how.tp * how.pp)
    mesh = MegatronMesh(
        tp=how.tp,
        pp=how.pp,
        ep=how.ep,
        etp=how.etp,
        dp=data,
        distributed=how.distributed,
        bucket=None,
        vocabulary_multiple=how.vocabulary // how.tp,
    )
    with simulate(model_of(how), recipe(case), mesh=mesh) as simulated:
        for rank, (_, started) in enumerate(found):
            counting = CountingTransport()
            simulated.step(counting, rank=rank)
            assert [(moved.kind, moved.size, moved.sent) for moved in counting.log] == started


@pytest.mark.parametrize("kind", ["latent", "delta", "mamba"])
def test_the_trace_of_every_kind_of_model_is_what_is_sent(worlds: Worlds, kind: str) -> None:
    how = replace(LAYOUTS["tp2 dp2, distributed"], kind=kind, layers=4 if kind == "mamba" else 2)
    for planned, started in worlds(4).run(4, COUNTED, how, recipe(0), {"vocabulary": 37}):
        assert planned == started
        assert started


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("qwen3_next", "linear_attn.dt_bias"),
        ("qwen2_moe", "mlp.shared_expert.gate_proj.weight"),
        ("mamba2", "backbone.norm_f.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("opt", "embed_positions.weight"),
    ],
)
def test_a_model_that_a_plan_knows_no_job_of_is_refused(kind: str, named: str) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "word_embed_proj_dim": 16}
    mixers = {"num_heads": 8, "head_dim": 4, "expand": 2, "n_groups": 1} if kind == "mamba2" else heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL, **mixers))
    said = rf"not known how a Megatron job holds .*{re.escape(named)}"
    with pytest.raises(ValueError, match=said), simulate(model, recipe(0), mesh=MegatronMesh()):
        pass


@pytest.mark.parametrize("layout", ["tp2 dp2", "tp2 dp2, distributed"])
def test_collectives_do_not_grow_with_depth(worlds: Worlds, layout: str) -> None:
    kinds = []
    for layers in (2, 8):
        how = replace(LAYOUTS[layout], layers=layers)
        found = worlds(4).run(4, COUNTED, how, recipe(0), {})
        kinds.append([kind for kind, _, _ in found[0][1]])
    assert kinds[0] == kinds[1]


def test_row_rules_move_next_to_nothing(worlds: Worlds) -> None:
    """Where tensor parallelism cuts rows nothing but whether all is finite; in runs, at most a cut row each way."""
    rows: dict[str, Any] = {"rule": "row_norm", "lr": 0.1}
    given = {"default": rows, "other": {"rule": "adamw", "lr": 0.1}, "attention_o": {"rule": "adamw", "lr": 0.1}}
    given |= {"mlp_down": {"rule": "adamw", "lr": 0.1}, "expert_down": {"rule": "adamw", "lr": 0.1}}
    for _, started in worlds(4).run(4, COUNTED, LAYOUTS["tp4"], given, {}):
        assert [kind for kind, _, _ in started] == ["all_reduce"]
    how = LAYOUTS["dp4, distributed"]
    for _, started in worlds(4).run(4, COUNTED, how, given, {}):
        # Of every matrix a rank has at most two cut rows, and each is sent there and back.
        matrices = 1 + 1 + how.layers * 3 + (how.layers // 2) * (1 + how.experts)
        assert sum(sent for _, _, sent in started) <= 4 * 2 * 2 * how.hidden * matrices
