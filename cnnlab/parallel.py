"""The device mesh: one axis, `data`, over which a batch is split; the state is on every device."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cnnlab.types import CnnlabError


def make_mesh(devices: int) -> Mesh:
    """A mesh of this many devices.

    Args:
        devices: how many; 0 takes all there are.

    Raises:
        CnnlabError: there are fewer.
    """
    available = jax.device_count()
    if devices > available:
        raise CnnlabError(
            f"parallel.devices: expected at most the {available} {jax.default_backend()} "
            f"device(s) there are, got {devices}; 0 takes all"
        )
    count = devices or available
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises a CnnlabError unless the devices divide the batch."""
    if batch_size % mesh.size:
        nearest = max(round(batch_size / mesh.size), 1) * mesh.size
        raise CnnlabError(
            f"{key}: expected a multiple of the {mesh.size} devices, got {batch_size}; "
            f"the nearest is {nearest}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return split_axis(mesh, 0)


def split_axis(mesh: Mesh, axis: int) -> NamedSharding:
    """This axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of this size lie on this process's devices, ascending; int32."""
    held = split_batch(mesh).addressable_devices_indices_map((size,))
    rows = [np.arange(size, dtype=np.int32)[index] for index in held.values() if index is not None]
    return np.unique(np.concatenate(rows))


def put(
    local: np.ndarray, sharding: NamedSharding, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """An array on the devices of a mesh, of one process or of several.

    Args:
        local: what this process has of it: all of it, or the rows of `local_rows`.
        sharding: how it lies on the devices.
        shape: of the whole array; that of `local` if `None`.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(local, sharding)
    return jax.make_array_from_process_local_data(sharding, local, shape or local.shape)
