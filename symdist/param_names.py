"""Names of parameters, whatever wrappers stand round the modules that hold them."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which torch.compile, FSDP and activation checkpointing keep the module that they wrap."""


def plain_name(name: str) -> str:
    """A name without what wrappers put into it: `module._orig_mod.layers.0.weight` is `layers.0.weight`.

    Wrappers stand anywhere; `module`, as DistributedDataParallel calls what it wraps, only at the front.
    """
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1 and words[0] == "module":
        words.pop(0)
    return ".".join(words)
