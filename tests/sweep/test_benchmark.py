"""Benchmarks: contenders in processes of their own, and what stands in the table."""

import csv
import io
import json
import math
import re
import sys

import jax
import numpy as np
import pytest

from cnnlab import cli, models, registry
from cnnlab.reporting import tables, times
from cnnlab.sweep import Benchmark, Workload, benchmark, experiment, timing
from cnnlab.types import CnnlabError, Record

# Contenders that write down each call, so that a test sees who ran when.
FILE = '''"""Who is faster?

    cnnlab table experiments/race.py
"""
import os

import numpy as np

from cnnlab.sweep import Benchmark, Contender, Workload

LOG = os.environ["RACE_LOG"]


def say(*words):
    with open(LOG, "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")


def contender(name, factor=1.0):
    def make(case):
        if case.get("only", name) != name:
            return None
        say(name, "builds", case["n"])
        if case.get("crash") == name:
            os._exit(3)
        if case.get("error") == name:
            raise ValueError("no such thing")

        def run():
            say(name, "runs", os.getpid())
            print("chatter")
            return factor * np.arange(case["n"], dtype=np.float32)

        return Workload(run, lambda y: [y])

    return make


def get_experiment():
    return Benchmark(
        cases=CASES,
        contenders={
            "ours": Contender(contender("ours"), keep_heap=KEEP),
            "theirs": Contender(contender("theirs", THEIRS), PACKAGES, {"RACE": "1"}),
        },
        cost=lambda case: (2.0 * case["n"], 0.0),
        peak={"n": 1000},
        rounds=3,
    )
'''


