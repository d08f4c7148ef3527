"""The ensemble and its parts against reference outcomes, closed forms and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from cnnlab import attacks, backend, keys, parallel
from cnnlab.attacks import _balls, _losses, apgd, autoattack, fab, square
from cnnlab.types import CnnlabError

RNG = np.random.default_rng(0)
KEY = keys.key(0, "attack")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
# What is small here runs at once and takes long to compile.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def lengths(a, b, norm):
    """In float64."""
    delta = (np.asarray(a, np.float64) - np.asarray(b, np.float64)).reshape(len(a), -1)
    return np.linalg.norm(delta, ORDERS[norm], axis=1)


# --- balls --------------------------------------------------------------------------------------


@functools.partial(jit, static_argnums=3)
def projected(images, clean, eps, norm):
    inside = _balls.project(images, clean, eps, norm)
    return inside, _balls.project(inside, clean, eps, norm), _balls.random_start(
        KEY, clean, eps, norm
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(ORDERS)),
    st.one_of(st.sampled_from([0.0, 8 / 255, 0.1, 1.0]), st.floats(1e-7, 30)),
    st.floats(1e-4, 100),
    st.integers(0, 2**31 - 1),
)
def test_balls_are_exact_in_float64(norm, eps, spread, seed):
    rng = np.random.default_rng(seed)
    clean = rng.uniform(size=(4, 5, 7, 3)).astype(np.float32)
    clean[0] = clean[0].round()
    clean[1] = np.float32(rng.integers(0, 256, clean[1].shape)) / np.float32(255)
    images = (clean + spread * rng.normal(size=clean.shape)).astype(np.float32)
    inside, again, start = (np.asarray(x) for x in projected(images, clean, eps, norm))
    for found in (inside, again, start):
        assert found.min() >= 0
        assert found.max() <= 1
        assert lengths(found, clean, norm).max() <= eps
    np.testing.assert_allclose(again, inside, atol=1e-6)
    # Nothing is given away: what was far out lies on the ball's edge, or at the box's.
    free = np.abs(images - clean).min() > eps and eps > 1e-3
    if norm == "linf" and free:
        want = np.clip(clean + eps * np.sign(images - clean.astype(np.float64)), 0, 1)
        np.testing.assert_allclose(inside, want, atol=3e-7)


def test_what_lies_inside_stays_as_it_is():
    clean = RNG.uniform(size=(3, 4, 4, 1)).astype(np.float32)
    near = np.clip(clean + 0.01 * RNG.normal(size=clean.shape), 0, 1).astype(np.float32)
    for norm in ORDERS:
        eps = 1.01 * lengths(near, clean, norm).max()
        np.testing.assert_array_equal(projected(near, clean, eps, norm)[0], near)


def test_l1_projection_is_the_nearest_point_of_ball_and_box():
    clean = RNG.uniform(size=(20, 3, 3, 2)).astype(np.float32)
    images = (clean + RNG.normal(size=clean.shape)).astype(np.float32)
    got = np.asarray(projected(images, clean, 0.9, "l1")[0], np.float64)
    for y, c, x in zip(images.astype(np.float64), clean.astype(np.float64), got, strict=True):
        size, room = np.abs(y - c), np.where(y > c, 1 - c, c)
        low, high = 0.0, size.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (low, middle) if np.clip(size - middle, 0, room).sum() <= 0.9 else (middle, high)
            )
        want = c + np.sign(y - c) * np.clip(size - high, 0, room)
        np.testing.assert_allclose(x, want, atol=2e-5)


def test_steepest_steps():
    gradient = RNG.normal(size=(5, 4, 5, 1)).astype(np.float32)
    gradient[3] *= 1e-30  # whose squares vanish
    gradient[4] = 0
    flat = gradient.reshape(5, -1).astype(np.float64)
    for norm, dual in (("linf", 1), ("l2", 2)):
        step = np.asarray(_balls.steepest(jnp.array(gradient), norm)).reshape(5, -1)
        gain = (step * flat).sum(1)
        np.testing.assert_allclose(gain, np.linalg.norm(flat, dual, axis=1), rtol=1e-5)
    step = np.asarray(_balls.steepest(jnp.array(gradient), "l1", share=0.2)).reshape(5, -1)
    for each, g in zip(step[:4], flat, strict=False):
        four = np.argsort(-np.abs(g))[:4]
        assert set(np.flatnonzero(each)) == set(four)
        np.testing.assert_allclose(each[four], np.sign(g[four]) / 4, rtol=1e-6)
    assert not step[4].any()


# --- losses -------------------------------------------------------------------------------------


def test_losses_are_those_of_the_paper():
    logits = RNG.normal(size=(30, 6)).astype(np.float32) * 3
    labels = RNG.integers(0, 6, 30).astype(np.int32)
    targets = ((labels + 1 + RNG.integers(0, 5, 30)) % 6).astype(np.int32)
    for z, y, t, i in zip(logits.astype(float), labels, targets, range(30), strict=True):
        down = np.sort(z)[::-1]
        other = np.delete(z, y).max()
        one = (jnp.array(logits[i : i + 1]), jnp.array([y]), jnp.array([t]))
        want = {
            _losses.cross_entropy: np.log(np.exp(z).sum()) - z[y],
            _losses.dlr: (other - z[y]) / (down[0] - down[2]),
            _losses.targeted_dlr: (z[t] - z[y]) / (down[0] - (down[2] + down[3]) / 2),
        }
        for loss, value in want.items():
            np.testing.assert_allclose(loss(*one)[0], value, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(_losses.margin(*one[:2])[0], other - z[y], rtol=1e-5)
        assert _losses.ranked_class(one[0], 2)[0] == np.argsort(-z)[2]


def test_too_few_classes_for_the_dlr_loss_are_an_error():
    def two_classes(images):
        return images.reshape(len(images), -1)[:, :2]

    with pytest.raises(CnnlabError, match="needs at least 4 classes, the model has 2"):
        attacks.create("apgd_t", eps=0.1)(
            KEY, two_classes, jnp.zeros((2, 2, 2, 1)), jnp.zeros(2, jnp.int32)
        )


# --- the parts ----------------------------------------------------------------------------------


def test_checkpoints_of_apgd():
    windows = np.array(apgd._windows(100, "linf"))
    # Section 3.2: w_0 = 0, w_1 = 22, each interval 3 shorter than the one before, at least 6.
    assert list(np.flatnonzero(windows) + 1) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(windows[windows > 0]) == [22, 19, 16, 13, 10, 7, 6, 6]
    for steps in (1, 3, 4, 100):
        plan = apgd._plan(steps, "l1", shrinking=True)
        assert {len(column) for column in plan} == {steps}
        assert plan.radii[-1] == 1
    assert [list(plan.radii).count(radius) for radius in (3, 2, 1)] == [30, 30, 40]
    assert list(np.flatnonzero(plan.begins)) == [30, 60]


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_the_step_of_fab_is_the_linear_program_s(norm):
    count, size = 60, 8
    points = RNG.uniform(size=(count, size)).round(1)  # some on the box's faces
    normal = RNG.normal(size=(count, size)) * (RNG.uniform(size=(count, size)) < 0.8)
    rise = RNG.normal(size=count) * RNG.choice([0.1, 1, 3], count)
    shape = (count, 2, 4, 1)
    got = fab.to_plane(
        jnp.array(points, jnp.float32).reshape(shape),
        jnp.array(normal, jnp.float32).reshape(shape),
        jnp.array(rise, jnp.float32),
        norm,
    )
    got = np.asarray(got, np.float64).reshape(count, size)
    assert (points + got).min() > -1e-6
    assert (points + got).max() < 1 + 1e-6
    solved = 0
    for x, w, b, d in zip(points, normal, rise, got, strict=True):
        one, eye = np.ones((size, 1)), np.eye(size)
        if norm == "linf":
            program = linprog(
                np.r_[np.zeros(size), 1],
                np.block([[eye, -one], [-eye, -one]]),
                np.zeros(2 * size),
                np.r_[w, 0][None],
                [b],
                bounds=[*((-v, 1 - v) for v in x), (0, None)],
            )
        else:
            program = linprog(
                np.ones(2 * size),
                A_eq=np.r_[w, -w][None],
                b_eq=[b],
                bounds=[*((0, 1 - v) for v in x), *((0, v) for v in x)],
            )
        if program.status == 0:
            solved += 1
            np.testing.assert_allclose(w @ d, b, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(d, ORDERS[norm]), program.fun, atol=1e-5)
        else:  # out of reach: all the way
            room = np.where(w * b > 0, 1 - x, x) * (w != 0)
            np.testing.assert_allclose(np.abs(d), room, atol=1e-6)
    assert solved > 30


def test_the_l2_step_of_fab_is_the_nearest_point():
    points = RNG.uniform(size=(40, 2, 4, 1)).round(1).astype(np.float32)
    normal = RNG.normal(size=points.shape).astype(np.float32)
    rise = (0.7 * RNG.normal(size=40)).astype(np.float32)
    got = np.asarray(fab.to_plane(*map(jnp.array, (points, normal, rise)), "l2"), np.float64)
    for x, w, b, d in zip(points, normal, rise, got, strict=True):
        x, w = x.astype(np.float64), w.astype(np.float64)
        low, high = 0.0, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            step = np.clip(x + np.sign(b) * middle * w, 0, 1) - x
            low, high = (low, middle) if np.sign(b) * (w * step).sum() >= abs(b) else (middle, high)
        want = np.clip(x + np.sign(b) * high * w, 0, 1) - x
        np.testing.assert_allclose(d, want, atol=1e-4)


@pytest.mark.parametrize("norm", sorted(ORDERS))
def test_fab_finds_the_distance_to_a_linear_boundary(norm):
    weights = RNG.normal(size=(12, 3)).astype(np.float32)
    images = jnp.array(RNG.uniform(0.45, 0.55, (8, 2, 3, 2)), jnp.float32)  # far from the box

    def logits_fn(x):
        return 0.2 * x.reshape(len(x), -1) @ weights

    logits = np.asarray(logits_fn(images), np.float64)
    labels = logits.argmax(-1)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    want = [
        min(
            (z[y] - z[k]) / (0.2 * np.linalg.norm(weights[:, y] - weights[:, k], dual))
            for k in range(3)
            if k != y
        )
        for z, y in zip(logits, labels, strict=True)
    ]
    want = np.array(want)
    for name in ("fab", "fab_t"):
        attack = attacks.create(name, eps=1e3, norm=norm, steps=40)
        found = jit(lambda k, x, y, attack=attack: attack(k, logits_fn, x, y))(
            KEY, images, jnp.array(labels, jnp.int32)
        )
        ratio = lengths(found, images, norm) / want
        inside = want < 0.4 if norm == "l1" else want < np.inf  # the box stops one number alone
        assert inside.any()
        assert ratio[inside].min() > 0.999
        assert ratio[inside].max() < 1.02


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_windows_of_the_square_attack(side, turned):
    def hump(height, width):
        """Equation 2, as it stands: rectangles laid on one another."""
        made = np.zeros((height, width))
        row, column = height // 2, width // 2
        for k in range(max(row, column) + 1):
            rows = slice(max(row - k, 0), row + k + 1)
            made[rows, max(column - k, 0) : column + k + 1] += 1 / (k + 1) ** 2
        return made / np.linalg.norm(made)

    half = side // 2
    upper = [hump(half, side)] if half else []
    want = np.concatenate([*upper, -hump(side - half, side)])
    want /= np.linalg.norm(want)
    got = square._placed(
        jnp.int32(side), jnp.array([turned]), jnp.array([2]), jnp.array([1]), (10, 11)
    )[0, ..., 0]
    whole = np.zeros((10, 11))
    whole[2 : 2 + side, 1 : 1 + side] = want.T if turned else want
    np.testing.assert_allclose(got, whole, atol=1e-6)


# --- against the reference ----------------------------------------------------------------------


def attacked(lenet, count, *only):
    """The parts' result and the rows: the first that the model has right, and two it has not."""
    correct = np.array(lenet.outcomes["clean_correct"], bool)
    rows = np.r_[np.flatnonzero(correct)[: count - 2], np.flatnonzero(~correct)[:2]]
    images, labels = lenet.images[rows], lenet.labels[rows]
    result = autoattack.run(
        KEY, lenet.apply, lenet.variables, images, labels, eps=0.1, only=only, chunk=count
    )
    np.testing.assert_array_equal(result.correct, correct[rows])
    right = np.asarray(lenet.logits_fn(jnp.array(result.images)).argmax(-1) == labels)
    np.testing.assert_array_equal(right, result.robust)
    assert lengths(result.images, images, "linf").max() <= 0.1
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    return result, rows


