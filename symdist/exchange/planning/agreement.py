"""Compares the plans of all ranks, so that ranks that disagree get an error in place of a hang."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

import torch

from symdist.exchange.collectives.transport import Transport
from symdist.exchange.execution.job import Job
from symdist.exchange.planning.plan import Plan
from symdist.layouts import Group

Lines = dict[range | tuple[int, ...], list[str]]
"""For each group, by its ranks, what it does in a step."""


class PlanError(RuntimeError):
    """Ranks that must run the same collectives have planned different ones."""


def check_agreement(lines: Lines, *, peers: Group, transport: Transport) -> None:
    """Compare this rank's plan with those of all others; all ranks of `peers` call it.

    Each rank sends a digest for each of its groups. Only where these differ are the plans themselves sent.

    Args:
        lines: This rank's plan, from `lines_of`.
        peers: All ranks that train this model.
        transport: Gathers the digests.

    Raises:
        PlanError: On all ranks, if the ranks of a group have planned different steps; it shows the first difference.
    """
    by_rank = transport.gather_objects({ranks: _digest(text) for ranks, text in lines.items()}, group=peers)
    digests = dict(zip(peers.ranks, by_rank, strict=True))
    for ranks in sorted({ranks for of_rank in by_rank for ranks in of_rank}, key=tuple):
        # Where `process_group=` names fewer ranks than a layout, the others have no part in this.
        held = [rank for rank in ranks if rank in digests]
        if len({digests[rank].get(ranks) for rank in held}) > 1:
            texts = dict(zip(peers.ranks, transport.gather_objects(lines.get(ranks, []), group=peers), strict=True))
            raise PlanError(_difference({rank: texts[rank] for rank in held}))


_DTYPES = (torch.float16, torch.bfloat16)


def lines_of(plan: Plan, names: Sequence[str]) -> Lines:
    """Describe what each group of this rank does in a step, in words that are the same on all ranks of the group.

    Args:
        plan: The plan of this rank.
        names: The names of all parameters, by index.

    Returns:
        A line for each job, followed by one for each of its parameters, in the order of the waves.
    """
    lines: Lines = {}
    waves: Counter[range | tuple[int, ...]] = Counter()
    for wave in plan.waves:
        group = wave[0].stack.layout.group
        if group is None or group.size == 1:
            continue
        ranks = _short(group.ranks)
        waves[ranks] += 1  # Between two waves of one group, each rank may have others of other groups.
        for job in wave:
            lines.setdefault(ranks, []).append(f"wave {waves[ranks]}: {_described(job)}")
            lines[ranks] += [f"wave {waves[ranks]}: {_named(names[i])}" for i in job.everyone]
    return lines


def _named(name: str) -> str:
    """Return a parameter's name; one that it got for want of any is its number, which may differ between ranks."""
    return "a parameter without a name" if re.match(r"param_\d+\b", name) else name


def _digest(lines: object) -> str:
    """Return a short text that differs where `lines` differ."""
    return hashlib.sha256(repr(lines).encode()).hexdigest()[:16]


def _described(job: Job) -> str:
    stack = job.stack
    options = ", ".join(f"{name}={value}" for name, value in stack.options)
    rows = f", {stack.padding_rows} rows of padding" if stack.padding_rows else ""
    skip = ", rows without gradient stay" if stack.skip_zero_grad_rows else ""
    speeds = "/".join(f"{stack.hardware.speed(dtype) / stack.hardware.flops:.2g}" for dtype in _DTYPES)
    cut = _digest((stack.layout.splits, stack.view, job.multiple, job.alone, job.travels))
    return (
        f"{stack.rule.name} ({options}) by strategy {job.strategy} on {len(job.everyone)} of shape "
        f"{stack.layout.shape}, view {stack.view.kind}{rows}{skip}, in {stack.dtype}, float16 and "
        f"bfloat16 {speeds} times as fast as float32, sent in {job.communication_dtype}, cut as {cut}"
    )


def _short(ranks: tuple[int, ...]) -> range | tuple[int, ...]:
    """Return the ranks of a group as a range if they are one, for there may be thousands."""
    step = ranks[1] - ranks[0]
    short = range(ranks[0], ranks[-1] + 1, step)
    return short if tuple(short) == ranks else ranks


def _difference(texts: dict[int, list[str]]) -> str:
    """Return the error of ranks whose plans differ."""
    (first, expected), *others = texts.items()
    rank, text = next((rank, text) for rank, text in others if text != expected)
    here, there = next((a, b) for a, b in zip_longest(expected, text, fillvalue="nothing more") if a != b)
    return (
        f"ranks {first} and {rank} must run the same collectives in a step, but have planned different ones. The first "
        f"difference: rank {first} has {here!r}, rank {rank} has {there!r}. Build the same model, recipe and options "
        "on all ranks, with the same parameters frozen and the same release of symdist"
    )
