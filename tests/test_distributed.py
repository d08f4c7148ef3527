"""Two processes on this machine train one run together, as one process with as many devices."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cnnlab import config, encoding, parallel
from cnnlab.checkpoint import Checkpoints
from cnnlab.evaluation import checklist
from cnnlab.training import loop, run
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError

STEPS, STOP = 12, 5
SCORES = [
    "pgd(eps=0.1, steps=3), first 300",
    "certified(sigma=0.1, radius=0.05, samples=100), first 40",
]
PROGRAMS = Programs()
ROOT = Path(__file__).resolve().parent.parent


def recipe(devices=0, state="replicated"):
    made = config.base(
        model="simple_conv",
        data="digits",
        optim={"learning_rate": 0.05},
        train={
            "duration": f"{STEPS} steps",
            "batch_size": 64,
            "log_every": "1 steps",
            "eval_every": "6 steps",
            "checkpoint_every": "4 steps",
        },
        eval={"batch_size": 64},
    )
    changes = {
        "model.widths": (4,),
        "model.hidden": 64,
        "model.norm": "batch",
        "model.dropout": 0.1,
        "parallel.devices": devices,
        "parallel.state": state,
    }
    return config.resolve(config.override(made, changes, "t"), "t")


def train(folder, devices=0, stop=None, state="replicated"):
    """A run to its end, or for `stop` updates, which only this process knows of."""
    asked = []

    def should_stop():
        asked.append(1)
        return stop is not None and len(asked) >= stop

    job = run.Job(recipe(devices, state), folder, "r")
    try:
        return run.train([job], programs=PROGRAMS, should_stop=should_stop)[0]
    except loop.Interrupted:
        return None


def worker(address, index, folder):
    """What each of two processes does; the second finds what is wrong, or wants to stop."""
    parallel.start(address, 2, int(index))
    second = index == "1"
    folder = Path(folder)
    resident = train(folder / "resident")
    assert train(folder / "resident") == resident  # both read what the first wrote
    train(folder / "stopped", stop=STOP if second else None)
    train(folder / "from one")
    train(folder / "sharded", stop=STOP, state="sharded")
    train(folder / "sharded to the end", state="sharded")
    for name in ("resident", "sharded to the end"):
        run.extend(folder / name, SCORES, PROGRAMS, allow=checklist.CHECKS)
    os.environ["CNNLAB_RESIDENT"] = "0"
    train(folder / "streamed")
    told = []
    for attempt in (
        lambda: parallel.from_first(lambda: 1 // 0),
        lambda: parallel.require_same("the answer", index),
        lambda: train(folder / "held"),
        lambda: parallel.make_mesh(4),
        lambda: parallel.shared_out(lambda number: {"a": np.zeros(1)} if number else 1 // 0, 5),
    ):
        try:
            attempt()
        except (CnnlabError, ZeroDivisionError) as error:
            told.append(f"{type(error).__name__}: {error}")
    (folder / f"told{index}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of two processes of four devices; `from one` was begun by one process."""
    made = tmp_path_factory.mktemp("two")
    train(made / "from one", devices=1, stop=STOP)
    (made / "from one" / "config.json").unlink()  # which says one device
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": os.environ["CNNLAB_CACHE"],
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import test_distributed as t; t.worker{address, i, str(made)}",
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in "01"
    ]
    with run.record.RunFolder(made / "held", recipe()):
        try:
            errors = [process.communicate(timeout=240)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    shutil.copytree(made / "stopped", made / "kept")
    return made


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["train/loss"] for line in lines])


