"""From image files to named classes, on real weights where they are at hand."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnlab import cli, predict, pretrained
from cnnlab.data import _imagenet
from cnnlab.types import CnnlabError

WEIGHTS = Path(
    os.environ.get("CNNLAB_WEIGHTS") or Path(__file__).resolve().parents[2] / "shared" / "weights"
)
TINY = {"stage_sizes": (1, 1, 1, 1), "width": 8}
TINY_WORDS = ["--model", "resnet18", "--model.stage_sizes=1,1,1,1", "--model.width=8"]


def test_real_weights_give_the_published_classes(tmp_path, capsys):
    weights = WEIGHTS / "tf_efficientnet_lite0.safetensors"
    if not weights.exists():
        pytest.skip(f"no {weights.name} in {WEIGHTS}; CNNLAB_WEIGHTS says where")
    photographs = pytest.importorskip("skimage.data")
    reference = json.loads((WEIGHTS / "tf_efficientnet_lite0_photographs.json").read_text())
    files = []
    for entry in reference:
        files.append(str(tmp_path / f"{entry['image']}.png"))
        Image.fromarray(getattr(photographs, entry["image"])()).save(files[-1])
    command = ["predict", *files, "--model", "tf_efficientnet_lite0", "--weights", str(weights)]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == files
    assert len(found) == 4
    for entry, expected in zip(found, reference, strict=True):
        top = entry["top"]
        assert [ranked["index"] for ranked in top] == expected["top5_index"]
        # The reference gives all the words of a class, the first of them first.
        first = [name.partition(",")[0] for name in expected["top5_name"]]
        assert [ranked["name"] for ranked in top] == first
        probabilities = [ranked["probability"] for ranked in top]
        np.testing.assert_allclose(probabilities, expected["top5_probability"], atol=1e-3)


@pytest.fixture
def tiny(tmp_path):
    """A narrow ResNet's weights in a file."""
    rng = np.random.default_rng(0)
    tensors = {
        e.name: rng.uniform(0.5, 1.5, e.published_shape)
        if e.name.endswith("running_var")
        else rng.normal(size=e.published_shape) / np.sqrt(max(1, np.prod(e.published_shape[1:])))
        for e in pretrained.entries("resnet18", num_outputs=3, **TINY)
    }
    path = tmp_path / "tiny.safetensors"
    variables = pretrained.convert("resnet18", tensors, **TINY)
    pretrained.export(path, "resnet18", variables, **TINY)
    return path


def test_a_table_for_each_image_and_classes_of_ones_own(tiny, tmp_path, capsys):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 50), colour).save(tmp_path / name)
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    command = ["predict", *images, *TINY_WORDS, "--weights", str(tiny), "--size", "32"]
    assert cli.main([*command, "--classes", str(tmp_path / "names.txt")]) == 0
    out = capsys.readouterr().out
    assert out.count("probability") == 2
    assert all(out.count(name) == 2 for name in ("cat", "dog", "bird"))
    shares = [float(share) for share in re.findall(r"([\d.]+) %", out)]
    assert sum(shares) == pytest.approx(200, abs=0.1)
    for three in (shares[:3], shares[3:]):
        assert three == sorted(three, reverse=True)
    for words, message in (
        ([], r"the network has 3 classes, and ImageNet's are 1000: .*--classes"),
        (["--classes", str(tiny)], r"cannot read the names of classes .*tiny\.safetensors"),
        (["--classes", str(Path(__file__))], r"has 3 classes, but .* has \d+ lines"),
        (["--top", "0"], r"--top: expected at least 1, got 0"),
        (["--crop", "0"], r"crop must be a share in \(0, 1\]"),
    ):
        names = [] if "--classes" in words or not words else ["--classes", f"{tmp_path}/names.txt"]
        assert cli.main([*command, *names, *words]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_without_weights_the_default_repository_is_asked(tmp_path, capsys, monkeypatch):
    asked = []

    def read(source):
        asked.append(source)
        raise CnnlabError("not here")

    monkeypatch.setattr(pretrained.weights, "read", read)
    assert cli.main(["predict", "photo.jpg", "--model", "resnet50"]) == 2
    assert asked == ["timm/resnet50.a1_in1k"]
    assert cli.main(["predict", "photo.jpg", "--model", "squeezenet1_1"]) == 2
    assert "no repository of the hub is known for 'squeezenet1_1'" in capsys.readouterr().err
    assert cli.main(["predict", "photo.jpg", "--exported", "f", "--weights", "g"]) == 2
    assert "--exported has its weights, size and fields in it" in capsys.readouterr().err


def test_models_with_published_weights_are_listed(capsys):
    assert cli.main(["list", "models", "--published"]) == 0
    names = capsys.readouterr().out.split()
    assert {"resnet50", "vgg16", "tf_efficientnet_lite0"} <= set(names)
    assert not {"lenet5", "resnet20", "preact_resnet18"} & set(names)
    assert cli.main(["list", "data", "--published"]) == 2
    assert "--published is for models" in capsys.readouterr().err


def test_the_classes_of_imagenet():
    names = predict.class_names(1000)
    # Known from every published list, at both ends and where two share a word.
    known = {0: "tench", 1: "goldfish", 285: "Egyptian cat", 657: "missile", 999: "toilet tissue"}
    assert {index: names[index] for index in known} == known
    assert (names[134], names[517]) == ("crane bird", "crane")
    assert len(set(names)) == 1000


def test_a_damaged_list_of_classes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(_imagenet._embedded, "FOLDER", tmp_path)
    for content in (None, "tench\n" * 1000, "tench\ngoldfish\n"):
        if content:
            (tmp_path / "imagenet_classes.txt").write_text(content)
        _imagenet.class_names.cache_clear()
        with pytest.raises(CnnlabError, match="is damaged: expected 1000 different names"):
            _imagenet.class_names()
    _imagenet.class_names.cache_clear()


def test_top_is_the_softmax_in_order():
    scores = np.log(np.float32([0.2, 0.5, 0.05, 0.25])) + 100
    names = ("a", "b", "c", "d")
    ranked = predict.top(scores, names, 3)
    assert [(r.index, r.name) for r in ranked] == [(1, "b"), (3, "d"), (0, "a")]
    np.testing.assert_allclose([r.probability for r in ranked], [0.5, 0.25, 0.2], rtol=1e-5)
    assert len(predict.top(scores, names, 9)) == 4
    huge = predict.top(np.float32([1e30, 0]), ("x", "y"))
    assert [r.probability for r in huge] == [1.0, 0.0]


def test_images_go_through_in_batches_of_one_size():
    sizes = []

    def classify(images):
        sizes.append(len(images))
        return images.mean((1, 2))

    images = np.random.default_rng(0).random((predict.BATCH + 5, 4, 6, 3), np.float32)
    np.testing.assert_array_equal(predict.logits(classify, images), images.mean((1, 2)))
    assert sizes == [predict.BATCH] * 2
    predict.logits(classify, images[:3])
    assert sizes[-1] == 3


def gradient(height, width):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 77], -1).astype(
        np.uint8
    )


