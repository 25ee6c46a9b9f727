"""What each rank reads of the token shards, in which order, and how it resumes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.data import DataError, TokenLoader, validation_batches
from launch.data.permutation import permute
from tests.launch.corpora import numbered_shards


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_permutation_is_one_to_one(size: int) -> None:
    positions = np.arange(size)
    first = permute(positions, size=size, seed=1, epoch=0)
    assert sorted(first) == list(range(size))
    if size >= 64:
        others = [permute(positions, size=size, seed=seed, epoch=epoch) for seed, epoch in ((1, 1), (2, 0))]
        assert all((first == other).mean() < 0.2 for other in [positions, *others])
        assert len(np.unique(np.diff(first))) > size // 4
    assert permute(positions[-1:], size=size, seed=1, epoch=0) == first[-1]


def test_permutation_of_a_huge_range() -> None:
    size = 3 * 10**12
    places = permute(np.arange(size - 1000, size), size=size, seed=0, epoch=0)
    assert len(np.unique(places)) == 1000
    assert 0.4 < places.mean() / size < 0.6
    assert places.max() < size


def loaders(paths: list[Path], world: int, batch: int = 2, **options: object) -> list[TokenLoader]:
    settings = {"sequence": 8, "seed": 3} | options
    return [TokenLoader(paths, batch=batch, rank=rank, world=world, **settings) for rank in range(world)]


def step(ranks: list[TokenLoader]) -> list[int]:
    """First token of each window that one step of all ranks reads, in global order."""
    batches = [next(loader) for loader in ranks]
    assert all(tokens.dtype == torch.int64 and tokens.shape[1] == 9 for tokens in batches)
    assert all((tokens.diff(dim=1) == 1).all() for tokens in batches)
    return torch.cat(batches)[:, 0].tolist()


def test_an_epoch_covers_each_window_once(tmp_path: Path) -> None:
    paths = numbered_shards(tmp_path, 8 * 10 + 1, 5, 8 * 13 + 8, 8 + 1)
    starts = [*range(0, 80, 8), *range(86, 86 + 8 * 13, 8), 86 + 112]
    ranks = loaders(paths, world=3)
    assert ranks[0].windows == len(starts) == 24
    epochs = [[start for _ in range(4) for start in step(ranks)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == starts
    assert epochs[0] != epochs[1]
    assert epochs[0] != starts
    ordered = loaders(paths, world=3, shuffle=False)
    assert [start for _ in range(4) for start in step(ordered)] == starts


def test_seed_decides_the_order(tmp_path: Path) -> None:
    paths = numbered_shards(tmp_path, 8 * 50 + 1)
    assert step(loaders(paths, world=2)) == step(loaders(paths, world=2))
    assert step(loaders(paths, world=2)) != step(loaders(paths, world=2, seed=4))


@pytest.mark.parametrize(("world", "batch"), [(2, 2), (1, 4), (4, 1), (3, 2)])
def test_resuming_continues_the_global_row(tmp_path: Path, world: int, batch: int) -> None:
    paths = numbered_shards(tmp_path, 8 * 30 + 1, 8 * 11 + 3)
    whole = loaders(paths, world=2)
    for _ in range(7):
        step(whole)
    state = json.loads(json.dumps(whole[1].state_dict()))
    assert state["position"] == 28
    expected = [start for _ in range(12) for start in step(whole)]  # past the end of the first epoch
    resumed = loaders(paths, world=world, batch=batch)
    for loader in resumed:
        loader.load_state_dict(state)
    found = [start for _ in range(48 // (world * batch)) for start in step(resumed)]
    assert found == expected


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths, others = numbered_shards(tmp_path, 200), numbered_shards(tmp_path / "b", 199)
    state = loaders(paths, world=1)[0].state_dict()
    for changed, problem in (
        (loaders(others, world=1), "fingerprint"),
        (loaders(paths, world=1, sequence=9), "sequence 8.*sequence 9"),
        (loaders(paths, world=1, shuffle=False), "shuffled.*in order"),
        (loaders(paths, world=1, seed=4), "seed"),
    ):
        with pytest.raises(DataError, match=problem):
            changed[0].load_state_dict(state)


def test_loader_errors(tmp_path: Path) -> None:
    paths = numbered_shards(tmp_path, 8 * 5 + 1)
    with pytest.raises(DataError, match=r"part-0\.bin: 5 windows .* global batch of 6"):
        loaders(paths, world=3)
    with pytest.raises(DataError, match="outside the vocabulary of 3"):
        next(loaders(paths, world=1, vocabulary=3)[0])
    with pytest.raises(DataError, match="too short for one window"):
        validation_batches(paths, sequence=64, batch=1, rank=0, world=1, limit=None)


@pytest.mark.parametrize("limit", [1, 7, 12, None])
def test_validation_is_the_same_at_any_world_size(tmp_path: Path, limit: int | None) -> None:
    paths = numbered_shards(tmp_path, 8 * 9 + 1, 8 * 4 + 2)
    sets = []
    for world in (1, 2, 3):
        seen: list[int] = []
        counts = set()
        for rank in range(world):
            found = list(validation_batches(paths, sequence=8, batch=2, rank=rank, world=world, limit=limit))
            counts.add(len(found))
            for tokens, weight in found:
                assert tokens.shape == (2, 9)
                assert set(weight.tolist()) <= {0.0, 1.0}
                seen += tokens[weight == 1][:, 0].tolist()
        assert len(counts) == 1
        sets.append(sorted(seen))
    assert sets[0] == sets[1] == sets[2]
    assert len(set(sets[0])) == len(sets[0]) == min(limit or 13, 13)
