"""What makes CPU fast is in effect, said, and can be left off."""

import importlib.util
import json
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cnnlab import backend
from cnnlab.ops import conv
from cnnlab.types import CnnlabError


def in_process(code, **environment):
    """What a fresh Python prints as JSON."""
    variables = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", backend.VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_options_are_known_to_this_jaxlib_and_reach_the_compiler():
    assert backend.compiler_options() == backend.OPTIONS["fast"]
    made = backend.jit(lambda x: x + 1, donate_argnums=0)
    assert made(jnp.float32(1)) == 2
    with pytest.raises(Exception, match="no_such_option"):
        jax.jit(lambda: 0, compiler_options={"no_such_option": True})()
    assert not backend._known("no_such_option", True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_kept_heap_faults_no_page_twice():
    code = """
import json, resource
from cnnlab import backend
kept = backend.keep_heap()
import sys
assert "jax" not in sys.modules
import jax, jax.numpy as jnp
x = jnp.zeros(8 << 20)  # 32 MiB: 8,192 pages
f = jax.jit(lambda x: x + 1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(f(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(40):  # until the slivers of alignment have found their places
    faults()
# a call may still meet another thread's piece: most calls must not
print(json.dumps([kept, sum(faults() > 4096 for _ in range(40))]))
"""
    kept, faulting = in_process(code)
    assert kept
    assert faulting < 10, f"{faulting} of 40 calls"
    kept, faulting = in_process(code, CNNLAB_CPU="plain")
    assert not kept
    assert faulting == 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_temporaries_larger_than_an_arena_are_kept_too():
    code = """
import json, resource
from cnnlab import backend
backend.keep_heap()
import jax, jax.numpy as jnp
x = jnp.ones((1024, 4))
y = jnp.ones((4, 4096))
def function(x):
    products = [x * i @ y for i in range(5)]  # 16 MiB each: 4,096 pages
    all_of_them = sum(each[0, 0] for each in products)
    return sum((each @ (y[0] * all_of_them)).sum() for each in products)
def faulting(f):
    count = 0
    for i in range(60):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        jax.block_until_ready(f(x))
        count += i >= 30 and resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > 4096
    return count
made = backend.jit(function, often=True)
temporaries = made.lower(x).compile().memory_analysis().temp_size_in_bytes
whole = backend.jit(function)
print(json.dumps([temporaries, faulting(made), faulting(whole)]))
"""
    temporaries, in_pieces, whole = in_process(code)
    assert temporaries > backend._ARENA
    assert in_pieces < 10
    assert whole > 20


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (lambda x: x + 1, 100),
        (lambda x: jnp.tile(x, 3).sum(), 300),
        (lambda x: jax.lax.scan(lambda c, _: (c + jnp.tile(x, 4).sum(), 0), 0.0, None, 2), 400),
        (lambda x: jax.lax.cond(x[0] > 0, lambda: jnp.tile(x, 5).sum(), lambda: 0.0), 500),
        (jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.tile(x, 6)).sum())), 600),
    ],
    ids=["plain", "inside", "scan", "cond", "gradient"],
)
def test_the_largest_array_is_found_wherever_it_is_made(function, numbers):
    jaxpr = jax.jit(function).trace(jnp.ones(100, jnp.float32)).jaxpr
    assert max(size for size, _ in backend._sizes(jaxpr)) == 4 * numbers


UNROLLING = """
import json, os
from cnnlab import backend
limited = backend.limit_unrolling()
import sys
assert "jax" not in sys.modules
import jax, jax.numpy as jnp
x, scale = jnp.ones((8, 28, 28, 16)), jnp.ones(16)
function = jax.jit(
    lambda x, s: jnp.maximum(x * s + s, 0), compiler_options=backend.OPTIONS["fast"]
)
size = len(function.lower(x, scale).compile().runtime_executable().serialize())
print(json.dumps([limited, backend.limit_unrolling(), size, os.environ.get("XLA_FLAGS", "")]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_loops_over_a_few_channels_are_not_written_out():
    others = "--xla_force_host_platform_device_count=2"
    limited, again, size, flags = in_process(UNROLLING, JAX_PLATFORMS="cpu", XLA_FLAGS=others)
    assert limited
    assert again
    assert flags == f"{others} {backend.environment()['XLA_FLAGS']}"  # added once
    for left_alone in (
        {"CNNLAB_CPU": "plain"},
        {"XLA_FLAGS": "--xla_backend_extra_options=-unroll-full-max-count=99"},
    ):
        limited, again, longer, flags = in_process(UNROLLING, JAX_PLATFORMS="cpu", **left_alone)
        assert not limited
        assert not again
        assert flags == left_alone.get("XLA_FLAGS", "")
        assert size < 0.9 * longer  # 0.27 with vectors of 512 bits, 0.8 with 256


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_commands_start_with_the_heap_kept_and_unrolling_limited():
    code = """