def test_what_apgd_leaves_is_what_the_reference_leaves(lenet):
    result, rows = attacked(lenet, 32, "apgd_ce", "apgd_t")
    alone = np.array(lenet.outcomes["parts"]["apgd-ce"]["robust"])[rows]
    assert result.after["apgd_ce"].sum() <= alone.sum() + 1
    seeds = np.array([seed["robust"] for seed in lenet.outcomes["autoattack_seeds"]])[:, rows]
    agreed = (seeds == seeds[0]).all(0)
    assert (result.robust != seeds[0])[agreed].sum() <= 1
    assert (result.after["apgd_t"] <= result.after["apgd_ce"]).all()


@pytest.mark.parametrize("part", ["fab_t", "square"])
def test_other_parts_alone_are_as_strong_as_the_reference(lenet, part):
    result, rows = attacked(lenet, 16, part)
    alone = np.array(lenet.outcomes["parts"][part.replace("_", "-")]["robust"])[rows]
    assert result.robust.sum() <= alone.sum() + 1
    assert alone.sum() < 13  # so that a part that does nothing fails


# --- the ensemble -------------------------------------------------------------------------------

HIDDEN = RNG.normal(size=(16, 12)).astype(np.float32)
OUT = RNG.normal(size=(12, 5)).astype(np.float32)
IMAGES = jnp.array(RNG.uniform(size=(24, 4, 4, 1)), jnp.float32)


