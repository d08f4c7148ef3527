"""Random keys are functions of (seed, stream, step)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from cnnlab import keys


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_seeds_streams_and_steps_give_different_keys():
    made = {
        data(keys.key(seed, stream, step))
        for seed, stream, step in itertools.product((0, 1, 2**31 - 1), ("a", "b"), (0, 1, 70000))
    }
    assert len(made) == 3 * 2 * 3


def test_traced_and_plain_arguments_agree():
    traced = jax.jit(lambda seed, step: keys.key(seed, "shuffle", step))
    assert data(traced(jnp.int32(5), jnp.int32(9))) == data(keys.key(5, "shuffle", 9))


def test_an_examples_key_depends_on_its_position_alone():
    key = keys.key(0, "augment", 3)
    few, many = keys.per_example(key, 4), keys.per_example(key, 64)
    assert [data(k) for k in few] == [data(k) for k in many[:4]]
    assert len({data(k) for k in many}) == 64
