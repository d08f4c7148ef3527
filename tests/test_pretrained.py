"""Published networks and their weights: the published function, and what happens to bad files."""

import builtins
import importlib.util
import json
import pickle
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cnnlab import describe, models, pretrained, registry, weights
from cnnlab.ops import conv_algorithms
from cnnlab.types import CnnlabError

FOLDER = Path(__file__).with_name("parity")
# Compiling takes longer than running here, and most of it is optimisation.
UNOPTIMISED = {"xla_backend_optimization_level": 0}

_spec = importlib.util.spec_from_file_location("parity_weights", FOLDER / "weights.py")
assert _spec is not None
parity_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity_weights)


def reference(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors_of(spec):
    shapes = spec["state_dict"].items()
    return {name: parity_weights.tensor(name, tuple(shape)) for name, shape in shapes}


def run(module, variables, images):
    """Logits and last feature map; compiled anew each time, for `conv` may lower otherwise."""

    def function(variables, images):
        outputs = module.apply(variables, images, train=False)
        return outputs.logits, list(outputs.features.values())[-1]

    return jax.jit(function).lower(variables, images).compile(UNOPTIMISED)(variables, images)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_a_published_network_is_the_published_function(name, monkeypatch):
    spec = reference(name)
    fields = spec["kwargs"]
    module = models.create(spec["model"], num_outputs=1000, **fields)
    images = parity_weights.images(tuple(spec["input_shape"]))
    images = (images - np.float32(spec["mean"])) / np.float32(spec["std"])
    summary = describe.describe(module, images.shape[1:])
    assert summary.parameters == spec["params"]
    assert summary.macs == spec["macs_per_image"]

    variables = pretrained.convert(spec["model"], tensors_of(spec), **fields)
    calls = []

    def native(*arguments, **settings):
        calls.append(arguments)
        return conv_algorithms.native(*arguments, **settings)

    for plain in (False, True):
        if plain:
            monkeypatch.setattr(conv_algorithms, "cpu", native)
        logits, last = (np.asarray(a, np.float64) for a in run(module, variables, images))
        norms = np.linalg.norm(logits, axis=-1)
        np.testing.assert_allclose(norms, spec["logits_l2"], rtol=1e-4)
        errors = np.abs(logits[:, :20] - spec["logits_first20"]).max(-1)
        assert (errors < 1e-4 * np.asarray(spec["logits_l2"])).all()
        assert logits.argmax(-1).tolist() == spec["logits_argmax"]
        batch, channels, height, width = spec["features_shape_nchw"]
        assert last.shape == (batch, height, width, channels)
        np.testing.assert_allclose(last.std(ddof=1), spec["features_std"], rtol=1e-4)
        assert abs(last.mean() - spec["features_mean"]) < 1e-4 * spec["features_std"]
    assert calls  # or the second round was the first once more


# A network small enough to write, read and initialise many times.
TINY = {"stage_sizes": (1, 1, 1, 1), "width": 8}


@pytest.fixture(scope="module")
def tiny():
    """Tensors and variables of a narrow ResNet."""
    wanted = pretrained.entries("resnet18", **TINY)
    tensors = {e.name: parity_weights.tensor(e.name, e.published_shape) for e in wanted}
    return tensors, pretrained.convert("resnet18", tensors, **TINY)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def write(path, tensors):
    """By the format's own library."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    safetensors.numpy.save_file(arrays, path)
    return path


@pytest.mark.parametrize("name", ["resnet26d", "seresnet18", "resnext50_32x4d", "mobilenetv2_110d"])
def test_other_members_of_a_family_name_each_array_once(name):
    found = pretrained.entries(name, num_outputs=11)
    names = [entry.name for entry in found]
    assert len(set(names)) == len(names)
    heads = [entry for entry in found if entry.path[-2] == pretrained.HEAD]
    assert {entry.published_shape[0] for entry in heads} == {11}


def test_what_is_written_is_read_back_to_the_bit(tiny, tmp_path):
    tensors, variables = tiny
    path = tmp_path / "folder" / "weights.safetensors"
    pretrained.export(path, "resnet18", variables, **TINY)
    assert same(pretrained.load("resnet18", path, **TINY), variables)
    # And by the format's own library, under the names of PyTorch.
    found = safetensors.numpy.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_a_failed_export_leaves_the_file_that_was_there(tiny, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(
        CnnlabError, match=r"61 of another shape: .*mean: expected \(16,\), got \(8,\)"
    ):
        pretrained.export(path, "resnet18", tiny[1], **{**TINY, "width": 16})
    assert path.read_bytes() == b"before"
    with pytest.raises(CnnlabError, match=r"ends in \.safetensors, got .*weights\.npz"):
        pretrained.export(tmp_path / "weights.npz", "resnet18", tiny[1], **TINY)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_dtypes_become_float32(dtype, tiny, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in tiny[0].items()}
    path = tmp_path / "weights.safetensors"
    weights.write_safetensors(path, tensors)
    loaded = pretrained.load("resnet18", path, **TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    expected = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    assert same(loaded, pretrained.convert("resnet18", expected, **TINY))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    # The format's own words for two numbers, 1 and -2.5, laid out by hand.
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + bytes([0x80, 0x3F, 0x20, 0xC0])
    path = tmp_path / "two.safetensors"
    path.write_bytes(content)
    assert weights.read(path)["x"].astype(np.float32).tolist() == [1.0, -2.5]


def test_another_number_of_classes_makes_a_new_head_and_nothing_else(tiny, tmp_path):
    path = write(tmp_path / "weights.safetensors", tiny[0])
    key = jax.random.key(7)
    small = pretrained.load("resnet18", path, num_outputs=7, key=key, **TINY)
    head = small["params"]["logits"]
    # LeCun et al.: variance 1 / fan-in, here of 448 draws.
    assert head["kernel"].shape == (64, 7)
    assert abs(head["kernel"].std() * 8 - 1) < 0.15
    assert same(head["bias"], np.zeros(7, np.float32))
    other = pretrained.load("resnet18", path, num_outputs=7, key=jax.random.key(8), **TINY)
    assert not np.array_equal(other["params"]["logits"]["kernel"], head["kernel"])
    assert same(small, pretrained.load("resnet18", path, num_outputs=7, key=key, **TINY))
    rest = [{**v["params"], "logits": None} for v in (small, tiny[1])]
    assert same(*rest)
    assert same(small["batch_stats"], tiny[1]["batch_stats"])
    # As many as the weights have need no key, and keep the head.
    assert same(pretrained.load("resnet18", path, num_outputs=1000, **TINY), tiny[1])
    with pytest.raises(CnnlabError, match=r"has 1000 classes; for 7 a new head.*needs a key"):
        pretrained.load("resnet18", path, num_outputs=7, **TINY)
    # What it makes can be written and read again as what it is.
    pretrained.export(tmp_path / "seven.safetensors", "resnet18", small, **TINY)
    assert same(pretrained.load("resnet18", tmp_path / "seven.safetensors", **TINY), small)
    assert pretrained.num_outputs(small) == 7


def test_one_input_channel_is_three_equal_ones_and_any_image_size_works(tiny, tmp_path):
    path = write(tmp_path / "weights.safetensors", tiny[0])
    one = pretrained.load("resnet18", path, input_channels=1, **TINY)
    assert pretrained.input_channels("resnet18", one, **TINY) == 1
    module = models.create("resnet18", num_outputs=1000, **TINY)
    grey = parity_weights.images((2, 57, 80, 1))
    expected, _ = run(module, tiny[1], np.repeat(grey, 3, axis=-1))
    logits, _ = run(module, one, grey)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.linalg.norm(expected))
    # Weights for one channel are taken as they are.
    pretrained.export(tmp_path / "grey.safetensors", "resnet18", one, **TINY)
    loaded = pretrained.load("resnet18", tmp_path / "grey.safetensors", input_channels=1, **TINY)
    assert same(loaded, one)
    with pytest.raises(CnnlabError, match=r"conv1.weight takes 3 input channels .* fitted to 4"):
        pretrained.load("resnet18", path, input_channels=4, **TINY)
    with pytest.raises(CnnlabError, match=r"conv1.weight: expected \(8, 3, 7, 7\), got \(8, 1"):
        pretrained.load("resnet18", tmp_path / "grey.safetensors", **TINY)


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


BAD_TENSORS = {
    # what is wrong: (what is done to the tensors, what the message must say)
    "missing": (without("layer2.0.bn1.bias"), r"1 missing: layer2\.0\.bn1\.bias \(16,\)$"),
    "extra": (lambda t: {**t, "gate": np.zeros(3, np.float32)}, r"1 left over: gate \(3,\)$"),
    "wrong shape": (
        lambda t: {**t, "bn1.weight": np.ones(9, np.float32)},
        r"1 of another shape: bn1\.weight: expected \(8,\), got \(9,\)$",
    ),
    "quantised": (
        lambda t: {**t, "bn1.weight": np.ones(8, np.int32)},
        r"1 not of floating point: bn1\.weight int32$",
    ),
    "another network's": (
        lambda t: {f"module.{n}": x for n, x in t.items()},
        r"62 missing: .*, and 50 more\n  62 left over: module\.bn1\.bias \(8,\), module\.bn1\.",
    ),
    "no head": (without("fc.weight"), r"1 missing: fc\.weight \(1000, 64\)"),
    "scalar head": (
        lambda t: {**t, "fc.bias": np.float32(1)[...]},
        r"fc\.bias: expected \(1000,\), got \(\)",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_weights_that_are_not_the_models_are_listed(case, tiny, tmp_path):
    change, message = BAD_TENSORS[case]
    path = write(tmp_path / "weights.safetensors", change(tiny[0]))
    with pytest.raises(CnnlabError, match=message) as raised:
        pretrained.load("resnet18", path, **TINY)
    assert str(raised.value).startswith(f"{path}: these are not the weights of 'resnet18'")


def test_counters_of_batches_are_no_weights(tiny, tmp_path):
    counted = {**tiny[0], "bn1.num_batches_tracked": np.array(7)}
    path = write(tmp_path / "weights.safetensors", counted)
    assert same(pretrained.load("resnet18", path, **TINY), tiny[1])


def test_a_network_without_published_weights_says_so(tiny, tmp_path):
    path = write(tmp_path / "weights.safetensors", tiny[0])
    for name, fields in (("lenet5", {}), ("preact_resnet18", {})):
        assert not pretrained.is_published(name)
        with pytest.raises(CnnlabError, match="no published weights are known for"):
            pretrained.load(name, path, **fields)
        with pytest.raises(CnnlabError, match="no repository of the hub is known for"):
            pretrained.repository(name)


def truncated(path, whole):
    path.write_bytes(whole[: len(whole) // 2])


def pickled(path, whole):
    path.write_bytes(pickle.dumps({"weight": [1.0] * 1000}))


def pointer(path, whole):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def eight_bit_floats(path, whole):
    header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"weights\.safetensors is cut off or damaged \(.*not fully covered"),
        (lambda path, whole: path.write_bytes(whole[:60]), r"is cut off or damaged"),
        (lambda path, whole: path.write_bytes(b""), r"is no safetensors file, and only 0 bytes"),
        (pickled, r"weights\.safetensors is no safetensors file$"),
        (pointer, r"is no safetensors file, and only 63 bytes long: fetch it again"),
        (eight_bit_floats, r"x has dtype F8_E4M3; expected one of F64, F32, F16, BF16"),
        (lambda path, whole: path.unlink(), r"cannot read the weights .*: No such file"),
        (lambda path, whole: (path.unlink(), path.mkdir()), r"cannot read .*: Is a directory"),
    ],
)
def test_a_file_that_is_no_safetensors_file_or_not_whole(damage, message, tiny, tmp_path):
    path = write(tmp_path / "weights.safetensors", tiny[0])
    damage(path, path.read_bytes())
    with pytest.raises(CnnlabError, match=message):
        pretrained.load("resnet18", path, **TINY)


def test_a_source_that_is_nothing():
    with pytest.raises(CnnlabError, match=r"no file nothing; weights come from a \.safetensors"):
        weights.read("nothing")


# The hub: its client is replaced, so nothing here touches a network.


@pytest.fixture
def hub():
    return pytest.importorskip("huggingface_hub")


def test_a_repository_of_the_hub_gives_its_file(hub, tiny, tmp_path, monkeypatch):
    path = write(tmp_path / "model.safetensors", tiny[0])
    asked = []

    def download(repository, filename, *, revision=None):
        asked.append((repository, filename, revision))
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert same(pretrained.load("resnet18", "timm/resnet18.a1_in1k", **TINY), tiny[1])
    weights.read("timm/resnet18.a1_in1k@0c1d2e")
    assert asked == [
        ("timm/resnet18.a1_in1k", "model.safetensors", None),
        ("timm/resnet18.a1_in1k", "model.safetensors", "0c1d2e"),
    ]
    assert pretrained.repository("resnet18") == "timm/resnet18.a1_in1k"


def failing(hub, kind):
    errors = hub.errors
    response = types.SimpleNamespace(headers={}, status_code=404, request=None, url="")
    return {
        "unreachable": errors.LocalEntryNotFoundError("no connection"),
        "offline": errors.LocalEntryNotFoundError("offline"),
        "no such repository": errors.RepositoryNotFoundError("404", response=response),
        "no such revision": errors.RevisionNotFoundError("404", response=response),
        "no such file": errors.EntryNotFoundError("404"),
        "broken off": ConnectionError("reset by peer"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unreachable", r"timm/net@v1: the hub can't be reached and it is not in the cache"),
        ("offline", r"timm/net@v1: HF_HUB_OFFLINE is set and it is not in the cache"),
        ("no such repository", r"the hub has no repository timm/net, or shows it only to"),
        ("no such revision", r"the repository timm/net has no revision 'v1'"),
        ("no such file", r"the repository timm/net@v1 has no file model\.safetensors"),
        ("broken off", r"the download failed \(ConnectionError: reset by peer\); the same"),
    ],
)
def test_a_hub_that_does_not_give_the_file(kind, message, hub, monkeypatch):
    def download(*arguments, **settings):
        raise failing(hub, kind)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", kind == "offline")
    with pytest.raises(CnnlabError, match=message):
        weights.read("timm/net@v1")


@pytest.mark.parametrize(
    ("package", "source"), [("huggingface_hub", "timm/resnet18.a1_in1k"), ("torch", "net.pth")]
)
def test_a_missing_extra_is_named(package, source, monkeypatch):
    imported = builtins.__import__

    def missing(name, *arguments, **settings):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return imported(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", missing)
    extra = {"huggingface_hub": "hub", "torch": "torch"}[package]
    with pytest.raises(CnnlabError, match=rf"pip install 'cnnlab\[{extra}\]'.*\.safetensors file"):
        weights.read(source)


# PyTorch's own files. The real package where it is installed, and a stand-in everywhere.


def stand_in(monkeypatch, result, version="2.6.0"):
    calls = []

    def load(path, **settings):
        calls.append(settings)
        return result

    class Tensor:
        def __init__(self, array):
            self.array = array

        def is_floating_point(self):
            return self.array.dtype.kind == "f"

        def float(self):
            return Tensor(self.array.astype(np.float32))

        def numpy(self):
            return self.array

    torch = types.SimpleNamespace(load=load, Tensor=Tensor, __version__=version)
    monkeypatch.setitem(__import__("sys").modules, "torch", torch)
    return torch, calls


def test_pytorch_files_are_read_as_weights_only(tiny, tmp_path, monkeypatch):
    wrapped = {}
    torch, calls = stand_in(monkeypatch, {"epoch": 3, "state_dict": wrapped})
    wrapped.update({name: torch.Tensor(t.astype(np.float64)) for name, t in tiny[0].items()})
    for suffix in (".pth", ".pt", ".bin"):
        path = tmp_path / f"net{suffix}"
        path.touch()
        assert same(pretrained.load("resnet18", path, **TINY), tiny[1])
    assert calls == [{"map_location": "cpu", "weights_only": True}] * 3
    stand_in(monkeypatch, {"epoch": 3})
    with pytest.raises(CnnlabError, match=r"net\.pth holds no state dict"):
        weights.read(tmp_path / "net.pth")
    with pytest.raises(CnnlabError, match=r"none\.pth: there is no such file"):
        weights.read(tmp_path / "none.pth")
    stand_in(monkeypatch, wrapped, version="2.5.1+cpu")
    with pytest.raises(CnnlabError, match=r"PyTorch 2\.5\.1\+cpu .*expected 2\.6 or newer"):
        weights.read(tmp_path / "net.pth")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_pytorch_file_is_run(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    path, fired = tmp_path / "net.pth", tmp_path / "fired"
    torch.save({"state_dict": {"weight": Bomb(fired)}}, path)
    with pytest.raises(CnnlabError, match=r"holds more than tensors, which is never unpickled"):
        weights.read(path)
    assert not fired.exists()
    tensors = {n: torch.tensor(t, dtype=torch.bfloat16) for n, t in tiny[0].items()}
    torch.save(tensors, path)
    expected = {n: t.astype(ml_dtypes.bfloat16) for n, t in tiny[0].items()}
    assert same(
        pretrained.load("resnet18", path, **TINY),
        pretrained.convert("resnet18", expected, **TINY),
    )
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CnnlabError, match=r"net\.pth is not whole"):
        weights.read(path)


def test_preprocessing_is_what_the_weights_expect():
    prepare = pretrained.preprocessing("resnet18")
    assert (prepare.size, prepare.interpolation) == (224, "bicubic")
    pixels = np.float32([0.485, 0.456, 0.406]).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(prepare.normalize(pixels), np.zeros((1, 1, 1, 3)), atol=1e-6)
    white = prepare.normalize(np.ones((1, 1, 1, 3), np.float32)).reshape(3)
    np.testing.assert_allclose(white, [2.2489, 2.4286, 2.64], rtol=1e-4)
    grey = prepare.normalize(np.full((1, 1, 1, 1), 0.449, np.float32))
    np.testing.assert_allclose(grey, np.zeros((1, 1, 1, 1)), atol=1e-6)
    lite = [pretrained.preprocessing(f"tf_efficientnet_lite{i}") for i in range(5)]
    assert [p.size for p in lite] == [224, 240, 260, 280, 300]
    assert {(p.mean, p.std) for p in lite} == {((0.5,) * 3, (0.5,) * 3)}
    known = registry.plugins("models")
    for name in pretrained.published_models():
        assert 200 <= pretrained.preprocessing(name).size <= 400
    for module in {plugin.module for plugin in known.values()}:
        assert set(getattr(module, "PUBLISHED", {})) <= set(known), module.__name__
