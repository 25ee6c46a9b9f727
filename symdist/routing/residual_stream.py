"""Find which stage of the residual stream a matrix reads from or writes to."""

from dataclasses import dataclass

from symdist.param_names import plain_name

# Roles whose matrices, stored [out, in], take the residual stream as input (READS_RESIDUAL) or produce it as output
# (WRITES_RESIDUAL). An embedding writes its rows to the stream one at a time, so the stream is its column dimension.
# That is the same side as for the matrices that read the stream, so it is listed with them.
READS_RESIDUAL = frozenset(
    (
        *("embedding", "tied_embedding", "position_embedding", "head", "router", "gate", "mixer_in"),
        *("attention_q", "attention_k", "attention_v", "attention_qkv", "attention_gate"),
        *("mlp_gate", "mlp_up", "mlp_gate_up", "expert_gate", "expert_up", "expert_gate_up"),
    )
)
WRITES_RESIDUAL = frozenset(("attention_o", "mixer_out", "mlp_down", "expert_down"))


@dataclass(frozen=True, kw_only=True)
class ResidualStage:
    """A stage of the residual stream: what flows between two layers, before the first, or after the last.

    Attributes:
        tower: The name of the stack of layers; None for an embedding or head, whose name does not include it.
        number: The number of layers before the stage, None for the stage after the last layer.
    """

    tower: str | None
    number: int | None


def residual_stage(name: str, role: str) -> ResidualStage:
    """Return the stage of the residual stream that a matrix writes to or reads from.

    The first number in the name is taken as the number of the layer. A layer reads from the stage before it and writes
    to the stage after it; an embedding writes to the first stage, and a head reads from the last.

    Args:
        name: The parameter's name.
        role: The parameter's role.

    Returns:
        The stage.

    Raises:
        ValueError: If the name has no layer number, or the role neither reads from the stream nor writes to it.

    Example:
        >>> residual_stage("model.layers.3.mlp.down_proj.weight", "mlp_down")
        ResidualStage(tower='model.layers', number=4)
    """
    if role in ("embedding", "tied_embedding", "position_embedding"):
        return ResidualStage(tower=None, number=0)
    if role == "head":
        return ResidualStage(tower=None, number=None)
    words = plain_name(name).split(".")
    position = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    if position is None or role not in READS_RESIDUAL | WRITES_RESIDUAL:
        raise ValueError(
            f"{name} (role {role!r}): its name and role do not show its stage of the residual stream, so it cannot "
            'share a rotation; set share = "matrix" for it, in its role\'s section or in a pattern'
        )
    tower = ".".join(words[:position])
    return ResidualStage(tower=tower, number=int(words[position]) + (role in WRITES_RESIDUAL))
