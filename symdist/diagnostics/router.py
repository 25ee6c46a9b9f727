"""Measures how a mixture-of-experts model distributes its tokens: auxiliary losses and router load statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from symdist.diagnostics.router_calls import router_calls

# An expert whose load is below this fraction of an even load counts as dead.
_DEAD = 0.1


class RouterMonitor:
    """Observes the routers of a model: every module with a weight that routing gives the role "router".

    With E experts, k of them chosen per token, and N tokens, a layer has the load `f_i = count_i / (N·k)` and the mean
    router probability `p_i`: the softmax of the logits over all E experts, averaged over the tokens. The logits are the
    product of the router's weight with the tokens, plus its bias if it has one. It is the same for routers that go on
    with a sigmoid, a correction or a table. The chosen experts are those that the router chose, by these or without.

    A router that runs several times in a forward is measured by its last run.

    `losses` uses the last forward. `accumulate` adds the last forward to running totals, so call it once per forward;
    `summary` computes statistics of these totals. Under FSDP the monitor can be created before or after `fully_shard`.

    Args:
        model: The model.

    Attributes:
        layers: The number of routers in the model, in the order of the model. It is 0 for a dense model, for which all
            methods do nothing.

    Example:
        >>> monitor = symdist.diagnostics.RouterMonitor(model)
        >>> loss = model(input_ids=tokens, labels=tokens).loss
        >>> balance, z = monitor.losses()
        >>> (loss + 0.01 * balance + 0.001 * z).backward()
        >>> monitor.accumulate()
        >>> monitor.summary()["mean"]["load_cv"]
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = router_calls(model)
        self.layers = len(self._routers)
        # Per layer, a row of: counts (E), sums of probabilities (E), sum of logsumexp², number of tokens. Where layers
        # have different numbers of experts, both E are filled up to the largest with zeros.
        self._totals: Tensor | None = None
        self._sizes: list[int] = []

    def losses(self) -> tuple[Tensor, Tensor]:
        """Return the auxiliary losses of the last forward on this rank.

        Multiply them by weights of your choice and add them to the loss before `backward`.

        Returns:
            Two scalars, each the mean over the layers; zeros for a dense model. The first is the load-balance loss `E·Σ
            f_i·p_i`: 1 if the load is even, E if every token goes to the same expert with certainty; no gradient flows
            through f. The second is the z-loss: the squared logsumexp of the logits, averaged over the tokens.

        Raises:
            RuntimeError: If the model has not run since the monitor was created.
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
        """Add the last forward to the running totals. Call it once per forward.

        Raises:
            RuntimeError: If the model has not run since the monitor was created.
        """
        if self.layers == 0:
            return
        captured, rows = self._captured(), []
        self._sizes = [logits.shape[-1] for logits, _ in captured]
        for logits, chosen in captured:
            logits = logits.float()
            z = logits.logsumexp(-1).square().sum(0, keepdim=True)
            tokens = z.new_tensor([logits.shape[0]])
            per_expert = torch.stack([_counts(chosen, logits.shape[-1]), logits.softmax(-1).sum(0)])
            filled = functional.pad(per_expert, (0, max(self._sizes) - logits.shape[-1]))
            rows.append(torch.cat([*filled, z, tokens]))
        # float64, since counts of many steps exceed the integers that float32 represents exactly.
        totals = torch.stack(rows).double()
        self._totals = totals if self._totals is None else self._totals + totals

    def summary(self, reduce: Callable[[Tensor], object] | None = None) -> dict[str, Any]:
        """Return statistics of all forwards accumulated since the start or the last `reset`.

        Args:
            reduce: A function that sums a flat float64 tensor in place over the ranks that saw different tokens, such
                as `torch.distributed.all_reduce`; these ranks must then all call `summary`. The monitor's own totals
                stay those of this rank. None (default) for the statistics of this rank's tokens.

        Returns:
            `{"layers": {statistic: one number per layer}, "mean": {statistic: mean over the layers}}`; `{}` for a dense
            model.

            - `load_cv`: std(f) / mean(f); 0 if the load is even.
            - `load_entropy`: −Σ f ln f / ln E; 1 if the load is even.
            - `dead`: share of experts with f < 0.1 / E.
            - `top_load`: max f.
            - `balance`: E·Σ f_i·p_i.
            - `z`: mean squared logsumexp of the logits.

        Raises:
            RuntimeError: If nothing was accumulated.
        """
        if self.layers == 0:
            return {}
        if self._totals is None:
            raise RuntimeError("RouterMonitor has accumulated nothing yet: call accumulate() after a forward")
        totals = self._totals.clone()
        if reduce is not None:
            reduce(totals.view(-1))

        largest = (totals.shape[1] - 2) // 2
        layers = []
        for experts, row in zip(self._sizes or [largest] * len(totals), totals, strict=True):
            counts, probabilities, z, tokens = row[:experts], row[largest : largest + experts], row[-2], row[-1]
            load = counts / counts.sum()
            layers.append(
                {
                    "load_cv": load.std(unbiased=False) / load.mean(),
                    "load_entropy": torch.special.entr(load).sum() / math.log(experts),
                    "dead": (load < _DEAD / experts).double().mean(),
                    "top_load": load.max(),
                    "balance": experts * (load * probabilities / tokens).sum(),
                    "z": z / tokens,
                }
            )
        measures = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return {
            "layers": {name: values.tolist() for name, values in measures.items()},
            "mean": {name: values.mean().item() for name, values in measures.items()},
        }

    def reset(self) -> None:
        """Clear the running totals. The last forward is kept."""
        self._totals = None

    def close(self) -> None:
        """Remove the hooks and release the tensors of the last forward."""
        for router in self._routers:
            router.close()

    def _captured(self) -> list[tuple[Tensor, Tensor]]:
        captured = []
        for router in self._routers:
            if router.last is None:
                raise RuntimeError(f"RouterMonitor cannot measure router {router.name}: {router.problem}")
            captured.append(router.last)
        return captured


def _counts(chosen: Tensor, experts: int) -> Tensor:
    """Return the number of tokens per expert, `[E]` in float32, from the chosen experts `[N, k]`."""
    # Not bincount: on CUDA it waits for the device, since the length of its result depends on the values.
    counts = torch.zeros(experts, device=chosen.device)
    return counts.index_add_(0, chosen.flatten(), torch.ones(chosen.numel(), device=chosen.device))