def small_logits(images):
    return jnp.tanh(images.reshape(len(images), -1) @ HIDDEN) @ OUT


def small_apply(variables, images):
    return small_logits(images)


LABELS = small_logits(IMAGES).argmax(-1).astype(jnp.int32).at[:2].add(1) % 5
EPS = {"linf": 0.03, "l2": 0.15, "l1": 0.4}


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        ("linf", ("apgd_ce", "apgd_t", "fab_t", "square")),
        ("l2", ("square",)),
        ("l1", ("apgd_t", "square")),
    ],
)
def test_run_finds_what_the_pure_function_finds(norm, names, monkeypatch):
    short = {"apgd_ce": 12, "apgd_t": 12, "fab_t": 12, "square": 40}
    chosen = tuple(
        part._replace(settings=(*part.settings, ("steps", short[part.name])))
        for part in autoattack.parts("standard", norm)
        if part.name in names
    )
    monkeypatch.setattr(autoattack, "parts", lambda version, norm: chosen)
    monkeypatch.setattr(backend, "jit", lambda function, often=False: jit(function))
    pure = jit(lambda x, y: autoattack.perturb(KEY, small_logits, x, y, eps=EPS[norm], norm=norm))(
        IMAGES, LABELS
    )
    result = autoattack.run(
        KEY,
        small_apply,
        (),
        IMAGES,
        LABELS,
        eps=EPS[norm],
        norm=norm,
        chunk=24 if norm == "l1" else 32,
    )
    right = np.asarray(small_logits(jnp.array(pure)).argmax(-1) == LABELS)
    np.testing.assert_array_equal(right, result.robust)
    assert 0 < right.sum() < 22
    assert list(result.correct) == [False] * 2 + [True] * 22
    np.testing.assert_array_equal(result.images[:2], IMAGES[:2])
    assert lengths(result.images, IMAGES, norm).max() <= EPS[norm]
    assert lengths(pure, IMAGES, norm).max() <= EPS[norm]


