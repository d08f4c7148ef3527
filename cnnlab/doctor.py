"""`cnnlab doctor`: what this machine has, how fast it is, what is missing, and what to do about it.

`examine` gathers facts as plain values, `diagnose` turns them into findings without looking at the
machine again, and `render` prints both. JAX is imported only while gathering: that it can't start
is the finding that matters most.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Distributions whose versions are told."""

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "tfds": (("tensorflow-datasets", "array-record"), "data sets of TensorFlow Datasets"),
    "hub": (("huggingface-hub",), "published weights by name"),
    "torch": (("torch",), "weights in .pth files"),
    "wandb": (("wandb",), "--tracker wandb"),
    "mlflow": (("mlflow",), "--tracker mlflow"),
    "ray": (("ray",), "--launcher ray"),
    "slurm": (("submitit",), "--launcher slurm"),
    "bench": (("torch", "timm"), "benchmarks beside PyTorch"),
}
"""Extra of cnnlab -> the distributions that it installs, and what they are for."""

GIB = 2**30
LEAST_DISK = 100 * 2**20
LEAST_DEVICE_MEMORY = 2 * GIB
LEAST_SHARED_MEMORY = 1 * GIB

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know about this machine.

    Attributes:
        level: `error` (cnnlab can't run), `warning` (it runs, but badly) or `note`.
        what: what was found.
        remedy: what to do; empty where nothing has to be done.
    """

    level: str
    what: str
    remedy: str = ""


# --- gathering -----------------------------------------------------------------------------------


def examine(runs: Path, environ: Mapping[str, str] = os.environ) -> Facts:
    """All facts, as values that JSON can hold; takes a few seconds, most of them for the speeds.

    Args:
        runs: where runs' folders lie or will lie.
        environ: the environment.

    Returns:
        `versions`, `code`, `environment` (variables that steer JAX and cnnlab), `hardware`, `jax`
        (`error`, or `platform`, `devices`, `x64` and `vector`), `speed`, `host`, `cache`, `runs`,
        `data` and `packages`.
    """
    facts: Facts = {
        "versions": {"python": platform.python_version()} | {v: _version(v) for v in VERSIONS},
        "environment": {
            name: value
            for name, value in sorted(environ.items())
            if name.startswith(("JAX_", "XLA_", "CNNLAB_", "TPU_", "COLAB_TPU"))
            or name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
        },
        "hardware": hardware(environ),
        "host": host(),
        "runs": _folder(runs),
        "packages": {
            extra: {"installed": all(map(_version, wanted)), "purpose": purpose}
            for extra, (wanted, purpose) in EXTRAS.items()
        },
    }
    facts["jax"] = _start()
    if "error" in facts["jax"]:
        return facts | {"code": None, "cache": None, "speed": None, "data": {}}
    from cnnlab import record

    return facts | {
        "code": record.code_version(),
        "cache": _cache(),
        "data": data(),
        "speed": speed(facts["jax"]["platform"]),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def hardware(environ: Mapping[str, str], root: Path = Path("/")) -> Facts:
    """Accelerators that the machine has, whether or not JAX sees them.

    Args:
        environ: the environment.
        root: the root of the file system.

    Returns:
        `gpus`: `{"name", "memory", "driver"}` each (memory in bytes, all None where the driver's
        tool does not say); `tpu`: how a TPU shows, or None; `libtpu`: the copies installed.
    """
    gpus: list[dict[str, Any]] = []
    for name, memory, driver in _nvidia():
        size = int(float(memory) * 2**20) if memory.replace(".", "").isdigit() else None
        gpus.append({"name": name, "memory": size, "driver": driver})
    if not gpus:
        files = (root / "dev").glob("nvidia[0-9]*")
        gpus = [{"name": None, "memory": None, "driver": None} for _ in files]
    tpu = next(
        (n for n in ("COLAB_TPU_ADDR", "TPU_NAME", "TPU_ACCELERATOR_TYPE") if environ.get(n)), None
    )
    if accelerators := sorted((root / "dev").glob("accel[0-9]*")):
        tpu = str(accelerators[0])
    elif any((root / "dev/vfio").glob("[0-9]*")) and _google_accelerator(root):
        tpu = str(root / "dev/vfio")
    copies = [name for name in ("libtpu", "libtpu-nightly") if _version(name)]
    if environ.get("TPU_LIBRARY_PATH"):
        copies.append(f"TPU_LIBRARY_PATH={environ['TPU_LIBRARY_PATH']}")
    return {"gpus": gpus, "tpu": tpu, "libtpu": copies}


def _nvidia() -> list[list[str]]:
    """Name, memory in MiB and driver of each GPU, as NVIDIA's tool says it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run((tool, *query), capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []  # a driver that hangs or is half installed: /dev tells what there is
    lines = [line.split(", ") for line in done.stdout.splitlines()] if not done.returncode else []
    return [line for line in lines if len(line) == 3]


def _google_accelerator(root: Path) -> bool:
    """Whether a PCI device is Google's and neither a disk (class 01) nor a network card (02)."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        if vendor == "0x1ae0" and kind[2:4] not in ("01", "02"):
            return True
    return False


def host(root: Path = Path("/")) -> Facts:
    """Cores and memory of the host, and what of them this process may use.

    Args:
        root: the root of the file system.

    Returns:
        `processor`, `cores` (of the machine), `usable_cores` (by affinity and cgroup, may be a
        fraction), `memory`, `available` and `shared_memory` in bytes; None where it is unknown.
    """
    memory, quota = _memory(root), _cgroup_cores(root)
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    shared = root / "dev/shm"
    return {
        "processor": _processor(root),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "usable_cores": min(affinity, quota),
        "memory": memory.get("MemTotal"),
        "available": memory.get("MemAvailable"),
        "shared_memory": shutil.disk_usage(shared).total if shared.is_dir() else None,
    }


def _processor(root: Path) -> str:
    file = root / "proc/cpuinfo"
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory(root: Path) -> dict[str, int]:
    """MemTotal and MemAvailable in bytes, at most what the cgroup allows."""
    file = root / "proc/meminfo"
    if not file.exists():
        return {}
    lines = (line.replace(":", "").split() for line in file.read_text().splitlines())
    found = {line[0]: 1024 * int(line[1]) for line in lines if line[0].startswith("Mem")}
    cgroup = root / "sys/fs/cgroup"
    for limit in (cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"):
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            found = {name: min(value, int(text)) for name, value in found.items()}
    return found


def _cgroup_cores(root: Path) -> float:
    """The processor time that the cgroup grants (version 2, else 1), in cores."""
    cgroup = root / "sys/fs/cgroup"
    if (file := cgroup / "cpu.max").exists():
        quota, period = file.read_text().split()
    elif (file := cgroup / "cpu/cpu.cfs_quota_us").exists():
        quota, period = file.read_text().strip(), (file.parent / "cpu.cfs_period_us").read_text()
    else:
        return math.inf
    return float(quota) / float(period) if quota.isdigit() else math.inf  # "max" and "-1": no limit


def _start() -> Facts:
    """Starts JAX; what it runs on, or the error that keeps it from running."""
    try:
        import jax

        from cnnlab import backend

        backend.keep_programs()
        devices = [
            {
                "kind": device.device_kind,
                "memory": (device.memory_stats() or {}).get("bytes_limit"),
                "process": device.process_index,
            }
            for device in jax.devices()
        ]
    except Exception as error:  # a broken installation or a busy device fails in any way it likes
        return {"error": f"{type(error).__name__}: {error}".strip()}
    return {
        "platform": jax.default_backend(),
        "devices": devices,
        "x64": bool(jax.config.values["jax_enable_x64"]),
    }


def _cache() -> Facts:
    """The compilation cache that is in use."""
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    found = _folder(Path(folder))
    sizes = {e.name: e.stat().st_size for e in os.scandir(folder)} if found["exists"] else {}
    programs = sum(name.endswith("-cache") for name in sizes)  # each has a file of its last use
    return found | {"programs": programs, "bytes": sum(sizes.values())}


def _folder(path: Path) -> Facts:
    """A folder, whether it can be written, and the space there; neither is changed by asking."""
    path = path.expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        "free": shutil.disk_usage(there).free,
    }


def data() -> Facts:
    """Each data source with its defaults: name -> `found`, `examples` of the test split, `message`.

    `message` is None, or what the source says where it finds nothing: where it looked and the line
    that gets the data.
    """
    from cnnlab import registry
    from cnnlab.types import CnnlabError

    found: Facts = {}
    for name, plugin in registry.plugins("data").items():
        needed = [
            p.name
            for p in inspect.signature(plugin.function).parameters.values()
            if p.default is p.empty and p.name != "split"
        ]
        examples, message = None, None
        if needed:
            message = f"needs data.{needed[0]}"
        else:
            try:
                examples = len(plugin.function("test"))
            except CnnlabError as error:
                message = str(error)
        found[name] = {"found": examples is not None, "examples": examples, "message": message}
    return found


# --- speeds --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """How large the pieces of work are that are timed.

    Attributes:
        matrix: rows and columns of the square matrices.
        images: [B, H, W, C] of the convolution, which has C filters of 3x3.
        copy: bytes that are copied.
        calls: how many calls make one timing, so that a fast device is not timed for its latency.
    """

    matrix: int
    images: tuple[int, int, int, int]
    copy: int
    calls: int


WORK = {
    "cpu": Work(1024, (32, 32, 32, 64), 2**26, 1),
    "accelerator": Work(4096, (256, 32, 32, 256), 2**28, 20),
}


def speed(platform_name: str, work: Work | None = None) -> Facts:
    """How fast the first device multiplies matrices, convolves and copies.

    The precision of float32 is JAX's default, which on TPUs and newer GPUs is less than float32's
    24 bits. bfloat16 is measured on accelerators, and on processors that have instructions for it.

    Args:
        platform_name: JAX's name of the platform.
        work: what to do; fits the platform if None.

    Returns:
        `copy`: GB/s, bytes read and bytes written; for `float32` and `bfloat16` (None where it is
        not measured), in GFLOP/s (an addition and a multiplication are two): `matrix_product`,
        `convolution_forward` and `convolution_backward` (both gradients).
    """
    import jax.numpy as jnp

    work = work or WORK["cpu" if platform_name == "cpu" else "accelerator"]
    ones = jnp.ones(work.copy // 4, jnp.float32)
    seconds = _seconds(lambda x: x + 1, ones, calls=work.calls)
    found: Facts = {"copy": 2 * ones.nbytes / seconds / 1e9, "bfloat16": None}
    del ones
    for dtype in ("float32", "bfloat16"):
        if dtype == "float32" or platform_name != "cpu" or _bfloat16_instructions():
            found[dtype] = _speeds(work, jnp.dtype(dtype))
    return found


def _bfloat16_instructions() -> bool:
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.exists() else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _speeds(work: Work, dtype: Any) -> Facts:
    """GFLOP/s of one number format; see `speed`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cnnlab.ops.conv import conv

    def forward(images: Any, kernel: Any) -> Any:
        return conv(images, kernel, padding="SAME")

    def backward(images: Any, kernel: Any, cotangent: Any) -> Any:
        return jax.vjp(forward, images, kernel)[1](cotangent)

    size, channels = work.matrix, work.images[-1]
    generator = np.random.default_rng(0)  # JAX's own would take seconds to compile

    def drawn(*shape: int) -> Any:  # since some kernels are faster on zeros
        return jnp.asarray(generator.random(shape, np.float32), dtype)

    a, b = drawn(size, size), drawn(size, size)
    images, kernel = drawn(*work.images), drawn(3, 3, channels, channels)
    convolution = 2 * 9 * channels * math.prod(work.images)
    timed: dict[str, tuple[float, Callable[..., Any], tuple[Any, ...]]] = {
        "matrix_product": (2 * size**3, lambda x, y: x @ y, (a, b)),
        "convolution_forward": (convolution, forward, (images, kernel)),
        "convolution_backward": (2 * convolution, backward, (images, kernel, images)),
    }
    return {
        name: flop / _seconds(function, *arguments, calls=work.calls) / 1e9
        for name, (flop, function, arguments) in timed.items()
    }


def _seconds(function: Callable[..., Any], *arguments: Any, calls: int) -> float:
    """The median time of five rounds of calls, a call, after one that compiles."""
    import jax

    from cnnlab import backend

    compiled = backend.jit(function)
    jax.block_until_ready(compiled(*arguments))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        results = [compiled(*arguments) for _ in range(calls)]
        jax.block_until_ready(results)
        rounds.append(time.perf_counter() - start)
        del results
    return statistics.median(rounds) / calls


# --- judging -------------------------------------------------------------------------------------


def diagnose(facts: Facts) -> list[Finding]:
    """What the facts mean: errors first, then warnings, then notes."""
    found = [
        *_about_jax(facts),
        *_about_devices(facts),
        *_about_host(facts),
        *_about_folders(facts),
        *_about_data(facts),
    ]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _install(hardware: Facts) -> str:
    """The line that installs JAX for this hardware."""
    extra = "tpu"
    if not hardware["tpu"]:
        drivers = [gpu["driver"] for gpu in hardware["gpus"] if gpu["driver"]]
        # CUDA 13 needs a driver of the 580 series; an older or unknown one gets CUDA 12.
        extra = "cuda13" if drivers and int(drivers[0].split(".")[0]) >= 580 else "cuda12"
    return f"pip install 'cnnlab[{extra}]'  (in a checkout: pip install -e '.[{extra}]')"


def _about_jax(facts: Facts) -> list[Finding]:
    jax, hardware, environment = facts["jax"], facts["hardware"], facts["environment"]
    platforms = environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME")
    accelerator = "a TPU" if hardware["tpu"] else "an NVIDIA GPU" if hardware["gpus"] else ""
    found = []
    if "error" in jax:
        remedy = "pip install --force-reinstall cnnlab"
        if platforms:
            remedy = f"unset JAX_PLATFORMS (it is {platforms!r})"
        elif hardware["tpu"]:
            remedy = "end the process that holds the TPU (one at a time may), or reinstall: "
            remedy += _install(hardware)
        elif accelerator:
            remedy = _install(hardware)
        found.append(Finding("error", f"JAX does not start: {jax['error']}", remedy))
    elif jax["platform"] == "cpu" and accelerator:
        where = f" ({hardware['tpu']})" if hardware["tpu"] else ""
        what = f"this machine has {accelerator}{where}, but JAX runs on the CPU"
        hides = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and not hardware["tpu"]
        if platforms:
            found.append(Finding("warning", what, "unset JAX_PLATFORMS"))
        elif hides:
            found.append(Finding("warning", what, "unset CUDA_VISIBLE_DEVICES, which hides it"))
        else:
            found.append(Finding("warning", what, _install(hardware)))
    elif platforms:
        found.append(Finding("note", f"JAX_PLATFORMS={platforms} says where JAX runs"))
    if len(hardware["libtpu"]) > 1:
        what = f"several libtpu: {', '.join(hardware['libtpu'])}; which one is loaded is a chance"
        remedy = "pip uninstall libtpu-nightly, and unset TPU_LIBRARY_PATH"
        found.append(Finding("warning", what, remedy))
    if jax.get("x64"):
        what = "64-bit numbers are on (JAX_ENABLE_X64): slower, and other results than published"
        found.append(Finding("warning", what, "unset JAX_ENABLE_X64"))
    if environment.get("CNNLAB_CPU") == "plain" and jax.get("platform") == "cpu":
        what = "CNNLAB_CPU=plain leaves JAX's slow defaults on CPU as they are"
        found.append(Finding("warning", what, "unset CNNLAB_CPU"))
    if "XLA_FLAGS" in environment:
        found.append(Finding("note", f"XLA_FLAGS={environment['XLA_FLAGS']}"))
    return found


def _about_devices(facts: Facts) -> list[Finding]:
    jax, environment, found = facts["jax"], facts["environment"], []
    if jax.get("platform") in (None, "cpu"):
        return []
    memory = [device["memory"] for device in jax["devices"] if device["memory"]]
    fraction = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if fraction:
        what = f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} is the share of memory that JAX may use"
        found.append(Finding("note", what))
    if memory and min(memory) < LEAST_DEVICE_MEMORY:
        what = f"JAX may use {_bytes(min(memory))} of a device's memory"
        remedy = "end other processes on it, or choose a smaller --config.train.batch_size"
        if fraction:
            remedy = "raise or unset XLA_PYTHON_CLIENT_MEM_FRACTION"
        found.append(Finding("warning", what, remedy))
    deterministic = "--xla_gpu_deterministic_ops=true"
    if jax["platform"] == "gpu" and deterministic not in environment.get("XLA_FLAGS", ""):
        what = "a run repeated on GPU may differ in its last bits"
        remedy = f"where it must not: export XLA_FLAGS={deterministic}"
        found.append(Finding("note", what, remedy))
    return found


