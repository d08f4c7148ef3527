"""What makes XLA's CPU backend fast: its compile options and the process's heap.

Five of the defaults cost convolutional networks on CPU a factor of two and more:

- XLA hands convolutions to YNNPACK, which takes up to twice as long as the Eigen kernels that it
  replaces, and two to four times for kernel gradients. `jit` compiles without it.
- XLA fills vectors of 256 bits even where the processor has 512. With all of them elementwise
  loops, and so a ResNet's step, take a tenth to a fifth less; a processor without them is not
  concerned.
- XLA asks the C library for the memory of temporaries and results at each call and gives it back
  after it; glibc returns such large pieces to the kernel, so each call faults all its pages in
  again, at a tenth of the speed of memory that is there. `keep_heap` keeps them. A thread's share
  of glibc's heap (an arena; only the main thread's is unbounded) ends at 64 MiB, and all
  temporaries of a program together, which XLA asks for in one piece, exceed that. So
  `jit(..., often=True)` has it ask for several of at most 48 MiB, unless a single array is larger.
  One arena for all threads would hold any piece, but then threads wait for each other: training
  steps took up to a quarter longer so, and compilation half as long again.
- XLA leaves oneDNN aside, which is up to twice as fast as Eigen with few channels (jax 0.12; on
  0.10 asking for it changes nothing). A program with a call of it can't be stored in the
  compilation cache, so `jit(..., often=True)` hands over the convolutions and products of large
  programs alone: a second or more of compilation each time a process starts, made good by some
  thousand calls.
- LLVM writes out the loop over 16 channels, or 24, before it fills vectors, and then fills them
  with one channel of several pixels: elementwise code, as a normalisation's, is shuffled together
  and takes twice as long. `limit_unrolling` has it leave such loops alone. The option counts for
  the whole process, so that one with an accelerator, whose kernels it would change, does without.

All are safe (nothing changes but rounding) and optional. What a program gets follows from its
shapes, never from timing. `CNNLAB_CPU` in the environment chooses: `fast` is the default, `eigen`
the same without oneDNN, `onednn` has all programs use it, and `plain` leaves JAX as it comes.
`described` says what is in effect; every record keeps it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "CNNLAB_CPU"
CHOICES = ("fast", "eigen", "onednn", "plain")

# glibc's <malloc.h>, mallopt(3).
_M_MXFAST, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = 1, -1, -2, -4
_ARENA = 64 << 20
_SETTINGS = (
    (_M_MMAP_MAX, 0),  # large pieces from the heap, not from mmap
    (_M_TRIM_THRESHOLD, 2**31 - 1),  # never shrink the heap
    (_M_TOP_PAD, _ARENA),  # nor give back what a thread's arena has grown by
    (_M_MXFAST, 0),  # let the slivers that alignment leaves merge back, so that pieces fit again
)

Options = dict[str, bool | int | str]

PIECES = "xla_multiheap_size_constraint_per_heap"
LARGEST_PIECE = 3 * _ARENA // 4
# From so many bytes on, of all arrays that it makes, a program is large: LeNet-5's training step
# of 128 images is.
LARGE_PROGRAM = LARGEST_PIECE

_EXTRA = "xla_backend_extra_options"
MOST_UNROLLED = 12
"""Loops of more rounds are left for LLVM's vectoriser. Fewer would hold back the sums that
`cnnlab.ops.conv_algorithms` has unrolled."""
_UNROLLING = f"--{_EXTRA}=-unroll-full-max-count={MOST_UNROLLED}"

ONEDNN: Options = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_custom_call": True,
}
_FAST: Options = {
    # Replaces XLA's list, convolutions and reductions, by reductions alone.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": 512,
}
OPTIONS: dict[str, Options] = {
    "plain": {},
    "eigen": _FAST,
    "fast": _FAST,
    "onednn": {**_FAST, **ONEDNN},
}
# That such programs can't be stored is known, and said in `jit`.
_NOT_STORED = (
    "Error writing .*Multiple temp buffer allocations found",
    "Error writing .*std::bad_alloc",  # of oneDNN's calls
)


def choice() -> str:
    """What the environment asks for.

    Raises:
        CnnlabError: it is none of `CHOICES`.
    """
    given = os.environ.get(VARIABLE, "fast")
    if given not in CHOICES:
        from cnnlab.types import CnnlabError  # which imports JAX

        raise CnnlabError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}, got {given!r}")
    return given


@functools.cache
def keep_heap() -> bool:
    """Lets the process keep the memory it has freed, so that XLA finds it again at the next call.

    Call it before JAX runs anything. The process holds on to the most memory that it ever used.
    Needs glibc; imports nothing heavy. Silences XLA's warnings (not its errors) unless
    `TF_CPP_MIN_LOG_LEVEL` says otherwise: it has one for each array larger than a piece.

    Returns:
        Whether the setting is in effect: not off Linux, with another C library, or where
        `CNNLAB_CPU=plain`.
    """
    if choice() == "plain" or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    results = [library.mallopt(*setting) for setting in _SETTINGS]  # all, whatever one says
    return all(results)


def environment() -> dict[str, str]:
    """Variables with which a process should start that runs JAX on this machine's CPU.

    Returns:
        `XLA_FLAGS`, or nothing where it would be of no use or do harm: processors but x86-64, an
        accelerator's plugin that JAX may start (`JAX_PLATFORMS=cpu` says that it won't), and
        `CNNLAB_CPU=plain`.
    """
    platforms = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    alone = platforms == "cpu" if platforms else not plugins
    if choice() == "plain" or not alone or platform.machine() not in ("x86_64", "AMD64"):
        return {}
    return {"XLA_FLAGS": _UNROLLING}


def limit_unrolling() -> bool:
    """Adds the flag of `environment` to this process's, and so to those of processes it starts.

    Call it before JAX starts; it imports nothing heavy. Where `environment` has no flag it takes
    away what this process got from one that started it, maybe on another machine of a cluster.

    Returns:
        Whether the flag is in effect: not where `environment` has none, nor where `XLA_FLAGS` has
        options for LLVM already.
    """
    given = os.environ.get("XLA_FLAGS", "")
    wanted = bool(environment())
    if wanted and _EXTRA not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_UNROLLING}".strip()
    elif not wanted and _UNROLLING in given.split():
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in given.split() if flag != _UNROLLING)
    return wanted and _UNROLLING in os.environ["XLA_FLAGS"].split()


def start() -> None:
    """All that a process does before it works: heap, unrolling, and the compilation cache."""
    keep_heap()
    limit_unrolling()
    keep_programs()


def keep_programs() -> None:
    """Turns on the compilation cache, so that a second process starts in seconds.

    It lies in the folder that `CNNLAB_CACHE` names, or in `~/.cache/cnnlab/xla`.
    """
    import jax

    folder = os.environ.get("CNNLAB_CACHE") or str(Path.home() / ".cache" / "cnnlab" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def compiler_options(*, often: bool = False, large: bool = False) -> Options:
    """Options for `jax.jit(..., compiler_options=)` on the default backend; none but on CPU.

    A jaxlib that does not know one of them compiles without it.

    Args:
        often: as for `jit`.
        large: whether it is a large program, as `jit` judges it.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    options = OPTIONS[choice()]
    if often and options:
        options = {**options, PIECES: LARGEST_PIECE}
    if large and choice() == "fast":
        options = {**options, **ONEDNN}
    if options:
        for message in _NOT_STORED:
            warnings.filterwarnings("ignore", message)
    return {name: value for name, value in options.items() if _known(name, value)}


