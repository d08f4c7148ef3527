"""Folders of images: every kind of file and layout, every mistake, and random trees."""

import csv
import io
import itertools
import os
import pickle
import random
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnlab.data import _decoding, _streaming, image_folder
from cnnlab.data._decoding import BadImageError, View
from cnnlab.data._source import channel_moments
from cnnlab.types import CnnlabError, CnnlabWarning, StreamedSource, fingerprint

RNG = np.random.default_rng(0)
SMALL = {"size": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and data folders relative to the test's folder."""
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    image_folder._loaded.cache_clear()
    return tmp_path / "cache" / "data"


def pixels(height=8, width=8, channels=3):
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def save(path: Path, image=None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(pixels())).save(path, **options)
    return path


def tree(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name)
    return root


def decoded(path: Path, **view) -> np.ndarray:
    view = View(**{"size": 8} | view)
    out = np.empty(view.shape, np.uint8)
    with open(path, "rb") as file:
        _decoding.decode(file, out, view)
    return out


PHOTO = Image.fromarray(pixels(16, 16)).resize((64, 48), Image.Resampling.BICUBIC)
# Colours that a JPEG need not cut off at 0 or 255.
SMOOTH = Image.fromarray(pixels(2, 2) // 2 + 64).resize((8, 8), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("ending", "image", "options"),
    [
        ("png", Image.fromarray(pixels()), {}),
        ("png", Image.fromarray(pixels()).convert("L"), {}),
        ("png", Image.fromarray(pixels()).convert("1"), {}),
        ("png", Image.fromarray(pixels()).quantize(7), {}),
        ("bmp", Image.fromarray(pixels()), {}),
        ("gif", Image.fromarray(pixels()).quantize(7), {}),
        ("webp", Image.fromarray(pixels()), {"lossless": True}),
        ("JPG", SMOOTH, {}),
        ("jpeg", SMOOTH.convert("L"), {}),
        ("jpg", SMOOTH.convert("CMYK"), {}),
        ("jpg", SMOOTH, {"progressive": True}),
    ],
)
def test_every_kind_of_file_reads_as_pillow_converts_it(ending, image, options, tmp_path):
    path = save(tmp_path / f"x.{ending}", image, **options)
    with Image.open(path) as again:
        np.testing.assert_array_equal(decoded(path), np.asarray(again.convert("RGB")))
        grey = np.asarray(again.convert("L")).astype(int)
    # Of a JPEG only the luminance is decoded, which the way over RGB rounds three times more.
    slack = 2 if ending.lower().startswith("jp") else 0
    assert abs(decoded(path, channels=1)[..., 0] - grey).max() <= slack


def test_what_is_transparent_lies_on_white(tmp_path):
    data = pixels(8, 8, 4)
    alpha = data[..., 3:].astype(float) / 255
    expected = data[..., :3] * alpha + 255 * (1 - alpha)
    for ending, options in (("png", {}), ("webp", {"lossless": True, "exact": True})):
        found = decoded(save(tmp_path / f"x.{ending}", Image.fromarray(data), **options))
        assert abs(found - expected).max() <= 1
    keyed = Image.fromarray(np.array([[0, 100, 200, 0]] * 4, np.uint8))
    found = decoded(save(tmp_path / "k.png", keyed, transparency=0), size=4, channels=1)
    assert found[0, :, 0].tolist() == [255, 100, 200, 255]


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
    path = save(tmp_path / "x.png", Image.fromarray(values))
    assert decoded(path, size=4, channels=1)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation, tmp_path):
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", image, exif=exif)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decoded(path), expected)
    corner = np.asarray(image)[0, 0]  # The standard: where the row 0, column 0 pixel belongs.
    place = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
    place |= {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    np.testing.assert_array_equal(decoded(path)[place[orientation]], corner)


def test_crop_stretch_and_pad(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    path = save(tmp_path / "x.png", Image.fromarray(wide))
    assert (decoded(path, size=4) == 200).all()
    # The shorter side is resized, then the centre is cut out.
    whole = Image.fromarray(wide).resize((6, 2), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decoded(path, size=2), np.asarray(whole)[:, 2:4])
    stretched = decoded(path, size=12, fit="stretch", interpolation="bicubic")
    assert (stretched[:, 5:7] == 200).all()
    assert (stretched[:, :3] == 0).all()
    padded = decoded(path, size=12, fit="pad")
    np.testing.assert_array_equal(padded[4:8], wide)
    assert not padded[:4].any()
    assert not padded[8:].any()
    # Of an odd difference the centre is rounded down, and no pixel is interpolated.
    data = pixels(4, 7)
    odd = save(tmp_path / "odd.png", Image.fromarray(data))
    np.testing.assert_array_equal(decoded(odd, size=4), data[:, 1:5])


def test_a_draft_is_close_to_the_long_way(tmp_path):
    # Of slowly varying colours, as photographs are at this size.
    large = Image.fromarray(pixels(12, 16)).resize((1600, 1200), Image.Resampling.BICUBIC)
    path = save(tmp_path / "x.jpg", large, quality=95)
    with Image.open(path) as image:
        box = (200, 0, 1400, 1200)
        square = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR, box)
        expected = np.asarray(square).astype(int)
    difference = abs(decoded(path, size=64) - expected)
    assert difference.mean() < 0.5
    assert difference.max() <= 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "it is empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:30], "."),
        (lambda data: b"<html>no image</html>", "no JPEG, PNG, WebP, GIF or BMP image"),
    ],
)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_damaged_files_say_why(ending, damage, message, tmp_path):
    path = save(tmp_path / f"x.{ending}", PHOTO)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadImageError, match=message):
        decoded(path)


