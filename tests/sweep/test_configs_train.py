"""Every recipe of the project takes two steps, on whatever data is there."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab import config
from cnnlab.sweep import experiment
from cnnlab.training import optim, run, step
from cnnlab.types import CnnlabError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_two_steps(path):
    made = experiment.load_config(path)
    changes = {"train.duration": "2 steps", "train.batch_size": 16}
    made = config.resolve(config.override(made, changes, path.name), path.name)
    try:
        split = run.load_split(made, "train")
    except CnnlabError as error:
        # Without the whole set the recipe runs on the subset, whose images have the same shape.
        if made.data.name != "fashion_mnist" or "--data-dir" not in str(error):
            raise
        made = config.override(made, {"data.name": "fashion_mini"}, path.name)
        split = run.load_split(made, "train")
    program = step.make_program(made, split.info)
    stream = run.make_stream(made, split)
    hyper = optim.hyper(made, examples=len(stream.train))
    state = program.init(0, hyper)
    for t in range(2):
        state, packed = program.train_step(state, split.fed(stream.batch(t)), jnp.int32(0), hyper)
        assert np.isfinite(packed).all()
    assert int(state.step) == 2
