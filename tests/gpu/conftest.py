"""What needs a card: `python -m pytest tests/gpu`, where there is one. Elsewhere all of it is skipped."""

from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda"
"""ROCm's cards have this name too."""


@pytest.fixture
def card() -> Iterator[torch.device]:
    """The card, in full float32, and without what a test left in its memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield torch.device(DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.cuda.empty_cache()