import json, os
from cnnlab import backend, cli
cli._start_jax()
print(json.dumps(backend.described()))
"""
    found = in_process(code, JAX_PLATFORMS="cpu")
    assert found["xla_flags"].endswith(f"=-unroll-full-max-count={MOST}")
    assert found["kept_heap"] == sys.platform.startswith("linux")


def test_unrolling_is_not_limited_where_an_accelerator_may_be_used(monkeypatch):
    for variable in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "XLA_FLAGS", backend.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = {"XLA_FLAGS": f"--xla_backend_extra_options=-unroll-full-max-count={MOST}"}
    assert backend.environment() == flags
    for plugin in ("jax_plugins", "libtpu"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, it=plugin: name == it or None)
        assert backend.environment() == {}
        assert not backend.limit_unrolling()
        assert "XLA_FLAGS" not in os.environ
        # A launcher hands its variables on, from a node without accelerators to one that has them.
        with monkeypatch.context() as handed_on:
            handed_on.setenv("XLA_FLAGS", f"--one=1 {flags['XLA_FLAGS']} --two=2")
            assert not backend.limit_unrolling()
            assert os.environ["XLA_FLAGS"] == "--one=1 --two=2"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert backend.environment() == {}
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert backend.environment() == flags
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert backend.environment() == {}


PIECE, MOST = backend.LARGEST_PIECE, backend.MOST_UNROLLED


@pytest.mark.parametrize(
    ("sizes", "in_pieces", "onednn"),
    [
        ([], True, False),
        ([(PIECE // 8, 1)] * 7, True, False),
        ([(PIECE // 8, 1)] * 8, True, True),
        ([(PIECE // 8, 2), (PIECE // 8, 6)], True, True),
        ([(PIECE, 1)], True, True),
        ([(PIECE + 1, 1)], False, True),
    ],
)
def test_options_follow_from_the_sizes_of_arrays(sizes, in_pieces, onednn):
    options = backend._options_for(sizes)
    assert (backend.PIECES in options) == in_pieces
    assert (backend.ONEDNN.items() <= options.items()) == onednn
    assert options.items() >= backend.OPTIONS["fast"].items()


def test_a_large_program_uses_onednn_and_no_other_does():
    # 3.1 MiB a result: twenty of them are large together.
    images, kernel = jnp.ones((64, 28, 28, 16)), jnp.ones((3, 3, 16, 16))

    def function(x, times):
        for _ in range(times):
            x = conv.conv(x, kernel, padding=((1, 1), (1, 1)))
        return x[0, 0, 0]

    small = backend.jit(lambda x: function(x, 1), often=True)
    large = backend.jit(lambda x: function(x, 20), often=True)
    texts = [each.lower(images).compile().as_text() for each in (small, large)]
    known = jax.__version_info__ >= (0, 11) and platform.machine() == "x86_64"
    assert ["onednn$" in text for text in texts] == [False, known]
    assert backend.PIECES in small.options
    assert small.options.items() | backend.ONEDNN.items() == large.options.items()


def test_what_a_scan_stacks_counts():
    def function(x):
        return jax.lax.scan(lambda c, _: (c, c + 1), x, None, 7)[1]

    sizes = list(backend._sizes(jax.jit(function).trace(jnp.ones(100, jnp.float32)).jaxpr))
    assert max(sizes) == (2800, 1)  # stacked
    assert (400, 7) in sizes  # made in each round


def test_a_loop_in_a_loop_counts_each_round():
    def inner(c, _):
        return c * 2, None

    def outer(c, _):
        return jax.lax.scan(inner, c, None, 5)[0], None

    traced = jax.jit(lambda x: jax.lax.scan(outer, x, None, 3)[0]).trace(jnp.ones(25, jnp.float32))
    sizes = list(backend._sizes(traced.jaxpr))
    assert (100, 15) in sizes
    assert all(times in (1, 3, 15) for _, times in sizes)


def test_a_sized_program_is_traced_once_and_donates():
    traces = []

    def function(x):
        traces.append(x.shape)
        return x + 1

    made = backend.jit(function, often=True, donate_argnums=0)
    given = jnp.ones(3)
    assert made(given).tolist() == [2, 2, 2]
    assert given.is_deleted()
    made(jnp.ones(3))
    assert traces == [(3,)]
    assert made(jnp.ones(4)).shape == (4,)
    assert made.lower(jnp.ones(4)).compile()(jnp.ones(4)).tolist() == [2, 2, 2, 2]
    assert traces == [(3,), (4,)]


@pytest.mark.parametrize("choice", backend.CHOICES)
def test_the_environment_chooses(choice):
    code = "import json; from cnnlab import backend; print(json.dumps(backend.described()))"
    pieces = {backend.PIECES: backend.LARGEST_PIECE} if choice != "plain" else {}
    assert in_process(code, CNNLAB_CPU=choice) == {
        "cnnlab_cpu": choice,
        "kept_heap": False,
        "xla_flags": "",
        "compiler_options": backend.OPTIONS[choice] | pieces,
        "large_programs": backend.ONEDNN if choice == "fast" else {},
    }


def test_a_misspelt_choice_is_named(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "quick")
    with pytest.raises(CnnlabError, match="fast, eigen, onednn, plain, got 'quick'"):
        backend.choice()
