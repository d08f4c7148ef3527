"""The contract of every attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnlab import keys, parallel, registry

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


def sizes(adversarial, norm):
    """Of the perturbations, in float64."""
    delta = (np.asarray(adversarial, np.float64) - np.asarray(IMAGES, np.float64)).reshape(16, -1)
    if norm == "l0":
        return (delta.reshape(16, -1, 2) != 0).any(-1).sum(-1)
    return np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)


def losses(images):
    """Cross-entropy and margin of each example, and whether the model is wrong."""
    logits = logits_fn(images)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    own = jax.nn.one_hot(LABELS, 4, dtype=bool)
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
