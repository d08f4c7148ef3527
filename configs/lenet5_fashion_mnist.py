"""LeNet-5 with ReLU and max pooling on the whole of Fashion-MNIST.

    cnnlab train --config configs/lenet5_fashion_mnist.py

Under two minutes on two CPU cores; top-1 91.04 ± 0.05 % over three seeds.
"""

from ml_collections import ConfigDict

from cnnlab import config


def get_config(argument: str = "") -> ConfigDict:
    """The recipe; `argument` names another model of the registry."""
    return config.base(
        model=argument or "lenet5_modern",
        data="fashion_mnist",
        optim={
            "name": "adamw",
            "learning_rate": 0.004,
            "weight_decay": 0.05,
            "schedule": "one_cycle",
        },
        train={"duration": "12 epochs", "batch_size": 128, "checkpoint_every": "3 epochs"},
    )
