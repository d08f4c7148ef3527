"""The two embedded data sets, whole and damaged."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cnnlab.data import _embedded, digits, fashion_mini, fashion_mnist
from cnnlab.data._source import channel_moments
from cnnlab.types import CnnlabError, fingerprint

EMBEDDED = [fashion_mini, digits]
TOOL = Path(__file__).parents[2] / "tools" / "make_fashion_mini.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_fashion_mini", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("module", "split", "per_class"),
    [
        (fashion_mini, "train", [1_000] * 10),
        (fashion_mini, "test", [200] * 10),
        # UCI publishes 178 182 177 183 181 182 181 179 174 180 examples; 36 of each are for test.
        (digits, "train", [142, 146, 141, 147, 145, 146, 145, 143, 138, 144]),
        (digits, "test", [36] * 10),
    ],
)
def test_class_counts_and_mixed_order(module, split, per_class):
    source = module.load(split)
    assert source.info == module.info()
    assert np.bincount(source.labels).tolist() == per_class
    assert len(source) == len(source.images) == sum(per_class)
    assert len(np.unique(source.labels[:100])) == 10


@pytest.mark.parametrize("module", EMBEDDED)
def test_mean_and_std_are_those_of_the_training_images(module):
    info = module.info()
    images = module.load("train").images
    assert (info.mean, info.std) == channel_moments([images])
    np.testing.assert_allclose(info.mean[0], (images / 255).mean(), atol=1e-6)
    np.testing.assert_allclose(info.std[0], (images / 255).std(), atol=1e-6)


@pytest.mark.parametrize("module", EMBEDDED)
def test_no_test_image_is_a_training_image(module):
    train, test = ({image.tobytes() for image in module.load(s).images} for s in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("module", EMBEDDED)
def test_get_gives_the_examples_asked_for_in_order(module):
    source = module.load("test")
    images, labels = source.get(np.array([5, 0, 5]))
    np.testing.assert_array_equal(images[1], source.images[0])
    np.testing.assert_array_equal(images[0], images[2])
    assert labels.tolist() == source.labels[[5, 0, 5]].tolist()
    assert labels.dtype == np.int32


def test_the_embedded_files_stay_small_and_have_their_licences():
    files = {path.name: path for path in _embedded.FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 6_000_000
    assert "Copyright (c) 2017 Zalando SE" in files["LICENSE-fashion_mini.txt"].read_text()
    notice = files["LICENSE-digits.txt"].read_text()
    assert "CC BY 4.0" in notice
    assert "BSD 3-Clause" in notice


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    theirs = datasets.load_digits()
    positions = digits.split_indices(theirs.target)
    assert sorted(np.concatenate(list(positions.values()))) == list(range(1797))
    for split, chosen in positions.items():
        ours = digits.load(split)
        np.testing.assert_array_equal(ours.images[..., 0] / 15, theirs.images[chosen])
        np.testing.assert_array_equal(ours.labels, theirs.target[chosen])


def test_digits_in_the_test_split_are_the_last_of_their_class():
    labels = np.array([0, 1] * 50)
    positions = digits.split_indices(labels)
    assert positions["test"].tolist() == list(range(28, 100))
    assert positions["train"].tolist() == list(range(28))


def test_fashion_mini_is_the_first_of_each_class_of_the_whole_set():
    try:
        whole = {split: fashion_mnist.load(split) for split in ("train", "test")}
    except CnnlabError as error:
        pytest.skip(f"the whole Fashion-MNIST is not here: {error}")
    for split, count in (("train", 1_000), ("test", 200)):
        ours = fashion_mini.load(split)
        seen = [0] * 10
        chosen = []
        for position, label in enumerate(whole[split].labels):
            if seen[label] < count:
                seen[label] += 1
                chosen.append(position)
        assert fingerprint(ours.get(np.arange(len(ours)))) == fingerprint(
            whole[split].get(np.array(chosen))
        )


def test_the_tool_takes_the_first_of_each_class_in_order(tool):
    labels = np.array([2, 0, 0, 2, 1, 0, 1, 1, 2])
    assert tool.first_of_each_class(labels, 2).tolist() == [0, 1, 2, 3, 4, 6]


def test_the_tool_makes_the_embedded_digits(tool):
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    with _embedded.read(digits.PATH, size=digits.SIZE, sha256=digits.SHA256) as embedded:
        for name, array in tool.digits().items():
            np.testing.assert_array_equal(embedded[name], array)
            assert embedded[name].dtype == array.dtype


def test_the_tool_packs_what_numpy_reads_and_equal_arrays_to_equal_bytes(tool, tmp_path):
    arrays = {"a": np.arange(12, dtype=np.uint8).reshape(3, 4), "b": np.zeros(0, np.int32)}
    path = tmp_path / "packed.npz"
    path.write_bytes(tool.pack(arrays))
    assert path.read_bytes() == tool.pack(arrays)
    with np.load(path) as loaded:
        assert set(loaded) == {"a", "b"}
        np.testing.assert_array_equal(loaded["a"], arrays["a"])


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _one_bit_flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("module", EMBEDDED)
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncated, "expected {size} bytes, found {half}"),
        (_one_bit_flipped, "expected SHA-256 {sha256}, found "),
        (lambda data: b"", "expected {size} bytes, found 0"),
    ],
)
def test_a_damaged_file_is_named_with_what_was_expected_and_found(
    module, damage, expected, tmp_path
):
    path = tmp_path / module.PATH.name
    path.write_bytes(damage(module.PATH.read_bytes()))
    with pytest.raises(CnnlabError) as caught:
        module.load_from(path, "train")
    message = str(caught.value)
    assert expected.format(size=module.SIZE, half=module.SIZE // 2, sha256=module.SHA256) in message
    assert str(path) in message
    assert "Reinstall" in message


@pytest.mark.parametrize("module", EMBEDDED)
def test_a_missing_file_is_named(module, tmp_path):
    with pytest.raises(CnnlabError, match=r"gone\.npz.*No such file.*Reinstall"):
        module.load_from(tmp_path / "gone.npz", "train")


@pytest.mark.parametrize("module", EMBEDDED)
def test_a_whole_copy_elsewhere_gives_the_same(module, tmp_path):
    copy = tmp_path / "copy.npz"
    copy.write_bytes(module.PATH.read_bytes())
    np.testing.assert_array_equal(module.load_from(copy, "test").images, module.load("test").images)


@pytest.mark.parametrize("module", [*EMBEDDED, fashion_mnist])
def test_an_unknown_split_is_refused(module):
    with pytest.raises(CnnlabError, match="no split 'validation'"):
        module.load("validation")
