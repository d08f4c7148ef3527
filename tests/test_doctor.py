"""What the doctor sees and says, on machines made of files and facts."""

import copy
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from rich.console import Console

from cnnlab import cli, doctor

HEALTHY = {
    "versions": {"python": "3.13.0", "jax": "0.12.0"},
    "code": {"version": "0.1.0", "commit": "0123456789", "dirty": False, "digest": "abcdef"},
    "environment": {},
    "hardware": {"gpus": [], "tpu": None, "libtpu": []},
    "jax": {
        "platform": "cpu",
        "devices": [{"kind": "cpu", "memory": None, "process": 0}],
        "x64": False,
    },
    "speed": None,
    "host": {
        "processor": "some processor",
        "system": "Linux x86_64",
        "cores": 8,
        "usable_cores": 8,
        "memory": 2**35,
        "available": 2**34,
        "shared_memory": 2**34,
    },
    "cache": {"path": "/c", "exists": True, "writable": True, "programs": 3, "bytes": 5000},
    "runs": {"path": "/r", "exists": True, "writable": True, "free": 2**40},
    "data": {"digits": {"found": True, "examples": 360, "message": None}},
    "packages": {"hub": {"installed": False, "purpose": "published weights by name"}},
}
GPU = {"name": "H100", "memory": 80 * 2**30, "driver": "580.65.06"}
ON_GPU = {
    "platform": "gpu",
    "devices": [{"kind": "H100", "memory": 60 * 2**30, "process": 0}],
    "x64": False,
}


def facts(**changes):
    """Healthy facts, with these changes: `jax__x64=True` for what lies deeper."""
    made = copy.deepcopy(HEALTHY)
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            made[outer][inner] = value
        else:
            made[outer] = value
    return made


def printed(facts, width=80):
    console = Console(
        width=width, file=io.StringIO(), force_terminal=False, highlight=False, markup=False
    )
    doctor.render(facts, doctor.diagnose(facts), console)
    return console.file.getvalue()


def test_nothing_is_found_on_a_healthy_machine():
    assert doctor.diagnose(HEALTHY) == []
    assert doctor.report(HEALTHY, [])["ok"]
    assert "cnnlab can run here" in printed(HEALTHY)


