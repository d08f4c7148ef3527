"""The contract of every attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cnnlab import attacks, keys, parallel, registry
from cnnlab.types import CnnlabError

SMALL = {
    "steps": 4,
    "searches": 2,
    "candidates": 2,
    "tries": 4,
    "queries": 12,
    "batch_size": 8,
    "targets": 2,
}
EPS = {"linf": 0.1, "l2": 0.6, "l1": 2.0, "l0": 3.0}
OF_THE_SET = ("universal",)  # an example's result depends on the others, by nature
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def arguments(name):
    """A plug-in's own arguments, with few steps of everything."""
    plugin = registry.get("attacks", name)
    known = plugin.parameters
    small = {k: min(v, known[k]) for k, v in SMALL.items() if isinstance(known.get(k), int)}
    return plugin.fields | small


def distinct():
    """The attacks but for ensembles of others here, and for those that only differ in steps."""
    found = {}
    for name, plugin in registry.plugins("attacks").items():
        if "version" not in plugin.parameters:
            found.setdefault((plugin.function, str(sorted(arguments(name).items()))), name)
    return list(found.values())


NAMES = distinct()
FILES = {registry.get("attacks", name).module: name for name in NAMES if name not in OF_THE_SET}

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(32, 12)).astype(np.float32)
OUT = RNG.normal(size=(12, 4)).astype(np.float32)


def logits_fn(images):
    return jnp.tanh(images.reshape(len(images), -1) @ HIDDEN / 2) @ OUT


IMAGES = jnp.array(RNG.uniform(size=(16, 4, 4, 2)).round(1), jnp.float32)  # some at 0 and 1
# What the model says, so that there is something to lose; two examples are lost already.
LABELS = ((logits_fn(IMAGES).argmax(-1) + (jnp.arange(16) % 8 == 7)) % 4).astype(jnp.int32)


def norm_of(name):
    return registry.get("attacks", name).parameters["norm"]


@functools.cache
def attack(name):
    """The attack as a jitted function of key, images, labels and eps."""
    function, fixed = registry.get("attacks", name).function, arguments(name)

    def perturb(key, images, labels, eps):
        return function(key, logits_fn, images, labels, **fixed | {"eps": eps})

    return jax.jit(perturb, compiler_options=FAST_TO_COMPILE)


def sizes(adversarial, norm, images=IMAGES):
    """Of the perturbations, in float64."""
    delta = np.asarray(adversarial, np.float64) - np.asarray(images, np.float64)
    if norm == "l0":
        return (delta != 0).any(-1).sum((1, 2))
    delta = delta.reshape(len(delta), -1)
    return np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)


def losses(images, labels=LABELS, logits_fn=logits_fn):
    """Cross-entropy and margin of each example."""
    logits = logits_fn(images)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    own = jax.nn.one_hot(labels, 4, dtype=bool)
    margin = jnp.where(own, -jnp.inf, logits).max(1) - jnp.where(own, logits, -jnp.inf).max(1)
    return np.asarray(entropy), np.asarray(margin)


@pytest.mark.parametrize("name", NAMES)
def test_stays_in_the_ball_raises_the_loss_and_repeats_itself(name):
    norm, key = norm_of(name), keys.key(0, "attack")
    eps = EPS[norm]
    once = attack(name)(key, IMAGES, LABELS, eps)
    assert once.shape == IMAGES.shape
    assert once.dtype == jnp.float32
    assert np.array_equal(once, attack(name)(key, IMAGES, LABELS, eps))
    for strength in (eps, 0.3 * eps):
        made = attack(name)(key, IMAGES, LABELS, strength)
        assert sizes(made, norm).max() <= np.float64(strength)
        assert made.min() >= 0
        assert made.max() <= 1
    assert np.array_equal(attack(name)(key, IMAGES, LABELS, 0.0), IMAGES)

    before, after = losses(IMAGES), losses(once)
    if name in OF_THE_SET:
        assert after[0].mean() > before[0].mean()
        return
    # The loss that the attack climbs does not fall, and no verdict is lost; overall, it rises.
    entropy, margin = (b - a for a, b in zip(before, after, strict=True))
    assert (np.maximum(entropy, margin) >= -1e-6).all()
    assert ((before[1] <= 0) | (after[1] > 0)).all()
    assert entropy.sum() > 0
    if "eps" in registry.get("attacks", name).parameters:  # it looks for the nearest, or stops
        lost = before[1] > 0
        assert lost.any()
        assert np.array_equal(once[lost], IMAGES[lost])


