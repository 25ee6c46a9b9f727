"""Expert parallelism: each rank of `ep` holds some experts, and tokens travel to theirs and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from symdist.tools.models.pieces import cut_parameters
from symdist.tools.models.stand_in import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stacked_experts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold a layer's routed experts as stacked tensors."""
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def check_experts(model: PreTrainedModel, ep: int, *, even: bool) -> None:
    """Raise ValueError where there are no stacked experts or, to be `even`, where `ep` does not divide them."""
    family, layers = model.config.model_type, stacked_experts(model)
    if not layers:
        raise ValueError(f"{family} has no stacked experts to split over ep={ep}: use a mesh without ep")
    for experts in layers:
        count = next(experts.parameters()).shape[0]
        if even and count % ep:
            raise ValueError(f"{family}: ep={ep} does not divide {count} experts: use an ep that does")


def split_experts(model: PreTrainedModel, ep: DeviceMesh, *, dtype: torch.dtype | None) -> None:
    """Give each rank of `ep` its run of every layer's experts, in place, and let the forward send tokens to them.

    The gradient of an expert comes out as the mean over the ranks of `ep` of what each rank's loss gives. `dtype` is
    what the experts compute in, where FSDP2 does not see to that.
    """
    for experts in stacked_experts(model):
        cut_parameters(experts, ep)
        experts.forward = _Dispatch(experts, ep, dtype)


class _Dispatch:
    """The forward of a layer's experts: tokens go to the ranks of their experts, and what comes back is summed.

    The experts' own forward runs on what arrives as on any tokens, each with one expert of weight 1; the routers'
    weights stay at home. So any implementation of transformers serves, and ranks may have unequal numbers of tokens.
    """

    def __init__(self, experts: nn.Module, ep: DeviceMesh, dtype: torch.dtype | None):
        self.experts, self.ep, self.dtype = experts, ep, dtype
        self.compute = type(experts).forward

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, k = chosen.shape
        held = self._held()
        here = next(iter(held.values())).shape[0]
        group = self.ep.get_group()
        expert_of, order = chosen.flatten().sort(stable=True)
        # How many of this rank's tokens every expert gets, and how many of each rank's tokens the experts here get.
        leaving = torch.zeros(here * self.ep.size(), dtype=torch.long, device=hidden.device)
        leaving.scatter_add_(0, expert_of, torch.ones_like(expert_of))
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving, group=group)
        there, back = (counts.view(-1, here).sum(1).tolist() for counts in (leaving, coming))
        ids = torch.arange(here, device=hidden.device).repeat(self.ep.size()).repeat_interleave(coming)

        arrived = _Exchanged.apply(hidden[order // k], there, back, group)
        done = _Exchanged.apply(self._run(held, arrived, ids), back, there, group)
        weighted = done * weights.flatten()[order, None]
        return torch.empty_like(weighted).index_copy(0, order, weighted).view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _held(self) -> dict[str, Tensor]:
        """The experts' tensors here, in what they compute in."""
        held = {key: cast(DTensor, value).to_local() for key, value in self.experts.named_parameters(recurse=False)}
        return {key: value if self.dtype is None else value.to(self.dtype) for key, value in held.items()}

    def _run(self, held: dict[str, Tensor], arrived: Tensor, ids: Tensor) -> Tensor:
        count = len(ids)
        if count == 0:
            # FSDP reduces gradients together on all ranks, so experts without a token need theirs: zeros.
            arrived, ids = torch.cat([arrived, arrived.new_zeros(1, arrived.shape[1])]), ids.new_zeros(1)
        # The tokens of all ranks of `ep` are here, and each rank's loss is a mean over its own: their gradients are to
        # be averaged for the experts, and go home as they are.
        arrived = _Scaled.apply(arrived, self.ep.size())
        stand_in = StandIn(self.experts, {**held, "num_experts": next(iter(held.values())).shape[0]})
        done = self.compute(stand_in, arrived, ids[:, None], arrived.new_ones(len(ids), 1))
        return _Scaled.apply(done, 1 / self.ep.size())[:count]


class _Exchanged(torch.autograd.Function):
    """Rows sent to the ranks of a group, so many to each, and those received; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: list[int], back: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.route = there, back, group
        received = rows.new_empty(sum(back), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), back, there, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        there, back, group = ctx.route
        return _Exchanged.apply(gradient, back, there, group), None, None, None


class _Scaled(torch.autograd.Function):
    """The same values, with the gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None
