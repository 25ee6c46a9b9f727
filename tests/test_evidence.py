"""What a weight is for, by what is around it: own code, where a name or a size alone would mislead."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from symdist import UnroutedError, build_optimizer, route
from symdist.routing.facts import ModelFacts
from symdist.routing.sites import find_sites

ADAMW = {"default": {"rule": "adamw", "lr": 1.0}}
MUON = {"rule": "muon", "lr": 1.0}


def module(**members: Any) -> nn.Module:
    """A module with these attributes; tensors become parameters."""
    made = nn.Module()
    for name, member in members.items():
        setattr(made, name, nn.Parameter(member) if isinstance(member, torch.Tensor) else member)
    return made


def linear(into: int, out: int) -> nn.Linear:
    return nn.Linear(into, out, bias=False)


def language_model(block: nn.Module, *, vocabulary: int = 50, width: int = 16, **members: Any) -> nn.Module:
    members.setdefault("lm_head", linear(width, vocabulary))
    return module(tok=nn.Embedding(vocabulary, width), layers=nn.ModuleList([block]), **members)


def roles(model: nn.Module) -> dict[str, str | None]:
    return {name.removeprefix("layers.0."): site.role for name, (_, site) in find_sites(model).items()}


class OwnLinear(nn.Module):
    """A linear layer that is no `nn.Linear`, like those for eight bits or of Transformer Engine."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.in_features, self.out_features = into, out
        self.weight = nn.Parameter(torch.randn(out, into))


def test_a_head_may_be_a_linear_layer_of_ones_own() -> None:
    model = language_model(module(wq=OwnLinear(16, 24)), lm_head=OwnLinear(16, 50))
    assert roles(model)["lm_head.weight"] == "head"
    assert roles(model)["wq.weight"] == "attention_q"


class LayerNormMLP(nn.Module):
    """A norm and two linear layers in one module, as Transformer Engine has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(16))
        self.fc1_weight = nn.Parameter(torch.randn(24, 16))


def test_a_matrix_in_a_module_with_a_norm_is_no_norm() -> None:
    model = language_model(module(mlp=LayerNormMLP()))
    assert roles(model)["mlp.layer_norm_weight"] == "input_norm"
    with pytest.raises(UnroutedError, match=r"layers\.0\.mlp\.fc1_weight"):
        route(model, ADAMW)


class NoisyRouter(nn.Module):
    """Scores of experts, and of how much noise to add to them."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.noise = linear(16, 4), linear(16, 4)


class NarrowRouter(nn.Module):
    """Scores of experts after a layer that is narrower than there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.inner, self.score = linear(16, 2), linear(2, 4)


class ThinkingRouter(nn.Module):
    """Scores of experts after a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.score = linear(16, 12), linear(12, 4)


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        (module(moe_router=NoisyRouter()), {"moe_router.score.weight"}),
        (module(deep=ThinkingRouter()), {"deep.score.weight"}),
        (module(narrow=NarrowRouter()), {"narrow.score.weight"}),
        (module(gate=module(linear=linear(16, 4)), experts=nn.ModuleList([linear(16, 8)] * 4)), {"gate.linear.weight"}),
        (module(gate=nn.Sequential(linear(16, 4)), experts=nn.ModuleList([linear(16, 8)] * 4)), {"gate.0.weight"}),
        (module(experts_gate=linear(16, 4), experts=nn.ModuleList([linear(16, 8)] * 4)), {"experts_gate.weight"}),
        (module(router=linear(16, 4), mlps=nn.ModuleList([linear(16, 8)])), {"router.weight"}),
        (module(num_experts=4, gate=linear(16, 4), others=linear(16, 8)), {"gate.weight"}),
        (module(gate=linear(16, 4), experts=nn.ModuleList([linear(16, 8)])), {"gate.weight"}),
        (module(w_gate=linear(16, 3), experts=nn.ModuleList([linear(16, 8) for _ in range(3)])), {"w_gate.weight"}),
        (module(score=linear(16, 3), experts=module(w1=torch.zeros(3, 16, 8))), {"score.weight"}),
        (module(gate=linear(16, 4), routed_experts=nn.ModuleList([linear(16, 8)] * 4)), {"gate.weight"}),
        (
            module(score=linear(16, 2), experts=nn.ModuleDict({"a": linear(16, 8), "b": linear(16, 8)})),
            {"score.weight"},
        ),
        # A shared expert, and a latent as wide as there are experts, beside the router.
        (
            module(router=linear(16, 3), gate=linear(16, 24), experts=nn.ModuleList([linear(16, 8)] * 3)),
            {"router.weight"},
        ),
        (
            module(gate=linear(16, 3), latent=linear(16, 3), experts=nn.ModuleList([linear(16, 8)] * 3)),
            {"gate.weight"},
        ),
        # Those are no routers: an MLP's gate, a shared expert's, an attention's.
        (module(mlp=module(gate=linear(16, 24), up=linear(16, 24))), set()),
        (module(num_experts=4, shared_expert_gate=linear(16, 1)), set()),
        (module(experts=nn.ModuleList([linear(16, 8)] * 3), shared=module(up_proj=linear(16, 3))), set()),
        (module(num_experts=4, self_attn=module(num_heads=2, gate=linear(16, 2))), set()),
    ],
)
def test_routers_are_those_that_score_experts(mixture: nn.Module, expected: set[str]) -> None:
    found = roles(language_model(module(mixture=mixture)))
    assert {name.removeprefix("mixture.") for name, role in found.items() if role == "router"} == expected


