"""The compiled functions of a run: initial state, one update, and logits.

All are pure. Whatever may differ between runs of one program (seed, data order, numbers of `Hyper`)
is an argument, so one compilation serves them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cnnlab import attacks, augment, backend, keys, layers, models, parallel, registry
from cnnlab import config as config_lib
from cnnlab.evaluation import robustness
from cnnlab.pipeline import Fed
from cnnlab.training import defence, optim, strategies
from cnnlab.types import (
    Batch,
    CnnlabError,
    DatasetInfo,
    Hyper,
    Metrics,
    Outputs,
    PyTree,
    TrainState,
)

_Passed = tuple[Outputs, Outputs | None, PyTree]
"""Outputs on what is trained on, on clean images where both are seen, and moved statistics."""


@dataclasses.dataclass
class Program:
    """The functions that all runs of one cohort share.

    Attributes:
        module: the network; takes normalised images.
        mesh: the devices.
        init: (seed, hyper) -> TrainState, on the devices of the mesh.
        train_step: (state, fed, seed, hyper) -> (state, metrics); `fed` (`pipeline.Fed`) gives the
            batch, metrics are [M, 2] float32, the (sum, count) of each of `metric_names`. Donates
            `state`.
        sharded: whether the state lies in parts on the devices of the mesh.
        together: (strategy, how many) -> the same for several runs; see `strategies`.
        stack: states -> one state with a leading axis.
        logits: (params, batch_stats, fed) -> [E, K] float32, in evaluation mode.
        logits_of: ((params, batch_stats), images [B, H, W, C] in [0, 1]) -> [B, K] float32, in
            evaluation mode; not compiled: attacks differentiate and compile it.
        attacked: purpose -> (params, batch_stats, fed, seed, hyper) -> logits [E, K] of attacked
            images: `validation` (`eval.attack`) and, to see catastrophic overfitting, `own` and
            `stronger`; see `defence`.
        metric_names: the rows of the metrics of `train_step`; known once it has been traced.
        traces: how often `train_step` has been traced; 1 however many runs share the program.
        compiled: by which strategy, and of how many runs at once, there are compiled updates.
        figures: of how many runs at once `strategies` were measured, and what was found.
    """

    module: nn.Module
    mesh: Mesh
    init: Callable[[int, Hyper], TrainState]
    train_step: Callable[..., tuple[TrainState, jax.Array]]
    sharded: bool
    together: Callable[[str, int], strategies.Together]
    stack: Callable[[Sequence[TrainState]], TrainState]
    logits: Callable[..., jax.Array]
    logits_of: Callable[[PyTree, jax.Array], jax.Array]
    attacked: dict[str, Callable[..., jax.Array]]
    metric_names: tuple[str, ...] = ()
    traces: int = 0
    compiled: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    figures: dict[int, dict[str, float | str]] = dataclasses.field(default_factory=dict)

    def has_run(self, strategy: str, members: int) -> bool:
        """Whether such an update was made before; from now on it counts as made."""
        known = (strategy, members) in self.compiled
        self.compiled.add((strategy, members))
        return known


def make_program(config: ConfigDict, info: DatasetInfo) -> Program:
    """Builds the functions; nothing is compiled until they are called.

    Args:
        config: a resolved config; only its static settings matter.
        info: the data set.

    Raises:
        CnnlabError: the model does not fit the images, or the batch the devices.
    """
    mesh = parallel.make_mesh(config.parallel.devices)
    parallel.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
    if config.train.batch_size % (config.train.accumulate * mesh.size):
        raise CnnlabError(
            f"train.accumulate: {config.train.accumulate} pieces on {mesh.size} device(s) must "
            f"divide train.batch_size, which is {config.train.batch_size}"
        )
    parallel.check_batch_size(config.eval.batch_size, mesh, "eval.batch_size")
    task = registry.get("tasks", config.task.name).module
    fields = {key: value for key, value in config.model.items() if key != "name"}
    module = models.create(config.model.name, num_outputs=task.output_channels(info), **fields)
    transforms = tuple(config.augment.transforms)
    transform, soft = augment.compose(transforms), augment.soft_labels(transforms)
    defence.check_labels(config, soft)
    guard, perturbed_weights = config.defence.name, config.defence.awp > 0
    pieces = config.train.accumulate
    consistent = config.task.consistency > 0
    if consistent:  # the last one, augmix, makes the views
        transform, mix = augment.compose(transforms[:-1]), augment.compose(transforms[-1:])
    mean, std = (np.asarray(x, np.float32) for x in (info.mean, info.std))
    everywhere, split = parallel.replicated(mesh), parallel.split_batch(mesh)

    def normalise(images: jax.Array) -> jax.Array:
        return (images - mean[None, None, None]) / std[None, None, None]

    def pixels(fed: Fed) -> jax.Array:
        images, indices = fed.images, fed.indices
        if indices is not None:
            if mesh.size > 1:
                indices = parallel.constrain(indices, split)
            images = images[indices]
        return images.astype(jnp.float32) / 255

    def labels_of(fed: Fed) -> jax.Array:
        return fed.labels if fed.indices is None else fed.labels[fed.indices]

    def init_state(variables: PyTree, hyper: Hyper) -> TrainState:
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        rate = optim.learning_rate(config.optim.schedule, jnp.int32(0), hyper)
        opt_state = optim.optimizer(config, hyper, rate).init(params)
        if guard == "free":
            opt_state = (opt_state, jnp.zeros((config.train.batch_size, *info.image_shape)))
        return TrainState(
            step=jnp.int32(0),
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=averaged(params, batch_stats) if config.optim.ema_decay > 0 else None,
        )

    def averaged(params: PyTree, batch_stats: PyTree) -> PyTree:
        return {"params": params, "batch_stats": batch_stats}

    # In parts, or as it is: of one device there is but one part.
    sharded = config.parallel.state == "sharded" and mesh.size > 1

    def part(tree: PyTree) -> PyTree:
        return parallel.constrain(tree, parallel.parts(tree, mesh)) if sharded else tree

    def whole(tree: PyTree) -> PyTree:
        return parallel.constrain(tree, everywhere) if sharded else tree

    laid = None if sharded else everywhere
    place = jax.jit(lambda *given: part(init_state(*given)), out_shardings=laid)

    def init(seed: int, hyper: Hyper) -> TrainState:
        # Lazily: only the initialisers run, op by op, which compiles far faster than a jitted init.
        rngs = {"params": keys.key(seed, "params"), "dropout": keys.key(seed, "dropout")}
        example = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
        return place(module.lazy_init(rngs, example, train=True), hyper)

    def forward(
        params: PyTree, batch_stats: PyTree, images: jax.Array, dropout_key: jax.Array
    ) -> tuple[Outputs, PyTree]:
        with layers.statistics_of_parts(config.train.sub_batches):
            outputs, updated = module.apply(
                {"params": params, "batch_stats": batch_stats},
                normalise(images),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
        return outputs, updated.get("batch_stats", {})

    def train_step(
        state: TrainState,
        fed: Fed,
        seed: jax.Array,
        hyper: Hyper,
    ) -> tuple[TrainState, jax.Array]:
        program.traces += 1
        held = state.params  # what the optimizer moves
        state = dataclasses.replace(state, params=whole(held), batch_stats=whole(state.batch_stats))
        targets = labels_of(fed)
        if soft:
            targets = jax.nn.one_hot(targets, info.num_classes)
        batch = Batch(pixels(fed), targets, jnp.ones(len(targets)))
        shown = state.step // config.defence.replays if guard == "free" else state.step
        numbers, key = hyper["augment.transforms"], keys.key(seed, "augment", shown)
        views: tuple[jax.Array, ...] = ()
        if consistent:
            shared = len(numbers) - mix.count
            batch = transform(key, batch, numbers[:shared])
            views = tuple(
                mix(keys.key(seed, f"view{i}", state.step), batch, numbers[shared:]).images
                for i in range(2)
            )
        else:
            batch = transform(key, batch, numbers)
        decay = optim.aux_decay(config.task.aux_schedule, state.step, hyper)
        scheduled = Hyper(hyper.values | {"task.aux_weight": hyper["task.aux_weight"] * decay})
        dropout_key, attack_key = (
            keys.key(seed, stream, state.step) for stream in ("dropout", "attack")
        )
        opt_state, kept = state.opt_state if guard == "free" else (state.opt_state, None)
        seen = (batch, views, kept)
        if pieces == 1:
            given = (state.batch_stats, *seen, dropout_key, attack_key)
            gradients, batch_stats, kept, measured = learn(state.params, *given, scheduled)
        else:

            def one(
                carried: tuple[PyTree, PyTree], piece: tuple[jax.Array, tuple[Any, Any, Any]]
            ) -> tuple[tuple[PyTree, PyTree], tuple[jax.Array | None, Metrics]]:
                number, seen = piece
                of_dropout, of_attack = (
                    jax.random.fold_in(key, number) for key in (dropout_key, attack_key)
                )
                given = (carried[1], *seen, of_dropout, of_attack)
                gradients, batch_stats, kept, measured = learn(state.params, *given, scheduled)
                total = jax.tree.map(lambda a, b: a + b / pieces, carried[0], part(gradients))
                return (total, batch_stats), (kept, measured)

            nothing = part(jax.tree.map(jnp.zeros_like, state.params))
            (gradients, batch_stats), (kept, measured) = jax.lax.scan(
                one,
                (nothing, state.batch_stats),
                (jnp.arange(pieces), jax.tree.map(cut, seen)),
            )
            measured = jax.tree.map(lambda x: x.sum(0), measured)
            kept = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), kept)
        rate = optim.learning_rate(config.optim.schedule, state.step, hyper)
        updates, opt_state = optim.optimizer(config, hyper, rate).update(
            part(gradients), opt_state, held
        )
        if guard == "free":
            opt_state = (opt_state, kept)
        params = optax.apply_updates(held, updates)
        ema = state.ema
        if ema is not None:
            # Statistics of the averaged network's activations are averaged like its parameters.
            current = averaged(params, batch_stats)
            ema = optim.average(ema, current, state.step, hyper["optim.ema_decay"])
        measured["learning_rate"] = (rate, jnp.ones(()))
        program.metric_names = tuple(head_names(name) for name in measured)
        packed = jnp.stack([jnp.stack(pair) for pair in measured.values()])
        return part(TrainState(state.step + 1, params, batch_stats, opt_state, ema)), packed

    def cut(x: jax.Array) -> jax.Array:
        """[B, ...] to [pieces, B / pieces, ...], each piece spread over all devices as it lies."""
        return jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0)

    def learn(
        params: PyTree,
        batch_stats: PyTree,
        batch: Batch,
        views: tuple[jax.Array, ...],
        kept: jax.Array | None,
        dropout_key: jax.Array,
        attack_key: jax.Array,
        hyper: Hyper,
    ) -> tuple[PyTree, PyTree, jax.Array | None, Metrics]:
        """What the optimizer needs of some examples.

        Args:
            params: the parameters.
            batch_stats: the running statistics.
            batch: the examples.
            views: their further draws, of AugMix's consistency loss.
            kept: the perturbation of the defence `free`.
            dropout_key: of the network.
            attack_key: of the defence.
            hyper: as of this step.

        Returns:
            The gradients of the mean loss, the moved statistics, the moved perturbation and the
            metrics.
        """
        size = len(batch.labels)
        hard = batch.labels.ndim == 1
        probabilities = jax.nn.one_hot(batch.labels, info.num_classes) if hard else batch.labels
        shifted = jnp.concatenate([batch.images, *views])  # what the network is trained on
        if kept is not None:
            shifted = jnp.clip(batch.images + kept, 0, 1)
        elif guard != "none":
            shifted = defence.perturb(
                config,
                attack_key,
                (
                    lambda x: forward(params, batch_stats, x, dropout_key)[0].logits,
                    lambda x: logits_of((params, batch_stats), x),
                ),
                shifted,
                probabilities,
                hyper,
            )

        def objective(params: PyTree, shifted: jax.Array) -> tuple[jax.Array, _Passed]:
            moved, clean = batch_stats, None
            if guard in ("trades", "mart"):
                clean, moved = forward(params, moved, batch.images, dropout_key)
            outputs, moved = forward(params, moved, shifted, dropout_key)
            if consistent:
                logits = outputs.logits.reshape(3, size, -1)
                outputs = jax.tree.map(lambda x: x[:size], outputs)
                losses = task.loss(outputs, batch, hyper)
                losses += hyper["task.consistency"] * task.consistency(logits)
            elif clean is None:
                losses = task.loss(outputs, batch, hyper)
            else:
                pair, beta = (clean.logits, outputs.logits), hyper["defence.beta"]
                if guard == "trades":
                    losses = defence.trades(task.loss(clean, batch, hyper), *pair, beta)
                else:
                    losses = defence.mart(probabilities, *pair, beta)
            mean = (losses * batch.weights).sum() / batch.weights.sum()
            return mean, (outputs, clean, moved)

        if perturbed_weights:
            params = defence.move_weights(
                lambda p: objective(p, shifted)[0], params, hyper["defence.awp"]
            )
        (loss, (outputs, clean, moved)), gradients = jax.value_and_grad(
            objective, argnums=(0, 1) if kept is not None else 0, has_aux=True
        )(params, shifted)
        if kept is not None:
            gradients, uphill = gradients
            eps = hyper["defence.eps"]
            kept += defence.length(config, hyper) * eps * jnp.sign(uphill)
            kept = jnp.clip(kept, -eps, eps)
        count = batch.weights.sum()
        measured = {"loss": (loss * count, count)} | task.metrics(outputs, batch)
        if clean is not None:
            measured |= {f"clean/{k}": v for k, v in task.metrics(clean, batch).items()}
        return gradients, moved, kept, measured

    def logits(params: PyTree, batch_stats: PyTree, fed: Fed) -> jax.Array:
        return logits_of((params, batch_stats), pixels(fed))

    def logits_of(variables: PyTree, images: jax.Array) -> jax.Array:
        params, batch_stats = variables
        named = {"params": params, "batch_stats": batch_stats}
        outputs: Any = module.apply(named, normalise(images), train=False)
        return outputs.logits

    def attacked_logits(make: Callable[[Hyper], attacks.Attack], purpose: str) -> Any:
        def run(
            params: PyTree,
            batch_stats: PyTree,
            fed: Fed,
            seed: jax.Array,
            hyper: Hyper,
        ) -> jax.Array:
            model = functools.partial(logits_of, (params, batch_stats))
            key = keys.key(seed, f"attack of {purpose}")
            return model(make(hyper)(key, model, pixels(fed), labels_of(fed)))

        return backend.jit(run, out_shardings=everywhere)

    attacked: dict[str, Callable[[Hyper], attacks.Attack]] = {}
    if config.eval.attack:
        try:
            name, given = robustness.parse(config.eval.attack)
        except CnnlabError as error:
            raise CnnlabError(f"eval.attack: {error}") from None
        attacked["validation"] = lambda _: attacks.create(name, **given)
    if defence.single_step(config):
        for each in (defence.own, defence.stronger):
            attacked[each.__name__] = functools.partial(each, config)

    heads = config_lib.auxiliary_heads(config)

    def head_names(metric: str) -> str:
        """`aux0/top1` to `aux_stage1/top1`."""
        head, _, name = metric.rpartition("/")
        before, found, number = head.rpartition("aux")
        return f"{before}{heads[int(number)]}/{name}" if found else metric

    program = Program(
        module=module,
        mesh=mesh,
        init=init,
        train_step=backend.jit(
            train_step, often=True, donate_argnums=0, out_shardings=(laid, everywhere)
        ),
        sharded=sharded,
        together=functools.cache(
            lambda strategy, members: strategies.combine(strategy, members, train_step, mesh)
        ),
        stack=jax.jit(
            lambda states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=everywhere
        ),
        logits=backend.jit(logits, out_shardings=everywhere),
        logits_of=logits_of,
        attacked={purpose: attacked_logits(make, purpose) for purpose, make in attacked.items()},
    )
    return program


class Programs:
    """The programs built so far in this process, found by what they depend on."""

    def __init__(self) -> None:
        self._programs: dict[str, Program] = {}

    def get(self, config: ConfigDict, info: DatasetInfo, key: str) -> Program:
        """The program of a resolved config; `key` is its `config.program`."""
        if key not in self._programs:
            self._programs[key] = make_program(config, info)
        return self._programs[key]

    def __iter__(self) -> Any:
        return iter(self._programs.values())
