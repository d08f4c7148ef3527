"""Signals, full disks, locked folders and exhausted memory: what is told, and what stays whole."""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cnnlab import cli, config, faults, record
from cnnlab.types import CnnlabError

CONFIG = '''"""A tiny recipe."""
from cnnlab import config


def get_config(argument=""):
    return config.base(
        model={"name": "simple_conv", "widths": (8,), "hidden": 16},
        data="digits",
        optim={"learning_rate": 0.02},
        train={
            "duration": argument or "20 steps",
            "batch_size": 64,
            "log_every": "1 steps",
            "checkpoint_every": "5 steps",
        },
    )
'''
TRAIN = ["train", "--config", "configs/tiny.py"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(folder):
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit())


# Signals


def test_sigterm_leaves_a_checkpoint_of_that_step_and_its_own_code(project):
    words = ["train", "--config", "configs/tiny.py:1000000 steps", "--folder", "run"]
    process = start("-m", "cnnlab.cli", *words, cwd=project)
    run = project / "run"
    until = time.monotonic() + 60
    while not steps(run):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    out = process.communicate(timeout=60)[0]
    assert process.returncode == cli.TERMINATED == 143, out
    assert "stopping after this step, with a checkpoint" in out
    assert "the same command goes on where it was" in out
    assert "Traceback" not in out
    # Every step was logged: the last of them is the step that the checkpoint holds.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == steps(run)[-1]
    assert not (run / "result.json").exists()


COMMAND = """
import hashlib, sys, time
from cnnlab import cli
def command(options, changes):
    {body}
cli._list = command
code = cli.main(["list", "models"])
assert {{m for m in ("jax", "numpy") if m in sys.modules}} == set()
sys.exit(code)
"""
# A call into C that lasts for minutes, as the compilation of a network does: no handler runs.
COMPILING = """
    with options.stop.gently(lambda text: print(text, flush=True)):
        print("compiling", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_even_from_a_call_that_hears_none(tmp_path, root, second):
    process = start("-c", COMMAND.format(body=COMPILING.strip()), cwd=root)
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("stopping after this step")
    assert process.poll() is None
    process.send_signal(second)
    process.communicate(timeout=20)
    assert process.returncode == 128 + second


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_what_trains_nothing_ends_at_the_first_signal(root, first):
    body = "print('waiting', flush=True); time.sleep(100)"
    process = start("-c", COMMAND.format(body=body), cwd=root)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(first)
    out = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + first
    assert out == "cnnlab: interrupted; the same command goes on where it was\n"


def test_signals_are_as_they_were_after_a_command():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with cli._Stop() as stop, stop.gently(lambda _: None):
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 10
        while not stop() and time.monotonic() < until:
            time.sleep(0.001)
        assert stop()
        assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_end_of_a_forked_child_is_not_ours():
    code = """
import os, signal, time
from cnnlab import cli
with cli._Stop() as stop, stop.gently(print):
    child = os.fork()
    if not child:
        time.sleep(100)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(0.2)
    print("heard", stop.signal)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "heard 0\n", done.stderr


def test_the_help_tells_the_codes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for code in (cli.USER_ERROR, cli.DOUBTFUL, cli.INTERRUPTED, cli.TERMINATED):
        assert re.search(rf"\b{code}\b", said)


# Full disks


@contextlib.contextmanager
def files_of_at_most(size):
    """The kernel refuses to let any file of this process grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def evidence(folder):
    result = json.loads((folder / "result.json").read_text())
    return (
        result["parameters_sha256"],
        result["scores"],
        (folder / "metrics.jsonl").read_text(),
        (folder / "predictions.npz").read_bytes(),
    )


def test_no_space_at_any_write_is_told_and_the_run_goes_on_to_the_same_bits(
    project, capsys, caplog
):
    assert cli.main([*TRAIN, "--folder", "alone"]) == 0
    alone = evidence(project / "alone")
    sizes = {p.name: p.stat().st_size for p in (project / "alone").iterdir() if p.is_file()}
    tensors = max(
        p.stat().st_size for p in (project / "alone/checkpoints").rglob("*") if p.is_file()
    )
    limits = {
        "config.json": sizes["config.json"] // 2,
        "checkpoints": tensors - 1,  # met by threads of the storage library
        "predictions.npz": sizes["predictions.npz"] - 1,
    }
    assert sorted(limits.values()) == list(limits.values())  # each is met by the one it names
    for name, limit in limits.items():
        capsys.readouterr()
        with files_of_at_most(limit):
            assert cli.main([*TRAIN, "--folder", f"full-{name}"]) == 2
        error = capsys.readouterr().err
        assert re.search(rf"^cnnlab: no disk space left to write \S*{name} \(", error), error
        assert error.count("\n") == 1  # and not a page of the storage library's threads
        assert not [line for line in caplog.records if line.levelname == "ERROR"]
        assert not (project / f"full-{name}" / "result.json").exists()
    assert steps(project / "full-checkpoints") == []
    assert steps(project / "full-predictions.npz") == [15, 20]
    for name in ("checkpoints", "predictions.npz"):
        assert cli.main([*TRAIN, "--folder", f"full-{name}"]) == 0
        assert evidence(project / f"full-{name}") == alone
        assert not list((project / f"full-{name}").glob(".*.tmp"))
    assert evidence(project / "alone") == alone


def test_no_space_for_events_ends_it_and_does_not_hang(tmp_path):
    with record.RunFolder(tmp_path, config.base(data="digits")) as folder:
        folder.log({"step": 1, "a": 0.5}, seconds=0.0)
        events = next((tmp_path / "events").iterdir())
        size = events.stat().st_size
        assert size > (tmp_path / "metrics.jsonl").stat().st_size + 40
        with files_of_at_most(size), pytest.raises(OSError) as caught:  # noqa: PT011 - see below
            folder.log({"step": 2, "a": 0.25}, seconds=0.0)
        assert faults.disk_full(caught.value) == errno.EFBIG
        folder.log({"step": 3, "a": 0.125}, seconds=0.0)  # there is space again


def test_what_means_a_full_disk():
    full = OSError(errno.ENOSPC, "No space left on device", "f")
    assert faults.disk_full(full) == errno.ENOSPC
    assert faults.disk_full(OSError(errno.EDQUOT, "Disk quota exceeded")) == errno.EDQUOT
    text = "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"
    assert faults.disk_full(ValueError(text)) == errno.ENOSPC
    for other in (OSError(errno.EACCES, "No space left on device"), ValueError("no space")):
        assert faults.disk_full(other) is None


# Folders that can't be written


@pytest.fixture
def nobody():
    """Without root's rights, before which no folder is read-only."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_read_only_folder_is_told_before_it_is_needed(tmp_path, nobody):
    for folder in (os.path.join(os.sep, "proc", "results"), os.path.join(os.sep, "usr", "new")):
        with pytest.raises(CnnlabError, match=rf"{folder}: can't write there .*--results DIR"):
            faults.require_writable(type(tmp_path)(folder), "--results")


