"""How a mixture-of-experts model spreads its tokens: auxiliary losses and load measures of its routers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# An expert that gets less than this share of an even load counts as dead.
_DEAD = 0.1


class RouterMonitor:
    """Watches the routers of an OLMoE, Qwen3-MoE, Mixtral or gpt-oss model of transformers by forward hooks.

    With E experts, k of them a token and N tokens, a layer has the load `f_i = count_i / (N·k)` and the mean
    router probability `p_i`, the softmax over all E experts averaged over the tokens.

    `losses` looks at the last forward. `accumulate` adds the last forward to running totals, from which
    `summary` takes its measures; call it once a forward. Under FSDP the monitor may be placed before or after
    `fully_shard`.

    Attributes:
        layers: number of routers found; 0 for a dense model, for which every method does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        # By name: the library does not import transformers, and FSDP2 only puts a prefix before a class name.
        routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self.layers = len(routers)
        # Per layer of the last forward: logits [N, E] with their graph, and the chosen experts [N, k].
        self._last: list[tuple[Tensor, Tensor] | None] = [None] * self.layers
        # Per layer a row of counts (E), sums of probabilities (E), sum of logsumexp² and number of tokens.
        self._totals: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            router.register_forward_hook(self._recorder(layer)) for layer, router in enumerate(routers)
        ]

    def losses(self) -> tuple[Tensor, Tensor]:
        """Auxiliary losses of the last forward, to be weighted and added to the loss before `backward`.

        Returns:
            Two scalars, each a mean over layers. Load balance `E·Σ f_i·p_i`: 1 when the load is even, E when
            every token surely goes to one expert; no gradient flows through f. And z, the mean over tokens of
            the squared logsumexp of the logits. Zeros for a dense model.

        Raises:
            RuntimeError: the model has not run since the monitor was placed.
        """
        if self.layers == 0:
            return torch.zeros(()), torch.zeros(())
        balances, zs = [], []
        for logits, chosen in self._captured():
            experts = logits.shape[-1]
            load = _counts(chosen, experts) / chosen.numel()
            balances.append(experts * (load * logits.softmax(-1, dtype=torch.float32).mean(0)).sum())
            zs.append(logits.float().logsumexp(-1).square().mean())
        return torch.stack(balances).mean(), torch.stack(zs).mean()

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the last forward to the running totals.

        Raises:
            RuntimeError: the model has not run since the monitor was placed.
        """
        if self.layers == 0:
            return
        rows = []
        for logits, chosen in self._captured():
            logits = logits.float()
            z = logits.logsumexp(-1).square().sum(0, keepdim=True)
            tokens = z.new_tensor([logits.shape[0]])
            rows.append(torch.cat([_counts(chosen, logits.shape[-1]), logits.softmax(-1).sum(0), z, tokens]))
        # Counts of many steps outgrow the integers float32 holds exactly.
        totals = torch.stack(rows).double()
        self._totals = totals if self._totals is None else self._totals + totals

    def summary(self, reduce: Callable[[Tensor], object] | None = None) -> dict[str, Any]:
        """Measures of everything accumulated since the start or the last `reset`.

        Args:
            reduce: adds a flat float64 tensor over the ranks that saw other tokens, in place, such as
                `torch.distributed.all_reduce`. The monitor's own totals stay those of this rank.

        Returns:
            `{"layers": {measure: one number a layer}, "mean": {measure: mean over layers}}`; `{}` for a dense
            model. Measures: `load_cv`, std(f) / mean(f), 0 when even; `load_entropy`, −Σ f ln f / ln E, 1
            when even; `dead`, share of experts with f < 0.1 / E; `top_load`, max f; `balance`, E·Σ f_i·p_i;
            `z`, mean squared logsumexp.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        if self.layers == 0:
            return {}
        if self._totals is None:
            raise RuntimeError("nothing accumulated: call accumulate() after a forward")
        totals = self._totals.clone()
        if reduce is not None:
            reduce(totals.view(-1))

        experts = (totals.shape[1] - 2) // 2
        counts, probabilities, z, tokens = totals.split([experts, experts, 1, 1], dim=1)
        load = counts / counts.sum(1, keepdim=True)
        measures = {
            "load_cv": load.std(1, unbiased=False) / load.mean(1),
            "load_entropy": torch.special.entr(load).sum(1) / math.log(experts),
            "dead": (load < _DEAD / experts).double().mean(1),
            "top_load": load.amax(1),
            "balance": experts * (load * probabilities / tokens).sum(1),
            "z": (z / tokens).squeeze(1),
        }
        return {
            "layers": {name: values.tolist() for name, values in measures.items()},
            "mean": {name: values.mean().item() for name, values in measures.items()},
        }

    def reset(self) -> None:
        """Forget what was accumulated; the last forward stays."""
        self._totals = None

    def close(self) -> None:
        """Remove the hooks and let go of the last forward's tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = [None] * self.layers

    def _recorder(self, layer: int) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], None]:
        def record(router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, _, chosen = outputs
            self._last[layer] = (logits, chosen)

        return record

    def _captured(self) -> list[tuple[Tensor, Tensor]]:
        captured = [pair for pair in self._last if pair is not None]
        if len(captured) < self.layers:
            raise RuntimeError("no router logits: run the model's forward after placing the monitor")
        return captured


def _counts(chosen: Tensor, experts: int) -> Tensor:
    """Tokens per expert, float32 [E], from the chosen experts [N, k]."""
    # Not bincount: on CUDA it waits for the device, since its length depends on the values.
    counts = torch.zeros(experts, device=chosen.device)
    return counts.index_add_(0, chosen.flatten(), torch.ones(chosen.numel(), device=chosen.device))
