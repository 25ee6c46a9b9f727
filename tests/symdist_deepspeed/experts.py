"""DeepSpeed's own mixture of experts: what ranks run to train it."""

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tests.symdist_deepspeed.engines import Config, connect, engine_of, over_ranks

VOCABULARY, WIDTH, EXPERTS, TOKENS = 40, 12, 4, 24


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Model(nn.Module):
    """Every expert sees all its tokens, so that nothing depends on who has which."""

    def __init__(self, ep_size: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.moe = MoE(WIDTH, Expert(), num_experts=EXPERTS, ep_size=ep_size, k=1, drop_tokens=False, use_rts=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.moe(x)[0])


def fill(model: Model) -> None:
    """The same weights wherever an expert lies."""
    held = len(model.moe.deepspeed_moe.experts.deepspeed_experts)
    first = held * (dist.get_rank() % (EXPERTS // held))
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "deepspeed_experts" in parts:
            at = parts.index("deepspeed_experts") + 1
            parts[at] = str(first + int(parts[at]))
        generator = torch.Generator().manual_seed(sum(map(ord, ".".join(parts))))
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5


def losses(mesh: DeviceMesh, settings: Config, ep_size: int, steps: int) -> tuple[list[float], dict[str, str]]:
    """Mean losses over ranks, and the rule that every parameter got."""
    connect()
    model = Model(min(ep_size, dist.get_world_size()))
    fill(model)
    engine = engine_of(model, settings)
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for step in range(steps):
        tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(step)).chunk(world)[
            rank
        ]
        loss = nn.functional.cross_entropy(engine(tokens), (7 * tokens + 3) % VOCABULARY)
        engine.backward(loss)
        engine.step()
        found.append(over_ranks(loss))
    inner = engine.basic_optimizer.symdist
    rules = {name: group["rule"] for group in inner.param_groups for name in group["param_names"]}
    engine.destroy()
    return found, rules
