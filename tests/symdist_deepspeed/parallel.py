"""DeepSpeed's tensor parallelism: what ranks run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from symdist.tools.models import build
from symdist_deepspeed.tensor_parallel import cut_of
from tests.symdist_deepspeed.engines import Config, engine_of, over_ranks

VOCABULARY, BATCH = 64, 4
OVERRIDES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}


def model(heads: int) -> nn.Module:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 8}
    return build("qwen3-tiny", vocabulary=VOCABULARY, overrides=OVERRIDES | sizes, seed=3)


def losses(
    mesh: DeviceMesh, settings: Config, tensor: int, heads: int, steps: int
) -> tuple[list[float], dict[str, Any]]:
    """Mean losses over data-parallel ranks, and where the rules ran."""
    settings = dict(settings)
    data = dist.get_world_size() // tensor
    settings["train_micro_batch_size_per_gpu"] = BATCH // data
    if tensor > 1:
        settings["tensor_parallel"] = {"autotp_size": tensor}
    engine = engine_of(model(heads), settings)
    found = []
    for step in range(steps):
        drawn = torch.randint(0, 8, (BATCH, 13), generator=torch.Generator().manual_seed(step)).cumsum(1) % VOCABULARY
        batch = drawn.chunk(data)[dist.get_rank() // tensor]
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        found.append(over_ranks(loss))
    strategies = engine.basic_optimizer.symdist.strategies()
    engine.destroy()
    return found, strategies


def several_blocks(mesh: DeviceMesh) -> str:
    """What is said of a layer whose ranks hold a block of each of q, k and v."""
    weight = nn.Parameter(torch.zeros(6, 4))
    weight.ds_autotp_universal_checkpoint_meta = {  # type: ignore[attr-defined]
        "replicated": False,
        "partition_dim": 0,
        "partition_sizes": None,
        "sub_param_shard_widths": [[2, 2], [2, 2], [2, 2]],
        "original_shape": (12, 4),
        "logical_shape": (12, 4),
    }
    try:
        cut_of(weight, ranks=2, name="qkv")
    except ValueError as error:
        return str(error)
    return "nothing"


def megatron_cuts(mesh: DeviceMesh) -> tuple[Any, str]:
    """How a weight marked as Megatron marks it is cut, and what is said of one that is marked by halves."""
    weight: Any = nn.Parameter(torch.zeros(4, 3))
    weight.tensor_model_parallel, weight.partition_dim = True, 0
    cut = cut_of(weight, ranks=2, name="w")
    assert cut is not None
    weight.partition_stride = 2
    try:
        cut_of(weight, ranks=2, name="w")
    except ValueError as error:
        return (cut.shape, cut.dim, cut.sizes), str(error)
    return None, "nothing"
