"""Models as people write them by hand: small, in any dtype, and none with a config of transformers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, WIDTH, LAYERS = 80, 12, 24, 2
HEADS, GROUPS, HEAD = 6, 2, 4
EXPERTS, HIDDEN = 3, 40


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Attention over `[batch, length, heads * size]`, with as many heads as there are sizes of `HEAD`."""
    q, k, v = (heads.unflatten(-1, (-1, HEAD)).transpose(1, 2) for heads in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


@dataclass
class GPTConfig:
    """As nanoGPT's."""

    vocab_size: int = VOCABULARY
    block_size: int = LENGTH
    n_layer: int = LAYERS
    n_head: int = HEADS
    n_embd: int = WIDTH


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_attn(x).split(self.n_embd, dim=2)))


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH, bias: bool = True):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """As nanoGPT: one weight for query, key and value, learned positions, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config = GPTConfig()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class ChatAttention(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = HEADS, GROUPS, HEAD
        self.c_q = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.c_k = nn.Linear(WIDTH, GROUPS * HEAD, bias=False)
        self.c_v = nn.Linear(WIDTH, GROUPS * HEAD, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ve_gate_channels = 8
        self.ve_gate = nn.Linear(self.ve_gate_channels, GROUPS, bias=False) if layer % 2 else None

    def forward(self, x: Tensor, values: Tensor | None) -> Tensor:
        v = self.c_v(x)
        if self.ve_gate is not None and values is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate_channels]))
            v = v + (gate[..., None] * values.unflatten(-1, (GROUPS, HEAD))).flatten(2)
        return self.c_proj(attend(self.c_q(x), self.c_k(x), v))


class ChatBlock(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.attn, self.mlp = ChatAttention(layer), MLP(bias=False)

    def forward(self, x: Tensor, values: Tensor | None) -> Tensor:
        x = x + self.attn(F.rms_norm(x, (WIDTH,)), values)
        return x + self.mlp(F.rms_norm(x, (WIDTH,)))


class Chat(nn.Module):
    """As nanochat: no norms with weights, embeddings of values in some layers, scalars for the residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(VOCABULARY, WIDTH), "h": nn.ModuleList([ChatBlock(i) for i in range(LAYERS)])}
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(LAYERS))
        self.x0_lambdas = nn.Parameter(torch.full((LAYERS,), 0.1))
        self.value_embeds = nn.ModuleDict({"1": nn.Embedding(VOCABULARY, GROUPS * HEAD)})

    def forward(self, tokens: Tensor) -> Tensor:
        x = first = F.rms_norm(self.transformer.wte(tokens), (WIDTH,))
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * first
            x = block(x, self.value_embeds[str(i)](tokens) if str(i) in self.value_embeds else None)
        return self.lm_head(F.rms_norm(x, (WIDTH,)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = HEADS, GROUPS, HEAD
        self.wq = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.wk = nn.Linear(WIDTH, GROUPS * HEAD, bias=False)
        self.wv = nn.Linear(WIDTH, GROUPS * HEAD, bias=False)
        self.wo = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(attend(self.wq(x), self.wk(x), self.wv(x)))


class FeedForward(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, feed_forward: nn.Module):
        super().__init__()
        self.attention, self.feed_forward = Attention(), feed_forward
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """As Meta's Llama; with any block for the MLP."""

    def __init__(self, feed_forward: Any = FeedForward):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([TransformerBlock(feed_forward()) for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class Mixture(nn.Module):
    """Experts as modules, one beside the other, and one that every token goes through, behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList([FeedForward() for _ in range(EXPERTS)])
        self.shared_expert = FeedForward()
        self.shared_expert_gate = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        out = sum(scores[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        return out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class InOutExperts(nn.Module):
    """All experts in one weight, stored `[expert, in, out]`."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, hidden) / 5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, hidden, WIDTH) / 5)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, WIDTH, hidden) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None, None, :]
        return ((F.silu(x @ self.w1) * (x @ self.w3)) @ self.w2).squeeze(-2)


class OutInExperts(nn.Module):
    """All experts in one weight, stored `[expert, out, in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 5)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None, None, :]
        return ((F.silu(x @ self.w1.mT) * (x @ self.w3.mT)) @ self.w2.mT).squeeze(-2)


class AlternatingExperts(nn.Module):
    """As of gpt-oss: gates and ups take turns along the rows of a weight stored `[expert, out, in]`, or its columns."""

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.stored_in_out = transposed
        shapes = ((2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))
        sides = [shape[::-1] if transposed else shape for shape in shapes]
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *sides[0]) / 5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *sides[1]) / 5)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.stored_in_out else w.mT for w in (self.gate_up_proj, self.down_proj))
        return (alternating_swiglu(x[..., None, None, :] @ up) @ down).squeeze(-2)


def alternating_swiglu(x: Tensor) -> Tensor:
    return F.silu(x[..., ::2]) * (x[..., 1::2] + 1)


class Stacked(nn.Module):
    """A mixture over experts that one module holds."""

    def __init__(self, experts: Any):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        return (self.router(x).softmax(-1)[..., None] * self.experts(x)).sum(-2)


class MambaMixer(nn.Module):
    """As Mamba's, with the scan written out."""

    def __init__(self, state: int = 5, rank: int = 3):
        super().__init__()
        self.d_model, self.d_inner, self.d_state, self.dt_rank = WIDTH, 2 * WIDTH, state, rank
        self.in_proj = nn.Linear(WIDTH, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, 4, groups=self.d_inner, padding=3)
        self.x_proj = nn.Linear(self.d_inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.mT)[..., : x.shape[1]]).mT
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        state, out = torch.zeros(*x.shape[::2], self.d_state, dtype=x.dtype), []
        for i in range(x.shape[1]):
            decay = torch.exp(-dt[:, i, :, None] * self.A_log.exp())
            state = decay * state + (dt[:, i] * x[:, i])[..., None] * b[:, i, None]
            out.append((state * c[:, i, None]).sum(-1))
        return self.out_proj((torch.stack(out, 1) + self.D * x) * F.silu(z))


class MambaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(WIDTH), MambaMixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([MambaLayer() for _ in range(LAYERS)])
        self.norm_f = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


class VisionAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.num_heads = width // HEAD
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), causal=False))


class VisionMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), VisionAttention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), VisionMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """As in timm: patches by a convolution, positions and a token for the whole image as raw parameters."""

    def __init__(self, width: int = 16, patches: int = 4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, width))
        self.blocks = nn.ModuleList([VisionBlock(width) for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Seeing(nn.Module):
    """A language model that reads what a narrower vision tower has seen, before its text."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.projector = VisionTower(), nn.Linear(16, WIDTH)
        self.language_model = Transformer()

    def forward(self, tokens: Tensor) -> Tensor:
        model, draw = self.language_model, torch.Generator().manual_seed(3)
        images = torch.randn(len(tokens), 3, 4, 4, generator=draw).to(self.projector.weight.dtype)
        x = torch.cat([self.projector(self.vision_tower(images)), model.tok_embeddings(tokens)], 1)
        for layer in model.layers:
            x = layer(x)
        return model.output(model.norm(x[:, -tokens.shape[1] :]))


class Declared(nn.Module):
    """A head that only the method which transformers asks for it tells: its vocabulary is not that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Transformer()
        self.trunk.output = nn.Identity()
        self.scores = nn.Linear(WIDTH, VOCABULARY + 3, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.scores

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.trunk(tokens))


class Foresight(nn.Module):
    """A weight for each of the next tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Transformer()
        self.trunk.output = nn.Identity()
        self.next_tokens = nn.ModuleList([nn.Linear(WIDTH, VOCABULARY, bias=False) for _ in range(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.trunk(tokens)
        return sum(head(x) for head in self.next_tokens)


class Factored(nn.Module):
    """A narrow embedding that a matrix widens, as wide as the hidden layer of the MLPs; its head may be it again."""

    def __init__(self, tied: bool = False, narrow: int = 16):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, narrow)
        self.embed_proj = nn.Linear(narrow, WIDTH, bias=False)
        self.layers = nn.ModuleList([TransformerBlock(FeedForward(WIDTH, narrow)) for _ in range(LAYERS)])
        self.head_proj = nn.Linear(WIDTH, narrow, bias=False) if tied else nn.Identity()
        self.lm_head = nn.Linear(narrow if tied else WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_proj(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.head_proj(x))


class LowRank(nn.Module):
    """A frozen linear layer and what is trained beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / 5)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.mT @ self.lora_B.mT


def adapted() -> nn.Module:
    """A frozen model with low-rank adapters of its attention."""
    model = Transformer().requires_grad_(False)
    for layer in model.layers:
        for name in ("wq", "wk", "wv", "wo"):
            setattr(layer.attention, name, LowRank(getattr(layer.attention, name)))
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Of the next token."""
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def build(make: Any, seed: int = 0) -> nn.Module:
    """A model in float64, the same wherever it is built."""
    torch.manual_seed(seed)
    return make().double()