def views(model: nn.Module, **sections: Any) -> dict[str, Any]:
    groups = route(model, ADAMW | sections)
    return {name.removeprefix("layers.0."): group["view"] for group in groups for name in group["param_names"]}


def test_keys_have_fewer_heads_than_queries_only_if_something_says_how_many() -> None:
    def attention(**counts: int) -> nn.Module:
        layers = {"wq": linear(16, 16), "wk": linear(16, 4), "wv": linear(16, 4), "wo": linear(16, 16)}
        return language_model(module(attn=module(n_heads=4, **counts, **layers)))

    by_heads = {"attention": MUON | {"view": "heads"}}
    assert views(attention(kv_heads=1), **by_heads)["attn.wk.weight"] == {"heads": 1, "dim": 0}
    assert views(attention(head_dim=4), **by_heads)["attn.wk.weight"] == {"heads": 1, "dim": 0}
    with pytest.raises(UnroutedError, match=r"attn\.wk\.weight: view 'heads' needs the number of heads"):
        views(attention(), **by_heads)
    assert views(attention(), attention=MUON)["attn.wk.weight"] == "as_stored"


class Config:
    """Numbers of a model, or of a part of one."""

    def __init__(self, **numbers: int):
        self.__dict__.update(numbers)


def test_heads_are_those_of_the_nearest_module_that_counts_them() -> None:
    tower = module(
        config=Config(hidden_size=24, num_attention_heads=4),
        attn=module(num_heads=4, q_proj=linear(24, 24), qkv=linear(24, 72)),
    )
    model = language_model(module(vision=tower))
    model.config = Config(hidden_size=16, num_attention_heads=2, head_dim=8, vocab_size=50)
    found = views(model, attention=MUON | {"view": "heads"})
    assert found["vision.attn.q_proj.weight"] == {"heads": 4, "dim": 0}
    assert found["vision.attn.qkv.weight"] == {"heads": 12, "dim": 0}


def test_what_the_nearest_module_does_not_say_is_taken_from_further_out() -> None:
    layers = {"wq": linear(16, 16), "wk": linear(16, 8), "wv": linear(16, 8), "qkv": linear(16, 32)}
    model = language_model(module(attn=module(n_heads=4, **layers)))
    model.config = Config(hidden_size=16, n_heads=4, n_kv_heads=2, head_dim=4, vocab_size=50)
    found = views(model, attention=MUON | {"view": "heads"})
    assert [found[f"attn.{name}.weight"]["heads"] for name in layers] == [4, 2, 2, 8]


def test_configs_made_at_each_access_are_not_taken_for_one_another() -> None:
    facts = ModelFacts()
    assert [facts.number(Config(heads=heads), "heads") for heads in range(1, 100)] == list(range(1, 100))