def _about_host(facts: Facts) -> list[Finding]:
    host, found = facts["host"], []
    if host["usable_cores"] < host["cores"]:
        what = f"{host['usable_cores']:g} of {host['cores']} cores may be used (affinity or cgroup)"
        remedy = "" if host["usable_cores"] >= 2 else "give the container or job more cores"
        found.append(Finding("note" if host["usable_cores"] >= 2 else "warning", what, remedy))
    if host["memory"] and host["memory"] < 2 * GIB:
        what = f"{_bytes(host['memory'])} of memory: compiling a larger network may need more"
        found.append(Finding("warning", what, "choose a machine of at least 2 GiB"))
    shared = host["shared_memory"]
    if shared is not None and shared < LEAST_SHARED_MEMORY:
        what = f"/dev/shm holds {_bytes(shared)}; the loader's worker processes pass images there"
        found.append(Finding("warning", what, "docker run --shm-size=8g, or mount it larger"))
    return found


def _about_folders(facts: Facts) -> list[Finding]:
    found = []
    runs, cache = facts["runs"], facts["cache"]
    if not runs["writable"]:
        what = f"the runs' folder {runs['path']} can't be written"
        found.append(Finding("error", what, "choose another: --runs DIR"))
    elif runs["free"] < LEAST_DISK:
        what = f"{_bytes(runs['free'])} free at {runs['path']}: checkpoints will not fit"
        found.append(Finding("error", what, "free some space, or choose another: --runs DIR"))
    elif runs["free"] < 10 * LEAST_DISK:
        what = f"{_bytes(runs['free'])} free at {runs['path']}"
        found.append(Finding("warning", what, "large networks' checkpoints need more"))
    if cache is not None and not cache["writable"]:
        what = f"the compilation cache {cache['path']} can't be written: each start compiles anew"
        found.append(Finding("warning", what, "set CNNLAB_CACHE to a folder that can"))
    return found


