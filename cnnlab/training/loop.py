"""The training loop, and nothing else: updates, log lines, evaluations, checkpoints, stopping."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cnnlab import config as config_lib
from cnnlab import record
from cnnlab.checkpoint import Checkpoints
from cnnlab.evaluation import scores
from cnnlab.pipeline import Split, Stream
from cnnlab.record import RunFolder
from cnnlab.training import optim
from cnnlab.training.step import Program
from cnnlab.types import CnnlabError, PyTree, TrainState

# Metrics are read this many steps late, so that the host never waits for the newest step.
LAG = 2


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened in a run; callbacks take one.

    Attributes:
        name: `start`, `step`, `log`, `eval`, `checkpoint`, `stop` or `end`.
        step: updates done.
        steps: updates in all.
        metrics: of this event: `loss` at `step`; the new line at `log`; the validation scores at
            `eval`; empty elsewhere.
        state: the training state; its buffers live until the callback returns.
    """

    name: str
    step: int
    steps: int
    metrics: Mapping[str, float]
    state: TrainState


Callbacks = Mapping[str, Sequence[Callable[[Event], None]]]
"""Event name -> functions called in order."""


class Interrupted(Exception):  # noqa: N818 - no error
    """The run was asked to stop; it has a checkpoint at its last step."""


