"""The stream of examples: a function of (seed, step) that drops and repeats nothing."""

import dataclasses

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
    images, labels = split.resident
    assert np.array_equal(np.asarray(images), split.get(np.arange(len(split))).images)
    assert np.array_equal(np.asarray(labels), split.labels)
    assert images.sharding.is_fully_replicated
    assert len(images.devices()) == 8
    other = pipeline.load("digits", "train", parallel.make_mesh(1))
    assert other.fingerprint != split.fingerprint
    assert pipeline.load("digits", "test", parallel.make_mesh(1)).fingerprint == split.fingerprint


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(CnnlabError, match="at most the 8 cpu device"):
        parallel.make_mesh(9)


def test_a_batch_that_the_devices_do_not_divide_is_an_error():
    with pytest.raises(CnnlabError, match=r"multiple of the 8 devices, got 100; the nearest is 96"):
        parallel.check_batch_size(100, parallel.make_mesh(0), "train.batch_size")


def streamed(monkeypatch, name="digits", devices=1, split="train"):
    monkeypatch.setenv(pipeline.RESIDENT, "0")
    found = pipeline.load(name, split, parallel.make_mesh(devices))
    assert found.resident is None
    return found


def batches_of(split, steps):
    """(images, labels) of each step as the compiled functions get them."""
    for fed in split.feed(steps):
        pair = fed.images, fed.labels
        if fed.indices is not None:
            pair = tuple(np.asarray(each)[fed.indices] for each in pair)
        yield tuple(map(np.asarray, pair))


@pytest.mark.parametrize("devices", [1, 8])
def test_streamed_batches_are_the_resident_ones_from_any_step_on(monkeypatch, devices):
    resident = pipeline.load("digits", "train", parallel.make_mesh(devices))
    s = stream(size=len(resident))
    split = streamed(monkeypatch, devices=devices)
    assert split.fingerprint == resident.fingerprint
    for start in (0, 17):
        steps = pipeline.Steps([s], start, 45)  # over the ends of epochs
        pairs = zip(batches_of(resident, steps), batches_of(split, steps), strict=True)
        for number, (one, other) in enumerate(pairs):
            assert all(map(np.array_equal, one, other))
            assert np.array_equal(other[0], resident.get(s.batch(start + number)).images)
        assert number == 44 - start


def test_a_streamed_batch_lies_split_over_the_devices(monkeypatch):
    split = streamed(monkeypatch, devices=8)
    one = next(split.feed(pipeline.Steps([stream(size=len(split))], 0, 1)))
    assert {shard.data.shape for shard in one.images.addressable_shards} == {(8, 8, 8, 1)}
    several = [stream(seed=seed, size=len(split)) for seed in (0, 1)]
    both = next(split.feed(pipeline.Steps(several, 3, 4)))
    assert both.images.shape == (2, 64, 8, 8, 1)
    assert {shard.data.shape for shard in both.labels.addressable_shards} == {(2, 8)}
    for fed, s in zip(both.labels, several, strict=True):
        assert np.array_equal(fed, split.labels[s.batch(3)])


def test_worker_processes_read_the_same(monkeypatch):
    split = streamed(monkeypatch)
    steps = pipeline.Steps([stream(size=len(split))], 10, 16)
    here = list(batches_of(split, steps))
    monkeypatch.setenv(pipeline.WORKERS, "2")
    for one, other in zip(here, batches_of(split, steps), strict=True):
        assert all(map(np.array_equal, one, other))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_a_reader_complains_of_reaches_its_user(monkeypatch, workers):
    split = streamed(monkeypatch)
    monkeypatch.setenv(pipeline.WORKERS, workers)
    broken = split.with_images(Broken(split.source))
    with pytest.raises(CnnlabError, match=r"image 3\.jpg is damaged"):
        list(broken.feed([np.arange(4)]))


@dataclasses.dataclass(frozen=True)
class Broken:
    source: object

    @property
    def info(self):
        return self.source.info

    def get(self, indices):
        raise CnnlabError("image 3.jpg is damaged")


@pytest.mark.parametrize("given", ["many", "-1", "nan"])
def test_a_mistyped_limit_is_told(monkeypatch, given):
    monkeypatch.setenv(pipeline.RESIDENT, given)
    with pytest.raises(CnnlabError, match=f"CNNLAB_RESIDENT: expected a number.*'{given}'"):
        pipeline.load("digits", "train", parallel.make_mesh(1))
