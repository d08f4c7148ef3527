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
    assert faulting < 10
    kept, faulting = in_process(code, CNNLAB_CPU="plain")
    assert not kept
    assert faulting == 40


def test_plain_leaves_jax_as_it_comes():
    code = "import json; from cnnlab import backend; print(json.dumps(backend.described()))"
    assert in_process(code, CNNLAB_CPU="plain") == {"kept_heap": False, "compiler_options": {}}
    said = in_process(code, CNNLAB_CPU="onednn")
    assert said == {"kept_heap": False, "compiler_options": backend.OPTIONS["onednn"]}


def test_a_misspelt_choice_is_named(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "quick")
    with pytest.raises(CnnlabError, match="fast, onednn, plain, got 'quick'"):
        backend.choice()
