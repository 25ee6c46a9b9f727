"""Every way a tensor can lie on a mesh, and what each rank then holds: written down apart from the library.

A layout is a list of cuts in the order in which they are made: `(mesh axis, tensor dimension)`. A cut is `torch.chunk`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

GRIDS = ((2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (2, 2, 2))


@dataclass(frozen=True)
class Way:
    """`cuts` in order; `mesh` the shape of the mesh."""

    mesh: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...] = ()

    def dims(self, tensor_dims: int) -> list[tuple[int, int]]:
        """The cuts of a tensor with so many dimensions: those of dimensions it lacks go to its last."""
        return [(axis, min(dim, tensor_dims - 1)) for axis, dim in self.cuts]

    def placements(self, tensor_dims: int) -> list[Placement]:
        """As DTensor says it: strided where an axis to the right cut the same dimension before."""
        found: list[Placement] = [Replicate() for _ in self.mesh]
        cuts = self.dims(tensor_dims)
        for i, (axis, dim) in enumerate(cuts):
            before = [other for other, cut in cuts[:i] if cut == dim and other > axis]
            factor = int(torch.tensor([self.mesh[other] for other in before]).prod()) if before else 1
            found[axis] = _StridedShard(dim, split_factor=factor) if factor > 1 else Shard(dim)
        return found

    def piece(self, tensor: Tensor, coordinate: tuple[int, ...]) -> Tensor:
        """What the rank at a coordinate holds."""
        for axis, dim in self.dims(tensor.dim()):
            size = -(-tensor.shape[dim] // self.mesh[axis])
            start = min(coordinate[axis] * size, tensor.shape[dim])
            tensor = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
        return tensor

    def place(self, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
        """The tensor, cut, as a DTensor on this rank."""
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        return DTensor.from_local(
            self.piece(tensor, tuple(coordinate)).contiguous().clone(),
            mesh,
            self.placements(tensor.dim()),
            shape=tensor.shape,
            stride=tensor.stride(),
            run_check=False,
        )

    def whole(self, pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The tensor from the pieces of all ranks; ranks that hold the same must agree bit for bit."""
        numbers = torch.arange(int(torch.tensor(shape).prod())).view(shape)
        found = torch.full((numbers.numel(),), torch.nan, dtype=pieces[0].dtype)
        for coordinate, piece in zip(torch.cartesian_prod(*map(torch.arange, self.mesh)), pieces, strict=True):
            at = self.piece(numbers, tuple(coordinate.reshape(-1).tolist())).reshape(-1)
            held, given = found[at], piece.reshape(-1)
            assert torch.equal(held[~held.isnan()], given[~held.isnan()]), "replicas differ"
            found[at] = given
        assert not found.isnan().any(), "a number that no rank holds"
        return found.view(shape)


WAYS = {
    **{f"shard0 on {world}": Way((world,), ((0, 0),)) for world in (1, 2, 3, 4, 6, 8)},
    "shard1 on 3": Way((3,), ((0, 1),)),
    "shard1 on 8": Way((8,), ((0, 1),)),
    "replicated on 3": Way((3,)),
    "hsdp on 2 x 2": Way((2, 2), ((1, 0),)),
    "hsdp on 2 x 3": Way((2, 3), ((1, 0),)),
    "hsdp, outer axis cut, on 3 x 2": Way((3, 2), ((0, 1),)),
    "fsdp over column-wise tp on 2 x 2": Way((2, 2), ((1, 0), (0, 0))),
    "fsdp over column-wise tp on 4 x 2": Way((4, 2), ((1, 0), (0, 0))),
    "fsdp over row-wise tp on 2 x 2": Way((2, 2), ((1, 1), (0, 0))),
    "fsdp over row-wise tp on 2 x 3": Way((2, 3), ((1, 1), (0, 0))),
    "fsdp shard1 over expert parallel on 2 x 4": Way((2, 4), ((1, 0), (0, 1))),
    "left to right on 3 x 2": Way((3, 2), ((0, 0), (1, 0))),
    "hsdp over column-wise tp on 2 x 2 x 2": Way((2, 2, 2), ((2, 0), (1, 0))),
    "hsdp over row-wise tp on 2 x 2 x 2": Way((2, 2, 2), ((2, 1), (1, 0))),
    "fsdp over expert parallel and tp on 2 x 2 x 2": Way((2, 2, 2), ((1, 0), (2, 1), (0, 2))),
}
