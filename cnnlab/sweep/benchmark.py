"""A benchmark is an experiment whose columns are times: what it is, and a contender's process.

Each contender lives in a process of its own, with its own environment, so that it is measured as
its users would run it; `cnnlab.sweep.timing` starts these processes and lets one work at a time.
They import this module, which therefore imports neither JAX nor anything else that is large.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Case = dict[str, Any]
"""What is measured, as plain JSON values. Two entries mean something to every benchmark: `rounds`
(instead of the benchmark's) and `tolerance` (instead of `TOLERANCE`)."""

TOLERANCE = 1e-3
PAUSE = 0.01  # seconds, in which the threads of whoever worked last stop spinning and sleep
SHORT = 25e-3  # seconds; what is shorter is repeated within one timing
LEAST = 50e-3  # seconds that such a timing takes


@dataclasses.dataclass(frozen=True)
class Workload:
    """One case as one contender does it.

    Attributes:
        run: does the work once and returns when the result is ready.
        outputs: what `run` returned -> arrays, in the same order and layout for all contenders.
        device: where it runs, `cpu` or the accelerator's kind.
        options: what was set beyond the defaults, such as compiler options; recorded.
        items: how many images, say, one run takes; 0 where that means nothing.
        facts: what else a table says of the case, heading -> text; recorded.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], Sequence[np.ndarray]]
    device: str = "cpu"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: int = 0
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who is measured.

    Attributes:
        make: case -> its workload, or `None` where this contender has no such thing. It is called
            in the contender's process and imports there what it needs.
        packages: distributions that it needs; their versions are recorded.
        environment: variables of its process, over those that it inherits. Settings of speed
            (`cnnlab.sweep.timing.SETTINGS`: of JAX, XLA, OpenMP, MKL, malloc) are not inherited.
        keep_heap: whether the process starts with `cnnlab.backend.keep_heap()`; the record tells
            whether the system could.
    """

    make: Callable[[Case], Workload | None]
    packages: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep_heap: bool = False


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a table of times compares; `get_experiment()` of a file in `experiments/` returns one.

    Attributes:
        cases: name -> case, in the order of the table.
        contenders: name -> contender; the first is "ours", whose ratio to each other is shown.
        cost: case -> (floating-point operations, bytes that must be read and written), 0 where
            that is not a bound.
        peak: a case whose operations per second are the machine's peak: a matrix product. Each run
            measures it anew, and the best contender counts.
        bandwidth: likewise a case whose bytes per second are the memory's bandwidth: a copy.
        columns: names in `cnnlab.reporting.times.COLUMNS`.
        rounds: timings of each contender, one after another in every round.
        budget: seconds after which a contender skips the remaining rounds of a case, once it has
            three timings; three times as long without them.
        build_together: whether contenders build a case at the same time, which spoils the time of
            its first call.
    """

    cases: Mapping[str, Case]
    contenders: Mapping[str, Contender]
    cost: Callable[[Case], tuple[float, float]] = lambda case: (0.0, 0.0)
    peak: Case | None = None
    bandwidth: Case | None = None
    columns: Sequence[str] = ("ms", "ratio", "rate", "floor", "over_floor")
    rounds: int = 9
    budget: float = 30.0
    build_together: bool = False


def checksum(arrays: Sequence[np.ndarray]) -> list[list[float]]:
    """Of each array its size, sum, sum of squares and product with a fixed wave, in float64.

    The wave notices what the sums do not: elements in another order.
    """
    sums = []
    for array in arrays:
        flat = np.asarray(array, np.float64).reshape(-1)
        wave = np.cos(np.arange(flat.size, dtype=np.float64))
        sums.append([float(x) for x in (flat.size, flat.sum(), flat @ flat, flat @ wave)])
    return sums


def agree(
    one: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    tolerance: float = TOLERANCE,
) -> bool:
    """Whether two checksums are of the same numbers, up to `tolerance` of the arrays' norms."""
    if len(one) != len(other):
        return False
    for (size, total, square, wave), (size2, total2, square2, wave2) in zip(
        one, other, strict=True
    ):
        norm = max(square, square2) ** 0.5
        near = (
            size == size2
            and abs(total - total2) <= tolerance * (norm + abs(total))
            and abs(square - square2) <= tolerance * norm**2
            and abs(wave - wave2) <= tolerance * norm
        )
        if not near:  # NaN agrees with nothing
            return False
    return True


def calls(seconds: float) -> int:
    """How often a workload that takes `seconds` is repeated within one timing."""
    if seconds >= SHORT:
        return 1
    return int(np.clip(np.ceil(LEAST / max(seconds, 1e-9)), 1, 10_000))


def serve(file: str, name: str, heap: str) -> None:
    """The whole life of a contender's process: answers commands, a JSON line each.

    Args:
        file: the experiment file.
        name: the contender.
        heap: `"keep"` or `"default"`.
    """
    kept_heap = False
    if heap == "keep":
        from cnnlab import backend

        kept_heap = backend.keep_heap()
    # What a library prints goes to standard error; answers alone go to the pipe.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands = sys.stdin
    sys.path.insert(0, str(Path(file).resolve().parent.parent))
    server = _Server(file, name, kept_heap)
    for line in commands:
        try:
            answer = server.answer(**json.loads(line))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = [f for f in frames if Path(f.filename).resolve() == Path(file).resolve()]
            where = f"{file}, line {last[-1].lineno}: " if last else ""
            traceback.print_exc()
            answer = {"error": f"{where}{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Server:
    def __init__(self, file: str, name: str, kept_heap: bool) -> None:
        self.file, self.name, self.kept_heap = file, name, kept_heap
        self.benchmark: Benchmark | None = None
        self.workload: Workload | None = None

    def answer(self, do: str, **arguments: Any) -> dict[str, Any]:
        return dict(getattr(self, f"do_{do}")(**arguments))

    def do_start(self) -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location("_cnnlab_file", self.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # Flax looks up there where a class was defined
        spec.loader.exec_module(module)
        self.benchmark = module.get_experiment()
        return {}

    def do_build(self, case: Case) -> dict[str, Any]:
        assert self.benchmark is not None
        self.workload = None
        gc.collect()  # what the last case held
        self.workload = self.benchmark.contenders[self.name].make(case)
        if self.workload is None:
            return {"supported": False}
        start = time.perf_counter()
        result = self.workload.run()
        first = time.perf_counter() - start
        return {
            "supported": True,
            "device": self.workload.device,
            "options": dict(self.workload.options),
            "items": self.workload.items,
            "facts": dict(self.workload.facts),
            "kept_heap": self.kept_heap,
            "first": first,
            "checksum": checksum(self.workload.outputs(result)),
        }

    def do_time(self, calls: int) -> dict[str, Any]:
        assert self.workload is not None
        run = self.workload.run
        time.sleep(PAUSE)
        run()  # the processor's caches hold others' data now; steps follow steps of their own
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return {"seconds": (time.perf_counter() - start) / calls}

    def do_drop(self) -> dict[str, Any]:
        self.workload = None
        gc.collect()
        if jax := sys.modules.get("jax"):
            jax.clear_caches()  # compiled programs hold memory maps, of which a process has few
        return {}