def parameters(folder):
    """Those of the last checkpoint, on one device."""
    made = recipe(1)
    split = run.load_split(made, "train")
    program = PROGRAMS.get(made, split.info, config.program(made))
    like = program.init(0, run.optim.hyper(made, examples=1000))
    with Checkpoints(folder / "checkpoints", best="max") as checkpoints:
        state, _ = checkpoints.restore(like, STEPS)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.batch_stats))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process on 1, 2, 4 and 8 devices."""
    made = tmp_path_factory.mktemp("alone")
    for devices in (1, 2, 4, 8):
        train(made / str(devices), devices)
    return made


def test_devices_and_processes_see_the_same_losses(folder, alone):
    reference = losses(alone / "1")
    assert reference.shape == (STEPS,)
    assert reference[-1] < reference[0]
    for other in (alone / "2", alone / "4", alone / "8", folder / "resident", folder / "streamed"):
        np.testing.assert_allclose(losses(other), reference, rtol=0, atol=1e-5, err_msg=str(other))


def test_processes_share_the_scores_under_attack(folder, alone):
    for devices in (1, 8):
        run.extend(alone / str(devices), SCORES, PROGRAMS, allow=checklist.CHECKS)
    found = {
        path.name: json.loads((path / "result.json").read_text())["scores"]
        for path in (alone / "1", alone / "8", folder / "resident", folder / "sharded to the end")
    }
    for name in SCORES:
        first, *others = (scores[name] for scores in found.values())
        assert 0.05 < first["top1"] < 0.95
        for other in others:
            bits = [encoding.decode_labels(each["robust"]) for each in (first, other)]
            assert len(bits[0]) == int(name.rpartition(" ")[2])
            assert (bits[0] != bits[1]).sum() <= 1  # rounding
    assert not list(folder.glob("*/chunks/*"))


def test_the_first_process_alone_writes(folder):
    for name in ("resident", "streamed", "from one"):
        result = json.loads((folder / name / "result.json").read_text())
        assert result["environment"]["devices"] == 8
        assert [line["step"] for line in result["curves"]] == list(range(1, STEPS + 1))
        begun = 2 if name == "from one" else 1
        assert len(list((folder / name / "events").iterdir())) == begun
    assert not list(folder.rglob("*.tmp"))


def test_a_checkpoint_of_two_processes_is_gone_on_with_by_one(folder, alone):
    stopped = folder / "stopped"
    assert not (stopped / "result.json").exists()
    # Only the second asked to stop; both did at the next pause.
    assert [int(p.name) for p in (stopped / "checkpoints").iterdir() if p.name == str(STOP)]
    (stopped / "config.json").unlink()  # which says all devices
    assert train(stopped, devices=1)["status"] == "done"
    np.testing.assert_allclose(losses(stopped), losses(alone / "1"), rtol=0, atol=1e-5)
    for have, want in zip(parameters(stopped), parameters(alone / "1"), strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


def test_a_checkpoint_of_one_process_is_gone_on_with_by_two(folder, alone):
    result = json.loads((folder / "from one" / "result.json").read_text())
    assert result["environment"]["devices"] == 8
    for have, want in zip(parameters(folder / "from one"), parameters(alone / "1"), strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


def test_what_fails_in_one_is_raised_in_all(folder):
    first, second = (json.loads((folder / f"told{i}.json").read_text()) for i in (0, 1))
    assert first[0].startswith("ZeroDivisionError")
    assert second[0].startswith("CnnlabError: process 0: integer")
    for told in (first, second):
        assert "the answer: expected the same in all processes" in told[1]
        assert "works on this run; wait for it, or end it first" in told[2]
        assert "expected 0 or all 8 of the 2 processes, got 4" in told[3]
    assert first[4].startswith("ZeroDivisionError")
    assert second[4] == "CnnlabError: another process failed at its share; it says at what"


LAYOUTS = [(devices, "replicated") for devices in (1, 2, 4, 8)]
LAYOUTS += [(devices, "sharded") for devices in (2, 4, 8)]


def started(devices, state, seed=0):
    """A state as this layout has it, and its program."""
    made = recipe(devices, state)
    split = run.load_split(made, "train")
    program = PROGRAMS.get(made, split.info, config.program(made))
    return program.init(seed, run.optim.hyper(made, examples=1000)), program


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """Layout -> checkpoints of a run that was stopped at `STOP`; two processes' are among them."""
    made = tmp_path_factory.mktemp("layouts")
    for devices, state in LAYOUTS:
        train(made / f"{devices} {state}", devices, STOP, state)
    found = {layout: made / f"{layout[0]} {layout[1]}" for layout in LAYOUTS}
    return found | {"two processes": folder / "kept", "two, sharded": folder / "sharded"}


