"""`models.create`: fields, errors, and the rule that models are built of our layers."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import pytest

import cnnlab.models
from cnnlab import models
from cnnlab.types import CnnlabError


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21' .did you mean 'resnet"),
        ("resnet20", {"dropuot": 0.1}, "no field 'dropuot' .did you mean 'dropout'.*Valid: act"),
        ("resnet20", {"depth": 21}, "6n \\+ 2, got 21; the nearest is 20"),
        ("resnet20", {"depth": 0}, "the nearest is 8"),
        ("wrn_28_10", {"depth": 26}, "6n \\+ 4 where widen.*nearest is (22|28)"),
        ("resnet20", {"shortcut": "C"}, "unknown shortcut 'C'.*Valid: 'A', 'B'"),
        ("resnet20", {"output_stride": 8}, "1, 2 or 4, got 8; the nearest is 4"),
        ("resnet20", {"zero_init": True, "preact": True}, "preact=False"),
        ("resnet20", {"width": 0}, "at least 1"),
        ("resnet20", {"norm": "bach"}, "unknown norm 'bach' .did you mean 'batch'"),
        ("resnet20", {"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ("resnet20", {"activation": "relo"}, "did you mean 'relu'"),
        ("resnet20", {"dropout": 1.0}, "dropout must be a rate in"),
        ("vgg16", {"pools": 6}, "0 to the number of stages, 5.*set pools=5"),
        ("vgg16", {"widths": (1, 2)}, "each of the 5 stages"),
        ("vgg16", {"stage_sizes": (2, 0)}, "at least 1"),
        ("vgg16", {"head": "orignal"}, "did you mean 'original'"),
        ("lenet5", {"widths": (6, 16)}, "4 numbers"),
        ("lenet5", {"pool": "avg"}, "unknown pool 'avg'"),
        ("simple_conv", {"widths": ()}, "not empty"),
        ("dilated_stack", {"dilations": (1, 0)}, "at least 1"),
        ("lenet5", {"aux": ("stage1", "stage1")}, "twice"),
        ("lenet5", {"num_outputs": 0}, "num_outputs must be at least 1"),
    ],
)
def test_bad_values_are_explained(name, fields, message):
    with pytest.raises(CnnlabError, match=message):
        models.create(name, **({"num_outputs": 10} | fields))


@pytest.mark.parametrize(
    ("name", "fields", "size", "message"),
    [
        ("vgg16", {}, 28, "at least 32x32, got 28x28; set pools=4"),
        ("lenet5", {"padding": 0}, 8, "does not fit"),
        ("resnet8", {"aux": ("stage4",)}, 32, "'stage4' .did you mean 'stage.*Valid: 'stem', 'st"),
    ],
)
def test_bad_shapes_are_explained(name, fields, size, message):
    module = models.create(name, num_outputs=10, **fields)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    with pytest.raises(CnnlabError, match=message):
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images)


def test_models_are_built_of_our_layers():
    """No model reaches past cnnlab.layers to lax or to Flax's own layers."""
    files = sorted(pathlib.Path(cnnlab.models.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        tree = ast.parse(file.read_text())
        imports = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for name in (node.module or "", *(f"{node.module}.{a.name}" for a in node.names))
        } | {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not {name for name in imports if name.startswith(("jax.lax", "jax.nn"))}, file
        attributes = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert "jax.lax" not in attributes, file
        flax_names = {name for name in attributes if name.startswith("nn.")}
        assert flax_names <= {"nn.Module", "nn.compact", "nn.remat"}, (file, flax_names)