def _about_data(facts: Facts) -> list[Finding]:
    sources = facts["data"]
    if sources and not any(source["found"] for source in sources.values()):
        first = next(source["message"] for source in sources.values())
        return [Finding("error", f"no data set can be read: {first}", "see the list of data")]
    return []


# --- printing ------------------------------------------------------------------------------------


def render(facts: Facts, findings: Sequence[Finding], console: Console) -> None:
    """Prints the facts, and below them what to do."""
    from rich.table import Table
    from rich.text import Text

    def section(title: str, rows: Sequence[tuple[str, ...]]) -> None:
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False
        )
        table.add_column(style="cyan", no_wrap=True, min_width=14)
        for _ in rows[0][1:]:
            table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()

    section("Software", _software(facts))
    section("Machine", _machine(facts))
    if facts["speed"]:
        console.print(_speed_table(facts["speed"], Table))
        console.print()
    section("Folders", _folders(facts))
    if facts["data"]:
        section(
            "Data",
            [
                (name, f"{each['examples']:,} test images" if each["found"] else each["message"])
                for name, each in facts["data"].items()
            ],
        )
    section(
        "Optional",
        [
            (
                extra,
                f"{each['purpose']}: "
                + ("installed" if each["installed"] else f"pip install 'cnnlab[{extra}]'"),
            )
            for extra, each in facts["packages"].items()
        ],
    )
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for finding in findings:
        console.print(Text(f"{finding.level}: {finding.what}", styles[finding.level]))
        if finding.remedy:
            console.print(Text(f"  -> {finding.remedy}"))
    errors = sum(finding.level == "error" for finding in findings)
    console.print(
        Text(f"{errors} thing(s) keep cnnlab from running", "bold red")
        if errors
        else Text("cnnlab can run here", "bold green")
    )


