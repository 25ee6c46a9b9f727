"""Pieces to their owners and updates back: one all-to-all each way for all the parameters that ask."""

import itertools
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from symdist.exchange.requests import Return, Ship
from symdist.exchange.transport import Transport
from symdist.layouts import Group


def answer_ships(
    requests: Sequence[Ship], *, group: Group, transport: Transport
) -> Generator[Any, None, list[list[Tensor]]]:
    """Every rank receives the pieces of what it owns and concatenates them along the split."""
    sent = [
        [
            piece
            for request in requests
            for piece, owner in zip(request.pieces, request.owners, strict=True)
            if owner == rank
        ]
        for rank in range(group.size)
    ]
    shapes = [
        [request.layout.shape_on(rank) for request in requests for owner in request.owners if owner == group.index]
        for rank in range(group.size)
    ]
    received = yield from _all_to_all(sent, shapes, like=requests[0].pieces[0], group=group, transport=transport)
    by_tensor = iter(zip(*received, strict=True))
    answers = []
    for request in requests:
        assert request.layout.split is not None
        owned = sum(owner == group.index for owner in request.owners)
        answers.append(
            [torch.cat(pieces, dim=request.layout.split.dim) for pieces in itertools.islice(by_tensor, owned)]
        )
    return answers


def answer_returns(
    requests: Sequence[Return], *, group: Group, transport: Transport
) -> Generator[Any, None, list[list[Tensor]]]:
    """Every owner cuts what it holds along the split and sends each rank its piece."""
    cuts: list[tuple[Tensor, ...]] = []
    for request in requests:
        assert request.layout.split is not None
        cuts += [whole.split(request.layout.split.sizes, dim=request.layout.split.dim) for whole in request.wholes]
    sent = [[cut[rank] for cut in cuts] for rank in range(group.size)]
    shapes = [
        [request.layout.local_shape for request in requests for owner in request.owners if owner == rank]
        for rank in range(group.size)
    ]
    received = yield from _all_to_all(sent, shapes, like=requests[0].like, group=group, transport=transport)
    queues = [iter(pieces) for pieces in received]
    return [[next(queues[owner]) for owner in request.owners] for request in requests]


def _all_to_all(
    sent: list[list[Tensor]],
    shapes: list[list[tuple[int, ...]]],
    *,
    like: Tensor,
    group: Group,
    transport: Transport,
) -> Generator[Any, None, list[list[Tensor]]]:
    """Send rank i the tensors `sent[i]`; return, for each rank, tensors of `shapes[i]` received from it."""
    flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    buffer = torch.cat(flat) if flat else like.new_empty(0)
    sizes = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    out = like.new_empty(sum(map(sum, sizes)))
    yield transport.all_to_all(
        out,
        buffer,
        received=[sum(of_rank) for of_rank in sizes],
        sent=[sum(tensor.numel() for tensor in tensors) for tensors in sent],
        group=group,
    )
    parts = iter(out.split([size for of_rank in sizes for size in of_rank]))
    return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]