@pytest.fixture
def race(tmp_path, monkeypatch):
    """Writes the experiment with some values filled in, and gives the command that measures it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RACE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("XLA_FLAGS", "--set_for_the_parent_only")
    monkeypatch.setattr(benchmark, "LEAST", 0.0)
    folder = tmp_path / "experiments"
    folder.mkdir()

    def command(*options, cases=None, theirs=1.0, packages=(), keep=False):
        values = f"CASES = {cases or {'small': {'n': 4}, 'large': {'n': 9}}!r}\n"
        values += f"THEIRS = {theirs}\nPACKAGES = {packages!r}\nKEEP = {keep}\n"
        (folder / "race.py").write_text(FILE + values)
        return cli.main(["table", "experiments/race.py", *options])

    return command


def log(tmp_path):
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    (tmp_path / "log").unlink()
    return lines


def test_contenders_take_turns_in_processes_of_their_own(race, tmp_path, capsys):
    assert race(keep=True) == 0
    lines = log(tmp_path)
    pids = {name: {line[2] for line in lines if line[:2] == [name, "runs"]} for name in
            ("ours", "theirs")}  # fmt: skip
    assert all(len(found) == 1 for found in pids.values())
    assert pids["ours"] != pids["theirs"]
    builds = [line[0] + line[2] for line in lines if line[1] == "builds"]
    assert builds == ["ours1000", "theirs1000", "ours4", "theirs4", "ours9", "theirs9"]

    # Of the last case: each builds and runs once, then two warm-up rounds and three of timings.
    start = max(i for i, line in enumerate(lines) if line == ["ours", "builds", "9"])
    turns = [line[0] for line in lines[start:] if line[1] == "runs"]
    changes = [a for a, b in zip([None, *turns], turns, strict=False) if a != b]
    assert len(changes) == 2 * (1 + 2 + 3)

    folder = tmp_path / "results" / "race"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {"table.md", "table.tex", "table.csv", "runs/small.json", "runs/large.json"}
    record = json.loads((folder / "runs" / "large.json").read_text())
    assert record["definition"] == {"n": 9}
    assert record["cost"] == {"bytes": 0.0, "flops": 18.0}
    assert len(record["contenders"]["theirs"]["seconds"]) == record["rounds"] == 3
    assert record["contenders"]["theirs"]["settings"]["environment"] == {"RACE": "1"}
    heaps = {name: found["kept_heap"] for name, found in record["contenders"].items()}
    assert heaps == {"ours": sys.platform == "linux", "theirs": False}
    assert set(record["peaks"]["flops"]) == {"ours", "theirs"}
    assert record["machine"]["cores"] >= 1
    text = (folder / "table.md").read_text()
    assert text.startswith("# Who is faster?\n")
    assert "ours / theirs" in text
    assert "cnnlab table experiments/race.py" in text
    assert "chatter" not in capsys.readouterr().out


def test_a_finished_case_is_measured_again_only_if_something_changed(race, tmp_path, capsys):
    assert race("--rows", "sm*") == 0
    assert {line[2] for line in log(tmp_path) if line[1] == "builds"} == {"1000", "4"}
    assert race("--dry-run") == 0
    out = capsys.readouterr().out
    assert "small: done" in out
    assert "large: to measure (new)" in out
    assert race() == 0
    assert {line[2] for line in log(tmp_path) if line[1] == "builds"} == {"1000", "9"}
    table = tmp_path / "results" / "race" / "table.md"
    before = table.read_text()

    assert race() == 0  # nothing is left to do: no process starts
    assert not (tmp_path / "log").exists()
    table.unlink()
    assert race("--render") == 0
    assert not (tmp_path / "log").exists()
    assert table.read_text() == before

    # A case that is gone loses its record; a changed file is measured anew.
    assert race("--dry-run", cases={"small": {"n": 5}}) == 0
    assert "small: to measure (other definition)" in capsys.readouterr().out
    assert race(cases={"small": {"n": 5}}) == 0
    assert [p.name for p in (table.parent / "runs").iterdir()] == ["small.json"]


def test_a_contender_may_lack_a_case_or_be_left_out(race, tmp_path):
    assert race(cases={"alone": {"n": 4, "only": "ours"}, "both": {"n": 4}}) == 0
    table = (tmp_path / "results/race/table.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|") for line in table.splitlines()[2:6]}
    assert rows["alone"][3].strip() == "–"
    assert rows["both"][3].strip() != "–"
    (tmp_path / "log").unlink()

    # What lacks a contender stands while that contender isn't asked for.
    cases = {"both": {"n": 6}}
    assert race("--without", "theirs", cases=cases) == 0
    assert {line[0] for line in log(tmp_path)} == {"ours"}
    assert race("--without", "theirs", cases=cases) == 0
    assert not (tmp_path / "log").exists()
    assert race(cases=cases) == 0
    assert {line[0] for line in log(tmp_path)} == {"ours", "theirs"}


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        ((), {"packages": ("no-such-package",)},
         r"'theirs' needs the package 'no-such-package'.*pip install 'cnnlab\[bench\]'.*--without"),
        ((), {"cases": {"a": {"n": 4, "crash": "theirs"}}},
         r"contender 'theirs', building 'a': its process ended with exit code 3"),
        ((), {"cases": {"a": {"n": 4, "error": "ours"}}},
         r"contender 'ours', building 'a': .*race.py, line \d+: ValueError: no such thing"),
        ((), {"theirs": 1.01}, r"ours and theirs compute different things"),
        ((), {"cases": {"a": {"n": 4, "only": "nobody"}}}, r"case 'a': no contender has it"),
        ((), {"cases": {"a": {"n": 4, "x": {1}}}}, r"case 'a': .*set is not JSON.*plain JSON"),
        (("--rows", "larg"), {}, r"no case 'larg'.*did you mean 'large'"),
        (("--without", "their"), {}, r"no contender 'their'.*did you mean 'theirs'"),
        (("--without", "ours"), {}, r"'ours' is what the others are compared with"),
        (("--seeds", "0"), {}, r"--seeds: a benchmark trains nothing"),
        (("--render",), {}, r"holds no results yet"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(race, capsys, options, values, message):
    assert race(*options, **values) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.replace("\n", " "))


def test_what_was_measured_before_a_failure_is_kept(race, tmp_path):
    cases = {"good": {"n": 4}, "bad": {"n": 4, "crash": "theirs"}}
    assert race(cases=cases) == cli.USER_ERROR
    assert [p.name for p in (tmp_path / "results/race/runs").iterdir()] == ["good.json"]


def test_a_table_experiment_takes_no_contenders(root, capsys):
    path = str(root / "experiments" / "quickstart.py")
    assert cli.main(["table", path, "--without", "x"]) == cli.USER_ERROR
    assert "--without is for benchmarks" in capsys.readouterr().err


# ------------------------------------------------------------------------------- pure functions


def test_a_dropped_case_leaves_no_compiled_program(tmp_path):
    file = tmp_path / "jitted.py"
    file.write_text(
        "import jax\nimport jax.numpy as jnp\n"
        "from cnnlab.sweep import Benchmark, Contender, Workload\n"
        "square = jax.jit(lambda x: 3 * x * x)\n"  # the file keeps it, and so does JAX
        "def make(case):\n"
        "    return Workload(lambda: square(jnp.arange(case['n'])), lambda y: [y])\n"
        "def get_experiment():\n"
        "    return Benchmark({'one': {'n': 5}}, {'a': Contender(make, ())})\n"
    )
    server = benchmark._Server(str(file), "a", False)
    server.answer("start")
    programs = jax.devices()[0].client.live_executables
    before = len(programs())
    server.answer("build", case={"n": 5})
    assert len(programs()) > before
    server.answer("drop")
    assert len(programs()) <= before


def test_checksums_notice_values_order_size_and_nan():
    x = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    one = benchmark.checksum([x])
    assert one[0][0] == 600
    assert one[0][1] == pytest.approx(x.astype(np.float64).sum())
    assert one[0][2] == pytest.approx(np.square(x.astype(np.float64)).sum())
    assert benchmark.agree(one, benchmark.checksum([x * (1 + 1e-6)]))
    broken = x.copy()
    broken[3, 3] = np.nan
    for other in ([x.T], [x * 1.01], [x[1:]], [x, x], [], [broken], [x + 0.01]):
        assert not benchmark.agree(one, benchmark.checksum(other))
    assert not benchmark.agree(benchmark.checksum([broken]), benchmark.checksum([broken]))


def test_short_work_is_repeated():
    assert benchmark.calls(1.0) == benchmark.calls(benchmark.SHORT) == 1
    assert benchmark.calls(1e-3) == math.ceil(benchmark.LEAST / 1e-3)
    assert benchmark.calls(0.0) == 10_000


def test_a_timing_follows_a_call_that_is_not_timed(monkeypatch, tmp_path):
    done = []
    server = benchmark._Server(str(tmp_path / "none.py"), "a", False)
    server.workload = Workload(run=lambda: done.append(len(done)), outputs=lambda _: [])
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: done.clear())
    # The first call after a pause takes a minute, the others a second.
    monkeypatch.setattr(
        benchmark.time, "perf_counter", lambda: float(len(done)) + 59 * (len(done) > 0)
    )
    for calls in (1, 5):
        assert server.answer("time", calls=calls) == {"seconds": 1.0}
        assert len(done) == calls + 1


def test_processes_start_without_the_parents_settings_of_speed(monkeypatch):
    for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "JAX_PLATFORMS", "CNNLAB_CPU", "HOME"):
        monkeypatch.setenv(name, "x")
    found = timing._environment(
        benchmark.Contender(lambda case: None, (), {"OMP_NUM_THREADS": "1"})
    )
    assert {"XLA_FLAGS", "CNNLAB_CPU"}.isdisjoint(found)
    assert (found["OMP_NUM_THREADS"], found["JAX_PLATFORMS"], found["HOME"]) == ("1", "x", "x")


class Scripted:
    """A worker whose calls take seconds that the test chooses."""

    def __init__(self, first, seconds):
        self.first, self.seconds, self.timed = first, seconds, 0

    def ask(self, do, doing, **arguments):
        self.timed += do == "time"
        return {
            "build": {"supported": True, "first": self.first, "checksum": [[1.0, 1.0, 1.0, 1.0]]},
            "time": {"seconds": self.seconds},
        }.get(do, {})


def test_who_is_too_slow_sits_out_and_is_kept_short():
    workers = {
        "quick": Scripted(0.1, 0.1),  # 9 rounds and 2 to warm up
        "slow": Scripted(5.0, 5.0),  # 25 seconds allow 6 timings
        "very slow": Scripted(40.0, 40.0),  # no warm-up, and 75 seconds allow 2 timings
    }
    found = timing.measure(workers, "a", {}, rounds=9, budget=25.0)
    assert {name: len(m["seconds"]) for name, m in found.items()} == {
        "quick": 9, "slow": 6, "very slow": 2,
    }  # fmt: skip
    assert [worker.timed for worker in workers.values()] == [11, 8, 2]


def record(case, ours, theirs, **more) -> Record:
    def contender(seconds, **settings):
        return {
            "seconds": seconds, "calls": 1, "first": 1.0, "checksum": [], "device": "cpu",
            "options": {}, "items": 4, "facts": {}, "kept_heap": False,
            "versions": {"numpy": "2.0"},
            "settings": {"environment": {}, "keep_heap": False}, **settings,
        }  # fmt: skip

    return {
        "schema": 1, "case": case, "definition": {}, "rounds": 3, "file": "f00",
        "contenders": {"ours": contender(ours), "theirs": contender(theirs)},
        "cost": {"flops": 4e9, "bytes": 1e9},
        "peaks": {"flops": {"ours": 1e12, "theirs": 2e12}, "bytes": {"ours": 1e11}},
        "machine": {"cpu": "A CPU", "cores": 2, "ram_gib": 8, "system": "linux", "python": "3.13"},
        "code": {"version": "1", "commit": "abc", "dirty": False, "digest": "d00"},
        **more,
    }  # fmt: skip


SPEC = times.TimesSpec(
    "race", "Who?", ("fast", "slow", "tie", "gone"), ("ours", "theirs"), tuple(times.COLUMNS), "cmd"
)


def test_the_table_of_known_times():
    records = [
        record("tie", [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]),
        record("fast", [0.020, 0.021, 0.019], [0.080, 0.079, 0.081]),
        record("slow", [0.08, 0.08], [0.02, 0.02, 0.02]),
    ]
    records[1]["contenders"]["theirs"]["facts"] = {"kind": "quick one"}
    grid = times.grid(SPEC, records)
    lines = {line[0][0]: line[1:] for line in grid.lines}
    assert grid.headers[1:7] == [
        "kind", "ours (images/s)", "theirs (images/s)", "ours (ms)", "theirs (ms)", "ours / theirs",
    ]  # fmt: skip
    assert [lines[name][0][0] for name in ("fast", "slow")] == ["quick one", "–"]
    # Four images in 20 ms.
    assert [lines["fast"][i][0] for i in (1, 2)] == ["200", "50.0"]
    # 1e9 bytes at 1e11 a second bound the case, not 4e9 operations at the better 2e12.
    assert [text for text, _ in lines["fast"]][6:] == ["50.0 GB/s", "10.0", "2.00"]
    assert [lines["fast"][i][0] for i in (3, 4)] == ["20.0", "80.0"]
    ratio, bold = lines["fast"][5]
    assert ratio.startswith("0.25 [0.2")
    assert bold
    assert lines["slow"][5] == ("4.00 [4.00, 4.00]†", False)
    text, bold = lines["tie"][5]
    assert text.startswith("1.00 [")
    assert not bold
    assert "†" not in text
    assert {text for text, _ in lines["gone"]} == {"–"}
    notes = "\n".join(grid.notes)
    for said in ("Missing: gone", "slow, ours (2)", "A CPU, 2 cores, 8 GiB", "sources d00", "cmd",
                 "ours 1,000 GFLOP/s; theirs 2,000 GFLOP/s"):  # fmt: skip
        assert said in notes
    assert "Warning" not in notes
    for write in (tables.to_markdown, tables.to_latex):
        assert "GB/s" in write(grid)


def test_cases_of_different_machines_are_told():
    records = [record("fast", [1.0], [1.0]), record("slow", [1.0], [1.0], machine={
        "cpu": "B", "cores": 8, "ram_gib": 8, "system": "linux", "python": "3.13"})]  # fmt: skip
    notes = "\n".join(times.grid(SPEC, records).notes)
    assert "Warning: the cases were not all measured with one machine" in notes
    assert "B, 8 cores, 8 GiB, linux, Python 3.13 (slow)" in notes


def test_csv_has_every_number_in_seconds():
    text = times.to_csv(SPEC, [record("fast", [1.0, 2.0, 4.0], [4.0, 4.0, 4.0])])
    ours, theirs = csv.DictReader(io.StringIO(text))
    assert (ours["median"], ours["least"], ours["greatest"]) == ("2.0", "1.0", "4.0")
    assert (float(theirs["ratio"]), theirs["timings"]) == (0.5, "3")
    assert ours["ratio"] == ""
    assert float(ours["floor"]) == pytest.approx(0.01)


def test_the_ratios_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        r = times.ratio(rng.lognormal(0, 0.1, 9), rng.lognormal(math.log(2), 0.1, 9))
        covered += r.low <= 0.5 <= r.high
    assert 180 <= covered <= 200  # 95 % nominal; the bootstrap of medians errs on the wide side


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "expected a record of schema 1, got 2"),
        ({"case": "fats"}, "no case 'fats'.*did you mean 'fast'"),
    ],
)
def test_records_that_do_not_belong(change, message):
    with pytest.raises(CnnlabError, match=message):
        times.grid(SPEC, [record("fast", [1.0], [1.0]) | change])


# -------------------------------------------------------------------- the project's benchmarks


@pytest.fixture(params=("ops_speed", "training_speed"))
def made(request, root):
    path = root / "experiments" / f"{request.param}.py"
    module, found = experiment.read(path)
    return path, module, found


def test_every_benchmark_of_the_project_expands(made):
    path, module, found = made
    assert isinstance(found, Benchmark)
    loaded = timing.expand(path, module, found)
    assert f"cnnlab table experiments/{path.name}" in path.read_text()
    assert loaded.spec.contenders[0] == "cnnlab"
    for name, case in found.cases.items():
        flops, moved = found.cost(case)
        assert flops >= 0, name
        assert moved >= 0, name
        assert flops or moved or case["what"] == "compile", name


def test_the_zoo_names_every_variant_and_no_other(root):
    module, found = experiment.read(root / "experiments" / "zoo.py")
    assert set(found.cases) == set(registry.plugins("models"))
    assert set(module.PUBLISHED) <= set(found.cases)
    timing.expand(root / "experiments" / "zoo.py", module, found)
    case = found.cases["resnet18"]
    assert module.facts(case, models.create("resnet18", num_outputs=1000)) == {
        "input": "224x224x3",
        "parameters": "11,689,512",
        "MACs (M)": "1,814.1",
        "receptive field / stride": "435 / 32",
        "top-1 (%)": "69.76",
        "source": "timm, tv_in1k",
    }
    gated = module.facts(found.cases["seresnet18"], models.create("seresnet18", num_outputs=1000))
    assert gated["receptive field / stride"] == "global"


def test_operations_are_those_of_the_published_counts(root):
    # He et al. 2016, table 6: 0.27 M parameters. 40.8 M multiply-accumulates at 32x32x3.
    module, found = experiment.read(root / "experiments" / "training_speed.py")
    assert found.cost(found.cases["LeNet-5, evaluation"]) == (2 * 128 * 416_520, 0.0)
    resnet = list(module.kernels(module.resnet20(), (32, 32, 3)))
    assert sum(macs for _, macs, _ in resnet) == pytest.approx(40.8e6, rel=0.01)
    count = sum(math.prod(shape) if shape else 0 for shape, _, _ in resnet)
    assert count + sum(beside for _, _, beside in resnet) == pytest.approx(0.27e6, rel=0.01)
