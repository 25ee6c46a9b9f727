"""Measures optimizer steps: how far weights move by role, nuclear norms (ν), and where the time goes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from symdist.layouts import FlatLayout, Layout

Sums = dict[str, list[float]]


class StepMonitor:
    """Measures single steps of a `SymDist` optimizer.

    Only a step before which `arm` was called is measured; other steps cost nothing extra. A measured step is slower: it
    waits for the device before and after each part of its work, and copies the weights that AdamW steps. Weights and
    updates are measured as local pieces in any layout, and `summary` combines them over the ranks.

    Args:
        optimizer: The `SymDist` optimizer.

    Example:
        >>> monitor = symdist.diagnostics.StepMonitor(optimizer)
        >>> monitor.arm()
        >>> optimizer.step()
        >>> values = monitor.summary()  # of this rank's pieces; pass `gather` for all ranks
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
        """Measure the next step, and discard what was measured before."""
        self._squares, self._counts, self._nuclear, self._seconds = {}, {}, {}, {}
        self._measured = False
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._optimizer._observer = self

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time spent inside this context to a part of the step. The optimizer calls this.

        Args:
            part: The part: a strategy, "exchange" or "coordinate".
        """
        started = self._clock()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + self._clock() - started

    def moved(
        self,
        role: str,
        layouts: Sequence[Layout | FlatLayout],
        weights: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        padding_rows: int = 0,
    ) -> None:
        """Record how far parameters of a role moved. The optimizer calls this.

        Args:
            role: The role of the parameters.
            layouts: The layout of each parameter.
            weights: This rank's piece of each parameter, after the step.
            steps: What was subtracted from each piece, learning rate included and decay not; the sign does not matter.
            padding_rows: The number of last rows of each parameter that are padding, zero and not counted. 0 by
                default.
        """
        self._measured = True
        for layout, weight, step in zip(layouts, weights, steps, strict=True):
            # A replica is counted on every rank that has it, but a sharded tensor only once over its ranks. The number
            # of shards as a weight makes all tensors count alike in the sum over all ranks.
            shares = _shares(layout)
            real = 1 - padding_rows / layout.shape[0] if padding_rows else 1.0
            self._add(f"update_rms/{role}", step, shares, real)
            self._add(f"weight_rms/{role}", weight, shares, real)

    def factored(self, roles: Sequence[str], nuclear: Tensor, members: Sequence[int], ranks: float) -> None:
        """Record the nuclear norms of matrices whose polar factors were computed. The optimizer calls this.

        Args:
            roles: The roles of the parameters of a job.
            nuclear: `[b]`, the norms of one or several matrices per member; see `symdist.rules.Factored.nuclear`.
            members: The indices in `roles` of the parameters whose matrices these are, in order.
            ranks: How many ranks this call stands for: the weight of its values in the mean.
        """
        if not members:
            return
        self._measured = True
        for member, values in zip(members, nuclear.view(len(members), -1), strict=True):
            self._nuclear.setdefault(roles[member], []).append((values, float(ranks)))

    def summary(self, gather: Callable[[Any], list[Any]] | None = None) -> dict[str, float]:
        """Return what the last measured step showed.

        Args:
            gather: A function that takes an object from each rank and returns the list of all ranks' objects, like
                `torch.distributed.all_gather_object` with its list filled in. All ranks must then call `summary`.
                Without it (default), the values are those of this rank's pieces and work.

        Returns:
            Values by name; empty if the step was skipped.

            - `update_rms/ROLE`: root mean square of the step, with the learning rate and without weight decay.
            - `weight_rms/ROLE`: root mean square of the weights after the step.
            - `nu/ROLE`: mean nuclear norm of the matrices whose polar factors a spectral rule or Muon computes.
            - `optimizer_ms/PART`: milliseconds in a strategy, "exchange" or "coordinate", of the slowest rank in it.
        """
        result = self._sums(), self._seconds
        results = [result] if gather is None else gather(result)
        values: dict[str, float] = {}
        for key in sorted({key for sums, _ in results for key in sums}):
            total, count = (sum(column) for column in zip(*(s[key] for s, _ in results if key in s), strict=True))
            values[key] = (total / count) ** (1.0 if key.startswith("nu/") else 0.5) if count else 0.0
        for part in sorted({part for _, seconds in results for part in seconds}):
            values[f"optimizer_ms/{part}"] = 1e3 * max(seconds.get(part, 0.0) for _, seconds in results)
        return values

    def _add(self, key: str, values: Tensor, shares: int, real: float) -> None:
        if values.numel():
            norm = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
            self._squares.setdefault(key, []).append((norm, float(shares)))
            self._counts[key] = self._counts.get(key, 0.0) + values.numel() * shares * real

    def _sums(self) -> Sums:
        """Return by measure the sum of its values, and over how many values it was taken."""
        if not self._measured:
            return {}
        sums: Sums = {}
        for key, pairs in self._squares.items():
            norms = torch.stack([norm.double() for norm, _ in pairs]).square().tolist()
            total = sum(square * shares for square, (_, shares) in zip(norms, pairs, strict=True))
            sums[key] = [total, self._counts[key]]
        for role, pairs_of_role in self._nuclear.items():
            totals = torch.stack([values.double().sum() for values, _ in pairs_of_role]).tolist()
            total = sum(subtotal * ranks for subtotal, (_, ranks) in zip(totals, pairs_of_role, strict=True))
            sums[f"nu/{role}"] = [total, sum(values.numel() * ranks for values, ranks in pairs_of_role)]
        return sums

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _shares(layout: Layout | FlatLayout) -> int:
    """Return the number of ranks that a tensor is divided among."""
    return layout.shard_group.size if layout.shard_group is not None else 1
