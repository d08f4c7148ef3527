"""Variables for models without compiling their initialisers."""

import zlib

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def draw_variables():
    """A function (module, images) -> variables, drawn by NumPy.

    Kernels are He-normal; all else lies away from the usual start, where biases and some scales
    are 0 and their neighbours get no gradient.
    """

    def draw(module, images):
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))

        def leaf(path, shape):
            name = jax.tree_util.keystr(path)
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            noise = rng.normal(size=shape.shape)
            if "kernel" in name:
                noise *= np.sqrt(2 / np.prod(shape.shape[:-1]))
            elif "scale" in name or "var" in name:
                noise = np.exp(0.3 * noise)
            else:
                noise *= 0.1
            return noise.astype(shape.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw
