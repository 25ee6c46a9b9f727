"""How a model for tests is made and shared among ranks: said without Megatron, which only the ranks import."""

from dataclasses import dataclass

SEQUENCE = 16


@dataclass(frozen=True, kw_only=True)
class How:
    """A model and how its ranks share it."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    distributed: bool = False
    dtype: str = "float64"
    layers: int = 2
    hidden: int = 16
    heads: int = 8
    groups: int = 4
    kv_channels: int = 4
    ffn: int = 24
    experts: int = 4
    moe: tuple[int, ...] | None = None
    """Which layers are of experts: every other one, unless told."""
    grouped: bool = False
    shared: bool = False
    vocabulary: int = 40
    tied: bool = False
    bucket: int = 500
    layer_wise: bool = False
    kind: str = "gpt"
    """Of `kinds.SETTINGS`."""
    mtp: int = 0
    """Layers of multi-token prediction."""
    overlap: bool = False
    """Of gradient reduction and parameter gathering with computation."""
