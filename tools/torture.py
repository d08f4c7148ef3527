"""Kills training and damages its checkpoints, and looks whether the results are the same bits.

    python tools/torture.py --output results/torture      # ten minutes on two CPU cores

A small network is trained on the digits by `cnnlab train`, with a checkpoint each few steps.

1. Kills. Runs are ended by SIGKILL, at a moment drawn at random or within a save (as soon as the
   temporary folder of a checkpoint is there, and a few milliseconds), and started again, until
   they end by themselves. Parameters, predictions, metrics and scores must equal those of the same
   run left alone.
2. Damage. An unfinished run is copied, files of its checkpoints are truncated, zeroed, emptied,
   deleted or have a bit flipped, and the copy goes on. It must end with the same parameters, or
   with a message that names the checkpoint that is lost.
3. Full disk. The same run on file systems of a few dozen KiB (tmpfs, which needs root; left out
   without), so that the space ends at each kind of write. It must end with a message and, once
   there is space, go on to the same bits.

Each start is a process of its own, but a fork of one that has imported everything and has not
started JAX: what a start costs otherwise, the imports, is the only thing that is never killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cnnlab import backend

os.environ.setdefault("JAX_PLATFORMS", "cpu")
backend.keep_heap()
backend.limit_unrolling()

import tensorboardX.event_file_writer  # noqa: E402, F401 - before the fork

from cnnlab import cli, record  # noqa: E402
from cnnlab.sweep import progress, results  # noqa: E402, F401
from cnnlab.training import run  # noqa: E402, F401

CONFIG = """
from cnnlab import config


def get_config(argument=""):
    made = config.base(
        model={"name": "simple_conv", "widths": (8,), "hidden": 16},
        data="digits",
        optim={"learning_rate": 0.05},
        augment={"transforms": ("crop(padding=1)",)},
        train={
            "duration": "60 steps",
            "batch_size": 64,
            "log_every": "3 steps",
            "eval_every": "20 steps",
            "checkpoint_every": "6 steps",
            "keep": "best",
        },
    )
    made.seed = int(argument or 0)
    return made
