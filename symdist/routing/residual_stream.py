"""Which stage of the residual stream a matrix writes to or reads from."""

from dataclasses import dataclass

from symdist.param_names import plain_name

# Stored [out, in], the first have the residual stream as their input, the second as their output. An embedding's rows
# are written to it one by one, so its columns are the stream, as they are of what reads it.
READS_RESIDUAL = frozenset(
    (
        *("embedding", "tied_embedding", "head", "router"),
        *("attention_q", "attention_k", "attention_v", "attention_qkv"),
        *("mlp_gate", "mlp_up", "mlp_gate_up", "expert_gate", "expert_up", "expert_gate_up"),
    )
)
WRITES_RESIDUAL = frozenset(("attention_o", "mlp_down", "expert_down"))


@dataclass(frozen=True, kw_only=True)
class ResidualStage:
    """A stage of the residual stream: `number` counts the layers before it, None for the one after the last.

    `tower` is the stack of layers, None where a name does not tell it.
    """

    tower: str | None
    number: int | None


def residual_stage(name: str, role: str) -> ResidualStage:
    """Which stage a matrix writes to, or reads from.

    A layer's first number tells which it is: it reads from the stage before it and writes to the one after. An
    embedding writes to the first stage, a head reads from the last. Raises ValueError where that is not known.
    """
    if role in ("embedding", "tied_embedding"):
        return ResidualStage(tower=None, number=0)
    if role == "head":
        return ResidualStage(tower=None, number=None)
    words = plain_name(name).split(".")
    place = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    if place is None or role not in READS_RESIDUAL | WRITES_RESIDUAL:
        raise ValueError(
            f"{name} has role {role!r}: it is not known which stage of the residual stream it belongs to; "
            "share = 'matrix' needs to know none"
        )
    tower = ".".join(words[:place])
    return ResidualStage(tower=tower, number=int(words[place]) + (role in WRITES_RESIDUAL))
