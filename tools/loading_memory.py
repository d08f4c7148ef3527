"""Draws the memory that reading a folder of JPEGs takes over an epoch, and resumes in its middle.

    python tools/loading_memory.py --output results/loading_speed     # a minute on two CPU cores

The folder is that of `experiments/loading_speed.py`: 20,000 images of 224x224, 3 GB once decoded,
made if it is not there. An epoch of it is streamed as training streams it, in threads and in two
worker processes, each in a process of its own; what is counted is the memory of that process and
its workers (proportional set size, Linux). Then an epoch is begun in its middle: its batches must
be those that the whole one had there, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = 128
EVERY = 4  # batches between two looks at the memory
CHECKED = 6  # batches that are compared after resuming


def memory() -> float:
    """MiB that this process and its children have, shared pages divided among their owners."""
    children = Path("/proc/self/task").glob("*/children")
    pids = [os.getpid(), *(int(pid) for file in children for pid in file.read_text().split())]
    found = (re.search(r"^Pss:\s+(\d+)", _rollup(pid), re.MULTILINE) for pid in pids)
    return sum(int(match[1]) for match in found if match) / 1024


def _rollup(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return ""


def stream(place: Path, workers: int) -> dict[str, Any]:
    """An epoch, and a part of it once more."""
    from cnnlab import backend

    backend.keep_heap()
    backend.limit_unrolling()
    import jax
    import numpy as np

    from cnnlab import parallel, pipeline

    os.environ[pipeline.RESIDENT], os.environ[pipeline.WORKERS] = "0", str(workers)
    split = pipeline.load("image_folder", "train", parallel.make_mesh(1), folder=str(place))
    stream = pipeline.Stream.make(seed=0, size=len(split), validation=0.0, batch_size=BATCH)
    steps = len(split) // BATCH
    middle = steps // 2

    def digest(fed: pipeline.Fed) -> str:
        return hashlib.sha256(np.asarray(fed.images).tobytes()).hexdigest()

    read, used, first = [0], [memory()], list[str]()
    for number, fed in enumerate(split.feed(pipeline.Steps([stream], 0, steps))):
        jax.block_until_ready(fed.images)
        if middle <= number < middle + CHECKED:
            first.append(digest(fed))
        if number % EVERY == 0:
            read.append((number + 1) * BATCH)
            used.append(memory())
    again = pipeline.Steps([stream], middle, middle + CHECKED)
    return {
        "images": read,
        "mebibytes": [round(x, 1) for x in used],
        "batches_compared": CHECKED,
        "equal_after_resuming": [digest(fed) for fed in split.feed(again)] == first,
    }


def draw(found: dict[str, Any], file: Path) -> None:
    """The curves."""
    from cnnlab.reporting import figures

    def curves(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, (name, one) in enumerate(found.items()):
            axes.plot(
                one["images"], one["mebibytes"], color=figures.COLOURS[i],
                linestyle=figures.LINES[i], label=name,
            )  # fmt: skip
        axes.set(xlabel="Images read", ylabel="Memory (MiB)", xlim=(0, None), ylim=(0, None))
        axes.legend()

    figures.save(curves, file, (5.2, 3.6))


def main() -> int:
    """Measures, draws and tells; 1 where resuming was not exact."""
    from cnnlab import record

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import loading_speed

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = loading_speed.folder(20_000)
    if options.workers is not None:
        print(json.dumps(stream(place, options.workers)))
        return 0
    found = {}
    for name, workers in (("threads", 0), ("2 worker processes", 2)):
        command = [sys.executable, __file__, "--output", str(options.output)]
        done = subprocess.run(
            [*command, "--workers", str(workers)], check=True, stdout=subprocess.PIPE, text=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
        first, *rest = found[name]["mebibytes"][len(found[name]["mebibytes"]) // 10 :]
        print(
            f"{name}: {min(first, *rest):.0f} to {max(first, *rest):.0f} MiB after the first tenth "
            f"of the epoch, {'equal' if found[name]['equal_after_resuming'] else 'NOT equal'} "
            "after resuming in its middle"
        )
    about = {
        "command": "python tools/loading_memory.py --output results/loading_speed",
        "code": record.code_version(),
        "environment": record.environment(1),
    }
    record.write_atomic(options.output / "memory.json", record.dump_json(found | about))
    draw(found, options.output / "memory.png")
    return 0 if all(one["equal_after_resuming"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