"""
LAST_STEP = 60
KILLS_A_RUN = 12
SAVING = 0.4  # part of the kills that are aimed at a save

HOW: dict[str, Callable[[random.Random, bytes], bytes | None]] = {
    "truncated": lambda draw, content: content[: draw.randrange(len(content))],
    "zeroed": lambda _, content: bytes(len(content)),
    "emptied": lambda *_: b"",
    "deleted": lambda *_: None,
    "one bit flipped": lambda draw, content: _flipped(content, draw.randrange(8 * len(content))),
}


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@dataclasses.dataclass(frozen=True)
class Workplace:
    """The folder where all of it happens: a config, a compilation cache, and runs."""

    path: Path

    def start(self, folder: Path, seed: int) -> int:
        """Starts `cnnlab train` for a run's folder in a fork; returns its process id."""
        pid = os.fork()
        if pid:
            return pid
        with open(self.path / "log", "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        words = ["train", "--config", f"{self.path}/tiny.py:{seed}", "--folder", str(folder)]
        os._exit(cli.main(words))

    def said(self) -> str:
        """What the processes have written since this was asked last."""
        log = self.path / "log"
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return text

    def finish(self, folder: Path, seed: int) -> tuple[int, str]:
        """Lets a run go on to its end; returns the exit code and what was said."""
        self.said()
        _, status = os.waitpid(self.start(folder, seed), 0)
        return os.waitstatus_to_exitcode(status), self.said()


def evidence(folder: Path) -> dict[str, Any]:
    """What must be equal to the bit."""
    result = json.loads((folder / "result.json").read_text())
    return {
        "parameters_sha256": result["parameters_sha256"],
        "scores": result["scores"],
        **{
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("predictions.npz", "metrics.jsonl")
        },
    }


def unfinished_saves(folder: Path) -> set[tuple[str, int]]:
    """The temporary folders of saves that lie there: names, and when each was last changed."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # it may be renamed meanwhile
        for entry in os.scandir(folder / "checkpoints"):
            if "checkpoint-tmp" in entry.name:
                found.add((entry.name, entry.stat().st_ctime_ns))
    return found


def steps(folder: Path) -> list[int]:
    """The checkpoints of a run, ascending."""
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit())


def situation(folder: Path, before: set[tuple[str, int]]) -> str:
    """Where a kill met the run, by what lies there afterwards.

    Args:
        folder: of the run.
        before: the unfinished saves that earlier kills have left.
    """
    if unfinished_saves(folder) - before:
        return "within a save"
    if list(folder.glob(".*.tmp")):
        return "within the writing of another file"
    if not (folder / "config.json").exists():
        return "before the run began"
    if not steps(folder):
        return "before the first checkpoint"
    if (folder / "result.json").exists():
        return "after the result was written"
    return "scoring" if steps(folder)[-1] == LAST_STEP else "training, or going on"


def ended(pid: int) -> bool:
    """Whether a child has ended by itself (which also collects it)."""
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def kill_somewhere(
    place: Workplace, folder: Path, seed: int, draw: random.Random, usual: float
) -> str:
    """Starts a run, and kills it at a random moment or within a save.

    Args:
        place: where it is.
        folder: of the run.
        seed: of the run.
        draw: of the moment.
        usual: seconds that an undisturbed run takes.

    Returns:
        The situation in which it was; empty if it ended before.
    """
    aimed, pause = draw.random() < SAVING, draw.uniform(0, 0.03)
    wait = draw.uniform(0, 0.5 if aimed else 0.9) * usual
    before = unfinished_saves(folder)
    pid, until = place.start(folder, seed), time.monotonic() + wait
    while time.monotonic() < until:
        if ended(pid):
            return ""
        time.sleep(0.005)
    while aimed and not unfinished_saves(folder) - before:
        if ended(pid):
            return ""
        time.sleep(0.001)
    if aimed:
        time.sleep(pause)
    if ended(pid):
        return ""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return situation(folder, before)


def kills(place: Workplace, wanted: int, draw: random.Random) -> dict[str, Any]:
    """Kills runs so many times in all, lets each end, and compares it with one left alone."""
    met, equal, seed, done = collections.Counter[str](), 0, 0, 0
    usual, problems = 0.0, []
    while done < wanted:
        alone, killed = place.path / f"alone{seed}", place.path / f"killed{seed}"
        code, said = place.finish(alone, seed)  # the first one fills the compilation cache
        if code:
            raise SystemExit(f"a run left alone failed:\n{said}")
        if not usual:
            shutil.rmtree(alone)
            began = time.monotonic()
            place.finish(alone, seed)
            usual = time.monotonic() - began
        for _ in range(KILLS_A_RUN):
            if done == wanted:
                break
            where = kill_somewhere(place, killed, seed, draw, usual)
            if not where:
                break
            met[where] += 1
            done += 1
        code, said = place.finish(killed, seed)
        if code == 0 and evidence(killed) == evidence(alone):
            equal += 1
        else:
            problems.append(f"seed {seed}, code {code}: {said[-2000:]}")
        print(f"{done} kills, {equal} of {seed + 1} runs equal", flush=True)
        seed += 1
    return {
        "kills": done,
        "met": dict(met.most_common()),
        "runs": seed,
        "equal": equal,
        "seconds_alone": round(usual, 2),
        "problems": problems,
    }


def damages(place: Workplace, wanted: int, draw: random.Random) -> dict[str, Any]:
    """Damages the checkpoints of a run that was killed, in so many ways, and lets it go on."""
    half, alone = place.path / "half", place.path / "alone-damage"
    place.finish(alone, 0)
    pid = place.start(half, 0)
    while len(steps(half)) < 3 or steps(half)[-1] < LAST_STEP // 2:
        if ended(pid):
            raise SystemExit("the run that was to be damaged ended before it could be killed")
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    every = [p.relative_to(half) for p in sorted(half.glob("checkpoints/*/**/*")) if p.is_file()]
    every = [p for p in every if p.parts[1].isdigit() and (half / p).stat().st_size]
    newest = [p for p in every if int(p.parts[1]) == steps(half)[-1]]
    cases = [([file], how) for file in newest for how in HOW]  # each file in each way, and then
    draw.shuffle(cases)
    cases = cases[: wanted * 2 // 3]
    while len(cases) < wanted:  # several, of all checkpoints
        cases.append((draw.sample(every, draw.randint(1, 6)), draw.choice(list(HOW))))
    outcomes, problems, lost = collections.Counter[str](), [], []
    for files, how in cases:
        copy = place.path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(half, copy)
        for file in files:
            content = HOW[how](draw, (copy / file).read_bytes())
            if content is None:
                (copy / file).unlink()
            else:
                (copy / file).write_bytes(content)
        code, said = place.finish(copy, 0)
        what = f"{how}: {', '.join(map(str, files))}"
        if code == 0 and evidence(copy) == evidence(alone):
            told = "damaged and moved" in said
            outcomes["same bits, after a warning" if told else "same bits, nothing was lost"] += 1
        elif code == 2 and "is damaged" in said and "Traceback" not in said:
            outcomes["a message that names what is lost"] += 1
            lost.append(f"{what}: {said.strip().splitlines()[-1]}".replace(str(copy), "RUN"))
        else:
            outcomes["neither"] += 1
            problems.append(f"{what}: code {code}: {said[-2000:]}".replace(str(copy), "RUN"))
            print(problems[-1], flush=True)
    print(dict(outcomes), flush=True)
    return {
        "cases": len(cases),
        "ways": dict(collections.Counter(how for _, how in cases)),
        "files": dict(collections.Counter(min(len(files), 2) for files, _ in cases)),
        "outcomes": dict(outcomes.most_common()),
        "lost": lost,
        "problems": problems,
    }


@contextlib.contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Callable[[], None]]:
    """A file system of so many KiB; what is given makes it large.

    Raises:
        subprocess.CalledProcessError: this process may not mount any.
    """
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    subprocess.run(mount, check=True, capture_output=True)

    def enlarge() -> None:
        larger = ["mount", "-o", "remount,size=64m", str(path)]
        subprocess.run(larger, check=True, capture_output=True)

    try:
        yield enlarge
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def full_disks(place: Workplace, sizes: Sequence[int]) -> dict[str, Any]:
    """Trains on file systems that are too small, then makes them larger."""
    alone = place.path / "alone-damage"
    outcomes, problems = collections.Counter[str](), []
    for kib in sizes:
        with small_disk(place.path / "disk", kib) as enlarge:
            folder = place.path / "disk" / "run"
            code, said = place.finish(folder, 0)
            if code == 0:
                outcomes["there was space enough"] += 1
                continue
            clear = code == 2 and "no disk space left to write" in said and "Traceback" not in said
            enlarge()
            again, more = place.finish(folder, 0)
            if clear and again == 0 and evidence(folder) == evidence(alone):
                outcomes["a clear message, then the same bits"] += 1
            else:
                outcomes["not so"] += 1
                problems.append(f"{kib} KiB: {code}, {again}: {said[-1500:]}\n{more[-1500:]}")
                print(problems[-1], flush=True)
    print(dict(outcomes), flush=True)
    return {"sizes_kib": list(sizes), "outcomes": dict(outcomes), "problems": problems}


def table(found: dict[str, Any]) -> str:
    """The evidence as Markdown."""
    lines = [
        "# Kills, damaged checkpoints, full disks",
        "",
        f"`{found['command']}`, {found['minutes']} minutes; cnnlab {found['code']}, "
        f"{found['machine']}. Each start is a fork of a process that has imported everything; see "
        "`tools/torture.py`.",
        "",
        "| what | how often |",
        "|---|---:|",
    ]
    part = found["kills"]
    lines += [f"| kills by SIGKILL | {part['kills']} |"]
    lines += [f"| – {where} | {count} |" for where, count in part["met"].items()]
    lines += [
        f"| runs that were killed, up to {KILLS_A_RUN} times each | {part['runs']} |",
        "| – equal to the same run left alone: parameters, predictions, metrics, scores | "
        f"{part['equal']} |",
        f"| damaged checkpoints | {found['damages']['cases']} |",
    ]
    lines += [f"| – {what} | {count} |" for what, count in found["damages"]["outcomes"].items()]
    if "full_disks" in found:
        lines += [f"| disks of too few KiB | {len(found['full_disks']['sizes_kib'])} |"]
        lines += [f"| – {w} | {n} |" for w, n in found["full_disks"]["outcomes"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs all of it, writes the result, and says whether all was well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damaged", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=r".*fork\(\)", category=Warning)
    draw, began = random.Random(options.seed), time.monotonic()
    found: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        (place.path / "tiny.py").write_text(CONFIG)
        os.environ["CNNLAB_CACHE"] = str(place.path / "cache")
        found["kills"] = kills(place, options.kills, draw)
        found["damages"] = damages(place, options.damaged, draw)
        if os.geteuid() == 0:
            found["full_disks"] = full_disks(place, (8, 24, 40, 60, 80, 100, 120, 140, 160, 180))
        else:
            print("full disks are left out: mounting one needs root")
    found["minutes"] = round((time.monotonic() - began) / 60, 1)
    found["code"] = record.version_text()
    environment = record.environment(1)  # which starts JAX: only now
    found["machine"] = f"{environment['device']}, Python {environment['python']}"
    record.write_atomic(options.output / "torture.json", record.dump_json(found))
    record.write_atomic(options.output / "table.md", table(found))
    parts = [value for value in found.values() if isinstance(value, dict)]
    return int(any(part["problems"] for part in parts))


if __name__ == "__main__":
    sys.exit(main())