@pytest.mark.parametrize(
    ("changes", "level", "what", "remedy"),
    [
        (
            {"jax": {"error": "RuntimeError: no"}},
            "error",
            "does not start: RuntimeError: no",
            "pip",
        ),
        (
            {"jax": {"error": "no cuda"}, "environment": {"JAX_PLATFORMS": "cuda"}},
            "error",
            "no cuda",
            "unset JAX_PLATFORMS (it is 'cuda')",
        ),
        (
            {"jax": {"error": "in use"}, "hardware__tpu": "/dev/accel0"},
            "error",
            "in use",
            "end the process that holds the TPU",
        ),
        ({"hardware__gpus": [GPU]}, "warning", "an NVIDIA GPU, but", "'cnnlab[cuda13]'"),
        (
            {"hardware__gpus": [GPU | {"driver": "550.54.15"}]},
            "warning",
            "an NVIDIA GPU, but",
            "'cnnlab[cuda12]'",
        ),
        ({"hardware__tpu": "/dev/accel0"}, "warning", "(/dev/accel0), but", "'cnnlab[tpu]'"),
        (
            {"hardware__gpus": [GPU], "environment": {"JAX_PLATFORMS": "cpu"}},
            "warning",
            "runs on the CPU",
            "unset JAX_PLATFORMS",
        ),
        (
            {"hardware__gpus": [GPU], "environment": {"CUDA_VISIBLE_DEVICES": ""}},
            "warning",
            "runs on the CPU",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        ({"environment": {"JAX_PLATFORMS": "cpu"}}, "note", "JAX_PLATFORMS=cpu", ""),
        (
            {"hardware__libtpu": ["libtpu", "libtpu-nightly"]},
            "warning",
            "several libtpu",
            "uninstall libtpu-nightly",
        ),
        ({"jax__x64": True}, "warning", "64-bit", "unset JAX_ENABLE_X64"),
        ({"environment": {"CNNLAB_CPU": "plain"}}, "warning", "plain", "unset CNNLAB_CPU"),
        ({"environment": {"XLA_FLAGS": "--xla_x=1"}}, "note", "XLA_FLAGS=--xla_x=1", ""),
        ({"jax": ON_GPU}, "note", "last bits", "XLA_FLAGS=--xla_gpu_deterministic_ops=true"),
        (
            {"jax": ON_GPU, "environment": {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}},
            "note",
            "XLA_PYTHON_CLIENT_MEM_FRACTION=.3",
            "",
        ),
        (
            {"jax": ON_GPU | {"devices": [{"kind": "small", "memory": 2**30, "process": 0}]}},
            "warning",
            "1 GiB of a device's memory",
            "batch_size",
        ),
        ({"host__usable_cores": 3}, "note", "3 of 8 cores", ""),
        ({"host__usable_cores": 0.5}, "warning", "0.5 of 8 cores", "more cores"),
        ({"host__memory": 2**30}, "warning", "1 GiB of memory", "at least 2 GiB"),
        ({"host__shared_memory": 2**26}, "warning", "/dev/shm holds 64 MiB", "--shm-size"),
        ({"runs__writable": False}, "error", "/r can't be written", "--runs DIR"),
        ({"runs__free": 2**20}, "error", "1 MiB free at /r", "free some space"),
        ({"runs__free": 2**29}, "warning", "512 MiB free", "checkpoints"),
        ({"cache__writable": False}, "warning", "/c can't be written", "CNNLAB_CACHE"),
        (
            {"data": {"digits": {"found": False, "examples": None, "message": "it is damaged"}}},
            "error",
            "it is damaged",
            "list of data",
        ),
    ],
)
def test_every_trap_is_found_with_its_remedy(changes, level, what, remedy):
    found = doctor.diagnose(facts(**changes))
    matching = [f for f in found if what in f.what]
    assert [f.level for f in matching] == [level], found
    assert remedy in matching[0].remedy
    assert bool(matching[0].remedy) == bool(remedy)
    assert doctor.report(HEALTHY, found)["ok"] == (level != "error")
    text = " ".join(printed(facts(**changes)).split())
    assert " ".join(f"{level}: {matching[0].what}".split()) in text


def test_errors_come_first():
    levels = [
        f.level
        for f in doctor.diagnose(
            facts(jax__x64=True, environment={"XLA_FLAGS": "x"}, runs__writable=False)
        )
    ]
    assert levels == ["error", "warning", "note"]


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"sys__fs__cgroup__cpu_dot_max": "50000 100000\n"}, 0.5),
        ({"sys__fs__cgroup__cpu_dot_max": "max 100000\n"}, None),
        (
            {
                "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "150000\n",
                "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            {
                "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_the_cgroup_limits_the_cores(files, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    write(tmp_path, **files)
    seen = doctor.host(tmp_path)
    assert seen["cores"] == 4
    assert seen["usable_cores"] == (wanted or 3)


def test_the_cgroup_limits_the_memory(tmp_path):
    write(tmp_path, proc__meminfo="MemTotal: 4096 kB\nMemFree: 1 kB\nMemAvailable:  2048 kB\n")
    seen = doctor.host(tmp_path)
    assert (seen["memory"], seen["available"]) == (2**22, 2**21)
    write(tmp_path, sys__fs__cgroup__memory_dot_max="max")
    assert doctor.host(tmp_path)["memory"] == 2**22
    write(tmp_path, sys__fs__cgroup__memory_dot_max=str(3 * 2**20))
    seen = doctor.host(tmp_path)
    assert (seen["memory"], seen["available"]) == (3 * 2**20, 2**21)


def test_accelerators_are_seen_by_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.hardware({}, tmp_path) == {"gpus": [], "tpu": None, "libtpu": []}
    write(tmp_path, dev__nvidia0="", dev__nvidia1="", dev__nvidiactl="")
    assert len(doctor.hardware({}, tmp_path)["gpus"]) == 2
    # A network card of Google's behind vfio is no TPU; an accelerator (class 0x12) is.
    card = {
        "dev__vfio__0": "",
        "sys__bus__pci__devices__a__vendor": "0x1ae0\n",
        "sys__bus__pci__devices__a__class": "0x020000\n",
    }
    write(tmp_path, **card)
    assert doctor.hardware({}, tmp_path)["tpu"] is None
    write(tmp_path, sys__bus__pci__devices__a__class="0x120000\n")
    assert doctor.hardware({}, tmp_path)["tpu"] == str(tmp_path / "dev/vfio")
    write(tmp_path, dev__accel0="")
    assert doctor.hardware({}, tmp_path)["tpu"] == str(tmp_path / "dev/accel0")
    assert doctor.hardware({"COLAB_TPU_ADDR": "x"}, Path("/none"))["tpu"] == "COLAB_TPU_ADDR"


def test_the_drivers_tool_is_asked_for_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'Tesla T4, 15360, 550.54.15'\necho 'Tesla T4, 15360, 550.54.15'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), os.pathsep)
    t4 = {"name": "Tesla T4", "memory": 15 * 2**30, "driver": "550.54.15"}
    assert doctor.hardware({}, tmp_path)["gpus"] == [t4, t4]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert doctor.hardware({}, tmp_path)["gpus"] == []