def _software(facts: Facts) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if code := facts["code"]:
        commit = f", commit {code['commit']}" if code["commit"] else ""
        commit += " with changes" if code["dirty"] else ""
        rows.append(("cnnlab", f"{code['version']}{commit}, sources {code['digest']}"))
    named = (f"{name} {version or 'missing'}" for name, version in facts["versions"].items())
    rows.append(("versions", ", ".join(named)))
    told = [f"{name}={value}" for name, value in facts["environment"].items()]
    return [*rows, *([("environment", "\n".join(told))] if told else [])]


def _machine(facts: Facts) -> list[tuple[str, ...]]:
    jax, host = facts["jax"], facts["host"]
    rows: list[tuple[str, ...]] = []
    if "error" in jax:
        rows.append(("devices", "none: JAX does not start"))
    else:
        kinds: dict[tuple[str, int | None], int] = {}
        for device in jax["devices"]:
            key = (device["kind"], device["memory"])
            kinds[key] = kinds.get(key, 0) + 1
        for (kind, memory), count in kinds.items():
            of = f", {_bytes(memory)} each" if memory else ""
            rows.append(("devices", f"{count} x {kind} ({jax['platform']}){of}"))
    cores = f"{host['usable_cores']:g}"
    if host["usable_cores"] < host["cores"]:
        cores += f" of {host['cores']}"
    rows.append(("host", f"{host['processor']}, {host['system']}, {cores} cores"))
    if host["memory"]:
        available = f"{_bytes(host['memory'])}, {_bytes(host['available'])} available"
        rows.append(("memory", available))
    return rows


