"""A network with its weights as one file of `jax.export`."""

import json
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnnlab import cli, exporting, models, pretrained
from cnnlab.types import CnnlabError

FIELDS = {"stage_sizes": (1, 1, 1, 1), "width": 8}
WORDS = ["--model", "resnet18", "--model.stage_sizes=1,1,1,1", "--model.width=8"]


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    tensors = {
        e.name: rng.uniform(0.5, 1.5, e.published_shape)
        if e.name.endswith("running_var")
        else rng.normal(size=e.published_shape) / np.sqrt(max(1, np.prod(e.published_shape[1:])))
        for e in pretrained.entries("resnet18", **FIELDS)
    }
    return pretrained.convert("resnet18", tensors, **FIELDS)


@pytest.fixture(scope="module")
def program(variables):
    return exporting.make("resnet18", variables, size=(40, 32), **FIELDS)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).random((3, 40, 32, 3), np.float32)


def test_a_file_gives_the_same_bits_for_any_batch(variables, program, images, tmp_path):
    path = tmp_path / "folder" / "net.jaxexport"
    exporting.save(path, program)
    loaded = exporting.load(path)
    assert (loaded.name, loaded.input_shape, loaded.num_outputs) == ("resnet18", (40, 32, 3), 1000)
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    logits = np.asarray(program(images))
    np.testing.assert_array_equal(loaded(images), logits)

    # The published function: normalised by ImageNet's moments, here in float64, then the network.
    moments = np.float64([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    normal = ((images - moments[0]) / moments[1]).astype(np.float32)
    module = models.create("resnet18", num_outputs=1000, **FIELDS)
    expected = jax.jit(lambda v, x: module.apply(v, x, train=False).logits)(variables, normal)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.linalg.norm(expected))

    # One image alone, and by JAX without a line of this project.
    one = jax.export.deserialize(bytearray(path.read_bytes())).call(jnp.asarray(images[:1]))
    np.testing.assert_allclose(one, logits[:1], atol=1e-5 * np.linalg.norm(logits))


def test_each_platform_gets_its_own_convolutions(program):
    text = program.exported.mlir_module()
    assert program.exported.nr_devices == 1
    assert "stablehlo.convolution" in text
    assert "platform_index" in text


def test_what_does_not_fit_is_told(variables, program, images, tmp_path):
    with pytest.raises(CnnlabError, match=r"exported for images \[B, 40, 32, 3\], got \(3, 32"):
        program(images[:, :32])
    with pytest.raises(CnnlabError, match=r"unknown platform 'gpu'.*Valid: cpu, cuda, rocm, tpu"):
        exporting.make("resnet18", variables, platforms=("gpu",), **FIELDS)
    elsewhere = exporting.make("resnet18", variables, size=32, platforms=("tpu",), **FIELDS)
    with pytest.raises(CnnlabError, match=r"exported for tpu; this is cpu: .*--platforms cpu"):
        elsewhere(np.zeros((1, 32, 32, 3), np.float32))


def test_a_file_that_is_no_program(program, tmp_path):
    path = tmp_path / "net.jaxexport"
    whole = bytes(program.exported.serialize())
    for content in (b"", whole[:50], whole[: len(whole) // 2], b"\0" * 500, b"text" * 200):
        path.write_bytes(content)
        with pytest.raises(CnnlabError, match=r"net\.jaxexport is cut off, or is no program of"):
            exporting.load(path)
    other = jax.export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((3,), jnp.float32))
    path.write_bytes(other.serialize())
    with pytest.raises(CnnlabError, match="no program from images"):
        exporting.load(path)
    with pytest.raises(CnnlabError, match=r"cannot read the program .*none: No such file"):
        exporting.load(tmp_path / "none")


def test_the_commands_export_and_predict(variables, tmp_path, capsys):
    weights, output, photo = (tmp_path / name for name in ("w.safetensors", "net", "photo.png"))
    pretrained.export(weights, "resnet18", variables, **FIELDS)
    pixels = np.random.default_rng(2).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(photo)
    filled = [*WORDS, "--weights", str(weights), "--size", "32"]
    export = ["export", *filled, "--output", str(output), "--platforms", "cpu"]
    assert cli.main(export) == 0
    said = capsys.readouterr().out
    assert re.search(r"images \[B, 32, 32, 3\] in \[0, 1\] to 1000 logits, for cpu$", said.strip())
    found = []
    for words in (filled, ["--exported", str(output)]):
        assert cli.main(["predict", str(photo), *words, "--top", "3", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["top"])
    by_weights, by_program = found
    assert [e["index"] for e in by_weights] == [e["index"] for e in by_program]
    probabilities = [[entry["probability"] for entry in top] for top in found]
    np.testing.assert_allclose(*probabilities, rtol=1e-4)
    assert len(by_weights) == 3
