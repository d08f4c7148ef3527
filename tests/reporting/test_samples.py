"""The sheet of what training sees."""

import numpy as np
import pytest
from PIL import Image

from cnnlab import cli
from cnnlab.reporting import samples
from cnnlab.types import CnnlabError


def test_a_mixture_is_named_by_its_two_greatest_shares():
    names = ("Bag", "Coat", "Shirt")
    assert samples.caption(np.array([0.0, 1.0, 0.0]), names) == "Coat"
    assert samples.caption(np.array([0.3, 0.0, 0.7]), names) == "Shirt 0.70 + Bag 0.30"


def test_the_sheet_shows_the_images_that_it_was_given(tmp_path):
    columns = np.zeros((2, 1, 4, 4, 1))
    columns[1] = 1
    path = samples.sheet(columns, [["a"], ["b"]], ["as it is", "epoch 1"], "t", tmp_path / "s.png")
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"), float)
    width = grey.shape[1]
    dark = (grey < 8).mean(0)  # frames and letters are dark, too
    assert dark[: width // 2].mean() > 0.3
    assert dark[width // 2 :].mean() < 0.1
    with pytest.raises(CnnlabError, match=r"ends in \.png"):
        samples.sheet(columns, [["a"], ["b"]], ["x", "y"], "t", tmp_path / "s.txt")


def test_show_writes_a_sheet_and_explains_what_it_cannot(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text(
        "from cnnlab import config\n"
        "def get_config(argument=''):\n"
        "    return config.base(data='digits', augment={'transforms': ('flip', 'mixup')})\n"
    )
    target = tmp_path / "sheet.png"
    given = ["show", "--config", str(config), "--output", str(target)]
    assert cli.main([*given, "--images", "2", "--epochs", "2"]) == 0
    with Image.open(target) as image:
        assert image.size[0] > 300
    assert "wrote" in capsys.readouterr().out
    assert cli.main([*given, "--epochs", "0"]) == 2
    assert "--epochs: expected 1 to 64, got 0" in capsys.readouterr().err
