"""Batches in pieces: accumulated gradients, and statistics of parts."""

import jax
import numpy as np
import pytest

from cnnlab import config
from cnnlab.training import optim, run, step
from cnnlab.types import CnnlabError


def recipe(**changes):
    made = config.base(model="simple_conv", data="digits", augment={"transforms": ("mixup",)})
    small = {
        "model.widths": (8,),
        "model.hidden": 16,
        "model.norm": "none",
        "train.batch_size": 64,
        "train.duration": "30 steps",
        "optim.learning_rate": 0.05,
    }
    return config.resolve(config.override(made, small | changes, "t"), "t")


def train(made, steps=4):
    """The state and the metrics of the last step."""
    split = run.load_split(made, "train")
    program = step.make_program(made, split.info)
    stream = run.make_stream(made, split)
    hyper = optim.hyper(made, examples=len(stream.train))
    state = program.init(made.seed, hyper)
    for t in range(steps):
        state, packed = program.train_step(
            state, split.fed(stream.batch(t)), np.int32(made.seed), hyper
        )
    return state, dict(zip(program.metric_names, np.asarray(packed), strict=True))


def distance(one, other):
    a, b = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves((s.params, s.batch_stats))])
        for s in (one, other)
    )
    return np.linalg.norm(a - b) / np.linalg.norm(a)


FREE = {"defence.name": "free", "defence.eps": 0.1, "defence.replays": 2}


@pytest.mark.parametrize("changes", [{}, FREE], ids=["standard", "free"])
def test_accumulated_gradients_are_the_whole_batchs(changes):
    whole, one = train(recipe(**changes))
    pieces, other = train(recipe(**changes, **{"train.accumulate": 4}))
    assert distance(whole, pieces) < 2e-6
    assert one.keys() == other.keys()
    for name, (total, count) in one.items():
        assert other[name] == pytest.approx((total, count), rel=1e-5)


@pytest.mark.parametrize("setting", ["train.accumulate", "train.sub_batches"])
def test_pieces_have_batch_statistics_of_their_own_on_any_number_of_devices(setting):
    changes = {"model.norm": "batch", "model.activation": "gelu"}
    whole, _ = train(recipe(**changes))
    one, _ = train(recipe(**changes, **{setting: 4}))
    eight, _ = train(recipe(**changes, **{setting: 4, "parallel.devices": 8}))
    assert distance(one, eight) < 2e-6
    assert distance(whole, one) > 1e-4


def test_each_piece_draws_dropout_of_its_own():
    """With the same masks in all pieces of the same images, two would lose as much as four."""
    losses = []
    for pieces in (2, 4):
        made = recipe(
            **{
                "model.dropout": 0.5,
                "augment.transforms": (),
                "train.accumulate": pieces,
                "train.batch_size": 16 * pieces,
            }
        )
        split = run.load_split(made, "train")
        program = step.make_program(made, split.info)
        hyper = optim.hyper(made, examples=1000)
        same = np.repeat(np.arange(16, dtype=np.int32), pieces)
        _, packed = program.train_step(program.init(0, hyper), split.fed(same), np.int32(0), hyper)
        total, count = np.asarray(packed)[program.metric_names.index("loss")]
        assert count == 16 * pieces
        losses.append(total / count)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_pieces_that_do_not_fit_are_refused():
    with pytest.raises(CnnlabError, match=r"3 pieces on 1 device.* must divide .* is 64"):
        step.make_program(recipe(**{"train.accumulate": 3}), digits_info())


def digits_info():
    return run.load_split(recipe(), "train").info
