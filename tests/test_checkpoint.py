"""Checkpoints: exact, on any devices, keeping the latest and the best."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnlab import parallel
from cnnlab.checkpoint import Checkpoints
from cnnlab.types import CnnlabError, CnnlabWarning, TrainState


def state(step=0, devices=1, ema=False, width=3):
    params = {"layer": {"kernel": jnp.arange(2.0 * width).reshape(2, width) / 7 + step}}
    made = TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={},
        opt_state=optax.adam(0.1).init(params),
        ema={"params": jax.tree.map(lambda x: x / 3, params)} if ema else None,
    )
    return jax.device_put(made, parallel.replicated(parallel.make_mesh(devices)))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_restored_is_what_was_saved_onto_other_devices_too(tmp_path, ema):
    note = {"sums": {"loss": [1.5, 2.0]}, "best": None}
    with Checkpoints(tmp_path, best="max") as checkpoints:
        checkpoints.save(state(7, ema=ema), note, None)
    with Checkpoints(tmp_path, best="max") as checkpoints:
        assert checkpoints.steps == [7]
        restored, its_note = checkpoints.restore(state(0, devices=8, ema=ema), 7)
    assert same(restored, state(7, ema=ema))
    assert its_note == note
    assert len(restored.params["layer"]["kernel"].devices()) == 8


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    @jax.jit
    def overwrite(tree):
        return jax.tree.map(lambda x: x * 0 - 1, tree)

    donating = jax.jit(overwrite, donate_argnums=0)
    with Checkpoints(tmp_path, best="max") as checkpoints:
        saved = state(3)
        checkpoints.save(saved, {}, None)
        jax.block_until_ready(donating(saved))
        checkpoints.wait()
        restored, _ = checkpoints.restore(state(0), 3)
    assert same(restored, state(3))


def test_a_full_disk_is_an_os_error_that_names_the_folder(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, best="max") as checkpoints:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._checkpointer, "save_async", full)
            with pytest.raises(OSError, match="No space left") as caught:
                checkpoints.save(state(1), {}, None)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
        checkpoints.save(state(2), {}, None)
        checkpoints.wait()
        assert checkpoints.steps == [2]


@pytest.mark.parametrize(("best", "kept"), [("max", [2, 3, 4]), ("min", [1, 3, 4])])
def test_the_latest_two_and_the_best_are_kept(tmp_path, best, kept):
    with Checkpoints(tmp_path, best=best) as checkpoints:
        for step, value in ((1, 0.2), (2, 0.9), (3, None), (4, 0.5)):
            checkpoints.save(state(step), {}, value)
        checkpoints.wait()
        assert checkpoints.steps == kept


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: state(0, width=4), r"params/layer/kernel: saved \(2, 3\), expected \(2, 4\)"),
        (lambda: state(0, ema=True), r"ema/params/layer/kernel: saved nothing, expected \(2, 3\)"),
    ],
)
def test_another_tree_is_told_leaf_by_leaf(tmp_path, other, message):
    with Checkpoints(tmp_path, best="max") as checkpoints:
        checkpoints.save(state(5), {}, None)
        checkpoints.wait()
        with pytest.raises(CnnlabError, match=message):
            checkpoints.restore(other(), 5)


def test_a_folder_of_a_save_that_was_killed_is_passed_over(tmp_path):
    with Checkpoints(tmp_path, best="max") as checkpoints:
        checkpoints.save(state(5), {}, None)
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, best="max") as checkpoints:
        assert checkpoints.steps == [5]
        checkpoints.save(state(9), {}, None)
        checkpoints.wait()
        assert checkpoints.steps == [5, 9]


def saved(folder, steps=(3, 5)):
    with Checkpoints(folder, best="max") as checkpoints:
        for step in steps:
            checkpoints.save(state(step), {"best": step}, None)


def files(folder):
    """The files of a checkpoint without which it is lost: the note, and where the numbers lie."""
    note = folder / "_CHECKPOINT_METADATA"
    numbers = max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    return {"note": note, "numbers": numbers}


@pytest.mark.parametrize("how", ["truncated", "deleted", "zeroed"])
@pytest.mark.parametrize("what", ["note", "numbers"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_counts(tmp_path, what, how):
    saved(tmp_path / "checkpoints")
    file = files(tmp_path / "checkpoints" / "5")[what]
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(
            content[: len(content) // 2] if how == "truncated" else bytes(len(content))
        )
    with pytest.warns(CnnlabWarning, match=r"damaged and .*step 5 \(.*goes on from step 3"):
        checkpoints = Checkpoints(tmp_path / "checkpoints", best="max")
    with checkpoints:
        assert checkpoints.steps == [3]
        restored, note = checkpoints.restore(state(0), 3)
        assert same(restored, state(3))
        assert note == {"best": 3}
        checkpoints.save(state(4), {}, None)  # whose number is below that of the damaged one
    assert (tmp_path / "damaged" / "5").is_dir()
    with Checkpoints(tmp_path / "checkpoints", best="max") as checkpoints:
        assert checkpoints.steps == [3, 4]


def test_a_changed_number_is_noticed(tmp_path):
    """A state whose files are sound but not those of the note: a mixture of two checkpoints."""
    saved(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "state")
    shutil.copytree(tmp_path / "checkpoints/3/state", tmp_path / "checkpoints/5/state")
    with pytest.warns(CnnlabWarning, match="its numbers are not those that were saved"):
        Checkpoints(tmp_path / "checkpoints", best="max").close()


def test_where_all_are_damaged_the_run_begins_anew(tmp_path):
    saved(tmp_path / "checkpoints")
    for step in ("3", "5"):
        files(tmp_path / "checkpoints" / step)["numbers"].unlink()
    with pytest.warns(CnnlabWarning, match=r"step 5 .*step 3 .*begins anew"):
        checkpoints = Checkpoints(tmp_path / "checkpoints", best="max")
    with checkpoints:
        assert checkpoints.steps == []


@pytest.mark.parametrize("how", ["zeroed", "deleted", "changed"])
def test_a_damaged_monitored_value_is_mended_from_its_copy(tmp_path, how):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, best="max") as checkpoints:
        for step, monitored in ((3, 0.9), (5, None), (7, None)):
            checkpoints.save(state(step), {"best": 3}, monitored)
    file = folder / "3" / "metrics" / "metrics"
    content = file.read_bytes()
    assert b"0.9" in content
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(bytes(5) if how == "zeroed" else content.replace(b"0.9", b"0.1"))
    with Checkpoints(folder, best="max") as checkpoints:
        checkpoints.save(state(9), {}, 0.5)
        checkpoints.save(state(11), {}, None)
        checkpoints.wait()
        assert checkpoints.steps == [3, 9, 11]  # 3 is still the best
        assert checkpoints.restore(state(0), 3)[1] == {"best": 3}


def test_a_monitored_value_without_a_copy_sets_its_checkpoint_aside(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, best="max") as checkpoints:
        for step, monitored in ((3, 0.9), (5, None), (7, None)):
            checkpoints.save(state(step), {}, monitored)
    for file in ("metrics/metrics", "_CHECKPOINT_METADATA"):
        (folder / "3" / file).write_bytes(bytes(7))
    with pytest.warns(CnnlabWarning, match=r"step 3 \(its monitored value.*goes on from step 7"):
        checkpoints = Checkpoints(folder, best="max")
    with checkpoints:
        assert checkpoints.steps == [5, 7]


def test_a_clock_that_goes_backwards_keeps_the_latest_steps(tmp_path):
    """Of checkpoints, the step is what counts, not when each was written."""
    saved(tmp_path, (3, 5))
    for step, nanoseconds in ((3, 2 * 10**18), (5, 10**18)):
        note = tmp_path / str(step) / "_CHECKPOINT_METADATA"
        content = json.loads(note.read_text())
        for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
            assert content[key] > 0
            content[key] = nanoseconds
        note.write_text(json.dumps(content))
        os.utime(tmp_path / str(step), ns=(nanoseconds, nanoseconds))
    with Checkpoints(tmp_path, best="max") as checkpoints:
        assert checkpoints.steps == [3, 5]
        checkpoints.save(state(7), {}, None)
        checkpoints.wait()
        assert checkpoints.steps == [5, 7]


def test_a_damaged_best_checkpoint_is_told(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", best="max") as checkpoints:
        for step, monitored in ((3, 0.9), (5, None), (7, None)):
            checkpoints.save(state(step), {"best": 3}, monitored)
    files(tmp_path / "checkpoints" / "3")["numbers"].unlink()
    with Checkpoints(tmp_path / "checkpoints", best="max") as checkpoints:
        assert checkpoints.steps == [3, 5, 7]
        with pytest.raises(CnnlabError, match="checkpoints/3 is damaged"):
            checkpoints.restore(state(0), 3)
