"""What ranks run for the test of tiny models: three steps of each under FSDP2, or in one process."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from symdist import build_optimizer
from tests.architectures.tiny import backward, tiny, tokens

STEPS = 3
RECIPE = "small-moe"


def together(mesh: DeviceMesh, model_type: str) -> tuple[list[float], dict[str, Tensor]]:
    """This rank's losses, on its share of the tokens, and the full weights in the end by name."""
    model = tiny(model_type)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, RECIPE)
    losses = []
    for step in range(STEPS):
        losses.append(backward(model, tokens(step, mesh.get_local_rank())))
        optimizer.step()
        optimizer.zero_grad()
    return losses, weights(model)


def alone(model_type: str, shares: int) -> tuple[list[list[float]], dict[str, Tensor], set[str]]:
    """The losses of each share, the weights in the end, and the names of those that never got a gradient."""
    model = tiny(model_type)
    optimizer = build_optimizer(model, RECIPE)
    losses: list[list[float]] = []
    without = {name for name, _ in model.named_parameters()}
    for step in range(STEPS):
        losses.append([backward(model, tokens(step, share)) for share in range(shares)])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad /= shares
                without -= {name} if parameter.grad.any() else set()
        optimizer.step()
        optimizer.zero_grad()
    return losses, weights(model), without


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in model.named_parameters()
    }


def _layers(model: nn.Module) -> list[nn.Module]:
    stacks = (module for name, module in model.named_modules() if name.rpartition(".")[2] in ("layers", "h"))
    return [*next(stacks).children()]