@pytest.mark.parametrize("layout", [*LAYOUTS, "two processes", "two, sharded"])
def test_a_checkpoint_of_each_layout_is_restored_to_the_bit_in_each_other(saved, layout):
    states = {}
    with Checkpoints(saved[layout] / "checkpoints", best="max") as checkpoints:
        for other in LAYOUTS:
            like, _ = started(*other, seed=1)
            states[other], note = checkpoints.restore(like, STOP)
            assert note["strategy"] == "sequential"
            have, want = (jax.tree.map(lambda x: x.sharding, s) for s in (states[other], like))
            assert have == want
    first, *others = (bits(state) for state in states.values())
    assert all(other == first for other in others)
    reference, _ = started(1, "replicated")
    with Checkpoints(saved[LAYOUTS[0]] / "checkpoints", best="max") as checkpoints:
        reference, _ = checkpoints.restore(reference, STOP)
    for have, want in zip(
        jax.tree.leaves(states[LAYOUTS[0]]), jax.tree.leaves(reference), strict=True
    ):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


def test_a_run_that_moves_from_layout_to_layout_is_the_run_that_stayed(tmp_path, alone):
    for devices, state in [(8, "sharded"), (1, "replicated"), (2, "sharded"), (4, "replicated")]:
        train(tmp_path, devices, 2, state)
        (tmp_path / "config.json").unlink()  # which says how many devices
    assert train(tmp_path, 4, state="sharded")["status"] == "done"
    np.testing.assert_allclose(losses(tmp_path), losses(alone / "1"), rtol=0, atol=1e-5)
    for have, want in zip(parameters(tmp_path), parameters(alone / "1"), strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


def test_each_device_holds_its_part_of_a_sharded_state_before_and_after_an_update():
    before, program = started(8, "sharded")
    split = run.load_split(recipe(8), "train")
    fed = split.fed(np.arange(64))
    hyper = run.optim.hyper(recipe(8), examples=1000)
    shapes = {x.shape: x.sharding.spec for x in jax.tree.leaves(before) if x.size >= 1024}
    assert shapes  # a kernel, and its momentum
    after, _ = program.train_step(before, fed, np.int32(0), hyper)
    large = [x for x in jax.tree.leaves(after) if x.size >= 1024]
    assert len(large) == 2
    for x in large:
        assert x.sharding.spec == shapes[x.shape]
        assert all(8 * shard.data.size == x.size for shard in x.addressable_shards)
    small = [x for x in jax.tree.leaves(after) if x.size < 1024]
    assert all(x.is_fully_replicated for x in small)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(loop.scored(after)))


def test_arrays_are_split_along_the_longest_axis_that_the_devices_divide():
    mesh = parallel.make_mesh(8)
    shapes = [(3, 3, 64, 128), (128, 64), (64, 64), (7, 7, 21, 30), (1023,), (1024,), (8, 8), ()]
    split = parallel.parts([jax.ShapeDtypeStruct(s, np.float32) for s in shapes], mesh)
    axes = [s.spec.index("data") if "data" in s.spec else None for s in split]
    assert axes == [3, 0, 1, None, None, 0, None, None]


@pytest.mark.parametrize(
    ("given", "automatic", "message"),
    [
        (("localhost:1234", 2, None), False, "--process-id together"),
        ((None, 2, 0), False, "--coordinator, --num-processes"),
        (("localhost:1234", 2, 0), True, "or --distributed alone"),
        (("localhost", 2, 0), False, "--coordinator: expected HOST:PORT, got 'localhost'"),
        (("localhost:99999", 2, 0), False, "--coordinator: expected HOST:PORT"),
        (("localhost:1234", 0, 0), False, "--num-processes: expected at least 1, got 0"),
        (("localhost:1234", 2, 2), False, "--process-id: expected 0 to 1 .* got 2"),
        (("localhost:1234", 2, -1), False, "--process-id: expected 0 to 1"),
        (("127.0.0.1:1", 2, 1), False, "nobody answers at 127.0.0.1:1"),
    ],
)
def test_a_mistake_in_the_start_is_explained(given, automatic, message):
    with pytest.raises(CnnlabError, match=message):
        parallel.start(*given, automatic=automatic, timeout=0)


def test_a_process_by_itself_starts_nothing(monkeypatch):
    monkeypatch.setenv(parallel.TPU_HOSTS, "localhost")
    parallel.start()
    assert not jax.distributed.is_initialized()
    assert parallel.is_first()
    assert parallel.anywhere(True, ask=False)
    assert parallel.from_first(lambda: (1, "a")) == (1, "a")  # as it is, not as JSON


def test_a_slice_that_names_its_machines_is_joined(monkeypatch):
    joined = []
    monkeypatch.setenv(parallel.TPU_HOSTS, "t1v-0,t1v-1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append(a))
    parallel.start()
    assert joined == [(None, None, None)]  # JAX finds them
