"""Expert parallelism: each rank of `ep` holds some experts; tokens are sent to their experts and back."""

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
    """Return the modules that hold the routed experts of a layer as stacked tensors.

    Args:
        model: The model.

    Returns:
        The modules, one per layer with experts.
    """
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def check_experts(model: PreTrainedModel, ep: int, *, even: bool) -> None:
    """Check that a model's experts can be split.

    Args:
        model: The model; it may be on the meta device.
        ep: The number of ranks to split the experts over.
        even: Whether every rank must get the same number of experts.

    Raises:
        ValueError: If the model has no stacked experts, or `even` is set and `ep` does not divide their number.
    """
    family, layers = model.config.model_type, stacked_experts(model)
    if not layers:
        raise ValueError(f"{family} has no stacked experts to split over ep={ep}: use a mesh without ep")
    for experts in layers:
        count = next(experts.parameters()).shape[0]
        if even and count % ep:
            raise ValueError(f"{family}: ep={ep} does not divide {count} experts: use an ep that does")


def split_experts(model: PreTrainedModel, ep: DeviceMesh, *, dtype: torch.dtype | None) -> None:
    """Split the experts of every layer over the ranks of `ep`, in place, and make the forward send tokens to them.

    All ranks of `ep` must call it, and run every forward and backward together. The gradient of an expert is the mean
    over the ranks of `ep` of the gradients of each rank's loss.

    Args:
        model: The model, with equal weights on all ranks.
        ep: The mesh of expert parallelism.
        dtype: The dtype in which the experts compute, if FSDP2 does not take care of it; None to leave it.
    """
    for experts in stacked_experts(model):
        cut_parameters(experts, ep)
        experts.forward = _Dispatch(experts, ep, dtype)


class _Dispatch:
    """The forward of a layer's experts: sends tokens to the ranks of their experts, and adds up the results.

    The experts' own forward runs on the tokens that arrive, as if each had chosen one expert with weight 1; the routing
    weights are applied at the sender. This works with any implementation of transformers and with different numbers of
    tokens per rank.
    """

    def __init__(self, experts: nn.Module, ep: DeviceMesh, dtype: torch.dtype | None):
        self.experts, self.ep, self.dtype = experts, ep, dtype
        self.compute = type(experts).forward

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, k = chosen.shape
        held = self._held()
        experts_per_rank = next(iter(held.values())).shape[0]
        group = self.ep.get_group()
        expert_of, order = chosen.flatten().sort(stable=True)
        # The number of this rank's tokens for every expert, and the number of every rank's tokens for the experts here.
        send_counts_by_expert = torch.zeros(experts_per_rank * self.ep.size(), dtype=torch.long, device=hidden.device)
        send_counts_by_expert.scatter_add_(0, expert_of, torch.ones_like(expert_of))
        receive_counts_by_expert = torch.empty_like(send_counts_by_expert)
        dist.all_to_all_single(receive_counts_by_expert, send_counts_by_expert, group=group)
        send_counts, receive_counts = (
            counts.view(-1, experts_per_rank).sum(1).tolist()
            for counts in (send_counts_by_expert, receive_counts_by_expert)
        )
        ids = (
            torch.arange(experts_per_rank, device=hidden.device)
            .repeat(self.ep.size())
            .repeat_interleave(receive_counts_by_expert)
        )

        arrived = _Exchanged.apply(hidden[order // k], send_counts, receive_counts, group)
        results = _Exchanged.apply(self._run(held, arrived, ids), receive_counts, send_counts, group)
        weighted = results * weights.flatten()[order, None]
        return torch.empty_like(weighted).index_copy(0, order, weighted).view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _held(self) -> dict[str, Tensor]:
        """Return the expert tensors of this rank, in the dtype in which they compute."""
        held = {key: cast(DTensor, value).to_local() for key, value in self.experts.named_parameters(recurse=False)}
        return {key: value if self.dtype is None else value.to(self.dtype) for key, value in held.items()}

    def _run(self, held: dict[str, Tensor], arrived: Tensor, ids: Tensor) -> Tensor:
        count = len(ids)
        if count == 0:
            # FSDP reduces gradients on all ranks together, so experts without any token need zero gradients.
            arrived, ids = torch.cat([arrived, arrived.new_zeros(1, arrived.shape[1])]), ids.new_zeros(1)
        # Tokens of all ranks of `ep` are here, and each rank has its own loss. The experts need the mean of the losses'
        # gradients, the tokens the gradient of their own loss. So the backward divides the gradient where it enters the
        # experts, and multiplies it again where it leaves them.
        arrived = _Scaled.apply(arrived, self.ep.size())
        stand_in = StandIn(self.experts, {**held, "num_experts": next(iter(held.values())).shape[0]})
        results = self.compute(stand_in, arrived, ids[:, None], arrived.new_ones(len(ids), 1))
        return _Scaled.apply(results, 1 / self.ep.size())[:count]


class _Exchanged(torch.autograd.Function):
    """Sends rows to the ranks of a group, a given number to each; the backward sends the gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.route = send_counts, receive_counts, group
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        send_counts, receive_counts, group = ctx.route
        return _Exchanged.apply(gradient, receive_counts, send_counts, group), None, None, None


class _Scaled(torch.autograd.Function):
    """The identity, with the gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None
