"""Measures a benchmark: one process a contender, one of them at work at a time, case by case."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnnlab
from cnnlab import record
from cnnlab.registry import did_you_mean
from cnnlab.reporting import tables, times
from cnnlab.sweep import benchmark as benchmark_lib
from cnnlab.sweep import experiment, results
from cnnlab.sweep.benchmark import Benchmark, Case, Contender
from cnnlab.types import CnnlabError

WARM_UP = 2
LEAST_ROUNDS = 3
SETTINGS = ("XLA_", "JAX_", "OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_", "TORCH_", "DNNL_",
            "ONEDNN_", "OPENBLAS_", "CNNLAB_CPU")  # fmt: skip
KEPT_SETTINGS = ("JAX_PLATFORMS",)


@dataclass(frozen=True)
class Loaded:
    """A benchmark that was read from a file and checked.

    Attributes:
        path: the file.
        benchmark: what its `get_experiment()` returned.
        spec: what the table needs.
        digest: of the file's content.
    """

    path: Path
    benchmark: Benchmark
    spec: times.TimesSpec
    digest: str


def expand(path: Path, module: Any, made: Benchmark) -> Loaded:
    """Checks what `experiment.read` returned.

    Raises:
        CnnlabError: a case that is no dict of plain values, a contender of another type, numbers
            out of range, an unknown column.
    """
    for name, case in made.cases.items():
        try:
            same = json.loads(json.dumps(case))
        except TypeError as error:
            raise CnnlabError(f"{path}, case {name!r}: {error}; use plain JSON values") from None
        if not isinstance(same, dict):
            raise CnnlabError(f"{path}, case {name!r}: expected a dict, got {case!r}")
    for name, contender in made.contenders.items():
        if not isinstance(contender, Contender):
            raise CnnlabError(
                f"{path}, contender {name!r}: expected a cnnlab.sweep.Contender, got "
                f"{type(contender).__name__}"
            )
    if made.rounds < 1 or not made.budget > 0:
        raise CnnlabError(
            f"{path}: expected at least one round and a budget above 0 seconds, got "
            f"{made.rounds} and {made.budget}"
        )
    try:
        spec = times.TimesSpec(
            path.stem,
            experiment.title(module, path),
            tuple(made.cases),
            tuple(made.contenders),
            tuple(made.columns),
            experiment.command(path),
        )
    except CnnlabError as error:
        raise CnnlabError(f"{path}: {error}") from error
    return Loaded(path, made, spec, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def select(loaded: Loaded, patterns: Sequence[str], without: Sequence[str]) -> tuple[list, list]:
    """The names of the cases that match, and of the contenders that are left.

    Args:
        loaded: the benchmark.
        patterns: names, or patterns such as `"depthwise*"`; all cases where empty.
        without: names of contenders to leave out.

    Raises:
        CnnlabError: a pattern that matches nothing, an unknown contender, or ours left out.
    """
    spec = loaded.spec
    matched: set[str] = set()
    for pattern in patterns:
        found = {pattern} & set(spec.cases) or set(fnmatch.filter(spec.cases, pattern))
        if not found:
            raise CnnlabError(
                f"--rows: {spec.name} has no case {pattern!r}{did_you_mean(pattern, spec.cases)}. "
                f"Cases: {', '.join(map(repr, spec.cases))}"
            )
        matched |= found
    for name in without:
        if name not in spec.contenders:
            raise CnnlabError(
                f"--without: {spec.name} has no contender {name!r}"
                f"{did_you_mean(name, spec.contenders)}. Contenders: {', '.join(spec.contenders)}"
            )
    if spec.contenders[0] in without:
        raise CnnlabError(f"--without: {spec.contenders[0]!r} is what the others are compared with")
    cases = [case for case in spec.cases if not patterns or case in matched]
    return cases, [name for name in spec.contenders if name not in without]


def check_packages(loaded: Loaded, contenders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Contender -> the versions of its packages.

    Raises:
        CnnlabError: one is not installed.
    """
    versions: dict[str, dict[str, str]] = {}
    for name in contenders:
        versions[name] = {}
        for package in loaded.benchmark.contenders[name].packages:
            try:
                versions[name][package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise CnnlabError(
                    f"contender {name!r} needs the package {package!r}, which is not installed: "
                    f"pip install 'cnnlab[bench]', or leave it out with --without {name!r}"
                ) from None
    return versions


def machine() -> dict[str, Any]:
    """The hardware and the interpreter: what a time depends on besides code and packages."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": sys.platform,
        "python": platform.python_version(),
    }


def read(loaded: Loaded, folder: Path) -> dict[str, dict[str, Any]]:
    """Case -> its record under `results/`, for those that are there."""
    names = results.slugs(loaded.spec.cases)
    files = {case: folder / "runs" / f"{name}.json" for case, name in names.items()}
    return {case: record.read_json(file) for case, file in files.items() if file.exists()}


def write(
    loaded: Loaded, records: Mapping[str, Mapping[str, Any]], folder: Path
) -> tuple[tables.Grid, list[Path]]:
    """Writes the table, and removes the records of cases that the benchmark no longer has."""
    grid = times.grid(loaded.spec, records.values())
    text = times.to_csv(loaded.spec, records.values())
    kept = {f"{name}.json" for name in results.slugs(loaded.spec.cases).values()}
    for stale in {p.name for p in (folder / "runs").glob("*.json")} - kept:
        (folder / "runs" / stale).unlink()
    return grid, tables.write_texts(grid, text, folder)


def outdated(
    loaded: Loaded, case: str, contenders: Sequence[str], found: Mapping[str, Any] | None
) -> str:
    """Why a case must be measured, or `""` where its record still stands.

    A record stands for the same case and experiment file, code of cnnlab, machine, and settings
    and package versions of every contender asked for: whatever else changes, a time does not.
    """
    if found is None:
        return "new"
    now: dict[str, Any] = {
        "schema": times.SCHEMA,
        "definition": json.loads(json.dumps(loaded.benchmark.cases[case])),
        "rounds": _rounds(loaded.benchmark, case),
        "file": loaded.digest,
        "machine": machine(),
    }
    for key, value in now.items():
        if found.get(key) != value:
            return f"other {key}"
    if found["code"]["digest"] != record.code_version()["digest"]:
        return "other code"
    versions = check_packages(loaded, contenders)
    for name in contenders:
        there = found["contenders"].get(name)
        if there is None:
            return f"without {name}"
        if there["settings"] != _settings(loaded.benchmark.contenders[name]):
            return f"other settings of {name}"
        if there["versions"] != versions[name]:
            return f"other packages of {name}"
    return ""


def execute(
    loaded: Loaded,
    cases: Sequence[str],
    contenders: Sequence[str],
    folder: Path,
    *,
    tell: Callable[[str], None],
) -> None:
    """Measures the cases whose records do not stand, and writes a record after each.

    Args:
        loaded: the benchmark.
        cases: which.
        contenders: who; the first of the benchmark among them.
        folder: under `results/`.
        tell: takes a line about each case.

    Raises:
        CnnlabError: a package is missing, a contender fails, or the contenders' outputs differ.
    """
    code = record.code_version()  # before anything can change the sources on disk
    versions = check_packages(loaded, contenders)
    there = read(loaded, folder)
    todo = [case for case in cases if outdated(loaded, case, contenders, there.get(case))]
    if len(todo) < len(cases):
        tell(f"{len(cases) - len(todo)} of {len(cases)} cases are measured already")
    if not todo:
        return
    names = results.slugs(loaded.spec.cases)
    benchmark = loaded.benchmark
    with start(loaded, contenders) as workers:
        peaks = _peaks(benchmark, workers)
        for kind, unit in (("flops", "GFLOP/s"), ("bytes", "GB/s")):
            for name, value in peaks[kind].items():
                tell(f"{name}: {value / 1e9:.0f} {unit}")
        for case in todo:
            definition = benchmark.cases[case]
            rounds = _rounds(benchmark, case)
            measured = measure(
                workers,
                case,
                definition,
                rounds,
                benchmark.budget,
                together=benchmark.build_together,
            )
            flops, moved = benchmark.cost(definition)
            made = {
                "schema": times.SCHEMA,
                "case": case,
                "definition": definition,
                "rounds": rounds,
                "contenders": {
                    name: of_name
                    | {
                        "settings": _settings(benchmark.contenders[name]),
                        "versions": versions[name],
                    }
                    for name, of_name in measured.items()
                },
                "cost": {"flops": flops, "bytes": moved},
                "peaks": peaks,
                "machine": machine(),
                "code": code,
                "file": loaded.digest,
            }
            record.write_atomic(folder / "runs" / f"{names[case]}.json", record.dump_json(made))
            medians = {name: times.median(made, name) for name in contenders}
            shown = ", ".join(f"{n} {1e3 * s:.3g} ms" for n, s in medians.items() if s)
            tell(f"{case}: {shown}")


def measure(
    workers: Mapping[str, Worker],
    name: str,
    case: Case,
    rounds: int,
    budget: float,
    *,
    together: bool = False,
) -> dict[str, dict[str, Any]]:
    """Contender -> what was measured of one case.

    All build the case and must agree on its outputs; after warm-up rounds each is timed once in
    every round: right after a call that does not count, for as many calls as make a time that can
    be trusted. What others left in the processor's caches would count otherwise, which doubled the
    time of a step of milliseconds.

    Args:
        workers: contender -> its process.
        name: of the case.
        case: what it is.
        rounds: timings of each contender.
        budget: see `Benchmark`.
        together: whether they build it at the same time.

    Raises:
        CnnlabError: a contender fails, none has the case, or their outputs differ.
    """
    found: dict[str, dict[str, Any]] = {}

    def build(worker: Worker) -> dict[str, Any]:
        return worker.ask("build", f"building {name!r}", case=dict(case))

    with concurrent.futures.ThreadPoolExecutor(len(workers) if together else 1) as pool:
        all_built = list(pool.map(build, workers.values()))
    for who, built in zip(workers, all_built, strict=True):
        found[who] = {"seconds": [], "calls": 0, "checksum": None}
        if built.pop("supported"):
            found[who] |= built
    able = [who for who in workers if found[who]["checksum"] is not None]
    if not able:
        raise CnnlabError(f"case {name!r}: no contender has it")
    tolerance = case.get("tolerance", benchmark_lib.TOLERANCE)
    for who in able[1:]:
        one, other = found[able[0]]["checksum"], found[who]["checksum"]
        if not benchmark_lib.agree(one, other, tolerance):
            raise CnnlabError(
                f"case {name!r}: {able[0]} and {who} compute different things, so their times "
                f"can't be compared: of each output (size, sum, sum of squares, wave) {one} and "
                f"{other} differ by more than {tolerance} of their norms"
            )
    asking = f"timing {name!r}"
    quickest = {who: float(found[who]["first"]) for who in able}
    for _ in range(WARM_UP):
        for who in able:
            if quickest[who] < budget:
                seconds = workers[who].ask("time", asking, calls=1)["seconds"]
                quickest[who] = min(quickest[who], seconds)
    for who in able:
        found[who]["calls"] = benchmark_lib.calls(quickest[who])
    for done in range(rounds):
        for who in able:
            of_who = found[who]
            spent = sum(of_who["seconds"]) * of_who["calls"]
            if spent > (budget if done >= LEAST_ROUNDS else LEAST_ROUNDS * budget):
                continue
            answer = workers[who].ask("time", asking, calls=of_who["calls"])
            of_who["seconds"].append(answer["seconds"])
    for worker in workers.values():
        worker.ask("drop", f"after {name!r}")
    return found


class Worker:
    """A contender's process.

    Args:
        loaded: the benchmark.
        name: the contender.
    """

    def __init__(self, loaded: Loaded, name: str) -> None:
        self.name = name
        contender = loaded.benchmark.contenders[name]
        code = "import sys; from cnnlab.sweep import benchmark; benchmark.serve(*sys.argv[1:])"
        heap = "keep" if contender.keep_heap else "default"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(loaded.path.resolve()), name, heap],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(contender),
            text=True,
            start_new_session=True,  # Ctrl-C is ours to handle
        )

    def ask(self, do: str, doing: str, **arguments: Any) -> dict[str, Any]:
        """Gives a command and waits for its answer.

        Args:
            do: the command, as `cnnlab.sweep.benchmark` knows it.
            doing: what to say this was, should it fail.
            **arguments: of the command.

        Raises:
            CnnlabError: the contender raised an error, or its process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):  # told below: it has no answer
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise CnnlabError(f"contender {self.name!r}, {doing}: {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CnnlabError(f"contender {self.name!r}, {doing}: {answer['error']}")
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f"; its last words: {words[-1]}" if words else ""
        return f"its process ended with {how}{last}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def start(loaded: Loaded, contenders: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """The contenders' processes, for as long as the context lasts.

    Raises:
        CnnlabError: one of them does not start.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in contenders:
            workers[name] = Worker(loaded, name)
            stack.callback(workers[name].close)
        for worker in workers.values():
            worker.ask("start", "starting")
        yield workers


def _environment(contender: Contender) -> dict[str, str]:
    """What the process sees: a clean slate of performance settings, then its own."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(SETTINGS) or name in KEPT_SETTINGS
    }
    package = str(Path(cnnlab.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, clean.get("PYTHONPATH"))))
    return clean | {"PYTHONPATH": path} | dict(contender.environment)


def _settings(contender: Contender) -> dict[str, Any]:
    return {
        "environment": dict(contender.environment),
        "keep_heap": contender.keep_heap,
    }


def _rounds(benchmark: Benchmark, case: str) -> int:
    return int(benchmark.cases[case].get("rounds", benchmark.rounds))


def _peaks(benchmark: Benchmark, workers: Mapping[str, Worker]) -> dict[str, dict[str, float]]:
    """What the machine can do: operations and bytes a second, of each contender that can tell."""
    found: dict[str, dict[str, float]] = {"flops": {}, "bytes": {}}
    for kind, case, index in (("flops", benchmark.peak, 0), ("bytes", benchmark.bandwidth, 1)):
        if case is None:
            continue
        amount = benchmark.cost(case)[index]
        rounds = int(case.get("rounds", benchmark.rounds))
        for name, m in measure(workers, kind, case, rounds, benchmark.budget).items():
            if m["seconds"]:
                median = sorted(m["seconds"])[len(m["seconds"]) // 2]
                found[kind][name] = amount / median
    return found
