"""The processes as a mesh: replicas, shards, tensor parallelism."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["data_mesh", "make_mesh"]


def make_mesh(device_type: str, world_size: int, num_replicas: int, tensor_parallel_size: int) -> DeviceMesh:
    """The mesh of all processes. Those of one tensor-parallel group are neighbours, then those that share one model.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.
        world_size: Number of processes.
        num_replicas: Copies of the sharded model (HSDP); 1 for none besides the one.
        tensor_parallel_size: Processes that split layers between them.

    Returns:
        ``("data_parallel", "tensor_parallel")``, Lightning's names; with replicas
        ``("replicate", "shard", "tensor_parallel")``.

    Raises:
        ValueError: The sizes do not divide the number of processes.
    """
    for name, size in (("num_replicas", num_replicas), ("tensor_parallel_size", tensor_parallel_size)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive whole number.")
    together = num_replicas * tensor_parallel_size
    if world_size % together:
        raise ValueError(
            f"{world_size} processes cannot be divided into num_replicas={num_replicas} copies of the model with"
            f" tensor_parallel_size={tensor_parallel_size}: choose sizes whose product divides {world_size}."
        )
    shards = world_size // together
    if num_replicas == 1:
        return init_device_mesh(
            device_type, (shards, tensor_parallel_size), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
    sizes = (num_replicas, shards, tensor_parallel_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard", "tensor_parallel"))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What to shard parameters over: ``(shards,)`` or ``(replicas, shards)``."""
    names = mesh.mesh_dim_names or ()
    return mesh["replicate", "shard"] if "replicate" in names else mesh["data_parallel"]
