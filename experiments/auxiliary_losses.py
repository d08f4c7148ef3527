"""Do auxiliary losses help a plain deep stack, and a ResNet?

    cnnlab table experiments/auxiliary_losses.py

Half an hour on two CPU cores; results/auxiliary_losses/README.md says what came out.

None, one or two auxiliary heads; three weights; weights that stay or decay to zero; on a plain
VGG-style stack of eleven convolutions without normalisation, and on a ResNet-20. A head is a global
average pooling and one dense layer, dropped at inference, so all rows of a block have the same
network when scored.

After Szegedy et al. 2015, "Going Deeper with Convolutions", section 5 (two heads, weight 0.3), and
Lee et al. 2015, "Deeply-Supervised Nets", section 2.2 (companion losses that vanish).
"""

from typing import Any

from cnnlab.sweep import Experiment
from configs import deep_vgg_fashion_mini

HEADS: dict[str, tuple[str, ...]] = {"one head": ("stage2",), "two heads": ("stage1", "stage2")}


def block(name: str, network: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of one network, the one without auxiliary losses first."""
    rows = {f"{name}, none": network}
    for heads, features in HEADS.items():
        for weight in (0.1, 0.3, 1.0):
            rows[f"{name}, {heads}, weight {weight}"] = network | {
                "model.aux": features,
                "task.aux_weight": weight,
            }
        rows[f"{name}, {heads}, 0.3 decaying"] = network | {
            "model.aux": features,
            "task.aux_weight": 0.3,
            "task.aux_schedule": "cosine",
        }
    return rows


def get_experiment() -> Experiment:
    resnet = {
        "model.name": "resnet20",
        "model.width": 8,
        "model.stem_stride": 2,
        "optim.learning_rate": 0.01,
    }
    return Experiment(
        base=deep_vgg_fashion_mini.get_config(),
        rows=block("plain stack", {}) | block("ResNet-20", resnet),
        seeds=range(3),
        baseline=("plain stack, none", "ResNet-20, none"),
        columns=("top1", "nll", "ece"),
        figures=("curves",),
    )
