"""LeNet-5, classic and modern, on the whole of Fashion-MNIST.

    cnnlab table experiments/fashion_mnist.py

Twelve minutes on two CPU cores.

The data are Debian's package `dataset-fashion-mnist`, or the four files of the original release
under `--data-dir`.
"""

from cnnlab.sweep import Experiment
from configs import lenet5_fashion_mnist


def get_experiment() -> Experiment:
    return Experiment(
        base=lenet5_fashion_mnist.get_config(),
        rows={
            "LeNet-5, modern": {},
            "LeNet-5, 1998": {"model.name": "lenet5"},
        },
        seeds=range(3),
        baseline="LeNet-5, 1998",
        columns=("top1", "nll", "ece", "f1", "parameters", "macs", "seconds"),
    )
