"""From an experiment file to finished runs."""

from cnnlab.sweep.experiment import Experiment, Run

__all__ = ["Experiment", "Run"]
