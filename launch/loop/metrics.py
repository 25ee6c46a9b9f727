"""Metrics a run logs besides loss and speed: update sizes by role, logits, memory, and model flops utilization."""

import resource
from typing import Any

import torch
from torch import Tensor

from launch.runtime.distributed import Ranks
from symdist.diagnostics import StepMonitor

# Peak dense bfloat16 Tflop/s of one GPU, from the vendors' data sheets. The key is a part of the name that
# torch.cuda.get_device_name returns; the first match counts, so longer names come first.
_PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A10G", 70.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("MI300X", 1307.4),
    ("MI325X", 1307.4),
    ("MI250X", 383.0),
)


class LogitMonitor:
    """Collects RMS and largest magnitude of the logits in a step's forward passes while `on` is true."""

    def __init__(self) -> None:
        self.on = False
        self._squares: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def see(self, logits: Tensor) -> None:
        """Add the logits of one forward pass, of any shape; does nothing while `on` is false."""
        if self.on and logits.numel():
            wide = torch.promote_types(logits.dtype, torch.float32)
            self._squares.append(torch.linalg.vector_norm(logits.detach(), dtype=wide).square())
            # Unlike logits.abs().max(), this makes no copy of the logits.
            self._largest.append(torch.linalg.vector_norm(logits.detach(), float("inf")).float())
            self._count += logits.numel()

    def take(self) -> tuple[float, float, int]:
        """Return sum of squares, largest magnitude and count of this rank's logits, and start over."""
        squares = float(torch.stack(self._squares).double().sum()) if self._squares else 0.0
        largest = float(torch.stack(self._largest).max()) if self._largest else 0.0
        count = self._count
        self._squares, self._largest, self._count = [], [], 0
        return squares, largest, count


class Measures:
    """Metrics of the steps for which it was armed.

    Args:
        ranks: The ranks of the run.
        optimizer: The SymDist optimizer; None if the run uses another one.
    """

    def __init__(self, ranks: Ranks, optimizer: Any | None):
        self._ranks = ranks
        self.logits = LogitMonitor()
        self._steps = None if optimizer is None else StepMonitor(optimizer)
        self._sent = None if optimizer is None else optimizer.trace_collectives().sent

    def arm(self) -> None:
        """Measure the step that begins now."""
        self.logits.on = True
        if self._steps is not None:
            self._steps.arm()

    def take(self) -> dict[str, float]:
        """Return the metrics of the armed step, the same on all ranks; all ranks must call it."""
        self.logits.on = False
        by_rank = self._ranks.gather((self.logits.take(), _peak_memory(self._ranks.device), self._sent))
        count = sum(logits[2] for logits, _, _ in by_rank)
        values: dict[str, float] = {}
        if count:
            values["logit_rms"] = (sum(logits[0] for logits, _, _ in by_rank) / count) ** 0.5
            values["logit_max"] = max(logits[1] for logits, _, _ in by_rank)
        values["memory_gb"] = max(memory for _, memory, _ in by_rank) / 1e9
        sent = [sent_bytes for _, _, sent_bytes in by_rank if sent_bytes is not None]
        if sent:
            values["sent_mb"] = max(sent) / 1e6
        return values if self._steps is None else values | self._steps.summary(self._ranks.gather)


def peak_flops(peak_tflops: float | None, device: torch.device, *, low: bool) -> float | None:
    """Return the peak floating-point operations per second of one rank.

    Args:
        peak_tflops: The peak in Tflop/s if the user gave it; None to look it up by the GPU's name.
        device: The rank's device.
        low: Whether the run computes in bfloat16; the built-in peaks are for bfloat16 only.

    Returns:
        The peak in flop/s, or None if it is neither given nor known.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda" or not low:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for gpu, tflops in _PEAK_TFLOPS if gpu in name), None)


def flops_per_token(model: Any, *, active: int, sequence: int) -> float:
    """Return the operations per token of forward and backward: `6·N + 12·L·H·Q·T` (PaLM, arXiv 2204.02311, app. B).

    N is `active` without the input embedding if that is separate from the head; L is the number of layers, H of heads
    and Q the size of a head. Attention counts all T tokens, although the mask is causal.

    Args:
        model: A transformers model, for its `config`.
        active: Number of parameters that a token uses.
        sequence: T, the tokens per sequence.
    """
    config = model.config
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * (active - embedding) + 12.0 * config.num_hidden_layers * heads * width * sequence


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory in bytes: allocated on the GPU, or the resident set of the process on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
