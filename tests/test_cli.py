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


def test_certify_counts_once_and_goes_on_after_a_kill(project, capsys, monkeypatch):
    from cnnlab.evaluation import certification

    noisy = "--config.augment.transforms=gaussian_noise(std=0.25, clip=False)"
    assert cli.main(["train", "--config", "configs/tiny.py:60 steps", noisy]) == 0
    (folder,) = (project / "runs").iterdir()
    command = ["certify", folder.name, "--sigma", "0.25", "--select", "10", "--samples", "40"]
    command += ["--alpha", "0.01", "--examples", "20", "--radii", "0", "0.125", "5"]

    def killed(*_):
        raise KeyboardInterrupt

    def nothing(*_):
        raise AssertionError("this was counted before")

    with monkeypatch.context() as patch:
        patch.setattr(certification, "summary", killed)
        assert cli.main(command) == cli.INTERRUPTED
    monkeypatch.setattr(certification, "_adder", lambda *_: nothing)
    capsys.readouterr()
    assert cli.main([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(certification, "count", nothing)
    assert cli.main([*command, "--json", "--plot", "curve.svg"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert (project / "curve.svg").exists()

    (file,) = folder.glob("certified-*")
    assert file.name == "certified-sigma0.25-select10-samples40-alpha0.01-first20.json"
    kept = json.loads(file.read_text())
    assert len(kept["classes"]) == len(kept["radii"]) == len(kept["right"]) == 20
    right = np.array(kept["right"])
    assert right.any()
    within = right & (np.array(kept["radii"]) >= 0.125)
    assert first["certified"] == {"0": right.mean(), "0.125": within.mean(), "5": 0}
    assert first["abstained"] == kept["classes"].count(None) / 20
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert f"{first['average_radius']:.4f}" in out
    assert "certified at 0.125" in out


def test_attack_draws_a_curve_and_a_gallery(project, capsys):
    assert cli.main(["train", "--config", "configs/tiny.py:60 steps"]) == 0
    (folder,) = (project / "runs").iterdir()
    command = ["attack", folder.name, "--attack", "fgsm", "--examples", "200"]
    capsys.readouterr()
    assert cli.main([*command, "--eps", "0.1", "--gallery", "gallery.png"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"200 examples: (\d+\.\d+) % clean, (\d+\.\d+) % under attack", said)
    several = [*command, "--eps", "0.1", "0", "0.3", "--plot", "curve.png"]
    assert cli.main([*several, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["attack"] for line in lines] == [
        f"fgsm(eps={eps}, norm='linf')" for eps in (0.0, 0.1, 0.3)
    ]
    accuracies = [line["top1"] for line in lines]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == lines[0]["clean"] > accuracies[-1]
    assert all(line["low"] <= line["top1"] <= line["high"] for line in lines)
    assert f"{100 * lines[1]['top1']:.2f} % under attack" in said
    for file in ("gallery.png", "curve.png"):
        assert (project / file).stat().st_size > 10_000
    assert cli.main(several) == 0
    assert f"{100 * lines[2]['low']:.2f} to {100 * lines[2]['high']:.2f}" in capsys.readouterr().out
    assert not [*(folder / "chunks").glob("**/*.npz")]


def test_an_attack_may_be_made_for_another_run(project, capsys):
    for seed in (0, 1):
        train = ["train", "--config", "configs/tiny.py:60 steps", f"--config.seed={seed}"]
        assert cli.main(train) == 0
    one, other = sorted(path.name for path in (project / "runs").iterdir())
    command = ["attack", one, "--attack", "fgsm", "--examples", "200", "--eps", "0.2", "--json"]
    capsys.readouterr()
    found = {}
    for source in ([], ["--source", other]):
        assert cli.main([*command, *source]) == 0
        found[bool(source)] = json.loads(capsys.readouterr().out)
    assert found[True]["attack"] == f"fgsm(eps=0.2, norm='linf') from {other}"
    assert found[True]["clean"] == found[False]["clean"]
    assert found[False]["top1"] < found[True]["top1"] < found[True]["clean"]
    assert cli.main([*command, "--source", "nowhere"]) == 2
    assert "no run 'nowhere'" in capsys.readouterr().err


def test_an_attack_that_cannot_be_believed_fails_until_that_is_allowed(
    project, capsys, monkeypatch
):
    from cnnlab.evaluation import checklist, robustness
    from cnnlab.training import run
    from cnnlab.training.step import Programs

    def outputs(*_):
        return [checklist.Finding("zero-gradients", "overestimate", "flat", {"part": 1.0})]

    assert cli.main(["train", "--config", "configs/tiny.py:5 steps"]) == 0
    (folder,) = (project / "runs").iterdir()
    monkeypatch.setattr(checklist, "outputs", outputs)
    attack = robustness.attack
    monkeypatch.delattr(robustness, "attack")  # it is not reached
    command = ["attack", folder.name, "--attack", "fgsm", "--examples", "50", "--eps", "0.1"]
    assert cli.main(command) == 3
    assert "zero-gradients: flat. To accept it all the same" in capsys.readouterr().err
    assert cli.main([*command, "--allow", "probabilities"]) == 3
    name = "fgsm(eps=0.1), first 50"
    with pytest.raises(checklist.UntrustworthyError, match="zero-gradients"):  # as a table does
        run.extend(folder, [name], Programs())
    monkeypatch.setattr(robustness, "attack", attack, raising=False)
    capsys.readouterr()
    assert cli.main([*command, "--allow", "zero-gradients", "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["figures"] == {"part": 1.0}
    assert cli.main(command) == 3  # the score is there, and so is what was found
    monkeypatch.setattr(checklist, "full", lambda *_, **__: outputs())
    allowed = [*command, "--allow", "zero-gradients", "--checklist"]
    assert cli.main(allowed) == 0
    assert "checklist of 8, 50 examples, eps 0.1: zero-gradients" in capsys.readouterr().err


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
