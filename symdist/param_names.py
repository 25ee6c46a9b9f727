"""Parameter names without the parts that module wrappers add."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which torch.compile, FSDP and activation checkpointing keep the wrapped module."""


def plain_name(name: str) -> str:
    """Remove from a parameter name what wrappers add to it.

    Wrapper attributes are removed anywhere; `module`, which DistributedDataParallel adds, only at the front.

    Example:
        >>> plain_name("module._orig_mod.layers.0.weight")
        'layers.0.weight'
    """
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1 and words[0] == "module":
        words.pop(0)
    return ".".join(words)
