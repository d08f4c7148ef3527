"""How several runs of one program are trained: side by side in one update, or one after another.

| strategy | an update of all runs is |
|---|---|
| `sequential` | no such thing: the runs are trained one after another, each to its end |
| `vmap` | the update over a leading axis |
| `map` | a compiled loop over the runs |
| `unrolled` | the runs' updates one after another in one program, which XLA may interleave |
| `devices` | one run, or as many for each, on each device or equal group of devices |

All but `sequential` equal the solo runs up to float rounding; `sequential` is them, to the bit.
Which is fastest depends on the network, the number of runs and the machine, so `measure` times the
very program.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnlab import backend, parallel
from cnnlab.pipeline import Fed
from cnnlab.types import CnnlabError, Hyper, PyTree, TrainState

SEQUENTIAL = "sequential"
STRATEGIES = (SEQUENTIAL, "vmap", "map", "unrolled", "devices")
AUTO = "auto"

UPDATES = 5
"""Timed updates of each strategy, after one that compiles."""

Step = Callable[[TrainState, Fed, jax.Array, Hyper], tuple[TrainState, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Together:
    """The update of several runs at once.

    Attributes:
        step: as `Program.train_step`, every argument (of `Fed`, what tells the batches) and result
            with a leading axis. Donates the state.
        place: lays what has that axis where `step` wants it.
        spread: the same for what all runs share.
        member: (the runs' states, index) -> the state of one, where a solo run has it.
    """

    step: Callable[..., tuple[TrainState, jax.Array]]
    place: Callable[[PyTree], PyTree]
    spread: Callable[[Fed], Fed]
    member: Callable[[TrainState, int], TrainState]


def available(members: int, mesh: Mesh, *, sharded: bool) -> tuple[str, ...]:
    """The strategies that so many runs can be trained by.

    Args:
        members: how many.
        mesh: of one of them alone.
        sharded: whether its state lies in parts.
    """
    if sharded:  # for want of memory, so that there is none for two
        return (SEQUENTIAL,)
    fits = not parallel.several() and parallel.side_by_side(members, mesh).shape["replica"] > 1
    return tuple(name for name in STRATEGIES if name != "devices" or fits)


def check(strategy: str, members: int, mesh: Mesh, *, sharded: bool) -> None:
    """Raises a CnnlabError where so many runs can't be trained that way; see `available`."""
    fitting = available(members, mesh, sharded=sharded)
    if strategy in fitting:
        return
    if sharded:
        why = "parallel.state=sharded is for a run that fills the devices"
    else:
        why = "`devices` takes several devices of one process that can be shared equally"
    raise CnnlabError(
        f"--strategy {strategy}: expected one of {', '.join(fitting)} for {members} run(s) on "
        f"{mesh.size} of {jax.device_count()} device(s) each; {why}"
    )


def combine(strategy: str, members: int, step: Step, solo_mesh: Mesh) -> Together:
    """The update of several runs by one of `STRATEGIES`, `sequential` excepted.

    Args:
        strategy: which.
        members: how many runs.
        step: the update of one run; not compiled.
        solo_mesh: the devices of a run alone, on which its state is whole.
    """
    solo = parallel.replicated(solo_mesh)

    def of(fed: Fed, index: Any) -> Fed:
        if fed.indices is not None:
            return fed._replace(indices=fed.indices[index])
        return Fed(fed.images[index], fed.labels[index], None)

    def mapped(
        states: TrainState, fed: Fed, seeds: jax.Array, hypers: Hyper
    ) -> tuple[TrainState, jax.Array]:
        def one(index: jax.Array) -> tuple[TrainState, jax.Array]:
            state, seed, hyper = jax.tree.map(lambda x: x[index], (states, seeds, hypers))
            return step(state, of(fed, index), seed, hyper)

        return jax.lax.map(one, jnp.arange(len(seeds)))

    def unrolled(
        states: TrainState, fed: Fed, seeds: jax.Array, hypers: Hyper
    ) -> tuple[TrainState, jax.Array]:
        done = []
        for index in range(len(seeds)):
            state, seed, hyper = jax.tree.map(lambda x, i=index: x[i], (states, seeds, hypers))
            done.append(step(state, of(fed, index), seed, hyper))
        return jax.tree.map(lambda *x: jnp.stack(x), *done)

    def vectorised(
        states: TrainState, fed: Fed, seeds: jax.Array, hypers: Hyper
    ) -> tuple[TrainState, jax.Array]:
        axes: Any = Fed(None, None, 0) if fed.indices is not None else Fed(0, 0, None)  # type: ignore[arg-type]
        return jax.vmap(step, in_axes=(0, axes, 0, 0))(states, fed, seeds, hypers)

    if strategy != "devices":
        function = {"map": mapped, "unrolled": unrolled, "vmap": vectorised}[strategy]
        take = jax.jit(lambda states, i: jax.tree.map(lambda x: x[i], states), out_shardings=solo)
        return Together(
            backend.jit(function, often=True, donate_argnums=0, out_shardings=solo),
            place=lambda tree: tree,
            spread=lambda fed: fed,
            member=take,
        )
    mesh = parallel.side_by_side(members, solo_mesh)
    split, batches, everywhere = (
        NamedSharding(mesh, PartitionSpec(*axes))
        for axes in (("replica",), ("replica", "data"), ())
    )
    # Without groups there is nothing to partition: every device runs the solo update.
    axes = {"replica"} if mesh.shape["data"] > 1 else set(mesh.axis_names)

    def on_devices(
        states: TrainState, fed: Fed, seeds: jax.Array, hypers: Hyper
    ) -> tuple[TrainState, jax.Array]:
        shared, own = PartitionSpec(), PartitionSpec("replica")
        streamed = fed.indices is None
        feeds: Any = Fed(own, own, None) if streamed else Fed(shared, shared, own)  # type: ignore[arg-type]
        return jax.shard_map(
            unrolled,
            mesh=mesh,
            in_specs=(own, feeds, own, own),
            out_specs=own,
            axis_names=axes,
            check_vma=False,
        )(states, fed, seeds, hypers)

    kept: dict[int, tuple[Any, Any, jax.Array, jax.Array]] = {}

    def spread(fed: Fed) -> Fed:
        if fed.indices is None:
            images, labels = jax.device_put((fed.images, fed.labels), batches)
            return Fed(images, labels, None)
        key = id(fed.images)
        if key not in kept:  # a split is sent to all devices once; what it came from is held
            copies = jax.device_put((fed.images, fed.labels), everywhere)
            kept.clear()
            kept[key] = (fed.images, fed.labels, *copies)
        _, _, images, labels = kept[key]
        return Fed(images, labels, np.asarray(fed.indices))

    return Together(
        backend.jit(on_devices, often=True, donate_argnums=0, out_shardings=split),
        place=lambda tree: jax.device_put(tree, split),
        spread=spread,
        member=lambda states, index: jax.device_put(jax.tree.map(lambda x: x[index], states), solo),
    )


def measure(
    update: Callable[..., tuple[TrainState, jax.Array]], state: TrainState, rest: Sequence[PyTree]
) -> float:
    """The median seconds of an update, of `UPDATES` after one that compiles.

    Args:
        update: takes the state, which it donates, and the rest.
        state: stays as it is.
        rest: what else it takes.
    """
    state, seconds = jax.tree.map(jnp.copy, state), list[float]()
    for _ in range(UPDATES + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, *rest))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def fastest(figures: dict[str, float | str]) -> str:
    """The strategy of the least seconds a run and update; those without a number do not count."""
    timed = {name: value for name, value in figures.items() if isinstance(value, float)}
    return min(timed, key=lambda name: timed[name])


def chosen_before(notes: Sequence[str]) -> str:
    """What runs that go on were trained by so far, if they agree; else nothing."""
    names = set(notes) - {""}
    return names.pop() if len(names) == 1 else ""
