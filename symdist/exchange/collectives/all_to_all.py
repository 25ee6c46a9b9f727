"""Pieces to their owners and updates back: one all-to-all each way for all the parameters that ask."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from symdist.exchange.collectives.redistribution import Gather, Scatter
from symdist.exchange.collectives.transport import Transport
from symdist.layouts import Group


def answer_ships(
    requests: Sequence[Gather], *, group: Group, transport: Transport
) -> Generator[Any, None, list[list[Tensor]]]:
    """Every rank receives the pieces of what it owns and puts them together."""
    likes = [request.like for request in requests]
    routes = [(request.route, len(request.fields)) for request in requests]
    kept = [[request.route.kept(field) for field in request.fields] for request in requests]
    moving = _all_to_all(
        [_merged([request.route.sent_pieces(field) for field in request.fields]) for request in requests],
        [_times(route.received_pieces(), fields) for route, fields in routes],
        like=likes[0].to(requests[0].dtype),
        group=group,
        transport=transport,
    )
    # From here on the buffer has it all.
    del requests
    received = yield from moving
    return [
        [
            route.wholes(parts, like=like, kept=here)
            for parts, here in zip(_fields(received.pop(0), fields), kept.pop(0), strict=True)
        ]
        for (route, fields), like in zip(routes, likes, strict=True)
    ]


def answer_returns(
    requests: Sequence[Scatter], *, group: Group, transport: Transport
) -> Generator[Any, None, list[list[list[Tensor]]]]:
    """Every owner cuts what it made and sends each rank its piece."""
    likes = [request.like for request in requests]
    routes = [(request.route, len(request.fields), request.shape) for request in requests]
    kept = [[request.route.kept_home(field) for field in request.fields] for request in requests]
    moving = _all_to_all(
        [_merged([request.route.sent_home(field) for field in request.fields]) for request in requests],
        [_times(route.received_home(), fields) for route, fields, _ in routes],
        like=likes[0].to(requests[0].dtype),
        group=group,
        transport=transport,
    )
    del requests
    received = yield from moving
    return [
        [
            route.home(parts, shape=shape, like=like, kept=here)
            for parts, here in zip(_fields(received.pop(0), fields), kept.pop(0), strict=True)
        ]
        for (route, fields, shape), like in zip(routes, likes, strict=True)
    ]


def _merged(fields: list[dict[int, list[Tensor]]]) -> dict[int, list[Tensor]]:
    """What goes to each rank, one field after another."""
    return {rank: [tensor for field in fields for tensor in field[rank]] for rank in fields[0]}


def _times(counts: dict[int, int], fields: int) -> dict[int, int]:
    return {rank: count * fields for rank, count in counts.items()}


def _fields(received: dict[int, Tensor], fields: int) -> list[dict[int, Tensor]]:
    """The inverse of `_merged`, on what arrived: by rank, each field's share of one flat buffer."""
    return [{rank: flat.chunk(fields)[i] for rank, flat in received.items()} for i in range(fields)]


def _all_to_all(
    sent: list[dict[int, list[Tensor]]],
    expected: list[dict[int, int]],
    *,
    like: Tensor,
    group: Group,
    transport: Transport,
) -> Generator[Any, None, list[dict[int, Tensor]]]:
    """For each request: send rank i the tensors `sent[i]`, receive `expected[i]` numbers from it, flat, by rank."""
    outgoing = [[tensor for of_request in sent for tensor in of_request.get(rank, ())] for rank in range(group.size)]
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    buffer = like.new_empty(sum(counts))
    flat = [tensor for tensors in outgoing for tensor in tensors]
    places = buffer.split([tensor.numel() for tensor in flat])
    # Copied one by one, not concatenated: so each is converted on its way, and needs to be contiguous nowhere.
    if flat:
        torch._foreach_copy_([place.view(t.shape) for place, t in zip(places, flat, strict=True)], flat)
    del outgoing, flat, places, sent
    incoming = [[of_request.get(rank, 0) for of_request in expected] for rank in range(group.size)]
    out = like.new_empty(sum(map(sum, incoming)))
    yield transport.all_to_all(out, buffer, received=list(map(sum, incoming)), sent=counts, group=group)
    del buffer
    parts = iter(out.split([size for of_rank in incoming for size in of_rank]))
    found: list[dict[int, Tensor]] = [{} for _ in expected]
    for rank, of_rank in enumerate(incoming):
        for request, size in zip(found, of_rank, strict=True):
            part = next(parts)
            if size:
                request[rank] = part
    return found
