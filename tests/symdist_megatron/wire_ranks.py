"""In test ranks: what a step of a Megatron model sends, by a watch on torch.distributed, and by its trace."""

from typing import Any

from tests.symdist_megatron.how import How
from tests.symdist_megatron.models import build, optimizer_config, parameters

from torch.distributed.device_mesh import DeviceMesh

from symdist.diagnostics.collective_counter import CollectiveCounter
from symdist_megatron import get_symdist_optimizer

Log = list[tuple[str, int, float]]


def counted(mesh: DeviceMesh, how: How, recipe: Any, options: dict[str, Any]) -> tuple[Log, Log]:
    """The collectives of symdist's part of a step, as planned and as started."""
    config, chunks = build(how)
    optimizer = get_symdist_optimizer(optimizer_config(how), chunks, recipe=recipe, **options)
    for _, parameter, _ in parameters(chunks, config):
        parameter.main_grad.normal_()
    planned = optimizer.trace_collectives()
    optimizer.prepare_grads()
    with CollectiveCounter() as wire:
        optimizer.joint_step.step()
    return (
        [(moved.kind, moved.size, moved.sent) for moved in planned.log],
        [(moved.kind, moved.size, moved.sent) for moved in wire.log],
    )