@pytest.mark.parametrize("name", FILES.values())
def test_an_example_depends_on_its_key_only_and_not_on_the_devices(name):
    """Eight examples, with keys of their own, on eight devices, and among sixteen on one."""
    eps, key = EPS[norm_of(name)], keys.key(0, "attack")
    alone = attack(name)(key, IMAGES, LABELS, eps)
    split = parallel.split_batch(parallel.make_mesh(8))
    given = jax.device_put((keys.per_example(key, 8), IMAGES[:8], LABELS[:8]), split)
    spread = attack(name)(*given, eps)
    assert len(spread.sharding.device_set) == 8
    assert np.array_equal(logits_fn(spread).argmax(-1), logits_fn(alone[:8]).argmax(-1))
    # An attack that walks along the decision boundary may be on either side of it by rounding, and
    # goes on differently from there: one of the eight may.
    same = np.isclose(spread, alone[:8], rtol=0, atol=1e-5).all((1, 2, 3))
    assert same.sum() >= 7


SHAPES = ((1, 1, 1), (5, 3, 1), (2, 7, 3), (8, 8, 1))
RADII = {"linf": 1.25, "l2": 4.0, "l1": 12.0, "l0": 5.0}


@functools.cache
def norms_of(name):
    """The norms that an attack knows: it refuses others when it is traced."""
    if "norm" not in registry.get("attacks", name).parameters or norm_of(name) == "l0":
        return (norm_of(name),)
    known = []
    for norm in attacks.NORMS:
        perturb, images, labels, *_ = of_shape(name, SHAPES[1], norm)
        try:
            perturb.trace(jax.random.key(0), images, labels, 0.1)
        except CnnlabError as error:
            assert "norm: expected one of" in str(error)  # noqa: PT017 - any other norm may pass
            continue
        known.append(norm)
    return tuple(known)


@functools.cache
def of_shape(name, shape, norm):
    """The attack on images of this shape, the images, what a model says of them, the model."""
    rng = np.random.default_rng(len(name))
    hidden, out = (rng.normal(size=size) for size in ((np.prod(shape), 12), (12, 4)))

    def logits(images):
        return jnp.tanh(images.reshape(len(images), -1) @ jnp.float32(hidden)) @ jnp.float32(out)

    function, fixed = registry.get("attacks", name).function, arguments(name)
    fixed = fixed | ({"norm": norm} if "norm" in registry.get("attacks", name).parameters else {})

    def perturb(key, images, labels, eps):
        return function(key, logits, images, labels, **fixed | {"eps": eps})

    images = jnp.asarray(rng.uniform(size=(6, *shape)).round(1), jnp.float32)
    jitted = jax.jit(perturb, compiler_options=FAST_TO_COMPILE)
    return jitted, images, logits(images).argmax(-1).astype(jnp.int32), logits


@pytest.mark.parametrize("name", FILES.values())
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),  # each smaller example would compile anew
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_whatever_radius_norm_and_shape(name, data):
    """Each drawn program meets several radii and keys, which it takes without compiling anew."""
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    norm = data.draw(st.sampled_from(norms_of(name)), "norm")
    perturb, images, labels, logits = of_shape(name, shape, norm)
    before = losses(images, labels, logits)
    strengths = st.floats(0, RADII[norm], width=32)
    for eps in data.draw(st.lists(strengths, min_size=4, max_size=4), "eps"):
        key = keys.key(data.draw(st.integers(0, 2**31 - 1), "seed"), "attack")
        made = perturb(key, images, labels, eps)
        assert np.array_equal(made, perturb(key, images, labels, eps))
        assert sizes(made, norm, images).max() <= np.float64(np.float32(eps))
        assert made.min() >= 0
        assert made.max() <= 1
        gained = np.subtract(losses(made, labels, logits), before).max(0)
        fooled = logits(made).argmax(-1) != labels
        assert ((gained >= -1e-5) | fooled).all()  # the loss that it climbs does not fall
