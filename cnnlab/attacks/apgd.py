"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", section 3 and algorithm 1; for L1 Croce & Hein 2021, "Mind the box: l1-APGD
for sparse adversarial attacks on image classifiers", section 4 and algorithm 1.

The defaults are those of the ensemble (`autoattack`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnlab.attacks import LogitsFn, _balls, _losses, _search, _verdicts
from cnnlab.registry import Range, did_you_mean
from cnnlab.types import CnnlabError

VARIANTS: dict[str, dict] = {
    "apgd_ce": {"loss": "ce"},
    "apgd_dlr": {"loss": "dlr"},
    "apgd_t": {"loss": "targeted_dlr"},
}

LOSSES: dict[str, _losses.Loss] = {
    "ce": _losses.cross_entropy,
    "dlr": _losses.dlr,
    "targeted_dlr": _losses.targeted_dlr,
}

_SHRINKING = ((3.0, 0.3), (2.0, 0.3))
"""For L1: a ball of this many eps for this part of the steps; the rest is in the ball itself."""

_SPARSER = 1.5  # a step spreads over that many times fewer pixels than the perturbation has
_L1_FIRST_SHARE = 0.2


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
    loss: str = "ce",
    targets: int = 9,
    rho: Annotated[float, Range(0, 1)] = 0.75,
    draws: int = 1,
    shrinking: bool = False,
) -> jax.Array:
    """The images of highest loss in the ball; misclassified ones where there are any.

    Args:
        key: one key, or one an example, [B].
        logits_fn: pixels [B, H, W, C] in [0, 1] to logits [B, K]; with `draws` above 1 a function
            of pixels and a key.
        images: [B, H, W, C] in [0, 1].
        labels: [B] int32.
        eps: the ball's radius; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        steps: of each round.
        restarts: rounds from different random points; for each target.
        loss: `"ce"`, `"dlr"`, or `"targeted_dlr"`, which takes the `targets` most likely other
            classes in turn.
        targets: how many; no more than there are other classes.
        rho: the step is halved where fewer than this part of the steps since the last checkpoint
            raised the loss.
        draws: of a randomised model, averaged for each gradient (expectation over transformations).
        shrinking: starts in a ball of three times the radius (L1 only).

    Returns:
        [B, H, W, C] float32; the images themselves where the model is wrong already.

    Raises:
        CnnlabError: unknown norm or loss, too few classes for the loss, or a count below 1.
    """
    model = _search.model(logits_fn, draws)
    keys = _balls.example_keys(key, len(images))

    def judge(images: jax.Array) -> jax.Array:
        return model(images, keys[0])

    own = search(
        model,
        classes=_search.classes(judge, images),
        eps=eps,
        norm=norm,
        steps=steps,
        restarts=restarts,
        loss=loss,
        targets=targets,
        rho=rho,
        draws=draws,
        shrinking=shrinking,
    )
    return _search.run(own, keys, judge, images, labels)


class _State(NamedTuple):
    """All [B, ...]; `best` has the highest loss, `fooling` that among misclassified ones."""

    keys: jax.Array
    clean: jax.Array
    labels: jax.Array
    targets: jax.Array
    images: jax.Array
    before: jax.Array
    gradient: jax.Array
    loss: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    fooling: jax.Array
    fooling_loss: jax.Array
    step_size: jax.Array
    rises: jax.Array
    checked_loss: jax.Array
    checked_halved: jax.Array
    share: jax.Array
    nonzero: jax.Array


