"""The base config: overrides, checks, identity and what shares a compilation."""

import json

import pytest
from ml_collections import ConfigDict

from cnnlab import config
from cnnlab.types import CnnlabError


def resolved(**changes):
    return config.resolve(
        config.override(config.base(), {k.replace("__", "."): v for k, v in changes.items()}, "t"),
        "t",
    )


def test_every_default_is_in_its_own_range():
    config.resolve(config.base(), "base")
    for section, fields in config.FIELDS.items():
        for name, field in fields.items():
            assert field.help, f"{section}.{name} has no help"


def test_the_fields_of_the_chosen_plugins_are_settings_with_their_defaults():
    made = config.base(model="vgg_small")
    assert made.model.width == 16
    assert tuple(made.model.stage_sizes) == (2, 2, 2)
    with pytest.raises(AttributeError):
        made.model.depth = 20


def test_another_model_brings_its_own_fields_whatever_the_order():
    made = config.override(
        config.base(model="vgg_small"),
        {"model.width": "8", "model.name": "resnet8", "model.aux": ("stage1",)},
        "t",
    )
    assert (made.model.width, made.model.depth, tuple(made.model.aux)) == (8, 8, ("stage1",))
    assert "stage_sizes" not in made.model


def test_override_leaves_its_argument_alone():
    before = config.base()
    text = config.identity(before)
    config.override(before, {"optim.learning_rate": 0.5}, "t")
    assert config.identity(before) == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("train.batch_size", "64", 64),
        ("optim.nesterov", "true", True),
        ("optim.nesterov", "False", False),
        ("model.aux", "stage1,stage2", ("stage1", "stage2")),
        ("model.aux", "('stage1',)", ("stage1",)),
        ("model.aux", "", ()),
        ("task.aux_weight", "0.5", (0.5,)),
        ("task.aux_weight", "0.5,0.25", (0.5, 0.25)),
        ("augment.transforms", "crop(padding=2),flip", ("crop(padding=2)", "flip")),
        ("train.duration", "500 steps", "500 steps"),
    ],
)
def test_text_is_read_as_the_settings_type(key, text, value):
    section, name = key.split(".")
    got = config.override(config.base(), {key: text}, "t")[section][name]
    assert got == value
    assert type(got) is type(value)


def test_the_resolved_config_survives_json_with_its_identity():
    made = resolved(**{"model.name": "vgg_small", "model.aux": ("stage1",), "seed": 3})
    again = config.from_plain(json.loads(json.dumps(config.plain(made))))
    assert config.identity(config.resolve(again, "t")) == config.identity(made)


def test_identity_changes_with_every_setting():
    base = resolved()
    for changes in ({"seed": 1}, {"optim.learning_rate": 0.2}, {"train.patience": 3}):
        assert config.identity(resolved(**changes)) != config.identity(base)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"optim.learning_rate": 0.7, "optim.weight_decay": 1e-3},
        {"task.label_smoothing": 0.1},
        {"train.duration": "3 steps", "optim.warmup": "1 steps"},
        {"train.keep": "best", "data.validation": 0.2},
    ],
)
def test_runs_that_differ_in_numbers_share_a_program(changes):
    assert config.program(resolved(**changes)) == config.program(resolved())


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.name": "adam"},
        {"optim.clip_norm": 1.0},
        {"optim.ema_decay": 0.9},
        {"optim.milestones": (0.5,)},
        {"model.name": "lenet5"},
        {"model.dtype": "bfloat16"},
        {"train.batch_size": 64},
        {"task.aux_schedule": "linear"},
        {"augment.transforms": ("flip",)},
        {"parallel.devices": 2},
    ],
)
def test_runs_that_differ_in_structure_do_not(changes):
    assert config.program(resolved(**changes)) != config.program(resolved())


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10 epochs", 704),  # 10 x 9,000 / 128 = 703.1
        ("1 epoch", 71),
        ("0.5 epochs", 36),
        ("17 steps", 17),
        ("1 step", 1),
        ("1e4 examples", 79),
        ("128 examples", 1),
    ],
)
def test_durations_round_up_to_steps(text, steps):
    assert config.Duration.parse(text).steps(batch_size=128, examples=9000) == steps


def test_a_tenth_of_an_epoch_is_not_a_step_too_many():
    assert config.Duration.parse("0.1 epochs").steps(batch_size=100, examples=1000) == 1


@pytest.mark.parametrize("text", ["", "10", "ten epochs", "10 batches", "inf epochs", "nan steps"])
def test_durations_need_a_count_and_one_unit(text):
    with pytest.raises(ValueError, match="one unit"):
        config.Duration.parse(text)


def test_assignments_in_a_file_are_checked_too():
    made = config.base()
    made.optim.learning_rate = -1.0
    with pytest.raises(CnnlabError, match=r"my\.py: optim\.learning_rate: .*at least 0.*-1"):
        config.resolve(made, "my.py")


def test_a_config_that_lacks_a_section_is_refused():
    with pytest.raises(CnnlabError, match="'data' is missing"):
        config.resolve(ConfigDict({"optim": {}}), "my.py")


def test_naming_the_same_model_again_keeps_its_settings():
    made = config.base(model={"name": "vgg_small", "norm": "none"})
    again = config.override(made, {"model.name": "vgg_small", "model.pools": 1}, "t")
    assert (again.model.norm, again.model.pools) == ("none", 1)
