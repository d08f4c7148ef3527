"""Workers that are processes on this machine, which share its cores or its accelerators."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cnnlab.sweep.launchers import Work
from cnnlab.training import loop
from cnnlab.types import CnnlabError

CORES = 4  # of a worker on CPU, where nothing else is said
CHIPS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}
"""Chips of one process -> how the TPU runtime wants to hear of their layout."""


def launch(
    task: Work,
    *,
    workers: int | None = None,
    cores: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = print,
) -> None:
    """Starts the workers, shows their lines, and returns when all have ended.

    What a killed worker leaves the others take over.

    Args:
        task: what to do.
        workers: how many; one for each accelerator, or for every four cores, if `None`.
        cores: on CPU, how many each worker gets for itself. All have all if `None`, and the system
            shares them: XLA divides sums by the number of its threads, so that a run with fewer
            cores equals others up to rounding only.
        should_stop: when true, the workers are told to checkpoint and leave.
        tell: takes the workers' lines.

    Raises:
        CnnlabError: a worker ended with an error; the others were told to leave.
        loop.Interrupted: `should_stop` said so.
    """
    kind, devices = accelerators(os.environ)
    if workers is None:
        workers = len(devices) or max(1, (os.cpu_count() or 1) // (cores or CORES))
    environments = [environment(kind, devices, index, workers) for index in range(workers)]
    pinned = [["--pin", ",".join(map(str, part))] if part else [] for part in pins(cores, workers)]
    processes = [
        subprocess.Popen(
            [*command(task), "--worker", f"{index}/{workers}", *pinned[index]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **added, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # or an interrupt typed here reaches them twice, and kills
        )
        for index, added in enumerate(environments)
    ]
    readers = [
        threading.Thread(target=_relay, args=(process, index, tell), daemon=True)
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    try:
        failed, stopped = _watch(processes, should_stop, tell)
    finally:
        for process in processes:
            if process.poll() is None:  # only if something here failed
                process.terminate()
        for process, reader in zip(processes, readers, strict=True):
            process.wait()
            reader.join()
    if failed is not None:
        raise CnnlabError(
            f"worker {failed} ended with code {processes[failed].returncode}; its last lines above "
            "say why. Finished runs and checkpoints are kept: the same command goes on"
        )
    if stopped:
        raise loop.Interrupted


def _watch(
    processes: Sequence[subprocess.Popen[str]],
    should_stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> tuple[int | None, bool]:
    """Waits for all; returns the first worker that failed, and whether they were stopped."""
    failed, stopped, killed = None, False, set[int]()
    while any(process.poll() is None for process in processes):
        for index, process in enumerate(processes):
            code = process.poll()
            if code is not None and code < 0 and index not in killed:
                killed.add(index)
                tell(f"[{index}] killed by {signal.Signals(-code).name}; others take over its run")
            if code is not None and code > 0 and failed is None and not stopped:
                failed = index
        if (failed is not None or should_stop()) and not stopped:
            stopped = True
            for process in processes:
                process.terminate()
        time.sleep(0.1)
    codes = [process.returncode for process in processes]
    if failed is None and not stopped:
        failed = next((index for index, code in enumerate(codes) if code > 0), None)
    return failed, stopped


def _relay(process: subprocess.Popen[str], index: int, tell: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            tell(f"[{index}] {line.rstrip()}")


def command(task: Work) -> list[str]:
    """What starts a worker, but for which one it is."""
    words = [sys.executable, "-m", "cnnlab.cli", "sweep", str(task.file)]
    words += ["--runs", str(task.runs), "--together", str(task.together)]
    words += ["--strategy", task.strategy]
    words += ["--lease-seconds", str(task.lease_seconds)]
    if task.store:
        words += ["--store", task.store]
    for tracker in task.trackers:
        words += ["--tracker", tracker]
    if task.rows:
        words += ["--rows", *task.rows]
    if task.seeds:
        words += ["--seeds", *map(str, task.seeds)]
    return words


def accelerators(variables: Mapping[str, str]) -> tuple[str, list[str]]:
    """The accelerators of this machine, found without JAX, which would take hold of them.

    Args:
        variables: the environment.

    Returns:
        `"cuda"`, `"tpu"` or `"cpu"`, and their numbers, as strings; none of `"cpu"`.
    """
    if variables.get("JAX_PLATFORMS") == "cpu":
        return "cpu", []
    if (visible := variables.get("CUDA_VISIBLE_DEVICES")) is not None:
        cards = [card for card in visible.split(",") if card]
    else:
        cards = [path.name for path in Path("/proc/driver/nvidia/gpus").glob("*")]
        cards = [str(number) for number in range(len(cards))]
    if cards:
        return "cuda", cards
    if visible := variables.get("TPU_VISIBLE_CHIPS"):
        return "tpu", visible.split(",")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return ("tpu", [str(number) for number in range(len(chips))]) if chips else ("cpu", [])


def environment(kind: str, devices: Sequence[str], index: int, workers: int) -> dict[str, str]:
    """The variables that give a worker its share of the accelerators.

    Args:
        kind: `"cuda"`, `"tpu"` or `"cpu"`.
        devices: numbers of the accelerators.
        index: which worker.
        workers: how many there are.

    Raises:
        CnnlabError: a TPU's chips can't be shared so.
    """
    if kind == "cpu":
        return {}
    # No worker gets more than another, so that times stay comparable.
    size = max(len(devices) // workers, 1)
    first = index * size % len(devices)
    mine = devices[first : first + size]
    if kind == "cuda":
        several = -(-workers // len(devices))  # workers on one card, at most
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / several:.2f}"} if several > 1 else {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine), **memory}
    if workers > len(devices) or size not in CHIPS:
        raise CnnlabError(
            f"--jobs: a TPU chip has one process, and a process has 1, 2 or 4 chips; expected "
            f"at most {len(devices)} workers, as many chips for each, got {workers}"
        )
    return {
        "TPU_VISIBLE_CHIPS": ",".join(mine),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": CHIPS[size],
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }


def pins(cores: int | None, workers: int) -> list[list[int]]:
    """The cores of each worker; empty lists where all have all.

    Raises:
        CnnlabError: there are too few, or this system can't give a process its own.
    """
    if cores is None:
        return [[] for _ in range(workers)]
    if not hasattr(os, "sched_setaffinity"):
        raise CnnlabError(
            "--cores: this system can't give a process cores of its own; leave it out"
        )
    there = sorted(os.sched_getaffinity(0))
    if not 1 <= cores * workers <= len(there):
        raise CnnlabError(
            f"--cores: expected {workers} workers with at most {len(there) // workers} of the "
            f"{len(there)} cores each, got {cores}"
        )
    return [there[index * cores : (index + 1) * cores] for index in range(workers)]
