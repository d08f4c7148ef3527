"""Learning-rate schedules and optimizers as pure functions of traced numbers.

Every number comes from `Hyper`, so the optimizer is built anew inside each traced step and no value
is baked into the program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from cnnlab import config as config_lib
from cnnlab import registry
from cnnlab.types import CnnlabError, Hyper, PyTree


def hyper(config: ConfigDict, *, examples: int) -> Hyper:
    """All traced numbers of a resolved config, durations in steps.

    Args:
        config: a resolved config.
        examples: how many examples an epoch has.

    Raises:
        CnnlabError: the warm-up is as long as the run.
    """
    values: dict[str, np.ndarray] = {}
    batch_size = config.train.batch_size
    for section, fields in config_lib.FIELDS.items():
        for name, field in fields.items():
            if field.role == "traced":
                value = config[section][name]
                if field.plugin == "augment":
                    calls = [registry.call("augment", text) for text in value]
                    value = [number for made in calls for number in made.numbers]
                if field.duration:
                    duration = config_lib.Duration.parse(value)
                    value = duration.steps(batch_size=batch_size, examples=examples)
                values[f"{section}.{name}"] = np.asarray(value, np.float32)
    heads = (len(config_lib.auxiliary_heads(config)),)
    values["task.aux_weight"] = np.broadcast_to(values["task.aux_weight"], heads)
    values["train.steps"] = np.asarray(
        config_lib.parse_duration(config, "train.duration").steps(
            batch_size=batch_size, examples=examples
        ),
        np.float32,
    )
    if values["optim.warmup"] >= values["train.steps"]:
        raise CnnlabError(
            f"optim.warmup: expected less than the {values['train.steps']:.0f} steps of "
            f"train.duration {config.train.duration!r}, got {config.optim.warmup!r} "
            f"({values['optim.warmup']:.0f} steps)"
        )
    return Hyper({key: jnp.array(value) for key, value in values.items()})


def learning_rate(kind: str, step: jax.Array, hyper: Hyper) -> jax.Array:
    """The learning rate of update `step` (the first is 0); float32 scalar.

    With T steps in all, w of them warm-up, and p = (step - w) / (T - w):

    - warm-up: peak · (step + 1) / w, for step < w;
    - `constant`: peak;
    - `step`: peak · factor^(milestones m with m·T <= step) (He et al. 2016);
    - `cosine`: from peak to final·peak by (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017);
    - `one_cycle`: from initial·peak up to peak over the first `rise` of the run, then down to
      final·peak, both by half a cosine (Smith & Topin 2018);
    - `wsd`: peak, then linearly down to final·peak over the last `decay` of what follows the
      warm-up: warm-up, stable, decay (Hu et al. 2024).
    """
    step = jnp.asarray(step, jnp.float32)
    peak, total = hyper["optim.learning_rate"], hyper["train.steps"]
    warmup, final = hyper["optim.warmup"], hyper["optim.final"]
    p = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    falling = lambda x: (1 + jnp.cos(jnp.pi * x)) / 2  # noqa: E731
    if kind == "constant":
        part = jnp.ones(())
    elif kind == "step":
        passed = (hyper["optim.milestones"] * total <= step).sum()
        part = hyper["optim.factor"] ** passed
    elif kind == "cosine":
        part = final + (1 - final) * falling(p)
    elif kind == "one_cycle":
        rise, initial = hyper["optim.rise"], hyper["optim.initial"]
        up = initial + (1 - initial) * (1 - falling(p / jnp.maximum(rise, 1e-9)))
        down = final + (1 - final) * falling((p - rise) / jnp.maximum(1 - rise, 1e-9))
        part = jnp.where(p < rise, up, down)
    elif kind == "wsd":
        left = jnp.clip((1 - p) / jnp.maximum(hyper["optim.decay"], 1e-9), 0.0, 1.0)
        part = final + (1 - final) * left
    else:
        raise ValueError(f"unknown schedule {kind!r}")
    warming = (step + 1) / jnp.maximum(warmup, 1.0)
    return peak * jnp.where(step < warmup, warming, part)


def aux_decay(kind: str, step: jax.Array, hyper: Hyper) -> jax.Array:
    """What the weights of the auxiliary losses are multiplied by at update `step`, 1 to 0.

    Lee et al. 2015 (section 2.2) let the companion losses vanish as training goes on; GoogLeNet
    keeps them.
    """
    p = jnp.asarray(step, jnp.float32) / hyper["train.steps"]
    if kind == "constant":
        return jnp.ones(())
    if kind == "linear":
        return 1 - p
    if kind == "cosine":
        return (1 + jnp.cos(jnp.pi * p)) / 2
    raise ValueError(f"unknown schedule of auxiliary weights {kind!r}")


def decayed(params: PyTree) -> PyTree:
    """Which parameters weight decay applies to: kernels, not biases, scales and offsets.

    These are the arrays of two or more axes (Goyal et al. 2017, section 5.3).
    """
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def optimizer(config: ConfigDict, hyper: Hyper, rate: jax.Array) -> optax.GradientTransformation:
    """The optimizer of a config with all its numbers traced.

    Args:
        config: reads `optim.name`, `optim.nesterov`, and whether `optim.clip_norm` is above 0.
        hyper: the numbers.
        rate: the learning rate of this step.
    """
    decay = optax.add_decayed_weights(hyper["optim.weight_decay"], mask=decayed)
    descend = optax.scale_by_learning_rate(rate)
    beta1, beta2 = hyper["optim.beta1"], hyper["optim.beta2"]
    adam = optax.scale_by_adam(beta1, beta2, hyper["optim.epsilon"])
    chains = {
        "sgd": (
            decay,
            optax.trace(hyper["optim.momentum"], nesterov=config.optim.nesterov),
            descend,
        ),
        "adam": (decay, adam, descend),
        "adamw": (adam, decay, descend),
        "lamb": (adam, decay, optax.scale_by_trust_ratio(), descend),
        "lion": (optax.scale_by_lion(beta1, beta2), decay, descend),
    }
    clip = (
        (optax.clip_by_global_norm(hyper["optim.clip_norm"]),) if config.optim.clip_norm > 0 else ()
    )
    return optax.chain(*clip, *chains[config.optim.name])


def average(ema: PyTree, current: PyTree, step: jax.Array, decay: jax.Array) -> PyTree:
    """The exponential moving average of a tree after update `step`.

    The decay is min(decay, (1 + step) / (10 + step)), so that the first, random, parameters do not
    weigh on short runs (as TensorFlow's ExponentialMovingAverage has it).
    """
    step = jnp.asarray(step, jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, ema, current)