def test_the_central_square_is_resized(tmp_path):
    pixels = gradient(50, 81)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    square = np.ascontiguousarray(pixels[:, 15:65])  # (81 - 50) // 2
    expected = Image.fromarray(square).resize((24, 24), Image.Resampling.BICUBIC)
    found = predict.read_image(tmp_path / "wide.png", 24)
    assert (found.dtype, found.shape) == (np.float32, (24, 24, 3))
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32) / 255)
    # A share of the square, of another shape, by another filter.
    part = np.ascontiguousarray(pixels[5:45, 20:60])
    expected = Image.fromarray(part).resize((30, 20), Image.Resampling.BILINEAR)
    found = predict.read_image(tmp_path / "wide.png", (20, 30), crop=0.8, interpolation="bilinear")
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32) / 255)


def test_images_are_upright(tmp_path):
    pixels = gradient(16, 16)
    # EXIF 2.3, tag 0x0112: which way the stored rows and columns must be turned to be seen.
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
        found = predict.read_image(tmp_path / "turned.png", 16)
        np.testing.assert_array_equal(np.rint(found * 255), pixels, err_msg=str(orientation))


def test_every_colour_mode_becomes_rgb_or_grey(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 0], clear[:2, :, 3] = 255, 255  # red above, nothing below
    half = np.full((4, 4, 2), [0, 128], np.uint8)  # half transparent black
    palette = Image.fromarray(clear[..., :3]).quantize(2)
    palette.info["transparency"] = palette.getpixel((0, 0))
    cases = {
        "grey.png": (Image.fromarray(ramp.astype(np.uint8)), ramp.astype(np.uint8)),
        "grey16.png": (Image.fromarray(ramp), ramp // 257),
        "cmyk.tif": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), [255, 0, 0]),
        "rgba.png": (Image.fromarray(clear), np.where(clear[..., 3:], [255, 0, 0], 255)),
        "la.png": (Image.fromarray(half), [127, 127, 127]),
        "p.png": (palette, [255, 255, 255]),
        "bits.png": (Image.new("1", (4, 4), 1), [255, 255, 255]),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        found = predict.read_image(tmp_path / name, image.size)
        expected = np.asarray(expected)
        if expected.shape == (16, 16):
            expected = expected[..., None]
        expected = np.broadcast_to(expected, found.shape)
        np.testing.assert_array_equal(np.rint(found * 255), expected, err_msg=name)
    grey = predict.read_image(tmp_path / "rgba.png", 4, channels=1)
    assert grey.shape == (4, 4, 1)
    # ITU-R BT.601: red is 0.299 of the luma.
    np.testing.assert_array_equal(np.rint(grey[..., 0] * 255), [[76] * 4] * 2 + [[255] * 4] * 2)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, message in (
        ("text.jpg", "cannot identify image file"),
        ("cut.png", "truncated|broken"),
        ("none.png", "No such file"),
        (".", "Is a directory"),
        ("float.tif", "floating-point numbers of no known range"),
    ):
        path = tmp_path / name
        with pytest.raises(CnnlabError, match=f"cannot read the image {re.escape(str(path))}"):
            predict.read_image(path, 8)
        with pytest.raises(CnnlabError, match=message):
            predict.read_image(path, 8)
    with pytest.raises(CnnlabError, match="1 or 3 channels, but the network takes 4"):
        predict.read_image(tmp_path / "cut.png", 8, channels=4)
