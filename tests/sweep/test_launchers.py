"""Several workers make the table that one makes, though some are killed on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cnnlab import cli, record
from cnnlab.sweep import launchers
from cnnlab.sweep.launchers import local
from cnnlab.training import trackers
from cnnlab.types import CnnlabError

EXPERIMENT = '''"""Twelve runs of two programs."""
from cnnlab import config
from cnnlab.sweep import Experiment


def get_experiment():
    return Experiment(
        base=config.base(
            model="simple_conv",
            data="digits",
            train={"duration": "60 steps", "batch_size": 64, "checkpoint_every": "10 steps"},
            parallel={"devices": 1},
        ),
        rows={
            f"{name} {rate}": {"model.widths": widths, "optim.learning_rate": rate}
            for name, widths in (("narrow", (4,)), ("wide", (8,)))
            for rate in (0.02, 0.1, 0.2)
        },
        seeds=range(2),
        baseline="narrow 0.02",
        figures=(),
        columns=("top1", "nll", "parameters", "macs"),
    )
'''
FILE = "experiments/twelve.py"
# In a process of its own, as Ray forks and JAX runs here. A line of input kills the second node.
CLUSTER = """
from ray.cluster_utils import Cluster

quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print("up", cluster.address, nodes[1].all_processes["raylet"][0].process.pid, flush=True)
input()
cluster.remove_node(nodes[1], allow_graceful=False)
input()
cluster.shutdown()
"""
FOUR = ("--rows", "narrow 0.1", "wide 0.1")


CLUSTERS = pytest.mark.skipif(
    not os.environ.get("CNNLAB_CLUSTERS"),
    reason="starts a cluster for some minutes: CNNLAB_CLUSTERS=1 runs it",
)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """A folder with the experiment, its twelve runs done one after another, and two tables."""
    folder = tmp_path_factory.mktemp("sequential")
    (folder / "experiments").mkdir()
    (folder / FILE).write_text(EXPERIMENT)
    command = ["table", str(folder / FILE), "--runs", str(folder / "runs")]
    assert cli.main([*command, "--results", str(folder / "all")]) == 0
    return folder


def sweep(sequential, folder, *words):
    """Starts `cnnlab sweep` in a process group of its own."""
    command = [sys.executable, "-m", "cnnlab.cli", "sweep", str(sequential / FILE)]
    command += ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    with open(folder / "output", "a") as output:
        return subprocess.Popen(
            [*command, "--lease-seconds", "3", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
            start_new_session=True,
        )


def journal(folder):
    """(process, event) for all that the workers wrote down, each worker's in its order."""
    found = []
    for file in sorted((folder / "runs" / launchers.WORKERS).glob("*.jsonl")):
        process = int(file.stem.split("-")[-2])
        lines = file.read_text().split("\n")[:-1]
        found += [(process, json.loads(line)) for line in lines]
    return found


def middle(folder, wanted=lambda process: True):
    """Waits for a run between two checkpoints; the process that trains it, and its name."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for process, event in dict(journal(folder)).items():  # the last of each
            run = folder / "runs" / event["run"]
            begun = event["event"] == "start" and (run / "checkpoints" / "10").exists()
            if begun and not (run / "checkpoints" / "50").exists() and wanted(process):
                return process, event["run"]
        time.sleep(0.005)
    raise AssertionError((folder / "output").read_text())


def done(process, folder, code=0):
    try:
        assert process.wait(180) == code, (folder / "output").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return (folder / "output").read_text()


def scores(runs):
    """Of each run what must be equal to the last bit."""
    results = [record.read_json(file) for file in sorted(runs.glob("*/result.json"))]
    return {
        (r["row"], r["seed"]): (r["parameters_sha256"], r["scores"], r["curves"]) for r in results
    }


def require_equal(sequential, folder, runs=12):
    """The runs' scores and the table equal the sequential ones; each run was finished once."""
    mine, theirs = scores(folder / "runs"), scores(sequential / "runs")
    assert len(mine) == runs
    assert mine == {name: theirs[name] for name in mine}
    finishes = Counter(e["run"] for _, e in journal(folder) if e["event"] == "finish")
    assert list(finishes.values()) == [1] * runs
    same = folder / "sequential"
    same.mkdir()
    for run in finishes:
        (same / run).symlink_to(sequential / "runs" / run)
    command = ["table", str(sequential / FILE), "--runs", str(same)]
    command += ["--results", str(folder / "expected"), "--rows", *{row for row, _ in mine}]
    assert cli.main(command) == 0
    for name in ("table.csv", "table.tex", "table.md"):
        tables = [folder / place / "twelve" / name for place in ("results", "expected")]
        assert tables[0].read_bytes() == tables[1].read_bytes()


