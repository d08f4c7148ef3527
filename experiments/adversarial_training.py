"""What does each way of adversarial training withstand, and what does it cost?

    cnnlab table experiments/adversarial_training.py

LeNet-5 on the whole of Fashion-MNIST, 5 epochs, Linf perturbations of 0.1; an hour and a half on
two busy CPU cores, half of it AutoAttack's. Rows after Madry et al. 2018 (PGD-AT), Zhang et al.
2019 (TRADES), Wang et al. 2020 (MART), Wong et al. 2020 (Fast) and Shafahi et al. 2019 (Free); AWP
is the weight perturbation of Wu et al. 2020. The training's attack makes ten steps in the same
ball, Fast and Free make one. Seconds an epoch are those of this machine; Free's epoch counts
updates.

The data are Debian's package `dataset-fashion-mnist`, or the four files of the original release
under `--data-dir`.
"""

from cnnlab.sweep import Experiment
from configs import lenet5_fashion_mnist

EPS = 0.1
TITLES = {"pgd_at": "PGD-AT", "trades": "TRADES", "mart": "MART"}


def get_experiment() -> Experiment:
    base = lenet5_fashion_mnist.get_config()
    base.train.duration = "5 epochs"
    base.defence.eps = EPS
    rows: dict[str, dict[str, object]] = {
        "standard": {},
        "Fast": {"defence.name": "fast"},
        "Free": {"defence.name": "free", "defence.replays": 4},
    }
    for name, title in TITLES.items():
        rows[title] = {"defence.name": name}
        rows[f"{title}, AWP"] = {"defence.name": name, "defence.awp": 0.005}
    return Experiment(
        base=base,
        rows=rows,
        seeds=range(1),
        baseline="PGD-AT",
        columns=("top1", "seconds_per_epoch"),
        attacks=(f"fgsm(eps={EPS})", f"pgd_40(eps={EPS})", f"autoattack(eps={EPS})"),
        attack_examples=1000,
        figures=("curves",),
    )
