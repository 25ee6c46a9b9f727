"""The same JSON through transformers.Trainer and through accelerate."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.symdist_deepspeed import language, trainer

Worlds = Callable[[int], Ranks]


def config(stage: int) -> dict:
    """As users of the Trainer write it: what it knows is "auto"."""
    settings = language.config(stage)
    settings["optimizer"]["params"]["lr"] = "auto"
    settings |= {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return settings


@pytest.fixture(scope="module")
def expected(worlds: Worlds) -> list[float]:
    """The losses without either."""
    settings = language.config(1)
    settings["optimizer"]["params"]["lr"] = 0.01
    losses = worlds(2).run(2, language.labelled, settings, trainer.STEPS)[0]
    assert losses[0] - losses[-1] > 0.05
    return losses


@pytest.mark.parametrize("stage", [1, 3])
def test_trainer(worlds: Worlds, tmp_path: Path, expected: list[float], stage: int) -> None:
    for losses, optimizer, rate in worlds(2).run(2, trainer.trained, str(tmp_path), config(stage)):
        assert optimizer == "DeepSpeedSymDist"
        assert rate == 0.01
        assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("stage", [0, 2])
def test_accelerate(worlds: Worlds, expected: list[float], stage: int) -> None:
    settings = language.config(stage)
    settings["optimizer"]["params"]["lr"] = 0.01
    settings["gradient_accumulation_steps"] = 1
    for losses, optimizer in worlds(2).run(2, trainer.accelerated, settings):
        assert optimizer == "DeepSpeedSymDist"
        assert losses == pytest.approx(expected, abs=1e-4)
