"""What all ranks agree on before a step: whether gradients exist, are finite, and are placed like their weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.exchange import Transport
from symdist.layouts import FlatLayout, Group, Layout, peers
from symdist.rules.matrix import LARGEST, LARGEST_FLOAT64, largest

NonFinite: TypeAlias = Literal["raise", "skip", "zero"]

_LARGEST_SQUARED = 2.0**63
"""The largest magnitude whose square is in range in float32. A second moment of inf would stay so, and its weight."""

Norms: TypeAlias = dict[float, tuple[list[int], Tensor]]
"""Largest magnitudes of gradients; see `largest_of`."""

FLAGS = 3
"""The number of values that `agree` sums over all ranks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreed:
    """What all ranks know about the gradients before a step, in numbers on the device of the weights.

    Attributes:
        finite: 0-d float32: 1 if all gradients on all ranks are finite, otherwise 0.
        elsewhere: 0-d float32: on how many ranks a gradient's placements differ from its weight's, so that it must be
            redistributed first.
        any: 0-d float32: how many ranks have a gradient.
        norms: The largest magnitude of each gradient of this rank, where they have been found; for error messages.
    """

    finite: Tensor
    elsewhere: Tensor
    any: Tensor
    norms: Norms


def ranks_that_agree(
    parameters: Iterable[Tensor], layouts: Iterable[Layout | FlatLayout], *, replicas: Group | None = None
) -> Group | None:
    """Find the ranks that must agree on whether to step.

    The candidates are the root meshes that the DTensors' meshes were sliced from (which include pipeline stages), the
    groups of `layouts`, and `replicas`. The largest candidate is chosen.

    Args:
        parameters: The optimizer's parameters.
        layouts: The layouts of the parameters.
        replicas: The ranks that hold identical plain tensors; None (default) if not known.

    Returns:
        The ranks, or None if this rank trains alone.

    Raises:
        ValueError: If no single candidate contains all the others.
    """
    meshes = {id(parameter.device_mesh): parameter for parameter in parameters if isinstance(parameter, DTensor)}
    groups = [peers(parameter) for parameter in meshes.values()] + ([replicas] if replicas is not None else [])
    groups += list({layout.group for layout in layouts if layout.group is not None})
    if not groups:
        return None
    largest = max(groups, key=lambda group: (group.size, group.ranks))
    outside = [group for group in groups if not set(group.ranks) <= set(largest.ranks)]
    if outside:
        raise ValueError(
            f"some parameters are on ranks {largest.ranks} and others on ranks {outside[0].ranks}; pass the process "
            "group or device mesh of all ranks that train this model as process_group="
        )
    return largest


def agree(
    gradients: Sequence[Tensor],
    limits: Sequence[float],
    world: Group | None,
    *,
    elsewhere: bool,
    has_gradient: bool,
    transport: Transport,
    read: bool,
    device: torch.device,
) -> Agreed:
    """Combine what each rank of `world` knows about its gradients.

    All ranks of `world` must call it. It sums three numbers in one all-reduce.

    Args:
        gradients: This rank's local gradients, except those whose placements differ from their weights'.
        limits: The largest magnitude of each, see `limit_of`.
        world: The ranks that must agree; None if this rank trains alone.
        elsewhere: Whether this rank has gradients whose placements differ from their weights'.
        has_gradient: Whether this rank has any gradient.
        transport: The transport that runs the all-reduce.
        read: Whether numbers on the device may be read.
        device: Where the gradients are; this rank may have none here.

    Returns:
        The combined knowledge, the same on all ranks.
    """
    # On CPUs a 2-norm is twenty times as fast as a largest magnitude. The squares of finite numbers can overflow; the
    # largest magnitudes then decide.
    norms = largest_of(gradients, limits, order=2) if read else {}
    if not (read and _all_finite(norms, device)):
        norms = largest_of(gradients, limits)
    flags = torch.zeros(FLAGS, device=device)
    flags[0] = ~_all_finite(norms, device)
    flags[1:2].fill_(float(elsewhere))
    flags[2:3].fill_(float(has_gradient))
    share(flags, world, transport)
    return Agreed(finite=(flags[0] == 0).float(), elsewhere=flags[1], any=flags[2], norms=norms)


def share(flags: Tensor, world: Group | None, transport: Transport) -> None:
    """Add up the flags of all ranks, in place; plans call it with empty ones.

    Args:
        flags: `[FLAGS]`.
        world: The ranks that must agree; None if this rank trains alone.
        transport: The transport that runs the all-reduce.
    """
    if world is not None and world.size > 1:
        transport.all_reduce(flags, group=world).wait()


def may_read(tensors: Iterable[Tensor]) -> bool:
    """Return whether the host may read numbers that are computed from tensors, which makes it wait for accelerators."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def gated(gradients: list[Tensor], gate: Tensor) -> list[Tensor]:
    """Return copies of gradients, all zero if the gate is.

    Zero times NaN is NaN. Multiplied as whole numbers, however, the bits of any number become those of zero.

    Args:
        gradients: The gradients, of one dtype.
        gate: 0-d, 1 or 0.

    Returns:
        New tensors.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[gradients[0].dtype.itemsize]
    bits = torch._foreach_mul([gradient.view(whole) for gradient in gradients], gate.to(whole))
    return [one.view(gradients[0].dtype) for one in bits]


