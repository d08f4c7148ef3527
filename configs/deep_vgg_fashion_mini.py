"""A plain deep VGG-style stack (eleven convolutions, no normalisation) on the Fashion-MNIST subset.

    cnnlab train --config configs/deep_vgg_fashion_mini.py

Deep and without normalisation, it is the kind of network that auxiliary losses were made for.
About 25 seconds on two CPU cores; top-1 82.5 ± 0.6 % over three seeds.
"""

from ml_collections import ConfigDict

from cnnlab import config
from configs import lenet5_fashion_mini


def get_config(argument: str = "") -> ConfigDict:
    """The recipe; takes no argument."""
    return config.override(
        lenet5_fashion_mini.get_config("vgg_small"),
        {
            "model.norm": "none",
            "model.stage_sizes": (1, 4, 6),
            "model.widths": (8, 16, 32),
            "optim.learning_rate": 0.003,
            "train.duration": "6 epochs",
            "train.checkpoint_every": "3 epochs",
        },
        where=__name__,
    )
