"""Measures how a Megatron model's experts are loaded, with the same metrics as the other jobs."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from symdist.diagnostics import RouterMonitor


class MegatronRouterMonitor(RouterMonitor):
    """A `RouterMonitor` for Megatron's routers, with rows for the MoE layers of all pipeline stages.

    Each rank adds the tokens that its own routers see (under tensor parallelism, its share of a sequence), and zeros
    for layers of other stages, so the sum over all ranks counts every token once.

    Args:
        model: This rank's part of the model.
        moe_layers: Whether each layer of the whole model has experts.
        experts: Number of experts per layer.
    """

    def __init__(self, model: nn.Module, *, moe_layers: tuple[bool, ...], experts: int):
        self._experts = experts
        self._rows = {layer: row for row, layer in enumerate(i for i, moe in enumerate(moe_layers) if moe)}
        self._device = next(model.parameters()).device
        super().__init__(nn.Identity())
        self.layers = len(self._rows)
        for module in model.modules():
            if isinstance(module, TopKRouter):
                self._watch(module)

    def summary(self, reduce: Callable[[Tensor], object] | None = None) -> dict[str, Any]:
        """See `RouterMonitor`; a rank whose stage has no router contributes zeros."""
        if self._totals is None and self.layers:
            self._totals = torch.zeros(self.layers, 2 * self._experts + 2, dtype=torch.float64, device=self._device)
        return super().summary(reduce)

    def accumulate(self) -> None:
        """Do nothing: one call of the pipeline schedule runs many forward passes, and each is added as it runs."""

    def _watch(self, router: Any) -> None:
        row, routing = self._rows[router.layer_number - 1], router.routing

        def watched(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            probabilities, chosen = routing(logits, *args, **kwargs)
            self._add(row, logits.detach().reshape(-1, self._experts), chosen)
            return probabilities, chosen

        # Wraps the method, since a hook on the router would not see its logits.
        router.routing = watched

    @torch.no_grad()
    def _add(self, row: int, logits: Tensor, chosen: Tensor) -> None:
        logits = logits.float()
        z = logits.logsumexp(-1).square().sum(0, keepdim=True)
        counts = chosen.reshape(-1, self._experts).float().sum(0)
        sums = torch.cat([counts, logits.softmax(-1).sum(0), z, z.new_tensor([logits.shape[0]])])
        if self._totals is None:
            self._totals = torch.zeros(self.layers, sums.numel(), dtype=torch.float64, device=sums.device)
        self._totals[row] += sums
