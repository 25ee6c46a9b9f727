"""Measures of single optimizer steps: how far weights move by role, ν, and where the time goes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from symdist.layouts import FlatLayout, Layout
from symdist.rules.linalg.inverse_root import InverseRoot

Sums = dict[str, list[float]]


class StepMonitor:
    """Measures steps of a `SymDist` optimizer, those before which it was armed; the others cost nothing.

    It works on any layout: pieces are measured where they lie, and `summary` puts them together. A measured step waits
    for the device around each part of its work, and keeps a copy of what AdamW steps.

        monitor = StepMonitor(optimizer)
        monitor.arm()
        optimizer.step()
        values = monitor.summary(gather)
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._device = torch.device("cpu")
        self._measured = False
        self._squares: dict[str, list[tuple[Tensor, float]]] = {}
        self._counts: dict[str, float] = {}
        self._nuclear: dict[str, list[tuple[Tensor, float]]] = {}
        self._seconds: dict[str, float] = {}

    def arm(self) -> None:
        """Measure the next step, in place of one measured before."""
        self._squares, self._counts, self._nuclear, self._seconds = {}, {}, {}, {}
        self._measured = False
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._optimizer._observer = self

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Count the time inside for a strategy, or for "exchange" or "coordinate"."""
        started = self._clock()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + self._clock() - started

    def moved(
        self,
        role: str,
        layouts: Sequence[Layout | FlatLayout],
        weights: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        padding_rows: int = 0,
    ) -> None:
        """Pieces of parameters of a role have moved by these steps; `weights` are those after it.

        The last `padding_rows` of each, which are zero and stay so, are not counted.
        """
        self._measured = True
        for layout, weight, step in zip(layouts, weights, steps, strict=True):
            # Replicas hold the same: with as many shares as it is cut in, every tensor counts alike over all ranks.
            shares = _shares(layout)
            real = 1 - padding_rows / layout.shape[0] if padding_rows else 1.0
            self._add(f"update_rms/{role}", step, shares, real)
            self._add(f"weight_rms/{role}", weight, shares, real)

    def rooted(self, roles: Sequence[str], root: InverseRoot, members: Sequence[int], ranks: float) -> None:
        """A Gram's root was taken, of matrices of `members` in order, whose roles these are, for so many ranks."""
        if not members:
            return
        found = root.nuclear.flatten().view(len(members), -1)
        self._measured = True
        for member, values in zip(members, found, strict=True):
            self._nuclear.setdefault(roles[member], []).append((values, float(ranks)))

    def summary(self, gather: Callable[[Any], list[Any]] | None = None) -> dict[str, float]:
        """What the last measured step showed; empty where it was left out.

        `update_rms/ROLE` is of the step the weights took, learning rate included and decay not; `weight_rms/ROLE` of
        the weights after it; `nu/ROLE` the mean nuclear norm of what a spectral rule or Muon takes the polar factor
        of; `optimizer_ms/STRATEGY` the milliseconds of the rank that spends most there. `gather` returns the values
        of all ranks from each rank's own, as `torch.distributed.all_gather_object` does; all ranks must then call it.
        """
        mine = self._sums(), self._seconds
        found = [mine] if gather is None else gather(mine)
        values: dict[str, float] = {}
        for key in sorted({key for sums, _ in found for key in sums}):
            total, count = (sum(column) for column in zip(*(s[key] for s, _ in found if key in s), strict=True))
            values[key] = (total / count) ** (1.0 if key.startswith("nu/") else 0.5) if count else 0.0
        for what in sorted({what for _, seconds in found for what in seconds}):
            values[f"optimizer_ms/{what}"] = 1e3 * max(seconds.get(what, 0.0) for _, seconds in found)
        return values

    def _add(self, key: str, values: Tensor, shares: int, real: float) -> None:
        if values.numel():
            norm = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
            self._squares.setdefault(key, []).append((norm, float(shares)))
            self._counts[key] = self._counts.get(key, 0.0) + values.numel() * shares * real

    def _sums(self) -> Sums:
        """By measure: a sum, and of how many."""
        if not self._measured:
            return {}
        sums: Sums = {}
        for key, pairs in self._squares.items():
            norms = torch.stack([norm.double() for norm, _ in pairs]).square().tolist()
            total = sum(square * shares for square, (_, shares) in zip(norms, pairs, strict=True))
            sums[key] = [total, self._counts[key]]
        for role, told in self._nuclear.items():
            totals = torch.stack([values.double().sum() for values, _ in told]).tolist()
            total = sum(one * ranks for one, (_, ranks) in zip(totals, told, strict=True))
            sums[f"nu/{role}"] = [total, sum(values.numel() * ranks for values, ranks in told)]
        return sums

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _shares(layout: Layout | FlatLayout) -> int:
    """The number of ranks that hold a tensor once between them."""
    if isinstance(layout, FlatLayout):
        return layout.group.size
    return layout.shard_group.size if layout.shard_group is not None else 1
