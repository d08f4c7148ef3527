"""ResNet-20 on the whole of Fashion-MNIST by the recipe of Zhong et al. 2020.

    cnnlab train --config configs/resnet20_fashion_mnist.py

300 epochs; without random erasing. Published top-1 95.61 % (their table 1).
"""

from ml_collections import ConfigDict

from cnnlab import config


def get_config(argument: str = "") -> ConfigDict:
    """The recipe; `argument` names another model of the registry."""
    return config.base(
        model=argument or "resnet20",
        data={"name": "fashion_mnist", "validation": 0.0},
        augment={"transforms": ("crop(padding=4)", "flip")},
        optim={
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "step",
            "milestones": (0.5, 0.75),
            "factor": 0.1,
        },
        train={
            "duration": "300 epochs",
            "batch_size": 128,
            "log_every": "5 epochs",
            "checkpoint_every": "20 epochs",
        },
    )