def test_more_pixels_than_pillow_allows_are_refused_not_warned_of(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(BadImageError, match=r"100 x 100 pixels.*9999"):
        decoded(path)


def test_folders_are_classes_and_splits(tmp_path, cache):
    root = tree(
        tmp_path / "set",
        *(f"train/{c}/{i}.png" for c in "ba" for i in range(3)),
        "train/a/deep/er/x.PNG",
        "val/a/0.png",
        "valid/b/0.png",
        "train/a/.hidden.png",
        "__MACOSX/train/a/._0.png",
    )
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    source = image_folder.load("train", folder="set", **SMALL)
    assert isinstance(source, StreamedSource)
    names = ["train/a/0.png", "train/a/1.png", "train/a/2.png", "train/a/deep/er/x.PNG"]
    names += ["train/b/0.png", "train/b/1.png", "train/b/2.png"]
    assert list(source.files.names) == names
    assert source.info.class_names == ("a", "b")
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    everything = source.get(np.arange(7))
    images = np.stack([np.asarray(Image.open(root / name)) for name in names])
    np.testing.assert_array_equal(everything.images, images)
    assert (source.info.mean, source.info.std) == channel_moments([images])
    assert image_folder.info(folder="set", **SMALL) == source.info
    test = image_folder.load("test", folder=str(root), **SMALL)
    assert list(test.files.names) == ["val/a/0.png"]
    assert test.info == source.info
    other = image_folder.load("test", folder="set", test_folder="valid", **SMALL)
    assert other.labels.tolist() == [1]

    chosen = np.array([5, 0, 0, 3])
    some = source.get(chosen)
    np.testing.assert_array_equal(some.images, images[chosen])
    assert some.labels.tolist() == source.labels[chosen].tolist()
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: copy.get(np.arange(7)), range(8)):
            assert fingerprint(found) == fingerprint(everything)


def test_one_folder_is_cut_by_seed_and_stays_so_as_images_come(tmp_path):
    root = tree(tmp_path / "set", *(f"{c}/{i:02}.png" for c in "abc" for i in range(10)))

    def sides(**fields):
        image_folder._loaded.cache_clear()
        loaded = [image_folder.load(s, folder="set", **SMALL, **fields) for s in ("train", "test")]
        return [set(source.files.names) for source in loaded], loaded

    (train, test), (_, source) = sides()
    assert train | test == {f"{c}/{i:02}.png" for c in "abc" for i in range(10)}
    assert not train & test
    assert np.bincount(source.labels).tolist() == [2, 2, 2]
    assert sides(split_seed=1)[0][1] != test
    assert np.bincount(sides(test_part=0.5)[1][1].labels).tolist() == [5, 5, 5]
    save(root / "a" / "99.png")
    (_, more), _ = sides()
    assert len(test - more) <= 1
    (root / "b" / "00.png").unlink()


