"""What does each augmentation bring, on clean and on corrupted images?

    cnnlab table experiments/augmentations.py

LeNet-5 on the embedded 10,000 images of Fashion-MNIST, 16 epochs, five seeds a row; half a minute
a run on two busy CPU cores, AugMix four minutes. Every row but the first also shifts and mirrors.
Corrupted: the fifteen corruptions of Hendrycks & Dietterich 2019 in five severities each; mCE is
relative to the first row. Random erasing: Zhong et al. 2020; mixup: Zhang et al. 2018; CutMix: Yun
et al. 2019; RandAugment: Cubuk et al. 2020; TrivialAugment: Müller & Hutter 2021; AugMix, with its
consistency loss: Hendrycks et al. 2020.
"""

from cnnlab.sweep import Experiment
from configs import lenet5_fashion_mini

SHIFT = ("crop(padding=2)", "flip")


def get_experiment() -> Experiment:
    base = lenet5_fashion_mini.get_config()
    base.train.duration = "16 epochs"
    grey = 0.286  # the data's mean
    rows = {
        "none": (),
        "crop and flip": SHIFT,
        "random erasing": (*SHIFT, f"random_erasing(value={grey})"),
        "mixup": (*SHIFT, "mixup(alpha=0.2)"),
        "CutMix": (*SHIFT, "cutmix(alpha=1.0, probability=0.5)"),
        "RandAugment": (*SHIFT, "randaugment(num_ops=2, magnitude=9.0)"),
        "TrivialAugment": (*SHIFT, "trivialaugment"),
        "AugMix": (*SHIFT, "augmix"),
    }
    return Experiment(
        base=base,
        rows={
            name: {"augment.transforms": transforms}
            | ({"task.consistency": 12.0} if name == "AugMix" else {})
            for name, transforms in rows.items()
        },
        seeds=range(5),
        baseline="none",
        columns=("top1", "corrupted", "mce", "nll", "ece"),
        figures=("curves", "confusion"),
    )
