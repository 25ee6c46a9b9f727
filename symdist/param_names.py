"""Parameter names, modules and classes without what wrappers add to them."""

from torch import nn

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


def is_wrapped(attribute: str, holder: nn.Module) -> bool:
    """Return whether a module's child is the module that it only wraps.

    Args:
        attribute: The attribute that holds the child.
        holder: The module.

    Returns:
        True for the attributes in `WRAPPERS`, and for `module` where the holder has no other child.
    """
    return attribute in WRAPPERS or (attribute == "module" and len(holder._modules) == 1)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that wrappers hold, or the module itself if it wraps none."""
    for attribute, child in module.named_children():
        if is_wrapped(attribute, module):
            return unwrapped(child)
    return module


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, before `fully_shard` or `replicate` made another of it."""
    classes = (kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed."))
    return next(classes).__name__