def test_the_fingerprint_tells_sets_and_settings_apart(tmp_path):
    root = tree(tmp_path / "set", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))

    def of(**fields):
        image_folder._loaded.cache_clear()
        return image_folder.load("train", folder="set", **{"size": 8} | fields).fingerprint

    first = of()
    assert first == of()
    shutil.copytree(root, tmp_path / "copy")
    assert image_folder.load("train", folder="copy", **SMALL).fingerprint == first
    seen = [first, of(size=9), of(channels=1), of(fit="pad"), of(interpolation="bicubic")]
    for path in root.glob("*/*.png"):
        path.write_bytes(path.read_bytes() + b"\0")  # which PNG allows
    seen.append(of())
    (root / "a").rename(root / "c")
    seen.append(of())
    assert len(set(seen)) == len(seen)
    assert all(len(s) == 16 and int(s, 16) >= 0 for s in seen)


def test_what_took_long_is_done_once(tmp_path, cache, monkeypatch):
    tree(tmp_path / "set", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    first = image_folder.load("train", folder="set", **SMALL)
    image_folder._loaded.cache_clear()
    monkeypatch.setattr(_decoding, "decode", None)
    assert image_folder.load("train", folder="set", **SMALL).info == first.info
    monkeypatch.undo()
    monkeypatch.setenv("CNNLAB_CACHE", str(cache.parent))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    for path in cache.iterdir():  # a damaged cache is made anew
        path.write_text('{"format": 1')
    image_folder._loaded.cache_clear()
    assert image_folder.load("train", folder="set", **SMALL).info == first.info
    # A file that has changed since, though not in length, is looked at again.
    path = tmp_path / "set" / "a" / "0.png"
    path.write_bytes(bytes(path.stat().st_size))
    image_folder._loaded.cache_clear()
    with pytest.raises(CnnlabError, match=r"1 of 6 images can't be read.*a/0.png"):
        image_folder.load("train", folder="set", **SMALL)


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    tree(tmp_path / "set", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "file"))
    with pytest.warns(CnnlabWarning, match="CNNLAB_CACHE"):
        assert len(image_folder.load("train", folder="set", **SMALL)) == 4


def test_bad_files_fail_the_start_or_are_skipped_and_counted(tmp_path):
    root = tree(tmp_path / "set", *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(3)))
    tree(root, "test/a/0.jpg")
    bad = root / "train" / "a" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    (root / "train" / "b" / "9.jpg").symlink_to(root / "nowhere.jpg")
    (root / "train" / "b" / "scan.TIF").write_bytes(b"II*\0")
    os.mkfifo(root / "train" / "b" / "pipe.png")
    expected = r"(?i)4 of 10 images can't be read; the first: 'train/a/1.jpg': .*truncated"
    with pytest.raises(CnnlabError, match=rf"{expected}.*data\.bad='skip'"):
        image_folder.load("train", folder="set", **SMALL)
    with pytest.warns(CnnlabWarning, match=rf"{expected}.*left out"):
        source = image_folder.load("train", folder="set", bad="skip", **SMALL)
    assert len(source) == 5
    assert len(source.get(np.arange(5)).images) == 5
    (root / "train" / "a" / "0.jpg").unlink()
    with pytest.raises(CnnlabError, match=r"cannot read 'train/a/0.jpg': No such file"):
        source.get(np.array([0]))


