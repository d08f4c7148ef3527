"""From an experiment file to finished runs, or to measured times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnnlab.sweep.benchmark import Benchmark, Contender, Workload
    from cnnlab.sweep.experiment import Experiment, Run

__all__ = ["Benchmark", "Contender", "Experiment", "Run", "Workload"]


def __getattr__(name: str) -> Any:
    # A benchmark's contenders import a file that says `from cnnlab.sweep import Benchmark` in
    # processes that must stay free of JAX.
    import importlib

    if name in ("Experiment", "Run"):
        return getattr(importlib.import_module("cnnlab.sweep.experiment"), name)
    if name in __all__:
        return getattr(importlib.import_module("cnnlab.sweep.benchmark"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
