"""Adversarial training: what it trains on, its losses, its statistics, and what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from cnnlab import attacks, config, keys
from cnnlab.training import defence, loop, optim, run, step
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError

PROGRAMS = Programs()
EPS = 0.1


def recipe(name, **changes):
    made = config.base(
        model="simple_conv",
        data="digits",
        optim={"learning_rate": 0.05},
        train={
            "duration": "12 steps",
            "batch_size": 16,
            "log_every": "4 steps",
            "eval_every": "4 steps",
            "checkpoint_every": "4 steps",
        },
        eval={"batch_size": 128},
        defence={"name": name, "eps": EPS, "steps": 3, "replays": 3},
    )
    small = {"model.widths": (8,), "model.hidden": 16, "model.norm": "batch"}
    return config.resolve(config.override(made, small | changes, "t"), "t")


def program_of(made):
    split = run.load_split(made, "train")
    return PROGRAMS.get(made, split.info, config.program(made))


def train(made, folder, **kwargs):
    return run.train([run.Job(made, folder, "r")], programs=PROGRAMS, **kwargs)[0]


def one_step(made, at=0, state=None):
    """The state before and after update `at`, and the batch."""
    split, program = run.load_split(made, "train"), program_of(made)
    stream = run.make_stream(made, split)
    hyper = optim.hyper(made, examples=len(stream.train))
    before = program.init(made.seed, hyper) if state is None else state
    indices = stream.batch(at)
    after, _ = program.train_step(
        jax.tree.map(jnp.copy, before), split.fed(indices), jnp.int32(0), hyper
    )
    images = split.get(indices).images.astype(np.float32) / 255
    return before, after, (jnp.asarray(images), split.labels[indices]), hyper


def linear(weights):
    return lambda x: x.reshape(len(x), -1) @ weights


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd_at", "trades", "mart", "fast"])
def test_images_stay_in_the_ball_and_raise_the_loss_that_they_should(name, norm):
    made = recipe(name, **{"defence.norm": norm})
    hyper = optim.hyper(made, examples=1000)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((20, 4, 4, 1)), jnp.float32)
    targets = jax.nn.one_hot(rng.integers(10, size=20), 10)
    models = [linear(jnp.asarray(rng.normal(size=(16, 10)), jnp.float32)) for _ in range(2)]
    found = defence.perturb(made, jax.random.key(0), tuple(models), images, targets, hyper)
    delta = np.float64(np.asarray(found)) - np.float64(np.asarray(images))
    size = np.abs(delta).max((1, 2, 3)) if norm == "linf" else np.sqrt((delta**2).sum((1, 2, 3)))
    assert size.max() <= np.float64(np.float32(EPS))
    assert found.min() >= 0
    assert found.max() <= 1
    # In training mode or, of TRADES and MART, in evaluation mode; TRADES away from what it says.

    def gained(model):
        aim = jax.nn.softmax(model(images)) if name == "trades" else targets
        return defence.cross_entropy(model(found), aim) - defence.cross_entropy(model(images), aim)

    meant, other = models[::-1] if name in ("trades", "mart") else models
    assert gained(meant).min() > 0 or name == "fast"  # whose one step may overshoot
    assert gained(meant).mean() > max(0.01, 2 * gained(other).mean())


def test_adversarial_training_uses_the_attack_of_the_same_name():
    made = recipe("pgd_at")
    hyper = optim.hyper(made, examples=1000)
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.random((9, 4, 4, 1)), jnp.float32), jnp.arange(9)
    model = linear(jnp.asarray(rng.normal(size=(16, 10)), jnp.float32))
    key = jax.random.key(3)
    own_keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys.per_example(key, 9))
    found = defence.perturb(
        made, own_keys, (model, model), images, jax.nn.one_hot(labels, 10), hyper
    )
    attack = attacks.create("pgd", eps=EPS, steps=3, best=False)
    np.testing.assert_allclose(found, attack(key, model, images, labels), atol=1e-6)


def test_losses_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    clean, adversarial = rng.normal(size=(2, 30, 5)) * 3
    labels = rng.integers(5, size=30)
    adversarial[0, labels[0]] = 60.0  # sure beyond what float32 probabilities tell
    p, q = softmax(clean, 1), softmax(adversarial, 1)
    log_p, log_q = log_softmax(clean, axis=1), log_softmax(adversarial, axis=1)
    rows = np.arange(30)
    kl = (p * (log_p - log_q)).sum(1)
    others = np.where(np.arange(5)[None] == labels[:, None], -1, q)
    largest = others.argmax(1)
    mart = -log_q[rows, labels] - np.log1p(-q[rows, largest]) + 5 * kl * (1 - p[rows, labels])
    pair = jnp.asarray(clean, jnp.float32), jnp.asarray(adversarial, jnp.float32)
    found = defence.mart(jax.nn.one_hot(labels, 5), *pair, jnp.float32(5))
    np.testing.assert_allclose(found, mart, rtol=2e-5, atol=2e-5)
    loss = defence.trades(jnp.asarray(-log_p[rows, labels], jnp.float32), *pair, jnp.float32(6))
    np.testing.assert_allclose(loss, -log_p[rows, labels] + 6 * kl, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_running_statistics_are_moved_by_the_passes_of_the_update_alone(name):
    made = recipe(name)
    before, after, (images, labels), hyper = one_step(made)
    program = program_of(made)
    info = run.load_split(made, "train").info
    mean, std = (np.asarray(x, np.float32)[None, None, None] for x in (info.mean, info.std))

    def passed(stats, x):
        named = {"params": before.params, "batch_stats": stats}
        outputs, moved = program.module.apply(
            named, (x - mean) / std, train=True, mutable=["batch_stats"]
        )
        return outputs.logits, moved["batch_stats"]

    shifted = defence.perturb(
        made,
        keys.key(0, "attack", 0),
        (
            lambda x: passed(before.batch_stats, x)[0],
            lambda x: program.logits_of((before.params, before.batch_stats), x),
        ),
        images,
        jax.nn.one_hot(labels, 10),
        hyper,
    )
    stats = before.batch_stats
    for x in [images, shifted] if name == "trades" else [shifted]:
        _, stats = passed(stats, x)
    for ours, expected in zip(
        jax.tree.leaves(after.batch_stats), jax.tree.leaves(stats), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_weights_move_up_the_gradient_by_a_part_of_their_norm():
    params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.array([1.0, 2.0])}
    slope = jnp.array([[0.0, 2.0], [0.0, 0.0]])
    moved = defence.move_weights(
        lambda p: (p["kernel"] * slope).sum() + p["bias"].sum(), params, jnp.float32(0.01)
    )
    np.testing.assert_allclose(moved["kernel"], [[3.0, 0.05], [0.0, 4.0]], rtol=1e-6)
    np.testing.assert_array_equal(moved["bias"], params["bias"])


def test_weight_perturbation_updates_the_weights_that_were_not_moved():
    plain, moved = recipe("pgd_at"), recipe("pgd_at", **{"defence.awp": 1e-7})
    assert config.program(plain) != config.program(moved)
    _, one, _, _ = one_step(plain)
    _, other, _, _ = one_step(moved)
    _, far, _, _ = one_step(recipe("pgd_at", **{"defence.awp": 0.5}))

    def apart(a, b):
        pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
        return max(np.abs(x - y).max() for x, y in pairs)

    assert apart(one, other) < 1e-5
    assert apart(one, far) > 1e-3
    # Without a learning rate nothing is left of the perturbation, however large.
    still = {"defence.awp": 0.5, "optim.learning_rate": 0.0}
    before, after, _, _ = one_step(recipe("pgd_at", **still))
    assert apart(before, after) == 0


def test_free_keeps_its_perturbation_and_replays_the_batch():
    made = recipe("free")
    split = run.load_split(made, "train")
    stream = run.make_stream(made, split)
    np.testing.assert_array_equal(stream.batch(0), stream.batch(2))
    assert not np.array_equal(stream.batch(2), stream.batch(3))
    np.testing.assert_array_equal(stream.batch(3), run.make_stream(recipe("fast"), split).batch(1))
    program, state = program_of(made), None
    kept = np.zeros((16, 8, 8, 1), np.float32)
    for at in range(4):
        before, state, (images, labels), _ = one_step(made, at, state)
        np.testing.assert_allclose(before.opt_state[1], kept, atol=1e-7)

        def loss(x, before=before, labels=labels):
            info = split.info
            outputs, _ = program.module.apply(
                {"params": before.params, "batch_stats": before.batch_stats},
                (x - np.float32(info.mean[0])) / np.float32(info.std[0]),
                train=True,
                mutable=["batch_stats"],
            )
            return defence.cross_entropy(outputs.logits, jax.nn.one_hot(labels, 10)).mean()

        uphill = jax.grad(loss)(jnp.clip(images + kept, 0, 1))
        kept = np.clip(kept + EPS * np.sign(uphill), -np.float32(EPS), np.float32(EPS))
        # Where the slope is zero but for rounding its sign is no one's.
        near = np.abs(uphill) < 1e-6
        kept = np.where(near, state.opt_state[1], kept)


def test_strengths_share_one_compilation_and_resuming_is_exact(tmp_path):
    whole = recipe("free")
    assert config.program(whole) == config.program(
        recipe("free", **{"defence.eps": 0.3, "defence.relative_step": 2.0})
    )
    results = [train(whole, tmp_path / "whole")]
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 7

    with pytest.raises(loop.Interrupted):
        train(whole, tmp_path / "parts", should_stop=stop)
    results.append(train(whole, tmp_path / "parts"))
    assert results[0]["parameters_sha256"] == results[1]["parameters_sha256"]
    assert results[0]["curves"] == results[1]["curves"]
    train(recipe("free", **{"defence.eps": 0.3}), tmp_path / "stronger")
    assert program_of(whole).traces == 1


def test_runs_trained_together_are_those_trained_alone(tmp_path):
    made = [recipe("free", seed=seed) for seed in range(2)]
    jobs = [run.Job(each, tmp_path / f"t{each.seed}", "r") for each in made]
    together = run.train(jobs, programs=PROGRAMS)
    for each, one in zip(made, together, strict=True):
        solo = train(each, tmp_path / f"s{each.seed}")
        assert solo["curves"][0].keys() == one["curves"][0].keys()
        np.testing.assert_allclose(
            list(solo["curves"][0].values()), list(one["curves"][0].values()), rtol=2e-2, atol=1e-2
        )


def test_one_device_and_eight_agree():
    changes = {"defence.norm": "l2", "defence.eps": 0.5, "model.activation": "gelu"}
    states = []
    for devices in (1, 8):
        made = recipe("trades", **changes, **{"parallel.devices": devices, "eval.batch_size": 128})
        states.append(one_step(made)[1])
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_fast_training_withstands_what_standard_training_does_not(tmp_path):
    accuracies = {}
    for name in ("none", "fast"):
        made = config.base(
            model="lenet5_modern",
            data={"name": "fashion_mini", "validation": 0.04},
            optim={"name": "adamw", "learning_rate": 0.01, "schedule": "one_cycle"},
            train={"duration": "2 epochs", "eval_every": "2 epochs", "monitor": "robust"},
            defence={"name": name, "eps": EPS},
            eval={"attack": f"pgd_20(eps={EPS})"},
        )
        result = train(config.resolve(made, "t"), tmp_path / name)
        accuracies[name] = result["curves"][-1]["validation/robust"]
        assert result.get("overfitted_step") is None
    assert accuracies["fast"] >= accuracies["none"] + 0.25


def test_catastrophic_overfitting_is_told_from_robustness_and_from_failure():
    assert defence.overfitted(own=0.95, stronger=0.02)
    assert not defence.overfitted(own=0.75, stronger=0.68)
    assert not defence.overfitted(own=0.9, stronger=0.6)  # weaker, but no collapse
    assert not defence.overfitted(own=0.1, stronger=0.0)  # nothing was learnt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defence.name": "trade"}, r"defence\.name: expected one of .*did you mean 'trades'"),
        ({"defence.name": "free", "defence.norm": "l2"}, r"'free' expects defence\.norm='linf'"),
        ({"defence.name": "free", "defence.awp": 0.01}, r"'free' expects .*got 'linf' and 0\.01"),
        ({"defence.name": "mart", "task.label_smoothing": 0.1}, r"'mart' has a loss of its own"),
        ({"defence.name": "mart", "model.aux": ("stage1",)}, r"'mart' has a loss of its own"),
        (
            {
                "defence.name": "fast",
                "task.consistency": 12.0,
                "augment.transforms": ("augmix",),
            },
            r"defence\.name='fast' and task\.consistency both replace",
        ),
        ({"defence.eps": -1}, r"defence\.eps: expected a number of at least 0"),
        ({"defence.eps": "1/0"}, r"defence\.eps: expected a number, got '1/0'"),
        ({"train.monitor": "robust"}, r"train\.monitor='robust' needs an attack"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(CnnlabError, match=message):
        recipe("none", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"defence.name": "mart", "augment.transforms": ("mixup",)},
            r"'mart' expects hard labels, but augment\.transforms mixes them",
        ),
        ({"eval.attack": "pdg(eps=0.1)"}, r"eval\.attack: unknown attack 'pdg'"),
        ({"eval.attack": "pgd"}, r"eval\.attack: expected an attack with its strength"),
    ],
)
def test_what_can_not_be_built_is_refused(changes, message):
    made = recipe("none", **changes)
    with pytest.raises(CnnlabError, match=message):
        step.make_program(made, run.load_split(made, "train").info)


def test_fractions_are_read_and_earlier_runs_stay_what_they_are():
    made = recipe("none", **{"defence.eps": "8/255"})
    assert made.defence.eps == 8 / 255
    plain = config.plain(config.resolve(config.base(), "t"))
    assert "defence" not in plain
    assert "attack" not in plain["eval"]
    assert config.resolve(config.from_plain(plain), "t").defence.name == "none"


def test_a_provoked_catastrophic_overfitting_is_detected(tmp_path):
    """By single steps as long as the ball is wide, in a large ball."""
    seen = []
    made = recipe("fast", **{
        "defence.eps": 0.4,
        "defence.relative_step": 2.0,
        "model.widths": (32,),
        "model.hidden": 128,
        "model.norm": "none",
        "optim.learning_rate": 0.1,
        "train.batch_size": 64,
        "train.duration": "200 steps",
        "train.eval_every": "100 steps",
        "train.log_every": "200 steps",
    })  # fmt: skip
    job = run.Job(made, tmp_path / "run", "r", {"overfitting": (seen.append,)})
    result = run.train([job], programs=PROGRAMS)[0]
    assert result["overfitted_step"] == 100
    assert [event.step for event in seen] == [100]
    last = result["curves"][-1]
    assert last["train/robust_own"] > 0.4
    assert last["train/robust_stronger"] < 0.1