def search(
    model: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    classes: int,
    eps: float | jax.Array,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    targets: int = 9,
    rho: float | jax.Array = 0.75,
    draws: int = 1,
    shrinking: bool = False,
) -> _search.Search:
    """The attack as a `Search`.

    `model` is (pixels, key) -> logits [B, classes], one that is not randomised ignores the key; the
    other arguments are those of `perturb`.
    """
    _balls.check_norm(norm)
    _search.check_counts(steps=steps, restarts=restarts, targets=targets, draws=draws)
    if loss not in LOSSES:
        raise CnnlabError(
            f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}{did_you_mean(loss, LOSSES)}"
        )
    if shrinking and norm != "l1":
        raise CnnlabError(f"shrinking: only for norm 'l1', got norm {norm!r}")
    plan = _plan(steps, norm, shrinking)
    longest = 2.0 if norm != "l1" else 1.0

    def evaluate(state: _State, number: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The loss [B], whether the model is wrong [B], and the gradient."""

        def losses(images: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
            logits = model(images, key)
            each = LOSSES[loss](logits, state.labels, state.targets)
            return jnp.sum(each), (each, _verdicts.fooled(logits, state.labels))

        def draw(index: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            key = jax.random.fold_in(state.keys[0], number * draws + index)
            gradient, (each, wrong) = jax.grad(losses, has_aux=True)(state.images, key)
            return each, wrong, gradient

        def add(
            index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            each, wrong, gradient = draw(index)
            return sums[0] + each, wrong, sums[2] + gradient

        each, wrong, gradient = draw(0)
        if draws > 1:
            each, wrong, gradient = lax.fori_loop(1, draws, add, (each, wrong, gradient))
        return each / draws, wrong, gradient / draws

    def begin(state: _State, index: int | jax.Array, sparse: bool) -> _State:
        """A phase from `state.images`, which lie in its ball."""
        each, wrong, gradient = evaluate(state, index)
        nonzero = _nonzero(state.images, state.clean)
        pixels = math.prod(state.clean.shape[1:])
        radius = jnp.float32(eps) * _at(plan.radii, index)
        fooled = wrong & (_at(plan.radii, index) == 1)
        return state._replace(
            before=state.images,
            gradient=gradient,
            loss=each,
            best=state.images,
            best_gradient=gradient,
            best_loss=each,
            fooling=state.images,
            fooling_loss=jnp.where(fooled, each, -jnp.inf),
            step_size=jnp.full_like(each, longest * radius),
            rises=jnp.zeros_like(each),
            checked_loss=each,
            checked_halved=jnp.ones_like(wrong),
            share=nonzero / pixels / _SPARSER if sparse else jnp.full_like(each, _L1_FIRST_SHARE),
            nonzero=nonzero if sparse else jnp.full_like(each, pixels),
        )

    def start(keys: jax.Array, images: jax.Array, labels: jax.Array, number: jax.Array) -> _State:
        goals = labels
        if loss == "targeted_dlr":
            goals = _losses.ranked_class(model(images, keys[0]), 1 + number // restarts)
        first = _balls.random_start(keys, images, eps * float(plan.radii[0]), norm)
        none = jnp.zeros(len(images))
        blank = _State(
            keys=keys,
            clean=images,
            labels=labels,
            targets=goals,
            images=first,
            before=first,
            gradient=first,
            loss=none,
            best=first,
            best_gradient=first,
            best_loss=none,
            fooling=first,
            fooling_loss=none,
            step_size=none,
            rises=none,
            checked_loss=none,
            checked_halved=none > 0,
            share=none,
            nonzero=none,
        )
        return begin(blank, 0, shrinking)

    def step(state: _State, index: jax.Array) -> _State:
        if shrinking:
            state = lax.cond(_at(plan.begins, index), lambda s: enter(s, index), lambda s: s, state)
        radius = eps * _at(plan.radii, index)
        moved = _moved(state, radius, norm, jnp.where(_at(plan.first, index), 1.0, 0.75))
        state = state._replace(before=state.images, images=moved)
        each, wrong, gradient = evaluate(state, index + 1)
        higher = each > state.best_loss
        fooled = wrong & (each > state.fooling_loss) & (_at(plan.radii, index) == 1)
        state = state._replace(
            gradient=gradient,
            loss=each,
            rises=state.rises + (each > state.loss),
            best=_where(higher, moved, state.best),
            best_gradient=_where(higher, gradient, state.best_gradient),
            best_loss=jnp.where(higher, each, state.best_loss),
            fooling=_where(fooled, moved, state.fooling),
            fooling_loss=jnp.where(fooled, each, state.fooling_loss),
        )
        window = _at(plan.windows, index)
        check = _sparser if norm == "l1" else _halved
        return lax.cond(window > 0, lambda s: check(s, window, rho, radius), lambda s: s, state)

    def enter(state: _State, index: jax.Array) -> _State:
        inside = _balls.project(state.best, state.clean, eps * _at(plan.radii, index), norm)
        return begin(state._replace(images=inside), index, True)

    def outcome(state: _State) -> tuple[jax.Array, jax.Array]:
        fallen = state.fooling_loss > -jnp.inf
        score = jnp.where(fallen, _search.FALLEN, jnp.minimum(state.best_loss, _search.HIGHEST))
        return _where(fallen, state.fooling, state.best), score

    goals = min(targets, classes - 1) if loss == "targeted_dlr" else 1
    return _search.Search(goals * restarts, steps, start, step, outcome)


class _Plan(NamedTuple):
    """What is known of each step beforehand, [steps] each.

    Attributes:
        radii: of the ball, in eps.
        first: whether it is the first of its phase.
        begins: whether a phase but the first begins with it.
        windows: how many steps a checkpoint after it looks back on; 0 for no checkpoint.
    """

    radii: np.ndarray
    first: np.ndarray
    begins: np.ndarray
    windows: np.ndarray


def _at(table: np.ndarray, index: int | jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), index)


def _plan(steps: int, norm: str, shrinking: bool) -> _Plan:
    phases = [(1.0, steps)]
    if shrinking:
        early = [(factor, int(part * steps)) for factor, part in _SHRINKING]
        rest = (1.0, steps - sum(count for _, count in early))
        phases = [phase for phase in (*early, rest) if phase[1]]
    radii, first, windows = [], [], []
    for factor, count in phases:
        radii += [factor] * count
        first += [True] + [False] * (count - 1)
        windows += _windows(count, norm)
    begins = [False, *first[1:]]
    return _Plan(np.asarray(radii, np.float32), *map(np.asarray, (first, begins, windows)))


def _windows(steps: int, norm: str) -> list[int]:
    """The checkpoints: section 3.2, with its p_0 = 0.22, p_1 - p_0 = 0.19, down by 0.03 to 0.06."""
    length, least, less = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    if norm == "l1":
        length = least = max(int(0.04 * steps), 1)
    windows = [0] * steps
    at = length
    while at <= steps:
        windows[at - 1] = length
        length = max(length - less, least)
        at += length
    return windows


def _moved(
    state: _State, eps: float | jax.Array, norm: str, forward: float | jax.Array
) -> jax.Array:
    """Equations 1 and 2: a step along the gradient, then part of the way there, with momentum."""
    size = _balls.per_example(state.step_size)
    direction = _balls.steepest(state.gradient, norm, share=state.share)
    goal = _balls.project(state.images + size * direction, state.clean, eps, norm)
    if norm == "l1":
        return goal
    momentum = (1 - forward) * (state.images - state.before)
    moved = state.images + forward * (goal - state.images) + momentum
    return _balls.project(moved, state.clean, eps, norm)


def _halved(
    state: _State, window: jax.Array, rho: float | jax.Array, eps: float | jax.Array
) -> _State:
    """A checkpoint, section 3.2: where the step is too long, halves it and returns to the best."""
    few = state.rises <= rho * window
    stuck = ~state.checked_halved & (state.checked_loss >= state.best_loss)
    halve = few | stuck
    return state._replace(
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        images=_where(halve, state.best, state.images),
        gradient=_where(halve, state.best_gradient, state.gradient),
        rises=jnp.zeros_like(state.rises),
        checked_loss=state.best_loss,
        checked_halved=halve,
    )


def _sparser(
    state: _State, window: jax.Array, rho: float | jax.Array, eps: float | jax.Array
) -> _State:
    """A checkpoint for L1 (2021, section 4.2): as many pixels a step as the perturbation has."""
    nonzero = _nonzero(state.best, state.clean)
    fewer = nonzero < 0.95 * state.nonzero
    shorter = jnp.clip(state.step_size / 1.5, eps / 10, eps)
    return state._replace(
        step_size=jnp.where(fewer, eps, shorter),
        images=_where(fewer, state.best, state.images),
        gradient=_where(fewer, state.best_gradient, state.gradient),
        share=nonzero / math.prod(state.clean.shape[1:]) / _SPARSER,
        nonzero=nonzero,
    )


def _nonzero(images: jax.Array, clean: jax.Array) -> jax.Array:
    return _balls.total((images != clean).astype(jnp.float32))


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(_balls.per_example(chosen), new, old)
