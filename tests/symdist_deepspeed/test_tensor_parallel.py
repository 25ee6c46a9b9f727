"""AutoTP under ZeRO: the losses do not depend on how many ranks a weight is cut over."""

from collections.abc import Callable, Iterator

import pytest
from deepspeed.runtime import engine

from tests.ranks import Ranks, sets_of_ranks
from tests.symdist_deepspeed import engines, parallel

if not hasattr(engine, "UNIVERSAL_CHECKPOINT_INFO") and not hasattr(engine.DeepSpeedEngine, "autotp_size"):
    pytest.skip("this DeepSpeed has no tensor parallelism for training", allow_module_level=True)

Worlds = Callable[[int], Ranks]
STEPS = 10
RECIPE = {
    "embedding": {"rule": "row_norm", "lr": 0.1, "centered": False},
    "tied_embedding": {"rule": "right_spectral", "lr": 0.02},
    "head": {"rule": "right_spectral", "lr": 0.02, "centered": True},
    "attention": {"rule": "muon", "lr": 0.02, "view": "heads"},
    "mlp": {"rule": "hybrid", "lr": 0.02, "view": "neurons", "alpha": 0.0},
    "matrix": {"rule": "muon", "lr": 0.02},
    "other": {"rule": "adamw", "lr": 0.01},
    # Of weights that are cut by columns and by rows: none ends where ranks do.
    "patterns": [
        {"match": "*.o_proj.weight", "role": "matrix", "rule": "muon", "lr": 0.02, "view": {"sections": [19, 13]}},
        {
            "match": "*.gate_proj.weight",
            "role": "matrix",
            "rule": "muon",
            "lr": 0.02,
            "view": {"sections": [7, 30, 11]},
        },
    ],
}


def config(stage: int, clip: float = 0.0) -> engines.Config:
    settings = engines.config([], zero_optimization={"stage": stage}) | {"gradient_clipping": clip}
    settings["optimizer"]["params"] = {"recipe": RECIPE}
    return settings


@pytest.fixture(scope="module")
def parallel_worlds() -> Iterator[Worlds]:
    """Ranks of this module alone: DeepSpeed keeps its mesh for the life of a process."""
    with sets_of_ranks() as found:
        yield found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "heads"), [(2, 4), (4, 4), (4, 6)])
def test_losses_are_those_of_one_rank(
    worlds: Worlds, parallel_worlds: Worlds, stage: int, world: int, heads: int
) -> None:
    """Three key heads over two ranks are two and one."""
    clip = 0.5 if stage else 0.0
    ((alone, _),) = worlds(1).run(1, parallel.losses, config(stage, clip), 1, heads, STEPS)
    assert alone[0] - alone[-1] > 0.2
    for found, strategies in parallel_worlds(world).run(world, parallel.losses, config(stage, clip), 2, heads, STEPS):
        assert found == pytest.approx(alone, abs=1e-3)
        assert strategies["model.layers.0.mlp.down_proj.weight"] == ("owner" if stage else "reduce")


def test_fused_layers_are_refused(parallel_worlds: Worlds) -> None:
    for message in parallel_worlds(2).run(2, parallel.several_blocks):
        assert message == (
            "qkv: AutoTP cuts it into several blocks a rank, which symdist does not support; "
            "leave it out of tensor_parallel's partition_config, or split the layer in the model"
        )


def test_cuts_of_megatrons_kind(parallel_worlds: Worlds) -> None:
    for cut, message in parallel_worlds(2).run(2, parallel.megatron_cuts):
        assert cut == ((8, 3), 0, (4, 4))
        assert "w has tensor_model_parallel set, but symdist cannot tell how it is cut" in message
