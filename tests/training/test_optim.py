"""Schedules and optimizers against Optax and against their papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnlab import config
from cnnlab.training import optim

STEPS, EXAMPLES = 200, 640


def case(**changes):
    made = config.override(
        config.base(),
        {"train.duration": f"{STEPS} steps", "train.batch_size": 64, **changes},
        "t",
    )
    made = config.resolve(made, "t")
    return made, optim.hyper(made, examples=EXAMPLES)


def rates(**changes):
    made, hyper = case(**{f"optim.{k}": v for k, v in changes.items()})
    each = jax.jit(jax.vmap(lambda t: optim.learning_rate(made.optim.schedule, t, hyper)))
    return np.asarray(each(jnp.arange(STEPS)))


def follow(schedule):
    return np.array([float(schedule(t)) for t in range(STEPS)])


def test_durations_become_steps():
    _, hyper = case(**{"optim.warmup": "2 epochs"})
    assert (float(hyper["train.steps"]), float(hyper["optim.warmup"])) == (200, 20)


def test_constant():
    assert np.all(rates(schedule="constant", learning_rate=0.3) == np.float32(0.3))


def test_cosine_is_optaxs():
    ours = rates(schedule="cosine", learning_rate=0.3, final=0.1)
    assert ours == pytest.approx(follow(optax.cosine_decay_schedule(0.3, STEPS, 0.1)), rel=1e-5)


def test_step_is_optaxs():
    expected = follow(optax.piecewise_constant_schedule(0.3, {100: 0.1, 150: 0.1}))
    assert rates(schedule="step", learning_rate=0.3) == pytest.approx(expected, rel=1e-5)


def test_one_cycle_is_optaxs():
    ours = rates(schedule="one_cycle", learning_rate=0.3, rise=0.25, initial=0.04, final=0.0)
    expected = optax.cosine_onecycle_schedule(STEPS, 0.3, 0.25, div_factor=25, final_div_factor=1e9)
    assert ours == pytest.approx(follow(expected), rel=1e-5, abs=1e-7)


def test_warmup_stable_decay_is_optaxs_three_pieces():
    ours = rates(schedule="wsd", learning_rate=0.3, warmup="20 steps", decay=0.25, final=0.1)
    expected = optax.join_schedules(
        [
            optax.linear_schedule(0.3 / 20, 0.3 + 0.3 / 20, 20),
            optax.constant_schedule(0.3),
            optax.linear_schedule(0.3, 0.03, 45),
        ],
        [20, 155],
    )
    assert ours == pytest.approx(follow(expected), rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "wsd"])
def test_warmup_precedes_every_schedule_but_one_cycle(schedule):
    ours = rates(schedule=schedule, learning_rate=0.3, warmup="10 steps")
    assert ours[:10] == pytest.approx(0.3 * np.arange(1, 11) / 10, rel=1e-6)
    assert ours.max() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", lambda p: np.ones_like(p)),
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + np.cos(np.pi * p)) / 2),
    ],
)
def test_auxiliary_weights_decay(kind, expected):
    _, hyper = case()
    steps = np.arange(STEPS)
    ours = [float(optim.aux_decay(kind, jnp.int32(t), hyper)) for t in steps[::10]]
    assert ours == pytest.approx(expected(steps[::10] / STEPS), abs=1e-6)


MASK = {"kernel": True, "bias": False}
REFERENCES = {
    "sgd": lambda: optax.chain(
        optax.add_decayed_weights(1e-2, MASK), optax.sgd(0.05, momentum=0.8, nesterov=True)
    ),
    "adam": lambda: optax.chain(
        optax.add_decayed_weights(1e-2, MASK), optax.adam(0.05, 0.8, 0.95, 1e-6)
    ),
    "adamw": lambda: optax.adamw(0.05, 0.8, 0.95, 1e-6, weight_decay=1e-2, mask=MASK),
    "lamb": lambda: optax.lamb(0.05, 0.8, 0.95, 1e-6, weight_decay=1e-2, mask=MASK),
    "lion": lambda: optax.lion(0.05, 0.8, 0.95, weight_decay=1e-2, mask=MASK),
}


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("name", REFERENCES)
def test_optimizers_are_optaxs_with_weight_decay_on_kernels_only(name, clip):
    made, hyper = case(
        **{
            "optim.name": name,
            "optim.nesterov": True,
            "optim.momentum": 0.8,
            "optim.beta1": 0.8,
            "optim.beta2": 0.95,
            "optim.epsilon": 1e-6,
            "optim.weight_decay": 1e-2,
            "optim.clip_norm": clip,
        }
    )
    rng = np.random.default_rng(0)
    start = {"kernel": jnp.array(rng.normal(size=(3, 4))), "bias": jnp.array(rng.normal(size=4))}
    reference = REFERENCES[name]()
    if clip:
        reference = optax.chain(optax.clip_by_global_norm(clip), reference)
    ours = theirs = start
    our_state = optim.optimizer(made, hyper, jnp.float32(0.05)).init(start)
    their_state = reference.init(start)

    @jax.jit
    def step(hyper, gradients, state, params):
        update = optim.optimizer(made, hyper, jnp.float32(0.05)).update
        updates, state = update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        gradients = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape)), start)
        ours, our_state = step(hyper, gradients, our_state, ours)
        updates, their_state = reference.update(gradients, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        for key in start:
            assert ours[key] == pytest.approx(np.asarray(theirs[key]), rel=2e-5, abs=1e-6)


def test_the_average_of_parameters_forgets_the_first_ones():
    params = {"w": jnp.array([1.0])}
    ema = {"w": jnp.array([100.0])}
    by_hand = 100.0
    for step in range(50):
        decay = min(0.99, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * 1.0
        ema = optim.average(ema, params, jnp.int32(step), jnp.float32(0.99))
    assert float(ema["w"][0]) == pytest.approx(by_hand, rel=1e-5)
    assert float(ema["w"][0]) < 1.01