def test_keys_are_compared_with_queries_not_with_the_mlp_beside_them() -> None:
    layers = {name: linear(16, 16) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    model = language_model(module(n_heads=4, up_proj=linear(16, 64), **layers))
    assert views(model, attention=MUON | {"view": "heads"})["k_proj.weight"] == {"heads": 4, "dim": 0}


def test_short_names_beside_each_other_tell() -> None:
    block = module(
        n_heads=4, **{name: linear(16, 16) for name in "qkvo"}, mlp=module(up=linear(16, 64), down=linear(64, 16))
    )
    found = roles(language_model(block))
    assert [found[f"{name}.weight"] for name in "qkvo"] == [f"attention_{name}" for name in "qkvo"]
    assert (found["mlp.up.weight"], found["mlp.down.weight"]) == ("mlp_up", "mlp_down")


def test_a_mixer_is_cut_by_its_inner_width() -> None:
    mixer = module(
        A_log=torch.zeros(24, 4),
        D=torch.zeros(24),
        conv1d=nn.Conv1d(24, 24, 3, groups=24),
        in_proj=linear(16, 48),
        x_proj=linear(24, 9),
        out_proj=linear(24, 16),
    )
    gated = module(conv=nn.Conv1d(16, 16, 3, groups=16), in_proj=linear(16, 48), out_proj=linear(16, 16))
    found = find_sites(language_model(module(mamba=mixer, short=gated)))
    assert found["layers.0.mamba.in_proj.weight"][1].sections == (24, 24)
    assert found["layers.0.short.in_proj.weight"][1].sections == (16, 16, 16)
    assert found["layers.0.mamba.A_log"][1].role == "state_space"


def test_a_name_of_one_letter_says_nothing_of_a_matrix_alone() -> None:
    block = module(
        A=torch.zeros(3, 16), w_unbias=torch.zeros(3, 16), exposed=torch.zeros(3, 16), pos_table=torch.zeros(9, 16)
    )
    found = roles(language_model(block))
    assert [found[name] for name in ("A", "w_unbias", "exposed", "pos_table")] == [None] * 3 + ["position_embedding"]


def test_parts_of_one_weight_are_not_guessed() -> None:
    def attention(rows: int, **counts: int) -> nn.Module:
        return language_model(module(attn=module(n_heads=4, qkv=linear(16, rows), **counts)))

    name = "attn.qkv.weight"
    assert views(attention(48), attention=MUON)[name] == {"heads": 3, "dim": 0}
    assert views(attention(24, n_kv_heads=1), attention=MUON)[name] == {"sections": [16, 4, 4]}
    # A key head for every query head would divide these 24 rows as well.
    assert views(attention(24), attention=MUON)[name] == "as_stored"


def test_heads_of_wrapped_models_and_of_towers() -> None:
    padded = language_model(module(wq=linear(16, 16)), vocabulary=64)
    padded.config = Config(vocab_size=50, hidden_size=16)
    assert roles(module(model=padded, loss=nn.CrossEntropyLoss()))["model.lm_head.weight"] == "head"
    small, large = (language_model(module(fc1=linear(w, 2 * w)), width=w) for w in (16, 32))
    pair = roles(module(student=small, teacher=large))
    assert pair["student.lm_head.weight"] == pair["teacher.lm_head.weight"] == "head"
    positions = module(pos_emb=nn.Embedding(9, 16), tok_emb=nn.Embedding(50, 16), lm_head=linear(16, 50))
    found = roles(module(model=positions, other=linear(16, 16)))
    assert (found["model.pos_emb.weight"], found["model.tok_emb.weight"]) == ("position_embedding", "embedding")
    assert found["model.lm_head.weight"] == "head"
    # As many positions as a layer has rows.
    block = module(fc1=linear(16, 9))
    first = module(pos_emb=nn.Embedding(9, 16), tok_emb=nn.Embedding(50, 16), layers=nn.ModuleList([block]))
    found = roles(first)
    assert (found["pos_emb.weight"], found["tok_emb.weight"]) == ("position_embedding", "embedding")


def test_equal_names_without_wrappers_lose_no_weight() -> None:
    model = module(module=module(x=nn.Linear(8, 8)), x=nn.Linear(8, 8))
    held = [parameter for group in route(model, ADAMW) for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert set(find_sites(model)) == {"module.x.weight", "module.x.bias", "x.weight", "x.bias"}
    optimizer = build_optimizer(model, ADAMW)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def test_a_head_of_one_row_is_a_gate_that_moves() -> None:
    model = language_model(module(wq=linear(16, 24)), lm_head=linear(16, 1))
    assert roles(model)["lm_head.weight"] == "gate"
    optimizer = build_optimizer(model, "olmoe", overrides={"attention": {"view": "as_stored"}})
    before = model.lm_head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)


def test_layers_as_large_as_the_vocabulary_are_no_heads() -> None:
    block = module(
        attention=module(num_heads=2, query=linear(32, 32), output=linear(32, 32)),
        mlp=module(fc1=linear(32, 32), fc2=linear(32, 32)),
    )
    found = roles(language_model(block, vocabulary=32, width=32, embed_proj=linear(32, 32)))
    assert [name for name, role in found.items() if role == "head"] == ["lm_head.weight"]
    assert found["attention.output.weight"] == "attention_o"


class Gated(nn.Module):
    """Stacked experts `[expert, out, in]`, whose forward cuts gate and up in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 24, 16)), nn.Parameter(torch.randn(3, 16, 12))


def test_the_stream_tells_how_experts_are_stored_whatever_sizes_their_module_names() -> None:
    experts = module(
        in_features=16, out_features=8, w1=torch.zeros(3, 8, 16), w2=torch.zeros(3, 16, 8), w3=torch.zeros(3, 8, 16)
    )
    found = find_sites(language_model(module(mlp=module(experts=experts))))
    assert not any(found[f"layers.0.mlp.experts.w{i}"][1].transposed for i in (1, 2, 3))


class Halves(Gated):
    """Gates before ups."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up_proj.mT).chunk(2, -1)
        return F.silu(gate) * up @ self.down_proj.mT


class Alternating(Gated):
    """Gates and ups in turns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = x @ self.gate_up_proj.mT
        return F.silu(both[..., ::2]) * both[..., 1::2] @ self.down_proj.mT


class Otherwise(Gated):
    """A way that the code does not show at a glance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up_proj.mT).unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate) * up @ self.down_proj.mT


