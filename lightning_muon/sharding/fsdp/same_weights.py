"""All ranks start from one rank's weights, as under DDP: a shard is a piece of the rank's own tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["broadcast_from_first"]


@torch.no_grad()
def broadcast_from_first(tensors: Iterable[Tensor], mesh: DeviceMesh, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite each tensor with that of the group's first rank. Every rank must call it with the same tensors.

    Args:
        tensors: Parameters and buffers, on the device that the ranks communicate from.
        mesh: The mesh of data parallelism. A DTensor is a different piece on each rank of tensor parallelism, so it
            comes from the first rank of this mesh, not from that of the group.
        group: The process group; ``None`` is the default one, the whole job.
    """
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            # along the shards first: the first row then holds the first rank's, and hands it to the other rows
            for dim in reversed(range(mesh.ndim)):
                _broadcast(tensor.to_local(), mesh.get_group(dim))
        else:
            _broadcast(tensor, group)


def _broadcast(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    dense = tensor.detach().contiguous()
    dist.broadcast(dense, group=group, group_src=0)
    if dense.data_ptr() != tensor.data_ptr():
        tensor.copy_(dense)
