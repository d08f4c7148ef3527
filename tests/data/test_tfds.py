"""The TFDS source: a set really prepared (without TensorFlow), and TFDS's own mocks."""

import dataclasses
import io
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cnnlab.data import tfds as source_file
from cnnlab.data._source import channel_moments
from cnnlab.types import ArraySource, CnnlabError, StreamedSource, fingerprint

COLOURS = np.random.default_rng(0).integers(0, 256, (2, 12, 6, 5, 3), np.uint8)


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("PIL", reason="pillow is not installed")
    return pytest.importorskip("tensorflow_datasets", reason="the extra 'tfds' is not installed")


@pytest.fixture(scope="module")
def prepared(library, tmp_path_factory):
    """A folder with the set `cnnlab_tiny`: 12 train and 7 test images, 6x5x3, 3 classes.

    Three more splits hold what must be refused: an unlabelled example and images of other sizes.
    """
    from PIL import Image

    def png(pixels: np.ndarray) -> io.BytesIO:
        # Encoded here, because TFDS needs TensorFlow for it.
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        data.seek(0)
        return data

    # Not registered, as a set of which TFDS has the files but not the code.
    with library.core.registered.skip_registration():

        class CnnlabTiny(library.core.GeneratorBasedBuilder):
            VERSION = library.core.Version("1.0.0")
            code_path = None  # No file of checksums beside this one.

            def _info(self):
                features = library.features
                return library.core.DatasetInfo(
                    builder=self,
                    features=features.FeaturesDict(
                        {
                            "image": features.Image(shape=(None, None, 3)),
                            "label": features.ClassLabel(names=["red", "green", "blue"]),
                            "depth": features.Image(shape=(2, 2, 1), dtype=np.uint16),
                            "index": np.int64,
                        }
                    ),
                    homepage="https://example.org/tiny",
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(COLOURS[0]),
                    "test": self._generate_examples(COLOURS[1, :7]),
                    "unlabelled": self._generate_examples(COLOURS[0, :1], label=-1),
                    "mixed": self._generate_examples([COLOURS[0, 0], COLOURS[0, 1, :4]]),
                    "narrow": self._generate_examples(COLOURS[0, :, :, :4]),
                }

            def _generate_examples(self, images, label=None):
                depth = np.zeros((2, 2), np.uint16)
                for index, image in enumerate(images):
                    yield (
                        index,
                        {
                            "image": png(image),
                            "label": index % 3 if label is None else label,
                            "depth": png(depth),
                            "index": index,
                        },
                    )

    folder = tmp_path_factory.mktemp("tfds")
    CnnlabTiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def tiny(prepared, monkeypatch):
    monkeypatch.setenv("CNNLAB_DATA", str(prepared))
    return {"dataset": "cnnlab_tiny"}


def test_a_prepared_set_is_read_exactly(tiny):
    for number, (split, count) in enumerate((("train", 12), ("test", 7))):
        source = source_file.load(split, **tiny)
        assert isinstance(source, ArraySource)
        np.testing.assert_array_equal(source.images, COLOURS[number, :count])
        assert source.labels.tolist() == [i % 3 for i in range(count)]
        assert source.info == source_file.info(**tiny)


def test_info_comes_from_the_metadata_and_the_training_images(tiny):
    info = source_file.info(**tiny)
    assert info.name == "tfds:cnnlab_tiny"
    assert info.image_shape == (6, 5, 3)
    assert info.class_names == ("red", "green", "blue")
    assert info.homepage == "https://example.org/tiny"
    assert (info.mean, info.std) == channel_moments([COLOURS[0]])


def test_a_set_too_large_for_memory_stays_lazy(tiny, monkeypatch):
    whole = source_file.load("train", **tiny)
    monkeypatch.setattr(source_file, "MAX_BYTES_IN_MEMORY", 12 * 6 * 5 * 3)
    lazy = source_file.load("train", **tiny)
    assert isinstance(lazy, source_file.TfdsSource)
    assert len(lazy) == 12
    assert lazy.info == whole.info
    chosen = np.array([11, 0, 3, 3])
    assert fingerprint(lazy.get(chosen)) == fingerprint(whole.get(chosen))
    assert lazy.get(np.arange(0)).images.shape == (0, 6, 5, 3)