def limit_of(dtype: torch.dtype, *, squared: bool) -> float:
    """Return the magnitude above which a gradient is treated as not finite, because moments and sums could overflow.

    Args:
        dtype: The dtype of the gradient.
        squared: Whether its squares must be in range, too, because nothing bounds it for AdamW; see `bounded`.

    Returns:
        The largest magnitude that counts as finite.
    """
    return _LARGEST_SQUARED if squared and dtype != torch.float64 else largest(dtype)


def bounded(gradients: Sequence[Tensor], norms: Norms, squared: Sequence[bool]) -> list[Tensor]:
    """Bound the magnitudes of gradients whose squares AdamW accumulates, where the host knows that it has to.

    Args:
        gradients: This rank's local gradients.
        norms: Upper bounds of their magnitudes, see `largest_of`; they are read.
        squared: Which gradients AdamW accumulates.

    Returns:
        The gradients, of which only those are copied that could have larger elements.
    """
    result = list(gradients)
    for indices, of_all in norms.values():
        for i, norm in zip(indices, of_all.tolist(), strict=True):
            if squared[i] and not norm <= _LARGEST_SQUARED and gradients[i].dtype != torch.float64:
                result[i] = gradients[i].clamp(-_LARGEST_SQUARED, _LARGEST_SQUARED)
    return result


def zeroed(gradient: Tensor, limit: float) -> Tensor:
    """Return a gradient with zeros in place of the elements that are not finite or above a limit."""
    return torch.where(gradient.abs() <= limit, gradient, 0)


class Unread:
    """What a device knows of steps whose gradients were not finite, until the host asks.

    On an accelerator a step does not wait for the answer: it changes nothing if a gradient is not finite.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None
        self._last: tuple[Tensor, torch.cuda.Event | None, Norms, list[str]] | None = None

    def skipped(self, finite: Tensor) -> None:
        """Count a step that may have been skipped.

        Args:
            finite: 0-d, 1 if it was not.
        """
        if self._count is None:
            self._count = torch.zeros_like(finite)
        self._count += 1 - finite

    def take_count(self) -> int:
        """Read how many steps have been skipped since this was last asked."""
        count = 0 if self._count is None else int(self._count)
        if self._count is not None:
            self._count.zero_()
        return count

    def keep(self, agreed: Agreed, names: Sequence[str]) -> None:
        """Keep what `check` needs, and start to copy its answer to the host.

        Args:
            agreed: What all ranks know of the gradients of a step.
            names: The names of the parameters.
        """
        event = None
        answer = agreed.finite
        if answer.device.type == "cuda":
            answer = torch.empty((), device="cpu", pin_memory=True).copy_(answer, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(agreed.finite.device))
        self._last = answer, event, agreed.norms, list(names)

    def check(self) -> None:
        """Raise FloatingPointError, once, if a gradient of the last step was not finite; that step changed nothing."""
        if self._last is None:
            return
        (answer, event, norms, names), self._last = self._last, None
        if event is not None:
            # It passed long ago if anything was computed since.
            event.synchronize()
        if not (answer.numpy() if answer.device.type == "cpu" else bool(answer)):
            raise not_finite_error(norms, names)


def not_finite_error(norms: Norms, names: Sequence[str]) -> FloatingPointError:
    """Make the error that all ranks raise if any gradient is not finite.

    The message names parameters on this rank whose gradients are not finite, if there are any.

    Args:
        norms: The largest magnitudes of this rank's gradients. They are read here.
        names: The names of their parameters, by index.

    Returns:
        The error; it is not raised here.
    """
    large = [
        i
        for limit, (indices, of_all) in norms.items()
        for i, norm in zip(indices, of_all.tolist(), strict=True)
        if not norm <= limit
    ]
    bad = [names[i] for i in sorted(large)]
    place = f"of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}" if bad else "held by another rank"
    return FloatingPointError(
        f"a gradient {place} is not finite; no weight was changed. Not finite means inf, NaN or larger than "
        f"{LARGEST:.0e} ({LARGEST_FLOAT64:.0e} in float64, {_LARGEST_SQUARED:.0e} for AdamW on an accelerator). Pass "
        "nonfinite='skip' to skip such steps, or nonfinite='zero' to set these elements to zero"
    )


def largest_of(gradients: Sequence[Tensor], limits: Sequence[float], *, order: float = float("inf")) -> Norms:
    """Return the largest magnitude in each gradient, by the limit above which it counts as not finite.

    Args:
        gradients: This rank's local gradients.
        limits: The largest magnitude that counts as finite, for each.
        order: The order of the norm that is found; 2 gives an upper bound. By default, the largest magnitude.

    Returns:
        By limit, the indices of the gradients that have elements, and `[number of indices]`, float64.
    """
    by_limit: dict[float, list[int]] = {}
    for i, (gradient, limit) in enumerate(zip(gradients, limits, strict=True)):
        if gradient.numel():
            by_limit.setdefault(limit, []).append(i)
    return {
        limit: (indices, _stacked(torch._foreach_norm([gradients[i] for i in indices], order)))
        for limit, indices in by_limit.items()
    }


def _all_finite(norms: Norms, device: torch.device) -> Tensor:
    """Return whether all gradients are finite, as a 0-d bool tensor on `device`."""
    finite = torch.ones((), dtype=torch.bool, device=device)
    for limit, (_, of_all) in norms.items():
        # NaN is not at most the limit.
        finite = finite & (of_all.amax().to(device) <= limit)
    return finite


def _stacked(norms: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.to(norms[0].device) for norm in norms]).double()
