"""The compiled step: devices, precision, dropout, and one compilation for many runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnlab import config
from cnnlab.training import optim, run, step
from cnnlab.types import CnnlabError


def small(model="resnet8", **changes):
    fields = {"model.width": 4} if "resnet" in model else {}
    made = config.base(model=model, data="digits")
    changes = {"train.batch_size": 64, "train.duration": "30 steps", **fields, **changes}
    return config.resolve(config.override(made, changes, "t"), "t")


def train(made, steps):
    """The state and the metrics of each step, by the step function alone."""
    split = run.load_split(made, "train")
    program = step.make_program(made, split.info)
    stream = run.make_stream(made, split)
    hyper = optim.hyper(made, examples=len(stream.train))
    state, metrics = program.init(made.seed, hyper), []
    for t in range(steps):
        state, packed = program.train_step(
            state, split.fed(stream.batch(t)), jnp.int32(made.seed), hyper
        )
        metrics.append(dict(zip(program.metric_names, np.asarray(packed), strict=True)))
    return state, metrics, program


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"optim.learning_rate": 0.05}, 1e-5),
        # Where rounding moves an activation across ReLU's kink, its gradient jumps, and two runs
        # part at the rate that training itself amplifies (1e-4 in 20 steps here). Without a kink
        # nothing hides a wrong sum over the devices, so the tolerance is rounding's own.
        (
            {
                "data.name": "fashion_mini",
                "model.width": 8,
                "model.stem_stride": 2,
                "model.activation": "gelu",
                "optim.learning_rate": 0.02,
            },
            1e-6,
        ),
    ],
    ids=["relu", "gelu"],
)
def test_one_device_and_eight_give_the_same_parameters(changes, tolerance):
    one, _, _ = train(small(**changes, **{"parallel.devices": 1}), 20)
    eight, _, program = train(small(**changes, **{"parallel.devices": 8}), 20)
    assert program.mesh.size == 8
    for collection in ("params", "batch_stats"):
        a, b = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(s, collection))])
            for s in (one, eight)
        )
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    a, b, c = (
        jax.tree.leaves(train(small("simple_conv", seed=seed), 3)[0].params) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(a, c, strict=True) if x.ndim > 1)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters_statistics_and_loss():
    made = small(**{"model.dtype": "bfloat16", "optim.learning_rate": 0.02})
    state, metrics, program = train(made, 20)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)):
        assert leaf.dtype == jnp.float32
    images = jnp.zeros((1, 8, 8, 1))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs = program.module.apply(variables, images, train=False)
    assert outputs.logits.dtype == jnp.float32
    assert outputs.features["stage1"].dtype == jnp.bfloat16
    first, last = (
        np.mean([m["loss"][0] / m["loss"][1] for m in part]) for part in (metrics[:4], metrics[-4:])
    )
    assert last < first - 0.1


def test_auxiliary_heads_are_logged_by_name_and_absent_at_inference():
    made = small(**{"model.aux": ("stage1", "stage2"), "task.aux_weight": (0.5, 0.25)})
    state, metrics, program = train(made, 2)
    assert {"aux_stage1/nll", "aux_stage1/top1", "aux_stage2/nll"} <= set(metrics[0])
    mean = {name: total / count for name, (total, count) in metrics[1].items()}
    expected = mean["nll"] + 0.5 * mean["aux_stage1/nll"] + 0.25 * mean["aux_stage2/nll"]
    assert mean["loss"] == pytest.approx(expected, rel=1e-5)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert program.module.apply(variables, jnp.zeros((1, 8, 8, 1)), train=False).aux == ()


def test_a_networks_own_heads_come_first_and_are_weighted():
    changes = {"model.stem": "small", "model.stage_sizes": (1, 1), "model.width": 4,
               "model.widths": (16, 16), "model.aux": ("stage2",),
               "task.aux_weight": (0.3, 0.1)}  # fmt: skip
    _, metrics, _ = train(small("googlenet", **changes), 2)
    mean = {name: total / count for name, (total, count) in metrics[1].items()}
    expected = mean["nll"] + 0.3 * mean["aux1/nll"] + 0.1 * mean["aux_stage2/nll"]
    assert mean["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_decayed_auxiliary_weight_reaches_the_loss():
    made = small(
        **{"model.aux": ("stage1",), "task.aux_weight": 1.0, "task.aux_schedule": "linear"}
    )
    _, metrics, _ = train(made, 16)
    for t, logged in enumerate(metrics):
        mean = {name: total / count for name, (total, count) in logged.items()}
        expected = mean["nll"] + (1 - t / 30) * mean["aux_stage1/nll"]
        assert mean["loss"] == pytest.approx(expected, rel=1e-5)


def test_dropout_draws_anew_each_step_and_the_same_again():
    made = small("simple_conv", **{"model.dropout": 0.5, "optim.learning_rate": 0.0})
    _, first, program = train(made, 3)
    _, again, _ = train(made, 3)
    assert [m["loss"].tolist() for m in first] == [m["loss"].tolist() for m in again]
    split = run.load_split(made, "train")
    hyper = optim.hyper(made, examples=1000)
    same_batch = np.arange(64, dtype=np.int32)
    state, losses = program.init(0, hyper), []
    for _ in range(2):
        state, packed = program.train_step(state, split.fed(same_batch), jnp.int32(0), hyper)
        losses.append(float(packed[0, 0]))
    assert losses[0] != losses[1]


def test_three_learning_rates_times_three_seeds_compile_the_step_once():
    programs = step.Programs()
    for rate in (0.01, 0.1, 1.0):
        for seed in range(3):
            made = small("simple_conv", **{"optim.learning_rate": rate, "seed": seed})
            split = run.load_split(made, "train")
            program = programs.get(made, split.info, config.program(made))
            stream = run.make_stream(made, split)
            hyper = optim.hyper(made, examples=len(stream.train))
            state = program.init(seed, hyper)
            for t in range(2):
                state, _ = program.train_step(
                    state, split.fed(stream.batch(t)), jnp.int32(seed), hyper
                )
    assert [p.traces for p in programs] == [1]
    assert program.train_step._cache_size() == 1


def test_the_first_step_is_the_gradient_by_hand():
    """One SGD step equals params - rate * gradient of the mean loss, found without the step."""
    made = small("simple_conv", **{"optim.momentum": 0.0, "optim.schedule": "constant"})
    split = run.load_split(made, "train")
    program = step.make_program(made, split.info)
    hyper = optim.hyper(made, examples=1000)
    before = jax.tree.map(np.asarray, program.init(0, hyper).params)
    taken = np.arange(64, dtype=np.int32)
    mean, std = split.info.mean[0], split.info.std[0]
    images = (jnp.array(split.get(np.arange(64)).images) / 255.0 - mean) / std
    labels = split.labels[:64]

    def loss(params):
        logits = program.module.apply({"params": params}, images, train=False).logits
        return -jax.nn.log_softmax(logits)[np.arange(64), labels].mean()

    gradients = jax.grad(loss)(before)
    state, _ = program.train_step(program.init(0, hyper), split.fed(taken), jnp.int32(0), hyper)
    for p, g, after in zip(*map(jax.tree.leaves, (before, gradients, state.params)), strict=True):
        assert np.asarray(after) == pytest.approx(p - 0.1 * np.asarray(g), rel=1e-4, abs=1e-6)


def test_a_batch_that_devices_do_not_divide_is_an_error():
    made = small(**{"parallel.devices": 8, "train.batch_size": 60})
    with pytest.raises(CnnlabError, match="multiple of the 8 devices"):
        step.make_program(made, run.load_split(made, "train").info)
