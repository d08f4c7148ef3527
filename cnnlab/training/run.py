"""One run from its config to its record: train, score the test split once, write the result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cnnlab import config as config_lib
from cnnlab import describe, encoding, faults, keys, parallel, pipeline, record
from cnnlab.checkpoint import Checkpoints
from cnnlab.evaluation import certification, checklist, chunks, corruption, robustness, scores
from cnnlab.training import defence, loop, optim, strategies
from cnnlab.training.step import Program, Programs
from cnnlab.types import CnnlabError, PyTree, Source, TrainState


def load_split(config: ConfigDict, split: str) -> pipeline.Split:
    """A split of the config's data set, on the config's devices."""
    fields = {k: v for k, v in config.data.items() if k not in config_lib.FIELDS["data"]}
    return pipeline.load(
        config.data.name, split, parallel.make_mesh(config.parallel.devices), **fields
    )


def make_stream(config: ConfigDict, split: pipeline.Split) -> pipeline.Stream:
    """The order of a run's examples, its validation examples held out."""
    return pipeline.Stream.make(
        seed=config.seed,
        size=len(split),
        validation=config.data.validation,
        batch_size=config.train.batch_size,
        repeats=config.augment.repeats,
        replays=config.defence.replays if config.defence.name == "free" else 1,
    )


