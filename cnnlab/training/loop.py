"""The training loop, and nothing else: updates, log lines, evaluations, checkpoints, stopping."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cnnlab import config as config_lib
from cnnlab import parallel, record
from cnnlab.checkpoint import Checkpoints
from cnnlab.evaluation import scores
from cnnlab.pipeline import Fed, Split, Steps, Stream
from cnnlab.record import RunFolder
from cnnlab.training import defence, optim, strategies
from cnnlab.training.step import Program
from cnnlab.types import CnnlabError, Hyper, PyTree, TrainState

# Metrics are read this many steps late, so that the host never waits for the newest step.
LAG = 2

# Several processes stop at one step. Agreeing on it makes all wait for the newest, so that they ask
# each other at pauses and after so many steps only.
ASK_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened in a run; callbacks take one.

    Attributes:
        name: `start`, `step`, `log`, `eval`, `overfitting`, `checkpoint`, `stop` or `end`.
        step: updates done.
        steps: updates in all.
        metrics: of this event: `loss` at `step`; the new line at `log`; the validation scores at
            `eval`; accuracies of training examples under attack at `overfitting`; empty elsewhere.
        read_state: gives the training state; its buffers live until the callback returns.
    """

    name: str
    step: int
    steps: int
    metrics: Mapping[str, float]
    read_state: Callable[[], TrainState]

    @property
    def state(self) -> TrainState:
        """The training state."""
        return self.read_state()


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
        seconds: training time so far; of runs trained together each has its share.
        together: how many runs were trained together, at most.
        strategy: by which of `strategies.STRATEGIES`; empty before the first update.
        figures: strategy -> seconds a run and update where that was measured to choose.
        code: the code and JAX versions that trained it, in order.
        data: fingerprint of the training split.
        overfitted: the first evaluation that found catastrophic overfitting (`defence.overfitted`).
    """

    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    seconds: float = 0.0
    together: int = 1
    strategy: str = ""
    figures: dict[str, float | str] = dataclasses.field(default_factory=dict)
    code: list[str] = dataclasses.field(default_factory=list)
    data: str = ""
    overfitted: int | None = None


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


@dataclasses.dataclass(frozen=True)
class Member:
    """A run as the loop sees it.

    Attributes:
        config: its resolved config.
        stream: which of its examples come when, and which are held out.
        folder: takes its log lines.
        checkpoints: of this run.
        callbacks: called on its events.
    """

    config: ConfigDict
    stream: Stream
    folder: RunFolder
    checkpoints: Checkpoints
    callbacks: Callbacks


def due(step: int, every: config_lib.Duration, *, batch_size: int, examples: int) -> bool:
    """Whether update `step` (the first is 1) completes another period of this length.

    A period shorter than a step counts as one step.
    """
    unit = {"steps": batch_size, "epochs": examples, "examples": 1}[every.unit]
    period = max(unit * every.count, batch_size)
    before, after = ((s * batch_size + 1e-6) // period for s in (step - 1, step))
    return bool(after > before)


def scored(state: TrainState) -> tuple[PyTree, PyTree]:
    """The parameters and batch statistics that count, whole: the averages where there are any."""
    if state.ema is None:
        return parallel.whole((state.params, state.batch_stats))
    return parallel.whole((state.ema["params"], state.ema["batch_stats"]))


def rhythm(config: ConfigDict, stream: Stream, checkpoints: Checkpoints) -> tuple[object, ...]:
    """What runs trained together must have in common: where they are, and when what is due."""
    due_every = (f"train.{name}_every" for name in ("log", "eval", "checkpoint"))
    return (
        checkpoints.steps[-1] if checkpoints.steps else 0,
        len(stream.train),
        config_lib.parse_duration(config, "train.duration").steps(
            batch_size=config.train.batch_size, examples=len(stream.train)
        ),
        *(config_lib.parse_duration(config, key) for key in due_every),
    )


def fit(
    members: Sequence[Member],
    program: Program,
    split: Split,
    *,
    should_stop: Callable[[], bool],
    strategy: str = "vmap",
    figures: Mapping[str, float | str] | None = None,
) -> list[Outcome]:
    """Trains runs from their latest checkpoint, or from the start, to the end, step by step.

    Several runs are trained as one program over a leading axis; what becomes of one (it diverges,
    it stops early) does not concern the others.

    Args:
        members: the runs: of one program and, where they are several, of one `rhythm`.
        program: the compiled functions.
        split: the training split.
        should_stop: asked after each update; when true, the runs are checkpointed and left. Of
            several processes, one is enough, within `ASK_EVERY` updates.
        strategy: how several runs are trained, one of `strategies.STRATEGIES` but `sequential`.
        figures: what `choose` measured, for the record.

    Raises:
        Interrupted: `should_stop` said so.
        CnnlabError: the data are not those that a run began with.
        ValueError: the runs differ in rhythm.
    """
    first = members[0]
    rhythms = {rhythm(m.config, m.stream, m.checkpoints) for m in members}
    if len(rhythms) > 1:
        raise ValueError(f"runs trained together must be due together, got {rhythms}")
    tracks = [_Track(member, program, split, len(members)) for member in members]
    step, steps = tracks[0].step, tracks[0].steps
    sizes = {"batch_size": first.config.train.batch_size, "examples": len(first.stream.train)}
    periods = {
        name: config_lib.parse_duration(first.config, f"train.{name}_every")
        for name in ("log", "eval", "checkpoint")
    }
    together = len(members) > 1
    if not together:
        strategy = strategies.SEQUENTIAL
    for track in tracks:
        track.note.strategy = strategy
        track.note.figures = dict(figures or track.note.figures)
    ways = program.together(strategy, len(members)) if together else None
    feeding = split.feed(Steps([member.stream for member in members], step, steps))
    state, seed, hyper = _stacked(tracks, program, ways)
    train_step = ways.step if ways else program.train_step
    for track in tracks:
        del track.initial  # the update takes its buffers

    def following() -> Fed | None:
        fed = next(feeding, None)
        return ways.spread(fed) if ways and fed else fed

    def state_of(index: int) -> TrainState:
        return ways.member(state, index) if ways else state

    fed = following()
    if fed is not None and not program.has_run(strategy, len(members)):
        # The first update compiles: off the clock, thrown away.
        jax.block_until_ready(train_step(jax.tree.map(jnp.copy, state), fed, seed, hyper))
    unread: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def read(leave: int) -> None:
        """Adds up the metrics of all but the newest `leave` updates."""
        while len(unread) > leave:
            number, packed = unread.popleft()
            values = np.asarray(packed, np.float64)
            for track, row in zip(tracks, values if together else values[None], strict=True):
                track.add(number, row)

    def end(index: int) -> None:
        track = tracks[index]
        track.outcome = Outcome(state_of(index), track.note, track.diverged)
        track.emit("end", step, lambda: state_of(index))

    for index, track in enumerate(tracks):
        track.emit("start", step, functools.partial(state_of, index))
        if track.stopped_early:
            end(index)
    started = time.perf_counter()

    def active() -> list[int]:
        return [i for i, track in enumerate(tracks) if track.outcome is None]

    while step < steps and active():
        state, packed = train_step(state, fed, seed, hyper)
        step += 1
        fed = following()  # while the devices compute
        unread.append((step, packed))
        read(leave=LAG)
        for index in active():
            tracks[index].emit("step", step, functools.partial(state_of, index))
        last = step == steps
        happens = {name: last or due(step, every, **sizes) for name, every in periods.items()}
        ask = last or any(happens.values()) or step % ASK_EVERY == 0
        stopping = parallel.anywhere(should_stop(), ask=ask)
        lost = any(tracks[i].diverged is not None for i in active())
        if not (stopping or lost or any(happens.values())):
            continue
        read(leave=0)
        jax.block_until_ready(state)
        share = (time.perf_counter() - started) / len(members)
        for index in active():
            track = tracks[index]
            track.note.seconds += share
            if track.diverged is None:
                track.pause(step, happens, stopping, functools.partial(state_of, index))
            if track.diverged is not None or last or track.stopped_early:
                end(index)
        if stopping and active():
            for index in active():
                tracks[index].member.checkpoints.wait()
                tracks[index].emit("stop", step, functools.partial(state_of, index))
            raise Interrupted
        started = time.perf_counter()
    for index in active():  # was at its end already
        end(index)
    for member in members:
        member.checkpoints.wait()
    return [track.outcome for track in tracks if track.outcome is not None]


def choose(
    members: Sequence[Member], program: Program, split: Split
) -> tuple[str, dict[str, float | str]]:
    """How several runs are best trained: as they were so far, or by the fastest strategy.

    The fastest is found by timing a few updates of each on these very runs, once a process for a
    program and a number of runs; nothing of the updates is kept.

    Returns:
        One of `strategies.STRATEGIES`, and the seconds of each a run and update (or why it has
        none); no figures where the runs go on.
    """
    tracks = [_Track(member, program, split, len(members)) for member in members]
    if before := strategies.chosen_before([track.note.strategy for track in tracks]):
        return before, {}
    count, step = len(members), tracks[0].step
    if count not in program.figures:
        program.figures[count] = found = dict[str, float | str]()
        streams = [member.stream for member in members]
        for name in strategies.available(count, program.mesh, sharded=program.sharded):
            alone = name == strategies.SEQUENTIAL
            taken = tracks[:1] if alone else tracks
            ways = None if alone else program.together(name, count)
            fed = split.fed(Steps(streams[: len(taken)], step, step + 1)[0])
            fed = ways.spread(fed) if ways else fed
            state, seed, hyper = _stacked(taken, program, ways)
            update = ways.step if ways else program.train_step
            try:
                seconds = strategies.measure(update, state, (fed, seed, hyper))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                found[name] = "out of memory"
            else:
                found[name] = seconds / len(taken)
                program.has_run(name, len(taken))
    figures = parallel.from_first(lambda: program.figures[count])  # each has measured others
    return strategies.fastest(figures), figures


def _stacked(
    tracks: Sequence[_Track], program: Program, ways: strategies.Together | None
) -> tuple[TrainState, jax.Array, Hyper]:
    """State, seed and numbers of a run (no `ways`), or of several with a leading axis."""
    if ways is None:
        (track,) = tracks
        return track.initial, jnp.int32(track.member.config.seed), track.hyper
    state = program.stack([track.initial for track in tracks])
    hyper = jax.tree.map(lambda *x: jnp.stack(x), *(track.hyper for track in tracks))
    seeds = jnp.array([track.member.config.seed for track in tracks], jnp.int32)
    return ways.place(state), ways.place(seeds), ways.place(hyper)


class _Track:
    """One run's side of the loop: its bookkeeping, log lines, evaluations and checkpoints."""

    def __init__(self, member: Member, program: Program, split: Split, members: int) -> None:
        self.member, self.program, self.split = member, program, split
        config = member.config
        self.hyper = optim.hyper(config, examples=len(member.stream.train))
        self.steps = int(self.hyper["train.steps"])
        self.initial, self.note = program.init(config.seed, self.hyper), Note()
        checkpoints = member.checkpoints
        if checkpoints.steps:
            self.initial, saved = checkpoints.restore(self.initial, checkpoints.steps[-1])
            self.note = Note(**saved)
            if self.note.data != split.fingerprint:
                raise CnnlabError(
                    f"{member.folder.path}: the training images of {split.info.name} are not those "
                    "that this run began with; restore them, or remove the folder to begin anew"
                )
        self.note.data = split.fingerprint
        self.note.together = max(self.note.together, members)
        if (version := record.version_text()) not in self.note.code:
            self.note.code.append(version)
        self.step = int(self.initial.step)
        member.folder.rewind(self.step)
        self.loss = math.nan
        self.diverged: int | None = None
        self.outcome: Outcome | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether the run has waited long enough for a better evaluation."""
        return 0 < self.member.config.train.patience <= self.note.waited

    def emit(
        self,
        name: str,
        step: int,
        state: Callable[[], TrainState],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Calls those who wait for this event."""
        if name == "step":
            metrics = {"loss": self.loss}
        for callback in self.member.callbacks.get(name, ()):
            callback(Event(name, step, self.steps, metrics or {}, state))

    def add(self, number: int, row: np.ndarray) -> None:
        """Takes the (sum, count) pairs of update `number`, unless the run has ended."""
        if self.diverged is not None or self.outcome is not None:
            return
        for name, (total, count) in zip(self.program.metric_names, row, strict=True):
            sums = self.note.sums.setdefault(name, [0.0, 0.0])
            if name == "learning_rate":  # the latest, not a mean
                sums[:] = total, count
            else:
                sums[:] = sums[0] + total, sums[1] + count
            if name == "loss":
                self.loss = total / count
                if not math.isfinite(self.loss):
                    self.diverged = number
                    return

    def pause(
        self,
        step: int,
        happens: Mapping[str, bool],
        stopping: bool,
        state_of: Callable[[], TrainState],
    ) -> None:
        """Evaluates, logs and saves what is due after `step`; the clock stands still."""
        config = self.member.config
        state = state_of()
        improved, validation = False, dict[str, float]()
        if happens["eval"] and len(self.member.stream.validation):
            found = self._evaluate(state)
            if found is None:
                self.diverged = step
                return
            validation = found
            improved = _judge(self.note, validation, config.train.monitor, step)
            self.emit("eval", step, state_of, validation)
        training = self._hold_against(state, step) if happens["eval"] else {}
        if happens["log"] or validation:
            self._log(step, {"validation": validation, "train": training}, state_of)
        best = improved and config.train.keep == "best"
        if happens["checkpoint"] or stopping or best or self.stopped_early:
            monitored = self.note.best if best else None
            self.member.checkpoints.save(state, dataclasses.asdict(self.note), monitored)
            self.emit("checkpoint", step, state_of)

    def _evaluate(self, state: TrainState) -> dict[str, float] | None:
        """The scores of the validation split; `None` where a logit is not finite."""
        params, batch_stats = scored(state)
        positions = self.member.stream.validation
        logits = scores.predict(
            lambda fed: self.program.logits(params, batch_stats, fed),
            self.split.feed,
            positions,
            self.member.config.eval.batch_size,
        )
        if not np.isfinite(logits).all():
            return None
        found = scores.summary(logits, self.split.labels[positions])
        if "validation" in self.program.attacked:
            found["robust"] = self._under("validation", state, positions)
        return found

    def _under(self, purpose: str, state: TrainState, positions: np.ndarray) -> float:
        """The accuracy at these positions under one of the program's attacks."""
        config = self.member.config
        logits = scores.predict(
            lambda fed: self.program.attacked[purpose](
                *scored(state), fed, jnp.int32(config.seed), self.hyper
            ),
            self.split.feed,
            positions,
            config.eval.batch_size,
        )
        return scores.summary(logits, self.split.labels[positions])["top1"]

    def _hold_against(self, state: TrainState, step: int) -> dict[str, float]:
        """How training examples stand the training's own single step, and a stronger attack."""
        if "own" not in self.program.attacked:
            return {}
        positions = self.member.stream.train[: defence.CHECKED]
        found = {
            f"robust_{purpose}": self._under(purpose, state, positions)
            for purpose in ("own", "stronger")
        }
        if self.note.overfitted is None and defence.overfitted(
            own=found["robust_own"], stronger=found["robust_stronger"]
        ):
            self.note.overfitted = step
            self.emit("overfitting", step, lambda: state, found)
        return found

    def _log(
        self,
        step: int,
        found: Mapping[str, Mapping[str, float]],
        state_of: Callable[[], TrainState],
    ) -> None:
        config, stream = self.member.config, self.member.stream
        row = {"step": step, "epoch": step * config.train.batch_size / len(stream.train)}
        for name, (total, count) in self.note.sums.items():
            row[name if name == "learning_rate" else f"train/{name}"] = float(total / count)
        for split, values in found.items():
            row |= {f"{split}/{name}": value for name, value in values.items()}
        self.note.sums.clear()
        self.member.folder.log(row, self.note.seconds)
        self.emit("log", step, state_of, row)


def _judge(note: Note, validation: Mapping[str, float], monitor: str, step: int) -> bool:
    """Whether this evaluation is better than all before; counts those that were not."""
    value = validation[monitor]
    better = note.best is None or (value < note.best if monitor == "nll" else value > note.best)
    if better:
        note.best, note.best_step, note.waited = value, step, 0
    else:
        note.waited += 1
    return better