def test_results_depend_neither_on_chunks_nor_on_devices():
    def attack(each, images, labels):
        return attacks.create("square", eps=0.03, steps=30)(each, small_logits, images, labels)

    every = keys.per_example(KEY, len(IMAGES))
    one = jit(attack)(KEY, IMAGES, LABELS)
    split = jax.device_put((every, IMAGES, LABELS), parallel.split_batch(parallel.make_mesh(8)))
    np.testing.assert_allclose(jit(attack)(*split), one, atol=1e-6)
    part = jit(attack)(every[8:16], IMAGES[8:16], LABELS[8:16])
    np.testing.assert_allclose(part, one[8:16], atol=1e-6)


def test_rand_averages_a_random_model(monkeypatch):
    monkeypatch.setattr(backend, "jit", lambda function, often=False: jit(function))

    def noisy(variables, images, key):
        noise = jax.random.normal(key, images.shape)
        return small_logits(images + 0.02 * noise)

    result = autoattack.run(
        KEY, noisy, (), IMAGES, LABELS, eps=0.1, version="rand", only=("apgd_ce",), chunk=32
    )
    assert result.robust.mean() < 0.3 < result.correct.mean()


def test_versions():
    names = {v: [part.name for part in autoattack.parts(v, "l2")] for v in autoattack.VERSIONS}
    assert names == {
        "standard": ["apgd_ce", "apgd_t", "fab_t", "square"],
        "plus": ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"],
        "rand": ["apgd_ce", "apgd_dlr"],
    }
    first = dict(autoattack.parts("standard", "l1")[0].settings)
    assert first == {"restarts": 5, "shrinking": True}


