"""The devices: one mesh, of one process or several.

Its axis `data` splits a batch; its axis `replica` has, on each part, runs of their own, which know
nothing of each other. A run's state is on every device of `data`, or lies in parts on them, each of
which then holds and updates its part alone; the parameters come together for a pass (Rajbhandari et
al. 2020, "ZeRO", section 5; Xu et al. 2020, "Automatic Cross-Replica Sharding of Weight Update").

Where several processes (one a machine, as a rule) train together, all run the same program; the
first alone writes and speaks, and whatever depends on files, signals or clocks is decided by it
(`from_first`) or by all (`anywhere`): processes that disagree on what to compute next wait for each
other for ever. What needs no training is cut into shares that each computes alone (`shared_out`).
"""

from __future__ import annotations

import contextvars
import functools
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cnnlab.types import CnnlabError, PyTree

TPU_HOSTS = "TPU_WORKER_HOSTNAMES"
"""The variable in which a TPU machine finds the names of all machines of its slice."""

_LEAVE_WITHIN = 60
"""Seconds that a process which ends waits for the others; after that they are ended, too."""

_WHOLE = 1024
"""Arrays of fewer numbers are never split: to send them costs more than to have them."""

_T = TypeVar("_T")
_deciding: contextvars.ContextVar[bool] = contextvars.ContextVar("deciding", default=False)


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    automatic: bool = False,
    timeout: int = 300,
) -> None:
    """Joins this process with those on other machines; does nothing where there is only one.

    Call it before anything else asks JAX for devices. By itself it finds the others on a TPU slice
    whose machines are told of each other.

    Args:
        coordinator: `HOST:PORT` of process 0, which listens there. Needs the next two.
        num_processes: how many there are.
        process_id: which this one is, 0 to `num_processes` - 1.
        automatic: let JAX find all three: on TPU slices, under Slurm and Open MPI.
        timeout: seconds to wait for the others.

    Raises:
        CnnlabError: the arguments do not fit, or the others can't be found or reached.
    """
    if coordinator is None and num_processes is None and process_id is None:
        if automatic or len(os.environ.get(TPU_HOSTS, "").split(",")) > 1:
            _initialize(timeout)
        return
    if coordinator is None or num_processes is None or process_id is None or automatic:
        raise CnnlabError(
            "several processes: expected --coordinator, --num-processes and --process-id together, "
            "or --distributed alone, which finds them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise CnnlabError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
    if num_processes < 1:
        raise CnnlabError(f"--num-processes: expected at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise CnnlabError(
            f"--process-id: expected 0 to {num_processes - 1} (--num-processes is "
            f"{num_processes}), got {process_id}"
        )
    if process_id:
        _await(host.strip("[]"), int(port), timeout)
    _initialize(timeout, coordinator, num_processes, process_id)


def _await(host: str, port: int, timeout: float) -> None:
    """Waits until somebody listens there: JAX would end a process that waits in vain by force."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise CnnlabError(
                    f"--coordinator: nobody answers at {host}:{port} ({error.strerror or error}) "
                    f"after {timeout:g} seconds; is process 0 started there, and the port open?"
                ) from None
        time.sleep(min(1.0, timeout))


def _initialize(
    timeout: int,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=_LEAVE_WITHIN,
        )
    except (RuntimeError, ValueError) as error:
        where = f"at {coordinator}" if coordinator else "by what Slurm, Open MPI or a TPU tells"
        raise CnnlabError(
            f"the processes did not find each other {where}: {str(error).strip()[:500]}. Start "
            "the same command on all machines; --coordinator, --num-processes and --process-id "
            "say who they are"
        ) from error


def several() -> bool:
    """Whether other processes train with this one; starts no device where there are none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not several() or jax.process_index() == 0


def from_first(decide: Callable[[], _T]) -> _T:
    """What the first process finds, for all; its error is raised in all. A barrier.

    Args:
        decide: called by the first process alone; gives plain JSON data. What it calls may itself
            use `from_first`.

    Raises:
        CnnlabError: in the other processes, if `decide` raised anything.
    """
    if not several() or _deciding.get():
        return decide()
    found: dict[str, object] = {}
    failed: Exception | None = None
    if is_first():
        token = _deciding.set(True)
        try:
            found = {"value": decide()}
        except Exception as error:  # raised again below, once the others know
            failed, found = error, {"error": str(error) or type(error).__name__}
        finally:
            _deciding.reset(token)
    content = json.dumps(found).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Few lengths, as each compiles anew.
    padded = np.zeros(1 << max(size - 1, 255).bit_length(), np.uint8)
    if is_first():
        padded[:size] = np.frombuffer(content, np.uint8)
    told = multihost_utils.broadcast_one_to_all(padded)[:size]
    if failed is not None:
        raise failed
    found = json.loads(told.astype(np.uint8).tobytes())
    if "error" in found:
        raise CnnlabError(f"process 0: {found['error']}")
    return found["value"]  # type: ignore[return-value]


def anywhere(mine: bool, *, ask: bool = True) -> bool:
    """Whether something is so in any process; of a single process, what is so here.

    Args:
        mine: whether it is so here.
        ask: whether to ask the others now, which waits for them; otherwise the answer is no. Must
            be equal in all.
    """
    if not several():
        return mine
    return ask and bool(multihost_utils.process_allgather(np.array(mine)).any())


def require_same(what: str, text: str) -> None:
    """Raises a CnnlabError in all processes where `text`, which describes `what`, differs."""
    if not several():
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    others = multihost_utils.process_allgather(digest)
    different = [i for i, other in enumerate(others) if not np.array_equal(other, others[0])]
    if different:
        raise CnnlabError(
            f"{what}: expected the same in all processes, got another than that of process 0 in "
            f"{', '.join(map(str, different))}; give all the same files and settings"
        )


def make_mesh(devices: int) -> Mesh:
    """A mesh of this many devices.

    Args:
        devices: how many; 0 takes all there are.

    Raises:
        CnnlabError: there are fewer, or they belong to several processes that were not joined or
            some of which would have none.
    """
    available = jax.device_count()
    if jax.process_count() > 1 and not several():
        raise CnnlabError(
            f"this machine is one of {jax.process_count()} of a slice: give --distributed, to the "
            "same command on all of them"
        )
    if several() and devices not in (0, available):
        raise CnnlabError(
            f"parallel.devices: expected 0 or all {available} of the {jax.process_count()} "
            f"processes, got {devices}; 0 takes all"
        )
    if devices > available:
        raise CnnlabError(
            f"parallel.devices: expected at most the {available} {jax.default_backend()} "
            f"device(s) there are, got {devices}; 0 takes all"
        )
    return _mesh(1, jax.devices()[: devices or available])


def side_by_side(runs: int, solo: Mesh) -> Mesh:
    """The mesh of as many replicas as can have equally many of these runs each.

    Args:
        runs: how many.
        solo: the mesh of one of them. Where it is one device, the replicas are of one device each,
            of all that this process has; else they share the devices of `solo` equally.
    """
    if solo.size == 1:
        available = jax.local_devices()
        count = max(n for n in range(1, len(available) + 1) if runs % n == 0)
        return _mesh(count, available[:count])
    return _mesh(math.gcd(runs, solo.size), list(solo.devices.flat))


def _mesh(replicas: int, devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(
        (replicas, len(devices) // replicas),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
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


def constrain(tree: PyTree, shardings: PyTree) -> PyTree:
    """The same arrays, laid on the devices so; for use in a compiled function.

    Args:
        tree: the arrays.
        shardings: one `NamedSharding` for all, or one for each. Where the caller is itself one
            replica of several, its own devices take the place of theirs.
    """
    here = jax.sharding.get_abstract_mesh()
    if not here.empty:
        shardings = jax.tree.map(lambda s: NamedSharding(here, s.spec), shardings)
    return jax.lax.with_sharding_constraint(tree, shardings)


def parts(tree: PyTree, mesh: Mesh) -> PyTree:
    """How arrays lie in parts: each split along its longest axis that the devices divide.

    The last of several such; an array that has none, or fewer than `_WHOLE` numbers, is whole
    everywhere.

    Args:
        tree: arrays, or their shapes.
        mesh: the devices.
    """
    count = mesh.shape["data"]

    def lie(x: jax.Array) -> NamedSharding:
        fitting = [(n, i) for i, n in enumerate(x.shape) if n % count == 0]
        if x.size < _WHOLE or not fitting:
            return replicated(mesh)
        return split_axis(mesh, max(fitting)[1])

    return jax.tree.map(lie, tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def whole(tree: PyTree) -> PyTree:
    """The same arrays, each of them on every device that it lies on in parts.

    Args:
        tree: arrays, outside of a compiled function.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    for sharding in (x.sharding for x in arrays if not x.is_fully_replicated):
        if isinstance(sharding, NamedSharding):
            return _gather(sharding.mesh)(tree)
    return tree


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array in this process's memory, wherever its parts are."""
    here = not isinstance(array, jax.Array) or array.is_fully_addressable
    return np.asarray(array if here else whole(array))


def own(mesh: Mesh) -> Mesh:
    """The devices for what each process computes by itself: those of the mesh that are its own."""
    return _mesh(1, jax.local_devices()) if several() else mesh


def on_own(tree: PyTree, mesh: Mesh) -> PyTree:
    """What is whole on every device, on the devices of `own(mesh)`."""
    if not several():
        return tree
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(own(mesh)))


def shared_out(
    compute: Callable[[int], dict[str, np.ndarray]], count: int
) -> list[dict[str, np.ndarray]]:
    """What `compute` gives for 0 to `count` - 1, each computed by one of the processes, for all.

    Args:
        compute: number -> arrays by name; of all numbers the same names, types and shapes.
        count: how many, at least 1.

    Raises:
        CnnlabError: in the others, where `compute` raised anything in one.
    """
    if not several():
        return [compute(number) for number in range(count)]
    processes, here = jax.process_count(), jax.process_index()
    mine, failed = list[dict[str, np.ndarray]](), None
    try:
        mine = [compute(number) for number in range(here, count, processes)]
    except Exception as error:  # raised again below, once the others know
        failed = error
    if anywhere(failed is not None):
        raise failed or CnnlabError("another process failed at its share; it says at what")
    kinds = from_first(lambda: {k: (str(a.dtype), a.shape) for k, a in mine[0].items()})
    found = [dict[str, np.ndarray]() for _ in range(count)]
    for name, (dtype, shape) in kinds.items():
        # As bytes, or JAX would round what has 64 bits.
        size = math.prod(shape) * np.dtype(dtype).itemsize
        sent = np.zeros((-(-count // processes), size), np.uint8)
        for row, arrays in zip(sent, mine, strict=False):
            row[:] = np.frombuffer(np.ascontiguousarray(arrays[name]).tobytes(), np.uint8)
        told = np.asarray(multihost_utils.process_allgather(sent))
        for number, arrays in enumerate(found):
            content = told[number % processes, number // processes].tobytes()
            arrays[name] = np.frombuffer(content, dtype).reshape(shape)
    return found


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
