"""The stream of examples: a function of (seed, step) that drops and repeats nothing."""

import numpy as np
import pytest

from cnnlab import parallel, pipeline
from cnnlab.types import CnnlabError


def stream(seed=0, size=1000, validation=0.1, batch_size=64):
    return pipeline.Stream.make(seed=seed, size=size, validation=validation, batch_size=batch_size)


def test_every_epoch_has_every_training_example_once():
    s = stream()
    seen = np.concatenate([s.batch(step) for step in range(45)])  # 45 x 64 = 3.2 x 900
    for epoch in range(3):
        assert sorted(seen[epoch * 900 : (epoch + 1) * 900]) == sorted(s.train)
    assert not np.array_equal(seen[:900], seen[900:1800])


def test_the_validation_examples_are_never_trained_on_and_depend_on_the_seed():
    s = stream()
    assert len(s.validation) == 100
    assert sorted([*s.train, *s.validation]) == list(range(1000))
    assert not set(s.validation) & set(np.concatenate([s.batch(t) for t in range(30)]))
    assert np.array_equal(s.validation, stream().validation)
    assert not np.array_equal(s.validation, stream(seed=1).validation)


def test_a_batch_depends_on_seed_and_step_alone():
    walked, jumped = stream(), stream()
    for step in range(40):
        last = walked.batch(step)
    assert np.array_equal(jumped.batch(39), last)
    assert last.dtype == np.int32
    assert not np.array_equal(stream(seed=1).batch(39), last)


def test_the_seeds_orders_differ_even_without_a_validation_split():
    assert not np.array_equal(
        stream(validation=0.0).batch(0), stream(seed=1, validation=0.0).batch(0)
    )


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(CnnlabError, match="at most the 900 training examples, got 901"):
        stream(batch_size=901)


def test_a_split_is_the_same_on_host_and_devices():
    split = pipeline.load("digits", "test", parallel.make_mesh(8))
    assert np.array_equal(np.asarray(split.images), split.examples.images)
    assert np.array_equal(np.asarray(split.labels), split.examples.labels)
    assert split.images.sharding.is_fully_replicated
    assert len(split.images.devices()) == 8
    other = pipeline.load("digits", "train", parallel.make_mesh(1))
    assert other.fingerprint != split.fingerprint
    assert pipeline.load("digits", "test", parallel.make_mesh(1)).fingerprint == split.fingerprint


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(CnnlabError, match="at most the 8 cpu device"):
        parallel.make_mesh(9)


def test_a_batch_that_the_devices_do_not_divide_is_an_error():
    with pytest.raises(CnnlabError, match=r"multiple of the 8 devices, got 100; the nearest is 96"):
        parallel.check_batch_size(100, parallel.make_mesh(0), "train.batch_size")
