"""The commands, run as a user runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cnnlab import cli

EXPERIMENT = '''"""Which learning rate?

    cnnlab table experiments/rates.py
"""
from cnnlab.sweep import Experiment
from configs import tiny


def get_experiment():
    return Experiment(
        base=tiny.get_config(),
        rows={"slow": {}, "[fast]": {"optim.learning_rate": 0.2}},
        seeds=range(2),
        baseline="slow",
        columns=("top1", "nll", "parameters", "macs", "seconds"),
    )
'''
CONFIG = '''"""A tiny recipe."""
from cnnlab import config


def get_config(argument=""):
    return config.base(
        model="simple_conv",
        data="digits",
        optim={"learning_rate": 0.02},
        train={"duration": argument or "30 steps", "batch_size": 64, "checkpoint_every": "5 steps"},
    )
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with one config and one experiment, as the current directory."""
    for folder, name, text in (
        ("configs", "tiny.py", CONFIG),
        ("experiments", "rates.py", EXPERIMENT),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    monkeypatch.delitem(sys.modules, "configs.tiny", raising=False)
    return tmp_path


def start(project, *arguments, **environment):
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cnnlab.cli", *arguments],
        cwd=project,
        env={**os.environ, "XLA_FLAGS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_table_from_start_to_finish_and_again(project, capsys):
    assert cli.main(["table", "experiments/rates.py"]) == 0
    out = capsys.readouterr().out
    assert "slow" in out
    assert "[fast], seed 1: top-1" in out
    assert "±" in out
    results = project / "results" / "rates"
    names = {p.relative_to(results).as_posix() for p in results.rglob("*") if p.is_file()}
    assert {"table.md", "table.tex", "table.csv", "curves.png", "confusion.png"} <= names
    assert {f"runs/{row}-s{seed}.json" for row in ("slow", "fast") for seed in (0, 1)} <= names
    assert r"\toprule" in (results / "table.tex").read_text()
    record = json.loads((results / "runs/fast-s1.json").read_text())
    assert (record["row"], record["seed"]) == ("[fast]", 1)

    before = {p: p.stat().st_mtime_ns for p in (project / "runs").rglob("*")}
    table = (results / "table.md").read_text()
    assert cli.main(["table", "experiments/rates.py"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (project / "runs").rglob("*")} == before
    assert (results / "table.md").read_text() == table

    # The committed records are enough to draw everything again, on a machine without the runs.
    (project / "runs").rename(project / "elsewhere")
    assert cli.main(["table", "experiments/rates.py", "--render"]) == 0
    assert (results / "table.md").read_text() == table
    assert not (project / "runs").exists()


def test_a_part_of_a_table_names_what_is_missing(project, capsys):
    assert cli.main(["table", "experiments/rates.py", "--rows", "[fast]", "--seeds", "0"]) == 0
    table = (project / "results" / "rates" / "table.md").read_text()
    assert re.search(r"[Mm]issing.*slow", table)
    assert len(list((project / "runs").iterdir())) == 1

    # What was run elsewhere with these settings, and came here as a result, keeps its place.
    (project / "runs").rename(project / "elsewhere")
    assert cli.main(["table", "experiments/rates.py", "--rows", "slow", "--seeds", "1"]) == 0
    files = {p.name for p in (project / "results" / "rates" / "runs").iterdir()}
    assert files == {"fast-s0.json", "slow-s1.json"}
    table = (project / "results" / "rates" / "table.md").read_text()
    assert "Missing: slow seed 0; [fast] seed 1" in table


def test_a_dry_run_tells_and_trains_nothing(project, capsys):
    assert cli.main(["table", "experiments/rates.py", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 runs to do, 1 programs to compile" in out
    assert not (project / "runs").exists()
    assert not (project / "results").exists()


def test_results_of_other_settings_are_not_rendered(project, capsys):
    assert cli.main(["table", "experiments/rates.py", "--seeds", "0"]) == 0
    file = project / "experiments" / "rates.py"
    file.write_text(EXPERIMENT.replace("0.2}", "0.25}"))
    assert cli.main(["table", "experiments/rates.py", "--render"]) == 2
    assert "optim.learning_rate (0.2 there, 0.25 now)" in capsys.readouterr().err


def test_train_then_eval_then_list(project, capsys):
    arguments = ["train", "--config", "configs/tiny.py:20 steps", "--config.seed=3"]
    assert cli.main([*arguments, "--config.optim.learning_rate", "0.1"]) == 0
    (folder,) = (project / "runs").iterdir()
    trained = json.loads((folder / "result.json").read_text())
    assert trained["config"]["optim"]["learning_rate"] == 0.1
    assert (trained["seed"], trained["cost"]["steps"]) == (3, 20)
    capsys.readouterr()
    for run in (str(folder), folder.name):
        assert cli.main(["eval", run, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == trained["scores"]["test"]
    assert cli.main(["eval", folder.name, "--split", "validation"]) == 0
    assert f"{trained['scores']['validation']['nll']:.4f}" in capsys.readouterr().out
    assert cli.main(["list", "runs"]) == 0
    assert "done" in capsys.readouterr().out


@pytest.mark.parametrize("what", cli.LISTS)
def test_every_list_lists_something(what, root, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(root)
    assert cli.main(["list", what, "--runs", str(tmp_path)]) == 0
    expected = {
        "models": "resnet20",
        "data": "digits",
        "augment": "crop",
        "attacks": "autoattack",
        "tasks": "classification",
        "configs": "lenet5",
        "experiments": "quickstart",
        "runs": "run",
    }
    assert expected[what] in capsys.readouterr().out


def test_describe_counts_lenets_parameters(capsys):
    assert cli.main(["describe", "lenet5", "--input", "28x28x1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 61706
    assert cli.main(["describe", "--model.width=8", "--model.pools", "1", "vgg_small"]) == 0
    assert "stage1_conv1" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from cnnlab import cli\n"
        "try: cli.main(['table', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'numpy', 'rich', 'flax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def evidence(project):
    """Parameters, scores, metrics and predictions of every run."""
    found = {}
    for folder in sorted((project / "runs").iterdir()):
        result = json.loads((folder / "result.json").read_text())
        found[folder.name] = (
            result["parameters_sha256"],
            result["scores"],
            (folder / "metrics.jsonl").read_text(),
            np.load(folder / "predictions.npz")["logits"].tobytes(),
        )
    return found


def wait_for(project, step, process):
    """Returns once some unfinished run of the project has logged past `step`."""
    for _ in range(1200):
        for folder in (project / "runs").glob("*"):
            checkpoints = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
            if max(checkpoints, default=-1) >= step and not (folder / "result.json").exists():
                return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)
    raise AssertionError("nothing was trained in a minute")


def test_a_killed_table_goes_on_to_the_same_bits(project, tmp_path_factory, monkeypatch):
    # Long enough that the kill falls inside a run.
    longer = CONFIG.replace("30 steps", "500 steps").replace('every": "5', 'every": "50')
    (project / "configs" / "tiny.py").write_text(longer)
    table = ("table", "experiments/rates.py", "--rows", "slow", "--seeds", "0")
    process = start(project, *table)
    wait_for(project, 50, process)
    process.kill()
    process.communicate()
    assert not list(project.glob("runs/*/result.json"))

    process = start(project, *table)
    wait_for(project, 100, process)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert "the same command goes on where it was" in out
    assert "Traceback" not in out

    def finish():
        process = start(project, *table)
        out = process.communicate(timeout=120)[0]
        assert process.returncode == 0, out
        return evidence(project)

    killed = finish()
    (project / "runs").rename(project / "runs-killed")
    assert finish() == killed