def _speed_table(speed: Facts, table_of: Any) -> Any:
    """GFLOP/s and the share of the matrix product's."""
    formats = [name for name in ("float32", "bfloat16") if speed[name]]
    table = table_of(
        title=f"Speed of one device (copies {speed['copy']:.0f} GB/s)",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    table.add_column("GFLOP/s", style="cyan")
    for name in formats:
        table.add_column(name, justify="right")
        table.add_column("share", justify="right")
    for key, label in (
        ("matrix_product", "matrix product"),
        ("convolution_forward", "3x3 convolution, forward"),
        ("convolution_backward", "3x3 convolution, backward"),
    ):
        row = [label]
        for name in formats:
            value = speed[name][key]
            row += [f"{value:,.0f}", f"{100 * value / speed[name]['matrix_product']:.0f} %"]
        table.add_row(*row)
    return table


def _folders(facts: Facts) -> list[tuple[str, ...]]:
    runs, cache = facts["runs"], facts["cache"]

    def state(folder: Facts) -> str:
        return "writable" if folder["writable"] else "NOT writable"

    free = f"{state(runs)}, {_bytes(runs['free'])} free"
    rows: list[tuple[str, ...]] = [("runs", runs["path"], free)]
    if cache:
        held = f"{cache['programs']} programs, {_bytes(cache['bytes'])}"
        rows.append(("cache", cache["path"], f"{state(cache)}, {held}"))
    return rows


def _bytes(count: int) -> str:
    """`1.5 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def report(facts: Facts, findings: Sequence[Finding]) -> Facts:
    """Facts and findings as one JSON value; `ok` is whether cnnlab can run here."""
    return facts | {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ok": all(finding.level != "error" for finding in findings),
        "system": sys.platform,
    }
