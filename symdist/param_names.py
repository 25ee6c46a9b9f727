"""Parameter names without the components that module wrappers add."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""The attributes in which torch.compile, FSDP and activation checkpointing store the wrapped module."""


def plain_name(name: str) -> str:
    """Remove the components that wrappers add to a parameter name.

    The attributes in `WRAPPERS` are removed anywhere; `module`, which DistributedDataParallel adds, only at the front.

    Args:
        name: The name, as `model.named_parameters()` gives it.

    Returns:
        The name in the unwrapped model.

    Example:
        >>> plain_name("module._orig_mod.layers.0.weight")
        'layers.0.weight'
    """
    components = [component for component in name.split(".") if component not in WRAPPERS]
    while len(components) > 1 and components[0] == "module":
        components.pop(0)
    return ".".join(components)
