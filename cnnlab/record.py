"""What a run leaves behind: settings, metrics, scores, and what made them.

A run's folder holds

- `config.json`: the whole resolved config;
- `metrics.jsonl`: a line for each logged step, `{"step": 70, "epoch": 1.0, "train/loss": ...}`; no
  times, so that two runs of one config give equal files;
- `seconds.jsonl`: the training time spent up to each of these steps;
- `events/`: the same metrics as TensorBoard events;
- `checkpoints/`: see `cnnlab.checkpoint`;
- `predictions.npz`: `logits` [N, K] float32 and `labels` [N] int32 of the test split;
- `result.json`: written last; a run that has it is finished. Its fields: `schema` (1), `row`,
  `seed`, `identity`, `config`, `status` (`done` or `diverged`), `diverged_step`, `scores` (by
  split), `predictions` (predicted and true classes, `cnnlab.encoding`), `test_set`, `class_names`,
  `cost` (`parameters`, `macs`, `seconds`, `images_per_second`, `steps`, `examples`), `curves` (the
  lines of `metrics.jsonl`), `code` (that finished it), `code_history` (all that trained it),
  `environment`, `train_fingerprint`, `parameters_sha256` (not of a diverged run), `overfitted_step`
  (of adversarial training by single steps: where catastrophic overfitting was found, or null).

Files are written whole, to a temporary name and then renamed, except the two that grow by lines; a
line that a kill cut short is dropped when the run goes on.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

import cnnlab
from cnnlab import backend, parallel
from cnnlab import config as config_lib
from cnnlab.types import CnnlabError, CnnlabWarning, PyTree, Record

SCHEMA = 1


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all, and is sure that it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which failed writes lack
        raise
    finally:
        temporary.unlink(missing_ok=True)


def dump_json(value: Mapping[str, Any]) -> str:
    """JSON as the project writes it: sorted keys, one line a top-level entry, a final newline."""
    lines = (
        f" {json.dumps(key)}: {json.dumps(value[key], sort_keys=True, allow_nan=False)}"
        for key in sorted(value)
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CnnlabError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CnnlabError(f"{path} is damaged ({error}); remove it and run again") from None


class RunFolder:
    """The folder of one run, held by one process at a time.

    Use it as a context manager. Where several processes train the run together, all make this
    object and call its methods, and the first alone holds the folder and writes into it; what
    fails there is raised in all.

    Args:
        path: the folder; made if missing.
        config: the run's resolved config.

    Raises:
        CnnlabError: the folder belongs to a run of another config, or another process works on it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self._lock: BinaryIO | None = None
        self._events: _Events | None = None
        parallel.from_first(lambda: self._hold(config_lib.plain(config)))

    def _hold(self, config: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path / ".lock")
        try:
            for unfinished in self.path.glob(".*.tmp"):  # of a killed process: we hold the lock
                unfinished.unlink()
            self._claim(config)
        except BaseException:
            self._lock.close()
            raise

    def _claim(self, config: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if not file.exists():
            write_atomic(file, dump_json(config))
            return
        different = config_lib.differences(read_json(file), config, "here")
        if different:
            raise CnnlabError(
                f"{self.path} holds a run of another config: {different}. "
                "Choose another folder, or remove this one"
            )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._events is not None:
                self._events.close()
        finally:
            if self._lock is not None:
                self._lock.close()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def rewind(self, step: int) -> None:
        """Forgets every logged line after `step`."""
        parallel.from_first(lambda: self._rewind(step))

    def _rewind(self, step: int) -> None:
        for name in ("metrics.jsonl", "seconds.jsonl"):
            kept = [line for line in _lines(self.path / name) if line["step"] <= step]
            write_atomic(self.path / name, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, row: Mapping[str, float], seconds: float) -> None:
        """Appends one line of metrics; `row` has `step`."""
        parallel.from_first(lambda: self._append(row, seconds))

    def _append(self, row: Mapping[str, float], seconds: float) -> None:
        for name, line in (
            ("metrics.jsonl", dict(row)),
            ("seconds.jsonl", {"step": row["step"], "seconds": seconds}),
        ):
            try:
                with open(self.path / name, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                error.filename = error.filename or str(self.path / name)
                raise
        if self._events is None:
            self._events = _Events(self.path / "events", int(row["step"]))
        self._events.write(row)

    def metrics(self) -> list[dict[str, float]]:
        """The lines logged so far."""
        return parallel.from_first(lambda: _lines(self.path / "metrics.jsonl"))

    def write_predictions(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Keeps the logits and labels of the test split."""
        packed = io.BytesIO()
        np.savez(packed, logits=logits, labels=labels)
        content = packed.getvalue()
        parallel.from_first(lambda: write_atomic(self.path / "predictions.npz", content))

    def finish(self, record: Record) -> None:
        """Writes `result.json`: from now on the run is finished."""
        parallel.from_first(lambda: write_atomic(self.path / "result.json", dump_json(record)))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or `None` where it is not finished.

    Raises:
        CnnlabError: the file is damaged or of another schema.
    """
    # A file that one machine has just written may not be seen by another yet.
    return parallel.from_first(lambda: _read_result(folder))


def _read_result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    if not file.exists():
        return None
    record = read_json(file)
    if record.get("schema") != SCHEMA:
        raise CnnlabError(
            f"{file}: expected schema {SCHEMA}, got {record.get('schema')!r}; it was written by "
            "another version of cnnlab: remove the folder to run again"
        )
    return dict(record)


class _Events:
    """Metrics as TensorBoard reads them, in one file for each time that the run goes on.

    Without tensorboardX's `SummaryWriter`: its thread dies of a full disk unseen, whereupon the
    next few metrics wait for it for ever; and its files are named by the clock alone, so that of
    two begun within a second the first is overwritten.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import event_file_writer, summary  # which only training needs
        from tensorboardX.proto import event_pb2

        self._scalar, self._event = summary.scalar, event_pb2.Event
        folder.mkdir(exist_ok=True)
        # Sorted in the order in which they were begun, whatever the clock says.
        begun = folder / f"events{len(list(folder.iterdir())):05}"
        self._writer = event_file_writer.EventsWriter(str(begun))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(  # what is shown of this step and later ones is forgotten
            event_pb2.Event(wall_time=time.time(), step=step, session_log=start)
        )

    def write(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.write_event(
                    self._event(
                        wall_time=time.time(),
                        step=int(row["step"]),
                        summary=self._scalar(key, value),
                    )
                )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(lines := path.read_text().split("\n")):
        try:
            if line:
                found.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise CnnlabError(f"{path}: line {number + 1} is damaged: {line[:60]!r}") from None
    return found


def _lock(path: Path) -> BinaryIO:
    """Holds an advisory lock until the file is closed (or the process dies)."""
    file = open(path, "a+b")  # noqa: SIM115 - held as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode() or "another process"
        file.close()
        raise CnnlabError(
            f"{path.parent}: {holder} works on this run; wait for it, or end it first"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            file.close()
            raise
        warnings.warn(
            f"{path.parent}: this file system has no locks, so nothing keeps another process from "
            "this run but the leases of `cnnlab sweep`",
            CnnlabWarning,
            stacklevel=2,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    return file


def parameters_sha256(*trees: PyTree) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of every leaf, in the order of names."""
    digest = hashlib.sha256()
    for tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = parallel.on_host(leaf)
            digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@functools.cache
def code_version() -> dict[str, Any]:
    """Which code this is: `version`, git `commit` and `dirty` where known, `digest` of sources."""
    package = Path(cnnlab.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode())
        digest.update(file.read_bytes())

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", str(package.parent), *arguments), capture_output=True, text=True
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside some other project's repository.
    ours = git("ls-files", "--error-unmatch", str(package / "__init__.py")) is not None
    return {
        "version": cnnlab.__version__,
        "commit": git("rev-parse", "--short=10", "HEAD") if ours else None,
        "dirty": bool(git("status", "--porcelain", "--", str(package))) if ours else False,
        "digest": digest.hexdigest()[:12],
    }


def version_text() -> str:
    """The code and the JAX that run now, on one line."""
    code = code_version()
    commit = (
        f" {code['commit']}{' with changes' if code['dirty'] else ''}" if code["commit"] else ""
    )
    return f"{code['version']}{commit} (sources {code['digest']}), jax {jax.__version__}"


def environment(devices: int) -> dict[str, Any]:
    """Versions, hardware, and the settings that make CPU fast.

    Args:
        devices: how many the run uses.
    """
    import flax

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "platform": device.platform,
        "device": f"{platform.machine()}, {os.cpu_count()} cores"
        if device.platform == "cpu"
        else device.device_kind,
        "devices": devices,
        "system": sys.platform,
        **backend.described(),
    }
