"""A LeNet-5 with fixed, adversarially trained weights, and what the reference attacks did to it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab import models

FIXTURE = Path(__file__).parent / "lenet_fashion_linf"


class Lenet(NamedTuple):
    """`apply` is (variables, pixels) -> logits; `outcomes` as the reference's README describes."""

    variables: Any
    images: jax.Array
    labels: jax.Array
    outcomes: dict[str, Any]

    @staticmethod
    def apply(variables, images):
        return MODEL.apply(variables, images, train=False).logits

    def logits_fn(self, images):
        return self.apply(self.variables, images)


MODEL = models.create("lenet5_modern", num_outputs=10)
NAMES = {"fc1": "dense1", "fc2": "dense2", "fc3": "logits"}


@pytest.fixture(scope="session")
def lenet():
    with np.load(FIXTURE.with_suffix(".npz")) as file:
        data = dict(file)
    params: dict[str, Any] = {}
    for path, values in data.items():
        layer, _, kind = path.partition("/")
        if layer.startswith("conv"):
            params.setdefault(layer, {}).setdefault("conv", {})[kind] = jnp.array(values)
        elif layer in NAMES:
            params.setdefault(NAMES[layer], {})[kind] = jnp.array(values)
    images = jnp.array(data["images"], jnp.float32) / 255
    found = Lenet(
        {"params": params},
        images,
        jnp.array(data["labels"], jnp.int32),
        json.loads(FIXTURE.with_suffix(".json").read_text()),
    )
    np.testing.assert_allclose(
        found.logits_fn(images[:8]), data["logits_first8"], rtol=1e-4, atol=1e-4
    )
    return found
