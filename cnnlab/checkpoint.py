"""Checkpoints of a run: asynchronous, atomic, restored onto any number of devices.

A checkpoint holds the `TrainState` and a small JSON note (the loop's own bookkeeping: metrics
summed since the last log line, the early stopper, seconds spent). Orbax writes into a temporary
folder and renames it, so a kill at any time leaves the earlier checkpoints whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from cnnlab.types import CnnlabError, PyTree, TrainState

_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Checkpoints:
    """The checkpoints of one run: the latest one, and the one with the best monitored metric.

    Args:
        folder: where they lie; made if missing.
        best: `"max"` or `"min"`, which value of the monitored metric is best.
    """

    def __init__(self, folder: Path, *, best: str) -> None:
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(1),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics["monitored"],
                        reverse=best == "min",
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )
        self.folder = folder

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, state: TrainState, note: dict[str, Any], monitored: float | None) -> None:
        """Starts writing a checkpoint of `state`; waits only for the one before it.

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
                metrics=None if monitored is None else {"monitored": monitored},
                custom_metadata=note,
                force=True,
            )

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state and the note of one checkpoint.

        Args:
            like: a state with the wanted structure, shapes, dtypes and shardings.
            step: one of `steps`.

        Raises:
            CnnlabError: the checkpoint holds another tree; the message lists the differences.
        """
        metadata = self._checkpointer.metadata(step)
        wanted = _as_dict(like)
        _check_same_tree(metadata.metadata, wanted, f"{self.folder}/{step}")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        restored = self._checkpointer.load(step, abstract)
        return TrainState(**restored | {"ema": restored["ema"] or None}), metadata.custom_metadata

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
        """A full disk reaches us as a ValueError of the storage library, told by its text alone."""
        try:
            yield
        except ValueError as error:
            if "No space left on device" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder)) from error

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