def test_a_lazy_set_knows_its_labels_without_decoding(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(source_file, "MAX_BYTES_IN_MEMORY", 0)
    lazy = source_file.load("train", **tiny)
    assert isinstance(lazy, StreamedSource)
    assert isinstance(lazy.undecoded[0]["image"], bytes)
    bare = dataclasses.replace(lazy, records=[None] * 12)
    assert bare.labels.dtype == np.int32
    assert bare.labels.tolist() == [i % 3 for i in range(12)]
    # The second time they come from the cache.
    kept = dataclasses.replace(bare, undecoded=[None] * 12)
    assert kept.labels.tolist() == bare.labels.tolist()
    copy = pickle.loads(pickle.dumps(lazy))
    assert fingerprint(copy.get(np.arange(12))) == fingerprint(lazy.get(np.arange(12)))
    prints = {lazy.fingerprint, source_file.load("test", **tiny).fingerprint}
    prints.add(source_file.load("train", **(tiny | {"train_split": "train[:8]"})).fingerprint)
    assert len(prints) == 3
    assert copy.fingerprint == bare.fingerprint == lazy.fingerprint
    unlabelled = source_file.load("test", **(tiny | {"test_split": "unlabelled"}))
    with pytest.raises(CnnlabError, match=r"example 0 .* has label -1"):
        _ = unlabelled.labels


def test_moments_are_of_evenly_spaced_images(tiny, monkeypatch):
    # A slice of its own, because a process remembers the moments of each.
    monkeypatch.setattr(source_file, "MAX_IMAGES_FOR_MOMENTS", 3)
    monkeypatch.setattr(source_file, "_CHUNK", 2)
    info = source_file.info(train_split="train[:9]", **tiny)
    assert (info.mean, info.std) == channel_moments([COLOURS[0, [0, 3, 6]]])


def test_slices_of_splits_serve_as_train_and_test(tiny):
    fields = tiny | {"train_split": "train[:8]", "test_split": "train[8:]"}
    np.testing.assert_array_equal(source_file.load("train", **fields).images, COLOURS[0, :8])
    np.testing.assert_array_equal(source_file.load("test", **fields).images, COLOURS[0, 8:])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"test_split": "tset"}, r"split 'tset' \(did you mean 'test'\?\).*data\.test_split"),
        ({"test_split": "mixed"}, r"differing size: expected 6x5x3, image 1 .*'mixed' is 4x5x3"),
        ({"test_split": "narrow"}, r"expected 6x5x3, image 0 of split 'narrow' is 6x4x3"),
        ({"test_split": "unlabelled"}, r"example 0 .* has label -1, expected 0 to 2"),
        ({"train_split": "train[:0]"}, r"cannot read split 'train\[:0\]'"),
        ({"image_key": "imag"}, r"no feature 'imag' \(did you mean 'image'\?\).*data\.image_key"),
        ({"label_key": "index"}, r"'index' to be ClassLabel, it is .*data\.label_key"),
        ({"image_key": "depth"}, "expected uint8 images, 'depth' is uint16"),
        ({"dataset": "cnnlab_tini"}, r"'cnnlab_tini' is neither known to TFDS nor prepared in"),
        ({"dataset": "cifar"}, "did you mean 'cifar10'"),
        ({"dataset": "mnist:9.9.9"}, "cannot be loaded at version 9.9.9"),
        ({"dataset": "two words"}, r"name\[/config\]\[:version\]"),
        ({"dataset": "mnist"}, r"mnist.3\.0\.1.*--data-dir.*file_format='array_record'"),
    ],
)
def test_what_cannot_be_read_is_said(fields, expected, tiny):
    with pytest.raises(CnnlabError, match=f"(?s){expected}"):
        source_file.load("test", **(tiny | fields))


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        ("test.array_record", lambda data: data[: len(data) // 2], "prepare it again"),
        ("test.array_record", lambda data: data[:100], "prepare it again"),
        ("test.array_record", lambda data: data[:100] + bytes(9) + data[109:], "prepare it again"),
        ("test.array_record", None, "prepare it again"),
        ("dataset_info.json", lambda data: data[:20], "cannot open the data set"),
        ("dataset_info.json", None, "cannot open the data set"),
        ("features.json", lambda data: data[:20], "cannot open the data set"),
    ],
)
def test_damaged_and_missing_files_are_said(
    file, damage, expected, prepared, tmp_path, monkeypatch
):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    (path,) = folder.glob(f"cnnlab_tiny/1.0.0/*{file}*")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setenv("CNNLAB_DATA", str(folder))
    with pytest.raises(CnnlabError, match=expected) as caught:
        source_file.load("test", dataset="cnnlab_tiny")
    assert "cnnlab_tiny" in str(caught.value)


def test_an_unknown_split_is_refused_before_anything_is_imported():
    with pytest.raises(CnnlabError, match="no split 'validation'"):
        source_file.load("validation")


@pytest.mark.parametrize(("dataset", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_mocked_sets_have_the_published_shapes(dataset, shape, library, tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    with library.testing.mock_data(num_examples=5):
        source = source_file.load("train", dataset=dataset)
        assert source.info == source_file.info(dataset=dataset)
    assert source.info.image_shape == shape
    assert source.info.num_classes == 10
    images, labels = source.get(np.arange(5))
    assert images.shape == (5, *shape)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32


def test_mocked_images_of_differing_size_are_refused(library, tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    with (
        library.testing.mock_data(num_examples=5),
        pytest.raises(CnnlabError, match="images of differing size"),
    ):
        source_file.load("train", dataset="caltech101")


def test_the_default_folder_is_tfds_own(library, monkeypatch):
    monkeypatch.delenv("CNNLAB_DATA", raising=False)
    assert source_file._data_dir() is None


def test_a_missing_extra_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(CnnlabError, match=r"pip install 'cnnlab\[tfds\]'"):
        source_file.load("train")


def test_importing_the_file_does_not_import_tfds_and_reading_not_tensorflow(prepared):
    program = (
        "import sys, cnnlab.data.tfds as t\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "t.load('train', dataset='cnnlab_tiny')\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"CNNLAB_DATA": str(prepared)}
    )