def test_missing_data_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    found = doctor.data()
    assert found["digits"] == {"found": True, "examples": 360, "message": None}
    assert found["fashion_mini"]["examples"] == 2000
    missing = found["tfds"]
    assert not missing["found"]
    assert "prepare" in missing["message"] or "pip install" in missing["message"]


def test_speeds_are_work_over_time(monkeypatch):
    """With a clock that gives each call a second, the speeds are the operations themselves."""
    monkeypatch.setattr(doctor, "_seconds", lambda function, *arguments, calls: 1.0)
    work = doctor.Work(matrix=10, images=(2, 8, 8, 4), copy=4000, calls=1)
    found = doctor.speed("tpu", work)
    assert found["copy"] == pytest.approx(8000 / 1e9)
    forward = 2 * (2 * 8 * 8) * (3 * 3 * 4) * 4  # outputs, taps, filters
    for dtype in ("float32", "bfloat16"):
        assert found[dtype]["matrix_product"] == pytest.approx(2000 / 1e9)
        assert found[dtype]["convolution_forward"] == pytest.approx(forward / 1e9)
        assert found[dtype]["convolution_backward"] == pytest.approx(2 * forward / 1e9)


def test_the_whole_examination_on_this_machine(tmp_path, monkeypatch, capsys):
    tiny = doctor.Work(matrix=16, images=(2, 8, 8, 64), copy=4096, calls=1)
    monkeypatch.setitem(doctor.WORK, "cpu", tiny)
    # JAX's settings are those of the whole test session.
    monkeypatch.setenv("CNNLAB_CACHE", jax.config.jax_compilation_cache_dir)
    runs = tmp_path / "not" / "there"
    try:
        assert cli.main(["doctor", "--json", "--runs", str(runs)]) == 0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    found = json.loads(capsys.readouterr().out)
    assert not runs.parent.exists()  # asking makes nothing
    assert found["ok"]
    assert len(found["jax"]["devices"]) == jax.device_count()
    assert found["versions"]["jax"] == jax.__version__
    assert found["runs"]["path"] == str(runs)
    assert found["cache"]["path"] == jax.config.jax_compilation_cache_dir
    assert all(value > 0 for value in found["speed"]["float32"].values())
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("matrix product", "fashion_mini", "pip install", f"{jax.device_count()} x cpu"):
        assert word in text


def test_a_jax_that_does_not_start_is_a_finding(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cnnlab.cli", "doctor", "--json", "--runs", str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    (error, *_) = json.loads(done.stdout)["findings"]
    assert error["level"] == "error"
    assert "nonsense" in error["what"]
    assert "unset JAX_PLATFORMS" in error["remedy"]


def test_every_extra_is_known(root):
    """An extra of pyproject.toml has its line in the doctor's list, and its packages."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"dev", "cuda12", "cuda13", "tpu"}
    for extra, (distributions, _) in doctor.EXTRAS.items():
        wanted = {re.match(r"[\w.-]+", w)[0].replace("_", "-").lower() for w in extras[extra]}
        assert set(distributions) == wanted