def test_a_folder_that_can_be_written_stays_as_it_is(tmp_path):
    faults.require_writable(tmp_path / "a" / "b", "--results")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CnnlabError, match="can't write there"):
        faults.require_writable(tmp_path / "file" / "b", "--results")


def test_a_table_tries_its_folders_before_it_trains(project, capsys, monkeypatch):
    from cnnlab.sweep import executor

    def trained(*_, **__):
        raise AssertionError("this was to be refused before")

    monkeypatch.setattr(executor, "execute", trained)
    (project / "experiments").mkdir()
    (project / "experiments" / "one.py").write_text(
        '"""One row."""\nfrom cnnlab.sweep import Experiment\nfrom configs import tiny\n'
        "def get_experiment():\n    return Experiment(base=tiny.get_config(), rows={'one': {}}, "
        "seeds=(0,), baseline='one', columns=('top1',))\n"
    )
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    monkeypatch.delitem(sys.modules, "configs.tiny", raising=False)
    (project / "file").touch()
    for option in ("--results", "--runs"):
        assert cli.main(["table", "experiments/one.py", option, "file/in"]) == 2
        assert re.search(rf"file/in: can't write there .*{option} DIR", capsys.readouterr().err)


# Memory


def memory_config(**changes):
    made = config.base(data="digits", train={"batch_size": 128}, eval={"batch_size": 512})
    return config.resolve(config.override(made, changes, "t"), "t")


def test_exhausted_memory_says_what_to_try():
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.\nmore"
    )
    said = str(faults.explain_memory(error, memory_config()))
    assert "the cpu device is out of memory" in said
    assert "allocate 8589934592 bytes" in said
    assert "train.batch_size=64 (now 128)" in said
    assert "train.accumulate=2 (" in said
    again = str(faults.explain_memory(error, memory_config(**{"train.accumulate": 4})))
    assert "train.accumulate=8 (" in again
    odd = str(faults.explain_memory(error, memory_config(**{"train.batch_size": 63})))
    assert "accumulate" not in odd  # which two parts do not divide
    assert "eval.batch_size=256 (now 512)" in said
    assert "remat" not in said  # which this network does not have
    separable = memory_config(**{"model.name": "separable_stack12"})
    assert "model.remat=true" in str(faults.explain_memory(error, separable))
    separable = memory_config(**{"model.name": "separable_stack12", "model.remat": True})
    assert "remat" not in str(faults.explain_memory(error, separable))


@pytest.mark.parametrize(
    ("batch_size", "devices", "half"),
    [(24, 8, 8), (8, 8, None), (40, 8, 16), (3, 1, 1), (48, 0, 24)],
)
def test_half_a_batch_is_a_multiple_of_the_devices(batch_size, devices, half):
    made = memory_config(
        **{"train.batch_size": batch_size, "eval.batch_size": 8, "parallel.devices": devices}
    )
    said = str(faults.explain_memory(MemoryError(), made))
    assert "the host is out of memory (MemoryError)" in said
    found = re.search(r"train\.batch_size=(\d+)", said)
    assert (int(found[1]) if found else None) == half


def test_numpys_memory_error_is_one_and_others_are_not():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**58, np.float64)
    assert "Unable to allocate" in str(faults.explain_memory(caught.value, memory_config()))
    for other in (
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no"),
        ValueError("RESOURCE_EXHAUSTED: No space left on device"),
    ):
        assert faults.explain_memory(other, memory_config()) is None