@dataclasses.dataclass
class Note:
    """The loop's own bookkeeping, saved with each checkpoint.

    Attributes:
        sums: metric -> [sum, count] since the last log line.
        best: the best monitored value so far, and
        best_step: the step that had it.
        waited: evaluations since then.
        seconds: training time so far.
        code: the code and JAX versions that trained it, in order.
        data: fingerprint of the training split.
    """

    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    seconds: float = 0.0
    code: list[str] = dataclasses.field(default_factory=list)
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        state: the state after the last update.
        note: the loop's bookkeeping at that point.
        diverged_step: the first update whose loss (or after which a validation logit) was not
            finite, or `None`.
    """

    state: TrainState
    note: Note
    diverged_step: int | None


class _Diverged(Exception):  # noqa: N818 - no error
    """Carries the step out of the loop."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def due(step: int, every: config_lib.Duration, *, batch_size: int, examples: int) -> bool:
    """Whether update `step` (the first is 1) completes another period of this length.

    A period shorter than a step counts as one step.
    """
    unit = {"steps": batch_size, "epochs": examples, "examples": 1}[every.unit]
    period = max(unit * every.count, batch_size)
    before, after = ((s * batch_size + 1e-6) // period for s in (step - 1, step))
    return bool(after > before)


def scored(state: TrainState) -> tuple[PyTree, PyTree]:
    """The parameters and batch statistics that count: the averages where there are any."""
    if state.ema is None:
        return state.params, state.batch_stats
    return state.ema["params"], state.ema["batch_stats"]


def fit(
    config: ConfigDict,
    program: Program,
    split: Split,
    stream: Stream,
    folder: RunFolder,
    checkpoints: Checkpoints,
    *,
    callbacks: Callbacks,
    should_stop: Callable[[], bool],
) -> Outcome:
    """Trains from the latest checkpoint, or from the start, to the end.

    Args:
        config: the run's resolved config.
        program: the compiled functions.
        split: the training split.
        stream: which of its examples come when, and which are held out.
        folder: takes the log lines.
        checkpoints: of this run.
        callbacks: called on events.
        should_stop: asked after each update; when true, the run is checkpointed and left.

    Raises:
        Interrupted: `should_stop` said so.
        CnnlabError: the data are not those that the run began with.
    """
    hyper = optim.hyper(config, examples=len(stream.train))
    seed = jnp.int32(config.seed)
    steps = int(hyper["train.steps"])
    state, note = program.init(config.seed, hyper), Note()
    if checkpoints.steps:
        state, saved = checkpoints.restore(state, checkpoints.steps[-1])
        note = Note(**saved)
        if note.data != split.fingerprint:
            raise CnnlabError(
                f"{folder.path}: the training images of {split.info.name} are not those that this "
                "run began with; restore them, or remove the folder to begin anew"
            )
    note.data = split.fingerprint
    if (version := record.version_text()) not in note.code:
        note.code.append(version)
    step = int(state.step)
    folder.rewind(step)
    sizes = {"batch_size": config.train.batch_size, "examples": len(stream.train)}
    periods = {
        name: config_lib.parse_duration(config, f"train.{name}_every")
        for name in ("log", "eval", "checkpoint")
    }

    def emit(name: str, metrics: Mapping[str, float] | None = None) -> None:
        for callback in callbacks.get(name, ()):
            callback(Event(name, step, steps, metrics or {}, state))

    def update(state: TrainState, step: int) -> tuple[TrainState, jax.Array]:
        indices = stream.batch(step)
        return program.train_step(state, split.images, split.labels, indices, seed, hyper)

    if not program.metric_names:  # The first update compiles: a throw-away one, off the clock.
        jax.block_until_ready(update(program.init(config.seed, hyper), 0))
    unread: collections.deque[tuple[int, jax.Array]] = collections.deque()
    loss = math.nan

    def read(leave: int) -> None:
        """Adds up the metrics of all but the newest `leave` updates."""
        nonlocal loss
        while len(unread) > leave:
            number, packed = unread.popleft()
            for name, (total, count) in zip(
                program.metric_names, np.asarray(packed, np.float64), strict=True
            ):
                sums = note.sums.setdefault(name, [0.0, 0.0])
                if name == "learning_rate":  # the latest, not a mean
                    sums[:] = total, count
                else:
                    sums[:] = sums[0] + total, sums[1] + count
                if name == "loss":
                    loss = total / count
                    if not math.isfinite(loss):
                        raise _Diverged(number)

    def evaluate() -> dict[str, float]:
        params, batch_stats = scored(state)
        logits = scores.predict(
            lambda positions: program.logits(params, batch_stats, split.images, positions),
            stream.validation,
            config.eval.batch_size,
        )
        if not np.isfinite(logits).all():
            raise _Diverged(step)
        return scores.summary(logits, split.examples.labels[stream.validation])

    def log(validation: dict[str, float]) -> None:
        row = {"step": step, "epoch": step * sizes["batch_size"] / sizes["examples"]}
        for name, (total, count) in note.sums.items():
            row[name if name == "learning_rate" else f"train/{name}"] = float(total / count)
        row |= {f"validation/{name}": value for name, value in validation.items()}
        note.sums.clear()
        folder.log(row, note.seconds)
        emit("log", row)

    emit("start")
    improved, saved_step = False, step if checkpoints.steps else None
    started: float | None = time.perf_counter()

    def stop_clock() -> None:
        nonlocal started
        if started is not None:
            note.seconds += time.perf_counter() - started
        started = None

    try:
        while step < steps and not 0 < config.train.patience <= note.waited:
            state, packed = update(state, step)
            step += 1
            unread.append((step, packed))
            read(leave=LAG)
            emit("step", {"loss": loss})
            last = step == steps
            happens = {name: last or due(step, every, **sizes) for name, every in periods.items()}
            stopping = should_stop()
            if not (stopping or any(happens.values())):
                continue
            read(leave=0)
            jax.block_until_ready(state)
            stop_clock()
            improved, validation = False, {}
            if happens["eval"] and len(stream.validation):
                validation = evaluate()
                improved = _judge(note, validation, config.train.monitor, step)
                emit("eval", validation)
            if happens["log"] or validation:
                log(validation)
            best = improved and config.train.keep == "best"
            if happens["checkpoint"] or stopping or best:
                checkpoints.save(state, dataclasses.asdict(note), note.best if best else None)
                saved_step = step
                emit("checkpoint")
            if stopping and not last:
                checkpoints.wait()
                emit("stop")
                raise Interrupted
            started = time.perf_counter()
        if saved_step != step:
            checkpoints.save(state, dataclasses.asdict(note), None)
    except _Diverged as divergence:
        stop_clock()
        emit("end")
        return Outcome(state, note, divergence.step)
    checkpoints.wait()
    emit("end")
    return Outcome(state, note, None)


def _judge(note: Note, validation: Mapping[str, float], monitor: str, step: int) -> bool:
    """Whether this evaluation is better than all before; counts those that were not."""
    value = validation[monitor]
    better = note.best is None or (value < note.best if monitor == "nll" else value > note.best)
    if better:
        note.best, note.best_step, note.waited = value, step, 0
    else:
        note.waited += 1
    return better
