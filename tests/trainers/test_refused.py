"""What trainers do that leaves no matrices to see is refused on all ranks, with the remedy."""

from pathlib import Path

import pytest

import symdist
from tests.ranks import Ranks
from tests.trainers import language

pytest.importorskip("deepspeed")

from tests.trainers import refused_ranks


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_given_an_object(pair: Ranks, stage: int) -> None:
    for message in pair.run(2, refused_ranks.by_deepspeed, stage):
        assert '"type": "SymDist"' in message


def test_deepspeed_given_an_object_by_accelerate(pair: Ranks) -> None:
    for message in pair.run(2, refused_ranks.by_accelerate, 2):
        assert '"type": "SymDist"' in message


@pytest.mark.parametrize("way", ["wrapped", "prepared", "model prepared first", "trainer"])
def test_fsdp1_with_one_flat_parameter(pair: Ranks, tmp_path: Path, way: str) -> None:
    for message in pair.run(2, refused_ranks.flat, way, str(tmp_path)):
        assert "use_orig_params=True" in message


def test_fsdp1_wrapped_after_the_optimizer_was_built(pair: Ranks) -> None:
    # The root unit is outside of the model that the optimizer knows.
    for message in pair.run(2, refused_ranks.wrapped_later):
        assert "FullyShardedDataParallel" in message
        assert "symdist.build_optimizer(model, recipe), where model is the wrapped one" in message
        assert "DeepSpeed" not in message


def test_other_parameters_than_it_was_built_of() -> None:
    model = language.build("dense")
    optimizer = symdist.build_optimizer(model, language.RECIPES["spectral"])
    model.resize_token_embeddings(language.VOCABULARY + 8)
    # DeepSpeed is imported here, and has nothing to do with it.
    with pytest.raises(
        ValueError, match=r"embed_tokens.*has become one of shape \(104, 32\)\. Build the optimizer after"
    ):
        optimizer.step()
