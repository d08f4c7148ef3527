"""Six networks on a small Fashion-MNIST: what do depth, normalisation and auxiliary losses buy?

    cnnlab table experiments/quickstart.py

Five minutes on two CPU cores.

One recipe for all: AdamW on a one-cycle schedule, no augmentation, so that the rows differ in the
network alone. The networks are narrow so that the whole table fits a coffee break.
"""

from cnnlab.sweep import Experiment
from configs import lenet5_fashion_mini


def get_experiment() -> Experiment:
    resnet = {"model.name": "resnet8", "model.width": 8, "model.stem_stride": 2}
    return Experiment(
        base=lenet5_fashion_mini.get_config(),
        rows={
            "LeNet-5": {"model.name": "lenet5_modern"},
            "two convolutions": {"model.name": "simple_two_conv"},
            "VGG-style": {
                "model.name": "vgg_small",
                "model.stage_sizes": (1, 2, 2),
                "model.widths": (8, 16, 32),
            },
            "ResNet-8": resnet,
            "ResNet-8, auxiliary losses": resnet | {"model.aux": ("stage1", "stage2")},
            "dilated stack": {
                "model.name": "dilated_stack",
                "model.width": 16,
                "model.stem_stride": 4,
            },
        },
        seeds=range(3),
        baseline="LeNet-5",
        columns=("top1", "nll", "parameters", "macs", "seconds"),
    )
