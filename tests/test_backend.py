"""What makes CPU fast is in effect, said, and can be left off."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cnnlab import backend
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
    assert backend._largest(jaxpr) == 4 * numbers


@pytest.mark.parametrize(("more", "in_pieces"), [(0, True), (1, False)])
def test_temporaries_come_in_pieces_unless_one_array_is_larger(more, in_pieces):
    count = backend.LARGEST_PIECE // 4 + more
    made = backend.jit(lambda x: jnp.broadcast_to(x, (count,)).sum(), often=True)
    made.trace(jnp.float32(1))
    assert (made._chosen is made._pieces) == in_pieces


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


def test_plain_leaves_jax_as_it_comes():
    code = "import json; from cnnlab import backend; print(json.dumps(backend.described()))"
    assert in_process(code, CNNLAB_CPU="plain") == {"kept_heap": False, "compiler_options": {}}
    said = in_process(code, CNNLAB_CPU="onednn")
    options = {**backend.OPTIONS["onednn"], backend.PIECES: backend.LARGEST_PIECE}
    assert said == {"kept_heap": False, "compiler_options": options}


def test_a_misspelt_choice_is_named(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "quick")
    with pytest.raises(CnnlabError, match="fast, onednn, plain, got 'quick'"):
        backend.choice()