def steps_of(config: ConfigDict, split: pipeline.Split) -> int:
    """How many updates a run makes at most."""
    return config_lib.parse_duration(config, "train.duration").steps(
        batch_size=config.train.batch_size, examples=len(make_stream(config, split).train)
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        config: a resolved config.
        path: the run's folder.
        row: what the run is called in a table.
        callbacks: see `loop.Event`.
    """

    config: ConfigDict
    path: Path
    row: str
    callbacks: loop.Callbacks = dataclasses.field(default_factory=dict)


def train(
    jobs: Sequence[Job],
    *,
    programs: Programs,
    should_stop: Callable[[], bool] = lambda: False,
    strategy: str = strategies.AUTO,
) -> list[dict[str, Any]]:
    """Brings runs to their end, from wherever they were left, and returns their records.

    A finished run is not touched. A run whose loss stops being finite ends there, with the status
    `diverged`. Several jobs are trained together, as one program, as far as they are in one
    `loop.rhythm`; they must share one compiled program (`config.program`).

    Args:
        jobs: what to do.
        programs: shared by the runs of this process.
        should_stop: see `loop.fit`.
        strategy: how several jobs are trained, one of `strategies.STRATEGIES`; `auto`: as they
            were so far, or by the fastest, see `loop.choose`.

    Raises:
        CnnlabError: a folder is another run's, or something does not fit.
        loop.Interrupted: `should_stop` said so; the runs go on at the next call.
    """
    record.code_version()  # before anything can change the sources on disk
    results: dict[Path, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        members: dict[Path, loop.Member] = {}
        waves: dict[tuple[object, ...], list[Job]] = {}
        for job in jobs:
            folder = stack.enter_context(record.RunFolder(job.path, job.config))
            finished = record.read_result(job.path)
            if finished is not None:
                results[job.path] = finished
                continue
            split = load_split(job.config, "train")
            parallel.require_same(
                "the config, the training images and the code",
                f"{config_lib.identity(job.config)} {split.fingerprint} {record.version_text()}",
            )
            stream = make_stream(job.config, split)
            checkpoints = stack.enter_context(_checkpoints(job.config, folder))
            member = loop.Member(job.config, stream, folder, checkpoints, job.callbacks)
            members[job.path] = member
            waves.setdefault(loop.rhythm(job.config, stream, checkpoints), []).append(job)
        for wave in waves.values():
            config = wave[0].config
            split = load_split(config, "train")
            program = programs.get(config, split.info, config_lib.program(config))
            with _explained(config):
                for job, outcome in _fitted(wave, members, program, split, strategy, should_stop):
                    results[job.path] = _finish(job, members[job.path], outcome, program, split)
    return [results[job.path] for job in jobs]


def _fitted(
    wave: Sequence[Job],
    members: Mapping[Path, loop.Member],
    program: Program,
    split: pipeline.Split,
    strategy: str,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Job, loop.Outcome]]:
    """Trains runs of one rhythm, together or one after another, each until its end."""
    of_wave, figures = [members[job.path] for job in wave], None
    if len(wave) > 1:
        if strategy == strategies.AUTO:
            strategy, figures = loop.choose(of_wave, program, split)
        strategies.check(strategy, len(wave), program.mesh, sharded=program.sharded)
    size = 1 if strategy == strategies.SEQUENTIAL else len(wave)
    for start in range(0, len(wave), size):
        outcomes = loop.fit(
            of_wave[start : start + size],
            program,
            split,
            should_stop=should_stop,
            strategy=strategy,
            figures=figures,
        )
        yield from zip(wave[start : start + size], outcomes, strict=True)


def _finish(
    job: Job, member: loop.Member, outcome: loop.Outcome, program: Program, split: pipeline.Split
) -> dict[str, Any]:
    """Scores what a run's training came to and writes its record."""
    state, best_step = outcome.state, outcome.note.best_step
    if outcome.diverged_step is None and job.config.train.keep == "best" and best_step:
        state, _ = member.checkpoints.restore(state, best_step)
    found = _result(job, program, split, member, outcome, state)
    result = parallel.from_first(lambda: found)  # whose clock counts
    step = int(outcome.state.step)
    for callback in job.callbacks.get("finish", ()):
        callback(loop.Event("finish", step, step, {}, lambda: state))
    member.folder.finish(result)
    return result


@contextlib.contextmanager
def _explained(config: ConfigDict) -> Iterator[None]:
    """Says what to do where the memory of a device, or of the host, is not enough."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if (told := faults.explain_memory(error, config)) is None:
            raise
        raise told from error


def extend(
    path: Path, wanted: Sequence[str], programs: Programs, *, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """The record of a finished run with these scores, too; each is measured once and kept.

    Args:
        path: the run's folder.
        wanted: names in `EXTRAS`, attacks, `"pgd(eps=0.1), first 1000"`, of the test split (or
            `"pgd(eps=0.1) from RUN, first 1000"`, made for the run in the folder RUN beside this
            one), or what is certified, `"certified(sigma=0.25, radius=0.5), first 500"`.
        programs: shared.
        allow: names of `checklist.CHECKS` whose findings are accepted.

    Raises:
        CnnlabError: the run is not finished, or has no checkpoint any more.
        UntrustworthyError: an attack's score, new or kept, has a finding that is not allowed.
    """
    result = parallel.from_first(lambda: record.read_result(path))
    if result is None:
        raise CnnlabError(f"{path} is not finished; train the run first")
    # Once for all scores, and only if one is missing.
    restored = functools.cache(lambda folder: restore(folder, programs)[:3])
    for name in wanted:
        if result["status"] != "done":
            continue
        if name in result["scores"]:
            _require(result["scores"][name].get("findings", ()), allow)
            continue
        place = path / "chunks" / hashlib.sha256(name.encode()).hexdigest()[:16]
        measured = _measured(name, path, place, programs, restored, allow)
        measured = parallel.from_first(functools.partial(dict, measured))  # whose clock counts
        with record.RunFolder(path, _config(path)) as folder:
            # Another command may have added a score.
            result = parallel.from_first(lambda: record.read_result(path)) or result
            result = result | {"scores": result["scores"] | {name: measured}}
            folder.finish(result)
            chunks.clear(place)
    return result


def _measured(
    name: str,
    path: Path,
    place: Path,
    programs: Programs,
    restored: Callable[[Path], tuple[ConfigDict, Program, TrainState]],
    allow: Sequence[str],
) -> dict[str, Any]:
    """A score that `extend` is asked for; `place` keeps an attack's finished chunks."""
    text, several, examples = name.rpartition(", first ")
    if text.startswith("certified("):
        return _certified(text, int(examples), path, programs)
    config, program, state = restored(path)
    attack, transferred, source = text.partition(" from ")
    other = None
    if transferred:
        _, its_program, its_state = restored(path.parent / source)
        other = (its_program.logits_of, _own_variables(its_program, its_state))
    with record.RunFolder(path, config), _explained(config):
        if several:
            return _attacked(attack, int(examples), other, place, allow, config, program, state)
        return EXTRAS[name](config, program, state)


def certify(
    path: Path,
    smoothing: certification.Smoothing,
    examples: int,
    programs: Programs,
    *,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """What `certification.summary` says of a run's first test examples; counted once and kept.

    Args:
        path: the run's folder, which gets a file `certified-*.json`.
        smoothing: the noise and the numbers of draws.
        examples: how many, at most those of the test split.
        programs: shared.
        batch_size: noisy images at a time; the config's `eval.batch_size` if `None`.

    Raises:
        CnnlabError: the run is not finished, has diverged, or has no checkpoint any more.
    """
    result = parallel.from_first(lambda: record.read_result(path))
    if result is None:
        raise CnnlabError(f"{path} is not finished; train the run first")
    if result["status"] != "done":
        raise CnnlabError(f"{path} diverged at step {result['diverged_step']}: nothing to certify")
    examples = min(examples, result["test_set"]["examples"])
    about = {
        **dataclasses.asdict(smoothing),
        "examples": examples,
        "test_set": result["test_set"],
        "identity": result["identity"],
        "parameters_sha256": result["parameters_sha256"],
    }
    file = path / f"certified-{smoothing}-first{examples}.json"
    kept = parallel.from_first(lambda: record.read_json(file) if file.exists() else None)
    if kept is not None and kept["about"] == about:
        return dict(kept)
    config, program, state, _ = restore(path, programs)
    looked_at, unfinished = load_split(config, "test").first(examples), path / file.stem
    with record.RunFolder(path, config), _explained(config):
        counts = certification.count(
            keys.key(config.seed, "certification"),
            program.logits_of,
            _own_variables(program, state),
            looked_at.images,
            smoothing,
            batch_size=batch_size or config.eval.batch_size,
            mesh=parallel.own(program.mesh),
            folder=unfinished,
            about={"identity": result["identity"]},
        )
        found = {
            **certification.summary(counts, looked_at.labels, smoothing),
            "about": about,
            "code": record.code_version(),
            "environment": record.environment(program.mesh.size),
        }
        parallel.from_first(lambda: record.write_atomic(file, record.dump_json(found)))
        chunks.clear(unfinished)
    return found


def _own_variables(program: Program, state: TrainState) -> PyTree:
    """What is scored, where this process computes by itself."""
    return parallel.on_own(loop.scored(state), program.mesh)


def _certified(text: str, examples: int, path: Path, programs: Programs) -> dict[str, Any]:
    """Accuracy on the first examples of the test split that is certified at a radius.

    Returns:
        `top1`: part that is certified right at that radius; `average_radius`; `abstained`;
        `robust`: 1 or 0 for each example, encoded.
    """
    smoothing, at = certification.parse(text)
    found = certify(path, smoothing, examples, programs)
    standing = np.array(found["right"]) & (np.array(found["radii"]) >= at)
    return {
        "top1": float(standing.mean()),
        "average_radius": found["average_radius"],
        "abstained": found["abstained"],
        "robust": encoding.encode_labels(standing.astype(np.int32)),
    }


def _corrupted(config: ConfigDict, program: Program, state: TrainState) -> dict[str, Any]:
    """Top-1 errors of the test split, corrupted in fifteen ways of five severities.

    Returns:
        `errors`: corruption -> five fractions; `top1`: the mean accuracy over all 75.
    """
    split = load_split(config, "test")
    params, batch_stats = loop.scored(state)
    positions = np.arange(len(split), dtype=np.int32)
    errors: dict[str, list[float]] = {}
    for name in corruption.CORRUPTIONS:
        errors[name] = []
        for severity in corruption.SEVERITIES:
            images: np.ndarray | Source = corruption.Corrupted(split.source, name, severity)
            if split.resident is not None:
                everything = split.get(positions).images
                images = corruption.cached(everything, split.fingerprint, name, severity)
            logits = scores.predict(
                functools.partial(program.logits, params, batch_stats),
                split.with_images(images).feed,
                positions,
                config.eval.batch_size,
            )
            errors[name].append(float((logits.argmax(1) != split.labels).mean()))
    return {"errors": errors, "top1": 1 - float(np.mean(list(errors.values())))}


def _attacked(
    text: str,
    examples: int,
    source: tuple[robustness.LogitsOf, PyTree] | None,
    place: Path,
    allow: Sequence[str],
    config: ConfigDict,
    program: Program,
    state: TrainState,
) -> dict[str, Any]:
    """Accuracy on the first examples of the test split under an attack.

    Args:
        text: the attack.
        examples: how many.
        source: see `robustness.attack`.
        place: where finished chunks are kept.
        allow: findings that are accepted; others end it, before the attack where that is possible.
        config: the run's.
        program: the run's.
        state: the run's.

    Returns:
        `top1`: part that is right before and after; `clean`: before; `robust`: 1 or 0 for each
        example, encoded; `findings`: those that were allowed, as dicts.
    """
    split = load_split(config, "test")
    images, labels = split.first(examples)
    variables = _own_variables(program, state)
    findings = checklist.outputs(program.logits_of, variables, images, labels)
    _require(map(dataclasses.asdict, findings), allow)
    found = robustness.attack(
        text,
        program.logits_of,
        variables,
        images,
        labels,
        seed=config.seed,
        with_images=False,
        folder=place,
        about={"identity": config_lib.identity(config)},
        source=source,
        mesh=parallel.own(program.mesh),
    )
    findings += checklist.above_clean(found.clean, found.attacked)
    plain = [dataclasses.asdict(finding) for finding in findings]
    _require(plain, allow)
    return {
        "top1": float(found.robust.mean()),
        "clean": float(found.clean.mean()),
        "robust": encoding.encode_labels(found.robust.astype(np.int32)),
        "findings": plain,
    }


def _require(findings: Iterable[Mapping[str, Any]], allow: Sequence[str]) -> None:
    """Ends it where a finding, as a record holds it, is not allowed."""
    checklist.require(
        [checklist.Finding(**finding) for finding in findings],
        allow,
        "name it: --allow NAME of `cnnlab attack`, Experiment(allow=(NAME,)) of a table",
    )


EXTRAS: dict[str, Callable[[ConfigDict, Program, TrainState], dict[str, Any]]] = {
    "corrupted": _corrupted
}
"""Scores that are measured where a table asks for them, after training: name -> function."""


def _config(path: Path) -> ConfigDict:
    """The resolved config of a run's folder."""
    file = path / "config.json"
    if not file.exists():
        raise CnnlabError(f"{path} is no run's folder: it has no config.json")
    return config_lib.resolve(config_lib.from_plain(record.read_json(file)), str(file))


def restore(path: Path, programs: Programs) -> tuple[ConfigDict, Program, TrainState, str]:
    """The config, the functions and the scored state of a run's folder, and which state that is.

    Raises:
        CnnlabError: it is no run's folder, has no checkpoint yet, or lacks its best one.
    """
    config = _config(path)
    split = load_split(config, "train")
    program = programs.get(config, split.info, config_lib.program(config))
    hyper = optim.hyper(config, examples=len(make_stream(config, split).train))
    with record.RunFolder(path, config) as folder, _checkpoints(config, folder) as checkpoints:
        if not checkpoints.steps:
            raise CnnlabError(f"{path} has no checkpoint yet; train the run first")
        like = program.init(config.seed, hyper)
        step = checkpoints.steps[-1]
        state, note = checkpoints.restore(like, step)
        which = "last"
        if config.train.keep == "best" and note["best_step"]:
            step, which = note["best_step"], "best"
            if step not in checkpoints.steps:
                raise CnnlabError(f"{path}: the best checkpoint, of step {step}, is missing")
            state, _ = checkpoints.restore(like, step)
    result = record.read_result(path)
    if result is not None and result["status"] == "done":
        digest = record.parameters_sha256(state.params, state.batch_stats, state.ema)
        if digest != result["parameters_sha256"]:
            raise CnnlabError(
                f"{path}: the {which} checkpoint, step {step}, is not the network that its record "
                "tells of, which is lost; remove result.json there to train on from this one"
            )
    status = "unfinished" if result is None else result["status"]
    return config, program, state, f"{which} checkpoint, step {step} of a run that is {status}"


def score(
    config: ConfigDict,
    program: Program,
    state: TrainState,
    split: pipeline.Split,
    positions: np.ndarray,
) -> tuple[dict[str, Any], np.ndarray]:
    """All scores over some examples of a split, and their logits [n, K]."""
    params, batch_stats = loop.scored(state)
    logits = scores.predict(
        functools.partial(program.logits, params, batch_stats),
        split.feed,
        positions,
        config.eval.batch_size,
    )
    labels = split.labels[positions]
    return scores.classification(logits, labels, bins=config.eval.calibration_bins), logits


@functools.lru_cache(maxsize=64)
def _costs(program_key: str, module: Any, shape: tuple[int, int, int]) -> tuple[int, int]:
    summary = describe.describe(module, shape)
    return summary.parameters, summary.macs


def _checkpoints(config: ConfigDict, folder: record.RunFolder) -> Checkpoints:
    return Checkpoints(folder.checkpoints, best="min" if config.train.monitor == "nll" else "max")


def _result(
    job: Job,
    program: Program,
    split: pipeline.Split,
    member: loop.Member,
    outcome: loop.Outcome,
    state: TrainState,
) -> dict[str, Any]:
    """Scores the final state and gathers the record; see `cnnlab.record` for the fields."""
    config, stream, folder, info = job.config, member.stream, member.folder, split.info
    parameters, macs = _costs(config_lib.program(config), program.module, info.image_shape)
    steps = outcome.diverged_step or int(outcome.state.step)
    examples = steps * config.train.batch_size
    result: dict[str, Any] = {
        "schema": record.SCHEMA,
        "row": job.row,
        "seed": config.seed,
        "identity": config_lib.identity(config),
        "config": config_lib.plain(config),
        "status": "done" if outcome.diverged_step is None else "diverged",
        "diverged_step": outcome.diverged_step,
        **({"overfitted_step": outcome.note.overfitted} if defence.single_step(config) else {}),
        "scores": {},
        "class_names": list(info.class_names),
        "cost": {
            "parameters": parameters,
            "macs": macs,
            "seconds": outcome.note.seconds,
            "images_per_second": examples / outcome.note.seconds if outcome.note.seconds else 0.0,
            "together": outcome.note.together,
            "strategy": outcome.note.strategy,
            **({"strategies": outcome.note.figures} if outcome.note.figures else {}),
            "steps": steps,
            "examples": examples,
        },
        "curves": [
            {k: v for k, v in line.items() if math.isfinite(v)} for line in folder.metrics()
        ],
        "code": record.code_version(),
        "code_history": outcome.note.code,
        "environment": record.environment(program.mesh.size),
        "train_fingerprint": split.fingerprint,
    }
    test = load_split(config, "test")
    result["test_set"] = {
        "name": info.name,
        "split": "test",
        "examples": len(test),
        "fingerprint": test.fingerprint,
    }
    if outcome.diverged_step is not None:
        return result
    result["parameters_sha256"] = record.parameters_sha256(
        state.params, state.batch_stats, state.ema
    )
    everything = np.arange(len(test), dtype=np.int32)
    measured, logits = score(config, program, state, test, everything)
    if not np.isfinite(logits).all():  # the very last update broke it
        return result | {"status": "diverged", "diverged_step": steps}
    result["scores"]["test"] = measured
    if len(stream.validation):
        result["scores"]["validation"], _ = score(config, program, state, split, stream.validation)
    result["predictions"] = {
        "test": encoding.encode_labels(logits.argmax(1)),
        "labels": encoding.encode_labels(test.labels),
    }
    folder.write_predictions(logits, test.labels)
    return result