def starts(folder, run):
    """(process, step) for each time that a run was begun or taken up, in order of time."""
    events = [(e["time"], p, e) for p, e in journal(folder)]
    events = [(t, p, e["step"]) for t, p, e in events if (e["event"], e["run"]) == ("start", run)]
    return [(process, step) for _, process, step in sorted(events)]


def test_two_workers_make_the_table_of_one(sequential, tmp_path):
    output = done(sweep(sequential, tmp_path, "--jobs", "2", *FOUR), tmp_path)
    require_equal(sequential, tmp_path, runs=4)
    assert {line[:3] for line in output.split("\n") if ", seed " in line} == {"[0]", "[1]"}
    assert [event["event"] for _, event in journal(tmp_path)].count("start") == 4


def test_what_a_killed_worker_leaves_goes_on_at_another(sequential, tmp_path):
    process = sweep(sequential, tmp_path, "--jobs", "2", *FOUR)
    killed, run = middle(tmp_path)
    os.kill(killed, signal.SIGKILL)
    output = done(process, tmp_path)
    assert "killed by SIGKILL; others take over its run" in output
    require_equal(sequential, tmp_path, runs=4)
    (first, second) = starts(tmp_path, run)
    assert first == (killed, 0)
    assert second[0] != killed
    assert second[1] >= 10


def test_an_interrupt_is_passed_on_and_the_same_command_goes_on(sequential, tmp_path):
    process = sweep(sequential, tmp_path, "--jobs", "1", "--rows", "wide 0.1")
    _, run = middle(tmp_path)
    process.send_signal(signal.SIGINT)
    assert "interrupted; the same command goes on" in done(process, tmp_path, 130)
    assert not (tmp_path / "runs" / run / "result.json").exists()
    launchers.work(launchers.Work(sequential / FILE, tmp_path / "runs", ("wide 0.1",)))
    done(sweep(sequential, tmp_path, "--rows", "wide 0.1"), tmp_path)  # nothing is left to do
    require_equal(sequential, tmp_path, runs=2)
    assert [step >= 10 for _, step in starts(tmp_path, run)] == [False, True]


def test_finished_runs_lie_in_the_store_and_come_back_from_it(sequential, tmp_path, capsys):
    command = ["sweep", str(sequential / FILE), "--results", str(tmp_path / "results")]
    command += ["--rows", "wide 0.1", "--store", str(tmp_path / "store")]
    task = launchers.Work(
        sequential / FILE, tmp_path / "scratch", ("wide 0.1",), store=str(tmp_path / "store")
    )
    launchers.work(task)
    assert launchers.unfinished(task) == []
    stored = sorted((tmp_path / "store").glob("simple*"))
    assert [sorted(f.name for f in run.iterdir()) for run in stored] == [
        sorted(launchers.PUBLISHED)
    ] * 2
    # Another machine, which has trained nothing.
    assert cli.main([*command, "--runs", str(tmp_path / "elsewhere")]) == 0
    theirs = scores(sequential / "runs")
    assert scores(tmp_path / "elsewhere") == {
        ("wide 0.1", s): theirs["wide 0.1", s] for s in (0, 1)
    }