@functools.cache  # asked for both kinds of programs
def _known(name: str, value: bool | int | str) -> bool:
    import jax

    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if name not in str(error):
            raise
        return False
    return True


def jit(function: Callable[..., Any], *, often: bool = False, **settings: Any) -> Any:
    """`jax.jit` with the options that make XLA fast on CPU, for functions called from Python.

    Args:
        function: what to compile.
        often: whether a process calls it so many times that speed counts more than compilation, as
            training steps. Then the first call's arrays decide. The program's temporaries come in
            pieces that the heap keeps, unless one array is too large for that, and a large program
            (its arrays come to `LARGE_PROGRAM` bytes) uses oneDNN; with more than one piece, or
            with oneDNN, it is not stored in the compilation cache.
        settings: those of `jax.jit`.

    Returns:
        What `jax.jit` returns or, if it is called often, a function with the same `lower` and
        `trace`, and `options`: the compiler options, known once it was called.
    """
    import jax

    options = compiler_options()
    if not often or not options:
        return jax.jit(function, compiler_options=options, **settings)
    return _Sized(function, settings)


class _Sized:
    """A jitted function whose compiler options follow from its arrays' sizes."""

    def __init__(self, function: Callable[..., Any], settings: dict[str, Any]) -> None:
        self._function, self._settings = function, settings
        self._chosen: Any = None
        self.options: Options = {}  # filled in by the first call

    def _form(self, *args: Any, **kwargs: Any) -> Any:
        if self._chosen is None:
            import jax

            # JAX keeps a function's trace whatever it is compiled with, so this is the only one.
            traced = jax.jit(self._function, **self._settings).trace(*args, **kwargs)
            options = _options_for(list(_sizes(traced.jaxpr)))
            self.options.update(options)
            self._chosen = jax.jit(self._function, compiler_options=options, **self._settings)
        return self._chosen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._chosen or self._form(*args, **kwargs))(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._form(*args, **kwargs).lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._form(*args, **kwargs).trace(*args, **kwargs)

    def _cache_size(self) -> int:  # JAX's own name for how many variants are compiled
        return self._chosen._cache_size() if self._chosen else 0


def _options_for(sizes: Sequence[tuple[int, int]]) -> Options:
    """Options of a program that is called often and makes arrays so large, so many times."""
    largest = max((size for size, _ in sizes), default=0)
    total = sum(size * times for size, times in sizes)
    return compiler_options(often=largest <= LARGEST_PIECE, large=total >= LARGE_PROGRAM)


def _sizes(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, int]]:
    """Bytes of each array that a traced program makes, in whatever part, and how many times.

    What a scan's body makes counts as often as it runs, and what a scan stacks besides; of other
    loops nobody knows how often.
    """
    import jax

    for equation in jaxpr.eqns:
        parts = [
            inner
            for given in jax.tree.leaves(list(equation.params.values()))
            if hasattr(inner := getattr(given, "jaxpr", given), "eqns")  # closed or open
        ]
        scan = equation.primitive.name == "scan"
        for inner in parts:
            yield from _sizes(inner, times * equation.params["length"] if scan else times)
        if parts and not scan:
            continue  # its results are those of its parts
        for made in equation.outvars:
            width = getattr(getattr(made.aval, "dtype", None), "itemsize", 0)
            yield width * math.prod(getattr(made.aval, "shape", ())), times


def described() -> dict[str, object]:
    """What is in effect, for the record of a run."""
    kept = keep_heap.cache_info().currsize > 0 and keep_heap()  # says, and changes nothing
    options = compiler_options(often=True)
    large = compiler_options(often=True, large=True)
    return {
        "cnnlab_cpu": choice(),
        "kept_heap": kept,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": dict(options),
        "large_programs": {name: large[name] for name in large if name not in options},
    }