class Dense(nn.Module):
    """Gate and up of an MLP in one weight, cut in a way that the code does not show at a glance."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = linear(16, 48), linear(24, 16)


def test_how_a_dense_mlp_cuts_gates_and_ups_is_asked_for() -> None:
    model = language_model(module(mlp=Dense()))
    with pytest.raises(UnroutedError, match="whether all gates come before all ups") as error:
        route(model, ADAMW | {"mlp": MUON})
    assert "view = { heads = 2, dim = 0 }" in error.value.snippet
    assert views(model, mlp=MUON, mlp_gate_up=MUON)["mlp.gate_up_proj.weight"] == "as_stored"


@pytest.mark.parametrize(
    ("kind", "view", "expected"),
    [
        (Halves, "neurons", "gate_up_stacked"),
        (Halves, "apart", {"heads": 2, "dim": 0}),
        (Alternating, "neurons", {"gate_up": 12, "dim": 0}),
        (Alternating, "apart", "they alternate|alternate, so"),
        (Otherwise, "neurons", "whether all gates come before all ups"),
        (Otherwise, "apart", "whether all gates come before all ups"),
        (Otherwise, None, "as_stored"),
    ],
)
def test_gates_and_ups_are_cut_as_the_code_cuts_them(kind: type[nn.Module], view: str | None, expected: Any) -> None:
    model = language_model(module(mlp=module(experts=kind())))
    experts = {"experts": MUON | ({} if view is None else {"view": view})}
    if isinstance(expected, str) and " " in expected:
        with pytest.raises(ValueError, match=expected):
            views(model, **experts)
    else:
        assert views(model, **experts)["mlp.experts.gate_up_proj"] == expected


class Unfinished(nn.Module):
    """A model whose config and head are not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.fc1 = nn.Embedding(11, 16), linear(16, 24)

    @property
    def config(self) -> Any:
        raise RuntimeError("not yet")

    def get_output_embeddings(self) -> Any:
        raise NotImplementedError


def test_what_a_model_cannot_say_does_not_end_routing() -> None:
    assert roles(Unfinished()) == {"tok.weight": "embedding", "fc1.weight": "mlp_up"}


def test_lazy_layers_and_empty_models_are_told() -> None:
    with pytest.raises(ValueError, match=r"late\.weight has no shape before the first forward pass"):
        route(module(tok=nn.Embedding(11, 16), late=nn.LazyLinear(4)), ADAMW)
    with pytest.raises(ValueError, match="the model has no trainable parameters"):
        build_optimizer(nn.Module(), ADAMW)


def test_a_model_that_is_called_an_adapter_is_none() -> None:
    block = module(self_attn=module(num_heads=2, q_proj=linear(16, 16), q_lora=module(lora_A=linear(16, 2))))
    found = roles(module(model_adapter=language_model(block)))
    assert found["model_adapter.layers.0.self_attn.q_proj.weight"] == "attention_q"
    assert found["model_adapter.layers.0.self_attn.q_lora.lora_A.weight"] == "adapter"