def kaggle(root: Path, rows, header=("id", "breed")) -> Path:
    root.mkdir(exist_ok=True)
    with open(root / "labels.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    return root


def test_classes_from_a_csv(tmp_path):
    rows = [(f"{i}", "cat" if i % 2 else "dog") for i in range(10)]
    root = kaggle(tmp_path / "set", rows)
    tree(root, *(f"train/{i}.png" for i in range(10)), "test/90.png", "test/91.png")
    fields = {"folder": "set", "labels": "labels.csv", **SMALL}
    train, test = (image_folder.load(s, **fields) for s in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    assert train.info.class_names == ("cat", "dog")
    for source in (train, test):
        for name, label in zip(source.files.names, source.labels, strict=True):
            assert ("dog", "cat")[int(Path(name).stem) % 2] == source.info.class_names[label]
    # Other columns, names with endings, a test folder that is labelled.
    rows = [("x", f"train/{i}.png", "cat" if i % 2 else "dog") for i in range(10)]
    rows += [("x", "90.png", "cat"), ("x", "test/91", "dog")]
    kaggle(root, rows, ("note", "file", "kind"))
    image_folder._loaded.cache_clear()
    test = image_folder.load("test", file_column="file", class_column="kind", **fields)
    assert list(test.files.names) == ["test/90.png", "test/91.png"]
    assert test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([("a", "x"), ("b", "y")], {}, "1 images have no row in labels.csv; the first: 'c.png'"),
        ([("a", "x"), ("b", "y"), ("c", "x"), ("cc", "y")], {}, "line 5: there is no image 'cc'"),
        ([("a", "x"), ("a", "y")], {}, "'a' stands in lines 2 and 3"),
        ([("a", "x"), ("b",)], {}, "line 3: expected a file and its class"),
        ([("a", " "), ("b", "y")], {}, "line 2: expected a file and its class"),
        ([("a", "x"), ("b", "x"), ("c", "x")], {}, "at least two classes, found only 'x'"),
        ([], {}, "a header and a row an image"),
        ([("a", "x")], {"class_column": "bred"}, "data.class_column.*'bred' .did you mean 'breed'"),
        ([("a", "x")], {"labels": "label.csv"}, "data.labels: label.csv: cannot be read: No such"),
    ],
)
def test_mistakes_in_a_csv_are_named(rows, fields, message, tmp_path):
    tree(kaggle(tmp_path / "set", rows), "a.png", "b.png", "c.png")
    with pytest.raises(CnnlabError, match=message):
        image_folder.load("train", **{"folder": "set", "labels": "labels.csv"} | SMALL | fields)


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        ([], {"folder": "none"}, r"no folder or archive .*none"),
        ([], {"folder": ""}, r"data\.folder: expected a folder"),
        ([], {}, r"no images in it"),
        (["a/x.png"], {}, "at least two classes, found only 'a'"),
        (["a/x.png", "b/y.png", "z.png"], {}, "'z.png' lies in no class folder"),
        (["a/x.png", "b/"], {}, "the class folder b has no images"),
        (["a/x.png", "b/y.png"], {}, "no test images are left"),
        (["train/a/x.png", "train/b/x.png", "test/c/x.png"], {}, "class 'c', which has no folder"),
        (["train/a/x.png", "train/b/x.png", "test/"], {}, "the folder test has no images"),
        (["a/x.png", "b/x.png"], {"train_folder": "c"}, "data.train_folder: .* has no folder c"),
        (["train/a/x.png"], {"test_folder": "tset"}, "data.test_folder: .* has no folder tset"),
        (["tran/a/x.png", "test/a/x.png"], {}, "has a folder test, but none called train"),
        (["a/x.png"], {"fit": "squash"}, "data.fit: expected crop or stretch or pad"),
        (["a/x.png"], {"channels": 4}, "data.channels: expected 1 or 3, got 4"),
        (["a/x.png"], {"bad": "ignore"}, "data.bad: expected fail or skip"),
        (["a/x.png"], {"split": "valid"}, "has no split 'valid'"),
    ],
)
def test_mistakes_in_a_folder_are_named(names, fields, message, tmp_path):
    (tmp_path / "set").mkdir()
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True) if name.endswith("/") else save(
            tmp_path / "set" / name
        )
    with pytest.raises(CnnlabError, match=message):
        image_folder.load(**{"split": "train", "folder": "set"} | SMALL | fields)


def test_a_link_that_goes_round_is_refused(tmp_path):
    root = tree(tmp_path / "set", "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    (root / "a" / "again").symlink_to(root)
    with pytest.raises(CnnlabError, match="link to a folder that it lies in"):
        image_folder.load("train", folder="set", **SMALL)
    (root / "a" / "again").unlink()
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "2.png")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert "a/more/2.png" in {
        n
        for s in ("train", "test")
        for n in image_folder.load(s, folder="set", **SMALL).files.names
    }


NAMES = ["a", "b", "train", "test", "val", "ä ö", "new\nline", " ", "x.png", "c'q\"", "日本", "[a]"]