@CLUSTERS
def test_a_ray_cluster_loses_a_node_midway(sequential, tmp_path):
    pytest.importorskip("ray")
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        try:
            address, raylet = next(line for line in cluster.stdout if line[:3] == "up ").split()[1:]
            process = sweep(sequential, tmp_path, "--launcher", "ray", "--address", address)
            killed, run = middle(tmp_path, lambda process: parent(process) == int(raylet))
            cluster.stdin.write("\n")
            cluster.stdin.flush()
            done(process, tmp_path)
        finally:
            cluster.communicate("\n\n")
    require_equal(sequential, tmp_path)
    (first, second) = starts(tmp_path, run)
    assert first == (killed, 0)
    assert second[0] != killed
    assert second[1] >= 10


def parent(process):
    """The parent of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


@CLUSTERS
def test_a_slurm_job_is_preempted_midway_and_requeued(sequential, tmp_path):
    pytest.importorskip("submitit")
    settings = ("--launcher", "slurm", "--slurm", "cluster=local", "timeout_min=5")
    process = sweep(sequential, tmp_path, *settings)
    preempted, run = middle(tmp_path)
    os.kill(preempted, signal.SIGUSR2)
    done(process, tmp_path)
    require_equal(sequential, tmp_path)
    assert [step >= 10 for _, step in starts(tmp_path, run)] == [False, True]
    logs = "".join(f.read_text() for f in (tmp_path / "runs" / ".slurm").glob("*.err"))
    assert "Requeued job" in logs


def test_a_worker_gets_its_share_of_the_accelerators():
    cards = ["0", "1", "2", "3"]
    for workers, expected in ((1, ["0,1,2,3"]), (2, ["0,1", "2,3"]), (3, ["0", "1", "2"])):
        given = [local.environment("cuda", cards, i, workers) for i in range(workers)]
        assert given == [{"CUDA_VISIBLE_DEVICES": mine} for mine in expected]
    six = [local.environment("cuda", cards, i, 6) for i in range(6)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in six] == ["0", "1", "2", "3", "0", "1"]
    assert {e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in six} == {"0.45"}
    assert local.environment("tpu", cards, 1, 2) == {
        "TPU_VISIBLE_CHIPS": "2,3",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
    with pytest.raises(CnnlabError, match="at most 4 workers"):
        local.environment("tpu", cards, 0, 5)
    assert local.environment("cpu", [], 0, 2) == {}
    assert local.accelerators({"CUDA_VISIBLE_DEVICES": "4,5"}) == ("cuda", ["4", "5"])
    assert local.accelerators({"CUDA_VISIBLE_DEVICES": "4", "JAX_PLATFORMS": "cpu"})[0] == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--jobs", "0"), "--jobs: expected at least 1, got 0"),
        (("--rows", "none"), "has no row 'none'"),
        (("--launcher", "slurm"), "--slurm: .*srun"),
        (("--launcher", "slurm", "--slurm", "cluster=local", "gpus=1"), "--slurm: .*gpus"),
        (("--launcher", "slurm", "--slurm", "cluster"), "expected NAME=VALUE, got 'cluster'"),
        (("--launcher", "ray", "--resources", "TPU=x"), "expected NAME=VALUE, got 'TPU=x'"),
        (("--jobs", "2", "--cores", "9999"), "--cores: expected 2 workers with at most"),
        (("--lease-seconds", "0"), "positive number of seconds"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    sequential, tmp_path, monkeypatch, capsys, words, message
):
    # Or submitit, when it is imported, closes the log handlers of all, and pytest's streams.
    monkeypatch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert cli.main(["sweep", str(sequential / FILE), *places, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_workers_report_to_the_trackers(sequential, tmp_path, monkeypatch):
    seen = []

    def fake(project, *, name, identity, config):
        return {"end": (lambda event: seen.append((project, name, config["seed"], event.step)),)}

    monkeypatch.setitem(trackers.TRACKERS, "wandb", fake)
    task = launchers.Work(
        sequential / FILE, tmp_path / "runs", ("wide 0.1",), trackers=("wandb:p",)
    )
    launchers.work(task)
    steps = {step for *_, step in seen}
    assert seen == [("p", f"wide 0.1, seed {seed}", seed, *steps) for seed in (0, 1)]
    assert local.command(task)[-4:] == ["--tracker", "wandb:p", "--rows", "wide 0.1"]
