"""Fast adaptive boundary attack: the smallest perturbation that misleads, by projections.

Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
algorithm 1. Each step goes to the boundary of the linearised classifier, a little beyond it, and is
drawn towards the clean image; whenever it misleads, it goes back part of the way.

The defaults are those of the ensemble (`autoattack`).
"""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _losses, _search, _verdicts
from cnnlab.registry import Range

VARIANTS: dict[str, dict] = {"fab": {"targeted": False}, "fab_t": {"targeted": True}}

_BEYOND = 1.001
_NEWTON = 40  # far more than it takes: the steps end when all examples are there


def perturb(
    key: jax.Array,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *,
    eps: Annotated[float | jax.Array, Range(0)],
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targeted: bool = True,
    targets: int = 9,
    alpha_max: Annotated[float | jax.Array, Range(0, 1)] = 0.1,
    eta: Annotated[float | jax.Array, Range(1)] = 1.05,
    beta: Annotated[float | jax.Array, Range(0, 1)] = 0.9,
) -> jax.Array:
    """The nearest misclassified images that were found, where they are in the ball.

    Args:
        key: one key, or one an example, [B]; used by restarts only.
        logits_fn: pixels [B, H, W, C] in [0, 1] to logits [B, K].
        images: [B, H, W, C] in [0, 1].
        labels: [B] int32.
        eps: the ball's radius; may be traced. Restarts begin within half of it.
        norm: `"linf"`, `"l2"` or `"l1"`: the norm that is made small.
        steps: of each round.
        restarts: rounds, the first from the clean image; for each target.
        targeted: towards one class at a time, the `targets` most likely other ones, instead of the
            nearest one at each step, whose search takes a gradient for each class.
        targets: how many; no more than there are other classes.
        alpha_max: the most that a step is drawn towards the clean image.
        eta: how far it goes; 1 is to the linear boundary.
        beta: the part of its perturbation that an adversarial example keeps.

    Returns:
        [B, H, W, C] float32; the images themselves where the model is wrong already, and where
        nothing was found in the ball.

    Raises:
        CnnlabError: unknown norm, or a count below 1.
    """
    own = search(
        logits_fn,
        classes=_search.classes(logits_fn, images),
        eps=eps,
        norm=norm,
        steps=steps,
        restarts=restarts,
        targeted=targeted,
        targets=targets,
        alpha_max=alpha_max,
        eta=eta,
        beta=beta,
    )
    return _search.run(own, key, logits_fn, images, labels)


class _State(NamedTuple):
    """All [B, ...]; `best` is the nearest misclassified image, `sure` if by more than rounding."""

    keys: jax.Array
    clean: jax.Array
    labels: jax.Array
    targets: jax.Array
    images: jax.Array
    best: jax.Array
    distance: jax.Array
    sure: jax.Array


