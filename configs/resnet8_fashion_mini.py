"""ResNet-8 on the embedded part of Fashion-MNIST, for tables about augmentation.

cnnlab train --config configs/resnet8_fashion_mini.py
"""

from ml_collections import ConfigDict

from cnnlab import config


def get_config(argument: str = "") -> ConfigDict:
    """The recipe; `argument` names another model of the registry."""
    return config.base(
        model={"name": argument or "resnet8"},
        data="fashion_mini",
        optim={
            "name": "adamw",
            "learning_rate": 0.004,
            "weight_decay": 0.05,
            "schedule": "one_cycle",
        },
        train={"duration": "12 epochs", "batch_size": 128, "checkpoint_every": "6 epochs"},
    )