# --- what users meet ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"), [(0.1, 0.1), ("8/255", 8 / 255), ("8px", 8 / 255), (" 0.5 ", 0.5), (2, 2.0)]
)
def test_strengths(given, value):
    assert attacks.strength(given) == value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attacks.create("apgd", eps=0.1), "unknown attack 'apgd' .did you mean"),
        (lambda: attacks.create("apgd_ce"), "needs eps"),
        (lambda: attacks.create("apgd_ce", eps=0.1, step=3), "no argument 'step' .did you mean"),
        (lambda: attacks.create("apgd_ce", eps=0.1, steps=2.5), "steps: expected int, got 2.5"),
        (lambda: attacks.create("apgd_ce", eps=0.1, rho=2.0), "rho: expected a number of 0 to 1"),
        (lambda: attacks.create("apgd_ce", eps=-1), "eps: expected a number of at least 0"),
        (lambda: attacks.create("apgd_ce", eps="8/0"), "eps: expected"),
        (lambda: attacks.create("apgd_ce", eps=0.1, steps=jnp.ones(())), "steps: expected int"),
        (lambda: autoattack.parts("all", "linf"), "version: expected one of standard, plus, rand"),
        (lambda: autoattack.parts("plus", "l3"), "norm: expected one of linf, l2, l1, got 'l3'"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(CnnlabError, match=message):
        call()


def test_strengths_may_be_traced():
    def attack(eps, rho):
        made = attacks.create("apgd_ce", eps=eps, rho=rho, steps=3)
        return made(KEY, small_logits, IMAGES, LABELS)

    found = jit(attack)(0.05, 0.5)
    assert 0.049 < lengths(found, IMAGES, "linf").max() <= 0.05
