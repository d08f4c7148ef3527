"""Split names and channel statistics."""

import numpy as np
import pytest

from cnnlab.data._source import channel_moments, check_split
from cnnlab.types import CnnlabError


@pytest.mark.parametrize("split", ["valid", "tst", "Train", ""])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(CnnlabError, match="'train' and 'test'"):
        check_split("digits", split)


def test_the_nearest_split_is_named():
    with pytest.raises(CnnlabError, match="did you mean 'test'"):
        check_split("digits", "tst")


def test_moments_equal_numpys_whatever_the_batches():
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3), np.uint8)
    images[..., 1] //= 7  # Channels of differing statistics, so that mixing them up shows.
    scaled = images / 255
    for batches in ([images], np.split(images, [1, 17])):
        mean, std = channel_moments(iter(batches))
        np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), atol=5.1e-7)
        np.testing.assert_allclose(std, scaled.std((0, 1, 2)), atol=5.1e-7)


def test_moments_of_constant_images_have_no_rounding_error():
    assert channel_moments([np.full((2, 3, 3, 1), 255, np.uint8)]) == ((1.0,), (0.0,))


def test_moments_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        channel_moments([])