def _good(random: random.Random) -> bytes:
    kind, mode = random.choice(
        [("PNG", "RGB"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"),
         ("BMP", "L"), ("WEBP", "RGBA")]
    )  # fmt: skip
    buffer = io.BytesIO()
    size = random.randint(1, 9), random.randint(1, 9)
    Image.new(mode, size, random.randint(0, 200)).save(buffer, kind)
    return buffer.getvalue()


def _content(random: random.Random) -> bytes:
    good = _good(random)
    place = random.randrange(len(good))
    return random.choices(
        [
            good,
            good[:place],
            b"",
            random.randbytes(40),
            good[:place] + random.randbytes(3) + good[place + 3 :],
            good[:12] + random.randbytes(60),
        ],
        weights=(30, 2, 1, 1, 3, 1),
    )[0]


def _random_tree(root: Path, random: random.Random) -> None:
    """A folder with a structure that is often right, and something in it that often is not."""
    root.mkdir()
    classes = random.sample(NAMES, random.randint(1, 3))
    splits = random.choice([[""], ["train/"], ["train/", "test/"], ["train/", "val/"], ["test/"]])
    files = []
    for split, label in itertools.product(splits, classes):
        folder = root / f"{split}{label}" / random.choice(["", "deep"])
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(random.choice([0, 1, 2, 3, 3, 3])):
            ending = random.choice([".png", ".jpg", ".JPEG", ".gif", ".webp", ".bmp"])
            path = folder / f"{random.choice(NAMES).strip('.')}{number}{ending}"
            path.write_bytes(_content(random) if random.random() < 0.4 else _good(random))
            files.append(path.relative_to(root).as_posix())
    for _ in range(random.choice([0, 0, 1, 2])):
        where = random.choice([p for p in root.rglob("*") if p.is_dir()])
        where = where if not where.is_symlink() else root
        odd = where / f"odd{random.randrange(10**6)}"
        match random.randrange(9):
            case 0:
                odd.symlink_to(root)
            case 1:
                odd.with_suffix(".png").symlink_to(odd.with_suffix(".png"))
            case 2:
                odd.with_suffix(".png").symlink_to("nowhere")
            case 3:
                odd.with_suffix(".png").mkdir()
            case 4:
                odd.with_suffix(".txt").write_bytes(random.randbytes(9))
            case 5:
                odd.with_suffix(".tiff").write_bytes(b"II*\0")
            case 6:
                os.mkfifo(odd.with_suffix(".jpg"))
            case 7:
                os.mkdir(os.fsencode(where) + b"/\xff\xfe%d" % random.randrange(10**6))
            case 8:
                odd.mkdir()
    rows = [f'"{f}",{random.choice("xyz")}' for f in files if random.random() < 0.97]
    text = "file,class\n" + "\n".join(rows)
    (root / "labels.csv").write_bytes(
        random.choice([text.encode(), text.encode()[:-3], b"\xff\xfe\0" + text.encode(), b'a,"b'])
    )


def test_random_folders_either_read_whole_or_say_why_not(tmp_path, monkeypatch):
    outcomes = []
    for seed in range(200):
        draw = random.Random(seed)
        name = f"set{seed}"
        _random_tree(tmp_path / name, draw)
        if draw.random() < 0.2:
            with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
                for path in (tmp_path / name).rglob("*"):
                    if path.is_file():
                        try:
                            archive.write(path, path.relative_to(tmp_path / name))
                        except UnicodeEncodeError:
                            continue
            name += ".zip"
        fields = {
            "folder": name,
            "bad": draw.choice(["fail", "skip", "skip"]),
            "labels": "labels.csv" if draw.random() < 0.2 else "",
            "size": draw.randint(1, 12),
            "fit": draw.choice(_decoding.FITS),
            "channels": draw.choice([1, 3]),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for split in ("train", "test"):
                    source = image_folder.load(split, **fields)
                    examples = source.get(np.arange(len(source)))
                    assert len(examples.images) == len(source) > 0
                    assert (examples.labels == source.labels).all()
                    assert source.labels.max() < source.info.num_classes
            except CnnlabError as error:
                outcomes.append(str(error).replace(name, "FOLDER"))
            else:
                outcomes.append("")
    # Both kinds of end, and the second for many reasons.
    assert outcomes.count("") > 30
    for reason in (
        "can't be read",
        "at least two classes",
        "no images",
        "none called train",
        "no test images",
        "lies in, which has no end",
        "data.labels",
        "no class folder",
    ):
        assert any(reason in message for message in outcomes), reason
    assert _streaming.cache_folder().is_dir()
