"""Answers Gather and Scatter requests with one all-to-all for all requests: pieces to owners, and updates back."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from symdist.exchange.collectives.gather_scatter import Gather, Scatter
from symdist.exchange.collectives.transport import Handle, Transport
from symdist.layouts import Group


def answer_gathers(
    requests: Sequence[Gather], *, group: Group, transport: Transport
) -> Generator[Handle, None, list[list[Tensor]]]:
    """Send pieces to their owners and put the matrices together there: the answer to Gather requests.

    This is a generator: it yields the handle of the all-to-all, and its caller resumes it once the wait on that handle
    has returned. All ranks of `group` must call it, with the requests of the same jobs in the same order.

    Args:
        requests: Gather requests of one dtype and device.
        group: The ranks that exchange pieces.
        transport: Runs the all-to-all.

    Returns:
        For each request, a list with one tensor per field: what this rank put together.
    """
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
    _let_go(requests)
    received = yield from moving
    return [
        [
            route.wholes(parts, like=like, kept=kept_parts)
            for parts, kept_parts in zip(_fields(received.pop(0), fields), kept.pop(0), strict=True)
        ]
        for (route, fields), like in zip(routes, likes, strict=True)
    ]


def answer_scatters(
    requests: Sequence[Scatter], *, group: Group, transport: Transport
) -> Generator[Handle, None, list[list[list[Tensor]]]]:
    """Send every rank its pieces of the updates that the owners computed: the answer to Scatter requests.

    This is a generator like `answer_gathers`. All ranks of `group` must call it, with the requests of the same jobs in
    the same order.

    Args:
        requests: Scatter requests of one dtype and device.
        group: The ranks that exchange updates.
        transport: Runs the all-to-all.

    Returns:
        For each request, a list per field with this rank's piece of every matrix.
    """
    likes = [request.like for request in requests]
    routes = [(request.route, len(request.fields)) for request in requests]
    kept = [[request.route.kept_home(field) for field in request.fields] for request in requests]
    moving = _all_to_all(
        [_merged([request.route.sent_home(field) for field in request.fields]) for request in requests],
        [_times(route.received_home(), fields) for route, fields in routes],
        like=likes[0].to(requests[0].dtype),
        group=group,
        transport=transport,
    )
    _let_go(requests)
    received = yield from moving
    return [
        [
            route.home(parts, like=like, kept=kept_parts)
            for parts, kept_parts in zip(_fields(received.pop(0), fields), kept.pop(0), strict=True)
        ]
        for (route, fields), like in zip(routes, likes, strict=True)
    ]


def _let_go(requests: Sequence[Gather] | Sequence[Scatter]) -> None:
    """Empty the lists of fields, which jobs hold as well, so that what is in them is freed once it is sent."""
    for request in requests:
        request.fields.clear()


def _merged(fields: list[dict[int, list[Tensor]]]) -> dict[int, list[Tensor]]:
    """Return the tensors to send to each rank, one field after another."""
    return {rank: [tensor for field in fields for tensor in field[rank]] for rank in fields[0]}


def _times(counts: dict[int, int], fields: int) -> dict[int, int]:
    """Multiply the element count of every rank by the number of fields."""
    return {rank: count * fields for rank, count in counts.items()}


def _fields(received: dict[int, Tensor], fields: int) -> list[dict[int, Tensor]]:
    """Split what was received by field, undoing `_merged`: each field gets its part of every rank's flat buffer."""
    return [{rank: flat.chunk(fields)[i] for rank, flat in received.items()} for i in range(fields)]


def _all_to_all(
    sent: list[dict[int, list[Tensor]]],
    expected: list[dict[int, int]],
    *,
    like: Tensor,
    group: Group,
    transport: Transport,
) -> Generator[Handle, None, list[dict[int, Tensor]]]:
    """Run one all-to-all for several requests.

    Args:
        sent: For request `r`, `sent[r][i]` are the tensors to send to rank `i`.
        expected: For request `r`, `expected[r][i]` is how many numbers come from rank `i`.
        like: A tensor with the dtype and device of the buffers.
        group: The ranks that exchange data.
        transport: Runs the all-to-all.

    Returns:
        For each request, the data from each rank, as one vector per rank.
    """
    outgoing = [[tensor for of_request in sent for tensor in of_request.get(rank, ())] for rank in range(group.size)]
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    buffer = like.new_empty(sum(counts))
    flat = [tensor for tensors in outgoing for tensor in tensors]
    slots = buffer.split([tensor.numel() for tensor in flat])
    # A copy, unlike a concatenation, also converts the dtype and does not need contiguous tensors.
    if flat:
        torch._foreach_copy_([slot.view(t.shape) for slot, t in zip(slots, flat, strict=True)], flat)
    del outgoing, flat, slots, sent
    incoming = [[of_request.get(rank, 0) for of_request in expected] for rank in range(group.size)]
    out = like.new_empty(sum(map(sum, incoming)))
    yield transport.all_to_all(out, buffer, received=list(map(sum, incoming)), sent=counts, group=group)
    del buffer
    parts = iter(out.split([size for of_rank in incoming for size in of_rank]))
    received: list[dict[int, Tensor]] = [{} for _ in expected]
    for rank, of_rank in enumerate(incoming):
        for by_rank, size in zip(received, of_rank, strict=True):
            part = next(parts)
            if size:
                by_rank[rank] = part
    return received
