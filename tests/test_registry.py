"""Plug-ins found by file and name."""

import pytest

from cnnlab import registry
from cnnlab.types import CnnlabError


def test_every_folder_registers_what_its_files_define():
    assert {"lenet5", "resnet20", "vgg16_bn"} <= set(registry.plugins("models"))
    assert {"crop", "flip"} <= set(registry.plugins("augment"))
    sources = {"array_record", "digits", "fashion_mini", "fashion_mnist", "image_folder", "tfds"}
    assert sources == set(registry.plugins("data"))
    assert {"classification"} == set(registry.plugins("tasks"))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(CnnlabError, match=r"did you mean 'separable_stack12'.*\?\)\. "):
        registry.get("models", "separable_stack21")


def test_a_call_in_text_gives_all_parameters():
    call = registry.call("augment", "crop(padding=2)")
    assert (call.plugin.name, call.arguments) == ("crop", {"padding": 2, "fill": 0.0})
    assert registry.call("augment", "flip").arguments == {"probability": 0.5}
    assert registry.call("augment", "flip(probability=1)").arguments == {"probability": 1}


def test_floats_are_numbers_that_may_be_traced_and_the_rest_is_static():
    call = registry.call("augment", "crop(padding=2, fill=0.5, probability=0.3)")
    assert call.static == {"padding": 2, "fill": 1, "probability": 1}
    assert call.numbers == [0.5, 0.3]
    assert call.bound(iter([6.0, 7.0])) == {"padding": 2, "fill": 6.0, "probability": 7.0}
    # What is always applied has no probability.
    assert registry.call("augment", "crop").numbers == [0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop(", "expected a name with keyword arguments"),
        ("crop(3)", "expected a name with keyword arguments"),
        ("crop(padding=x)", "expected a name with keyword arguments"),
        ("crop(pading=3)", "did you mean 'padding'"),
        ("crop(padding='3')", "expected int, got '3'"),
        ("crop(padding=True)", "expected int, got True"),
        ("crop(padding=0)", "padding: expected a number of at least 1, got 0"),
        ("flip(probability=1.5)", "probability: expected a number of 0 to 1, got 1.5"),
        ("crop(probability=-1)", "probability: expected a number of 0 to 1, got -1"),
        ("crops", "did you mean 'crop'"),
        ("__import__('os')", "expected a name with keyword arguments"),
    ],
)
def test_a_call_that_does_not_fit_is_explained(text, message):
    with pytest.raises(CnnlabError, match=message.replace("(", r"\(")):
        registry.call("augment", text)
