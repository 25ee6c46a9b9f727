"""What a run logs of itself beside loss and speed: steps by role, logits, memory, and how much of the peak is used."""

import resource
from typing import Any

import torch
from torch import Tensor

from launch.runtime.distributed import Ranks
from symdist.diagnostics import StepMonitor

# Dense bfloat16 products of one GPU without sparsity, Tflop/s, from the makers' data sheets; by a part of the name that
# torch.cuda.get_device_name gives, more special ones first.
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
    """RMS and largest magnitude of the logits of a step's forwards, while it is `on`."""

    def __init__(self) -> None:
        self.on = False
        self._squares: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def see(self, logits: Tensor) -> None:
        """Add the logits of a forward, of any shape; nothing where it is off."""
        if self.on and logits.numel():
            wide = torch.promote_types(logits.dtype, torch.float32)
            self._squares.append(torch.linalg.vector_norm(logits.detach(), dtype=wide).square())
            # No copy of them, as their magnitudes would be.
            self._largest.append(torch.linalg.vector_norm(logits.detach(), float("inf")).float())
            self._count += logits.numel()

    def take(self) -> tuple[float, float, int]:
        """Sum of squares, largest magnitude and number of what this rank has seen, which is then forgotten."""
        squares = float(torch.stack(self._squares).double().sum()) if self._squares else 0.0
        largest = float(torch.stack(self._largest).max()) if self._largest else 0.0
        count = self._count
        self._squares, self._largest, self._count = [], [], 0
        return squares, largest, count


class Measures:
    """The measures of the steps it is armed for; `optimizer` is the SymDist at work, if one is."""

    def __init__(self, ranks: Ranks, optimizer: Any | None):
        self._ranks = ranks
        self.logits = LogitMonitor()
        self._steps = None if optimizer is None else StepMonitor(optimizer)
        self._sent = None if optimizer is None else optimizer.trace_collectives().sent

    def arm(self) -> None:
        """Measure the step that begins."""
        self.logits.on = True
        if self._steps is not None:
            self._steps.arm()

    def take(self) -> dict[str, float]:
        """What the step showed, the same on all ranks, which all must ask."""
        self.logits.on = False
        found = self._ranks.gather((self.logits.take(), _peak_memory(self._ranks.device), self._sent))
        count = sum(logits[2] for logits, _, _ in found)
        values: dict[str, float] = {}
        if count:
            values["logit_rms"] = (sum(logits[0] for logits, _, _ in found) / count) ** 0.5
            values["logit_max"] = max(logits[1] for logits, _, _ in found)
        values["memory_gb"] = max(memory for _, memory, _ in found) / 1e9
        sent = [each for _, _, each in found if each is not None]
        if sent:
            values["sent_mb"] = max(sent) / 1e6
        return values if self._steps is None else values | self._steps.summary(self._ranks.gather)


def peak_flops(given: float | None, device: torch.device, *, low: bool) -> float | None:
    """Operations a second of one rank at most: what was given in Tflop/s, or what is known of its GPU in bfloat16."""
    if given is not None:
        return given * 1e12
    if device.type != "cuda" or not low:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in name), None)


def flops_per_token(model: Any, *, active: int, sequence: int) -> float:
    """Of forward and backward: `6·N + 12·L·H·Q·T` (PaLM, arXiv 2204.02311, appendix B).

    N are the weights that a token multiplies, `active` less the embedding's rows; L layers have H heads of Q numbers,
    which look at T tokens, counted in full although the mask is causal.
    """
    config = model.config
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * (active - embedding) + 12.0 * config.num_hidden_layers * heads * width * sequence


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU what was allocated at most, of the host what the process held at most."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
