"""Checkpoints of a run: asynchronous, atomic, restored onto any number of devices.

A checkpoint holds the `TrainState` and a small JSON note (the loop's own bookkeeping: metrics
summed since the last log line, the early stopper, seconds spent). Orbax writes into a temporary
folder and renames it, so a kill at any time leaves the earlier checkpoints whole. Each also holds a
digest of its state: what a disk has damaged since is set aside, and the one before it counts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from cnnlab import faults, parallel, record
from cnnlab.types import CnnlabError, CnnlabWarning, PyTree, TrainState

_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


DIGEST = "state_sha256"
"""In the note on disk: a digest of the state beside it."""

MONITORED = "monitored"
"""In the note on disk, and in Orbax's file of metrics: the value that decides which is best."""


class Checkpoints:
    """The checkpoints of one run: the latest two, and the one with the best monitored metric.

    Where the newest is damaged it is moved to the folder `damaged` beside them, with a warning that
    says what was lost. Where several processes train a run together, all make this object and call
    its methods; the first decides which are damaged, and moves them.

    Args:
        folder: where they lie; made if missing.
        best: `"max"` or `"min"`, which value of the monitored metric is best.
    """

    def __init__(self, folder: Path, *, best: str) -> None:
        self.folder, self._best = folder, best
        logging.getLogger("absl").addFilter(_reaches_us_anyway)
        _drop_late_errors()
        self._sound: set[int] = set()  # steps that were looked at, so that none is read anew
        damaged = [
            f"step {step} (its monitored value can't be read)"
            for step in parallel.from_first(lambda: _set_unknown_aside(folder))
        ]
        self._checkpointer = self._open()
        while self.steps and (problem := self._problem(self.steps[-1])):
            step = self.steps[-1]
            damaged.append(f"step {step} ({problem})")
            self._checkpointer.close()
            parallel.from_first(functools.partial(_set_aside, folder / str(step)))
            self._checkpointer = self._open()
        if damaged and parallel.is_first():
            rest = f"goes on from step {self.steps[-1]}" if self.steps else "begins anew"
            warnings.warn(
                f"{folder}: damaged and moved to {folder.parent / 'damaged'}: "
                f"{', '.join(damaged)}; the run {rest}",
                CnnlabWarning,
                stacklevel=2,
            )

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        return ocp.training.Checkpointer(
            self.folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(2),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[MONITORED],
                        reverse=self._best == "min",
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def _problem(self, step: int) -> str:
        """What is wrong with a checkpoint, on one line; empty if nothing is."""
        found = self._look(step)  # by all, as the storage library reads
        if not (told := parallel.from_first(lambda: found)):
            self._sound.add(step)
        return told

    def _look(self, step: int) -> str:
        with _quiet():
            try:
                metadata = self._checkpointer.metadata(step)
                if not metadata.custom_metadata:
                    return "its note is missing"
                if metadata.metadata is None:
                    return "its numbers can't be read"
                there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                abstract = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
                    metadata.metadata,
                )
                state = self._checkpointer.load(step, abstract)
            except Exception as error:  # whatever a damaged file makes the storage library raise
                return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        saved = metadata.custom_metadata.get(DIGEST)  # which the first checkpoints lack
        if saved is not None and saved != _digest(state):
            return "its numbers are not those that were saved"
        return ""

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return parallel.from_first(
            lambda: sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)
        )

    def save(self, state: TrainState, note: dict[str, Any], monitored: float | None) -> None:
        """Starts writing a checkpoint of `state`; waits for the one before it, and for the digest.

        Args:
            state: what to save; may be donated to the next step right after the call.
            note: JSON data, given back by `restore`.
            monitored: the value that decides which checkpoint is best; `None` where it was not
                measured at this step.
        """
        with self._disk_errors():
            self._checkpointer.wait()
            # The copy keeps the saved values apart from buffers that the next step reuses.
            self._checkpointer.save_async(
                int(state.step),
                _as_dict(_copy(state)),
                metrics=None if monitored is None else {MONITORED: monitored},
                custom_metadata=note | {DIGEST: _digest(_as_dict(state)), MONITORED: monitored},
                force=True,
            )

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state and the note of one checkpoint.

        Args:
            like: a state with the wanted structure, shapes, dtypes and shardings.
            step: one of `steps`.

        Raises:
            CnnlabError: the checkpoint is damaged, or holds another tree; the message lists the
                differences.
        """
        if step not in self._sound and (problem := self._problem(step)):
            raise CnnlabError(
                f"{self.folder}/{step} is damaged ({problem}), and nothing else holds its state; "
                "remove the run's folder to train it again"
            )
        metadata = self._checkpointer.metadata(step)
        wanted = _as_dict(like)
        _check_same_tree(metadata.metadata, wanted, f"{self.folder}/{step}")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        restored = self._checkpointer.load(step, abstract)
        note = {k: v for k, v in metadata.custom_metadata.items() if k not in (DIGEST, MONITORED)}
        return TrainState(**restored | {"ema": restored["ema"] or None}), note

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._disk_errors():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then frees the threads."""
        with self._disk_errors():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full disk is told by the text of an error of the storage library alone."""
        try:
            yield
        except Exception as error:
            number = faults.disk_full(error)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(self.folder)) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_dict(state: TrainState) -> dict[str, PyTree]:
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "ema": {} if state.ema is None else state.ema,
    }


def _drop_late_errors() -> None:
    """For good: of reads and writes that failed, the last are told when all else is over."""
    global _hook
    if _hook is None:
        _hook = sys.unraisablehook
        sys.unraisablehook = _unless_late


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the storage library from writing pages about files that it can't read.

    Some of its reads fail after it gave up on them, in threads of their own; those may come later
    than this context ends, so that the hook stays.
    """
    _drop_late_errors()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        gc.collect()  # of those reads, which are logged as they go
        logging.disable(logging.NOTSET)


def _reaches_us_anyway(line: logging.LogRecord) -> bool:
    """Drops the pages that each of Orbax's threads writes about a full disk, which is raised too.

    They were thousands of lines, and our message came after them.
    """
    error = line.exc_info[1] if line.exc_info else None
    return not isinstance(error, Exception) or faults.disk_full(error) is None


_hook: Callable[[Any], object] | None = None


def _unless_late(unraisable: Any) -> None:
    if _hook is not None and str(unraisable.exc_value) != "Event loop is closed":
        _hook(unraisable)


def _digest(tree: PyTree) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever containers hold the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return record.parameters_sha256({_name(path): leaf for path, leaf in leaves})


def _unknown_values(folder: Path) -> list[int]:
    """The steps whose monitored value is lost; where only one of its two copies is, it is mended.

    Orbax reads all of these files at each save, fails at one that is damaged, and deletes the best
    checkpoint where its file is missing.
    """
    lost = []
    for checkpoint in sorted(folder.glob("[0-9]*")):
        if not checkpoint.name.isdigit():  # of a save that was killed
            continue
        file = checkpoint / "metrics" / "metrics"
        try:
            note = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
            known, value = True, note[MONITORED]
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or without it as the first
            known, value = False, None
        try:
            there = json.loads(file.read_text()) if file.exists() else None
        except ValueError:
            there = {}
        if known and value is not None and there != {MONITORED: value}:
            record.write_atomic(file, json.dumps({MONITORED: value}))
        elif not known and there == {}:
            lost.append(int(checkpoint.name))
    return lost


def _set_unknown_aside(folder: Path) -> list[int]:
    lost = _unknown_values(folder)
    for step in lost:
        _set_aside(folder / str(step))
    return lost


def _set_aside(checkpoint: Path) -> None:
    folder = checkpoint.parent.parent / "damaged"
    folder.mkdir(exist_ok=True)
    taken = {path.name for path in folder.iterdir()}
    names = (f"{checkpoint.name}{mark}" for mark in ("", *(f"-{i}" for i in range(1, 1000))))
    checkpoint.rename(folder / next(name for name in names if name not in taken))


def _check_same_tree(saved: PyTree, wanted: PyTree, where: str) -> None:
    """Orbax reports a missing or reshaped leaf misleadingly, so the trees are compared here."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves}

    have, want = shapes(saved), shapes(wanted)
    different = [
        f"{name}: saved {have.get(name, 'nothing')}, expected {want.get(name, 'nothing')}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    if different:
        raise CnnlabError(
            f"{where} holds another model's state ({len(different)} leaves differ): "
            + "; ".join(different[:5])
            + ". Remove the run's folder or restore the config that made it"
        )


def _name(path: tuple[Any, ...]) -> str:
    # Orbax gives tuples and named tuples back as dicts or lists: compare by key alone.
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