def search(
    logits_fn: LogitsFn,
    *,
    classes: int,
    eps: float | jax.Array,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targeted: bool = True,
    targets: int = 9,
    alpha_max: float | jax.Array = 0.1,
    eta: float | jax.Array = 1.05,
    beta: float | jax.Array = 0.9,
) -> _search.Search:
    """The attack as a `Search`; arguments as those of `perturb`."""
    _balls.check_norm(norm)
    _search.check_counts(steps=steps, restarts=restarts, targets=targets)
    plane = _towards if targeted else _nearest

    def start(keys: jax.Array, images: jax.Array, labels: jax.Array, number: jax.Array) -> _State:
        goals = labels
        if targeted:
            goals = _losses.ranked_class(logits_fn(images), 1 + number // restarts)
        first = images
        if restarts > 1:
            some = _balls.random_start(keys, images, 0.5 * eps, norm)
            first = jnp.where(number % restarts == 0, images, some)
        far = jnp.full(len(images), jnp.inf)
        return _State(keys, images, labels, goals, first, images, far, far < 0)

    def step(state: _State, index: jax.Array) -> _State:
        x, clean = state.images, state.clean
        value, normal = plane(logits_fn, state, norm)
        # Both stand on the same hyperplane, so the clean image's value follows from that of x.
        clean_value = value + _balls.total(normal * (clean - x))
        own = to_plane(x, normal, -value, norm)
        of_clean = to_plane(clean, normal, -clean_value, norm)
        length = jnp.maximum(_balls.length(own, norm), 1e-8)
        clean_length = jnp.maximum(_balls.length(of_clean, norm), 1e-8)
        alpha = _balls.per_example(jnp.minimum(length / (length + clean_length), alpha_max))
        moved = (1 - alpha) * (x + eta * own) + alpha * (clean + eta * of_clean)
        x = jnp.clip(moved, 0, 1)

        logits = logits_fn(x)
        beyond = _losses.wrong(logits, state.labels)
        distance = _balls.distance(x, clean, norm)
        nearer = beyond & (distance < state.distance)
        return state._replace(
            images=jnp.where(_balls.per_example(beyond), clean + beta * (x - clean), x),
            best=jnp.where(_balls.per_example(nearer), x, state.best),
            distance=jnp.where(nearer, distance, state.distance),
            sure=jnp.where(nearer, _verdicts.fooled(logits, state.labels), state.sure),
        )

    def outcome(state: _State) -> tuple[jax.Array, jax.Array]:
        inside = state.distance <= _balls.radius(eps)
        unsure = inside & ~state.sure
        found = lax.cond(jnp.any(unsure), farther, lambda s: s.best, state)
        found = _balls.project(found, state.clean, eps, norm)  # what rounding has put outside
        return found, jnp.where(inside, _search.FALLEN, -jnp.inf)

    def farther(state: _State) -> jax.Array:
        """A little beyond what lies so near a boundary that other rounding may flip the verdict."""
        delta = _BEYOND * (state.best - state.clean)
        pushed = _balls.project(state.clean + delta, state.clean, eps, norm)
        better = ~state.sure & _verdicts.fooled(logits_fn(pushed), state.labels)
        return jnp.where(_balls.per_example(better), pushed, state.best)

    goals = min(targets, classes - 1) if targeted else 1
    return _search.Search(goals * restarts, steps, start, step, outcome)


def _towards(logits_fn: LogitsFn, state: _State, norm: str) -> tuple[jax.Array, jax.Array]:
    """The target's logit less the label's, [B], and its gradient."""

    def difference(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = _losses.difference(logits_fn(images), state.labels, state.targets)
        return jnp.sum(each), each

    normal, value = jax.grad(difference, has_aux=True)(state.images)
    return value, normal


def _nearest(logits_fn: LogitsFn, state: _State, norm: str) -> tuple[jax.Array, jax.Array]:
    """The same for the class whose linearised boundary is nearest (equation 4)."""
    logits, backward = jax.vjp(logits_fn, state.images)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    own = _losses.at(logits, state.labels)

    def compare(
        number: jax.Array, best: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        columns = jnp.arange(logits.shape[-1])[None]
        towards = (columns == number).astype(logits.dtype)
        away = (columns == state.labels[:, None]).astype(logits.dtype)
        (normal,) = backward(towards - away)
        value = jnp.take(logits, number, 1) - own
        far = jnp.abs(value) / (_balls.length(normal, dual) + 1e-12)
        nearer = (far < best[0]) & (number != state.labels)
        return (
            jnp.where(nearer, far, best[0]),
            jnp.where(nearer, value, best[1]),
            jnp.where(_balls.per_example(nearer), normal, best[2]),
        )

    none = (jnp.full(len(logits), jnp.inf), jnp.zeros(len(logits)), jnp.zeros_like(state.images))
    _, value, normal = lax.fori_loop(0, logits.shape[-1], compare, none)
    return value, normal


def to_plane(points: jax.Array, normal: jax.Array, rise: jax.Array, norm: str) -> jax.Array:
    """The smallest perturbation in the box that changes `normal . points` by `rise`.

    Section 3.1 and appendix A. With the box no single formula gives it, but each number moves in a
    known direction, by min(lambda speed, room) for Linf and L2, so only lambda is to be found, and
    what is gained is a concave function of it: Newton's steps from 0 end at it, never beyond. For
    L1 the numbers with the largest part in `normal` go as far as they can.

    Args:
        points: [B, H, W, C] in [0, 1].
        normal: [B, H, W, C].
        rise: [B].
        norm: `"linf"`, `"l2"` or `"l1"`.

    Returns:
        [B, H, W, C]; where the box does not allow so much, as far as it does.
    """
    towards = normal * _balls.per_example(jnp.sign(rise))
    room = jnp.where(towards > 0, 1 - points, jnp.where(towards < 0, points, 0))
    weight = jnp.abs(normal)
    find = _l1_amounts if norm == "l1" else functools.partial(_amounts, norm=norm)
    return jnp.sign(towards) * find(weight, room, jnp.abs(rise))


def _amounts(weight: jax.Array, room: jax.Array, gain: jax.Array, norm: str) -> jax.Array:
    speed = weight if norm == "l2" else jnp.ones_like(weight)

    def amounts(factor: jax.Array) -> jax.Array:
        return jnp.minimum(_balls.per_example(factor) * speed, room)

    def newton(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, factor, active = carry
        moving = _balls.per_example(factor) * speed < room
        missing = gain - _balls.total(weight * amounts(factor))
        slope = _balls.total(jnp.where(moving, weight * speed, 0))
        # Each example stops by itself, so the result does not depend on its neighbours.
        active &= (missing > 1e-6 * gain) & (slope > 0)
        return count + 1, jnp.where(active, factor + missing / slope, factor), active

    def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, _, active = carry
        return (count < _NEWTON) & jnp.any(active)

    none = jnp.zeros_like(gain)
    _, factor, _ = lax.while_loop(goes_on, newton, (jnp.int32(0), none, none == 0))
    return amounts(factor)


def _l1_amounts(weight: jax.Array, room: jax.Array, gain: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(weight, jnp.int32)  # ordered as the numbers are
    gains = weight * room

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # all from low on are enough, those from high on are not
        middle = low + (high - low) // 2
        enough = _balls.total(jnp.where(bits >= _balls.per_example(middle), gains, 0)) >= gain
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(len(weight), jnp.int32)
    high = jnp.full(len(weight), 0x7F800000, jnp.int32)  # infinity
    low, _ = lax.fori_loop(0, 31, halve, (low, high))
    edge = _balls.per_example(low)
    beyond = jnp.where(bits > edge, room, 0)
    at_edge = jnp.where(bits == edge, room, 0)
    missing = gain - _balls.total(weight * beyond)
    part = missing / jnp.maximum(_balls.total(weight * at_edge), _balls.TINY)
    return beyond + at_edge * _balls.per_example(jnp.clip(part, 0, 1))
