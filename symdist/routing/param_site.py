"""What a parameter is used for, and how it is stored: what routing knows of it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Evidence: TypeAlias = Literal["class", "residual stream", "config", "name", "type"]
Fusion: TypeAlias = Literal["stacked", "interleaved", "unknown"]
Stream: TypeAlias = Literal["input", "output"]


@dataclass(frozen=True, kw_only=True)
class ParamSite:
    """What a parameter is used for, and how it is stored.

    Attributes:
        role: The role, such as "attention_q"; None for a weight that nothing explains.
        heads: The number of heads, if the matrix consists of heads one after another; else None.
        head_dim_index: The dimension of the stored matrix along which the heads lie: 0 for rows, 1 for columns.
        groups: The number of query groups, if a fused q, k and v consists of them one after another; else None.
        transposed: Whether the matrix is stored as `[in, out]` instead of `[out, in]`.
        fused: How gate and up projections share a tensor: "stacked" (all gates, then all ups, in each of the `blocks`)
            or "interleaved" (gates and ups alternate), or "unknown" if nothing tells. None if they do not.
        blocks: The number of blocks of a "stacked" tensor, each with the gates of some neurons and then their ups.
        latent: Whether the matrix projects to or from the latents of multi-head latent attention. Its input then counts
            as the residual stream.
        stream: Which side of the matrix `[out, in]` is the residual stream; None if neither is, or nothing tells.
        sections: The rows of each matrix of a weight `[out, in]` that holds several, in order; empty if it holds one.
        section_heads: The number of heads of each section; empty if they have none.
        evidence: What told the role: the class of a module, the residual stream, counts in the config, a name, or the
            type, which is all that is known of a linear layer that is just a matrix.
        likely: The roles to suggest to the user if `role` is None, likeliest first.
        doubt: If `role` is None: what is not known, for the error message; empty if nothing explains the weight.
    """

    role: str | None
    heads: int | None = None
    head_dim_index: int = 0
    groups: int | None = None
    transposed: bool = False
    fused: Fusion | None = None
    blocks: int = 1
    latent: bool = False
    stream: Stream | None = None
    sections: tuple[int, ...] = ()
    section_heads: tuple[int, ...] = ()
    evidence: Evidence = "name"
    likely: tuple[str, ...] = ("matrix", "other", "embedding")
    doubt: str = ""
