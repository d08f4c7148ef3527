"""A thousand configs drawn at random: each resolves, and its model builds, or its error is told."""

import itertools
import math
import random
import shlex

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from cnnlab import cli, config, models, registry
from cnnlab.types import CnnlabError

SECTIONS = tuple(config.FIELDS)
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**30, -(10**30), 0.0, -0.0, 0.5, 1e-300, 1e300,
    math.nan, math.inf, -math.inf, "", " ", "0", "-1", "1e999", "nan", "inf", "None", "true", "\0",
    "ä∞🦊", "a" * 3000, "((((", "[" * 300, "1/0", "8/255", "0/0", "1 epochs", "-1 epochs",
    "1e400 steps", "nan epochs", "1 fortnight", "steps", "__import__('os')", "flip",
    "crop(padding=4)", "crop(padding=1e300)",
    "crop(", "crop(4)", "flip()()", "crop(**{})", "flip(probability=nan)", "pgd(eps=0.1)", (), (1,),
    (0.5, 0.25), ("flip", "flip"), ("a", None), ((1, 2), (3,)), [], ["x"], {}, {"a": 1},
    {"name": "lenet5"}, b"bytes", 1j, object, lambda: 0, range(3), {1, 2},
)  # fmt: skip


def keys():
    """Every dotted key there is, and some that there are not."""
    known = [f"{section}.{name}" for section in SECTIONS for name in config.FIELDS[section]]
    return [
        *known,
        "seed",
        "model",
        "optim.learning_rat",
        "modle.width",
        "",
        ".",
        "model.",
        "a.b.c",
    ]


def value_for(draw, key, names):
    """A value that fits in half of the cases, and any odd one in the others."""
    section, _, name = key.partition(".")
    field = config.FIELDS.get(section, {}).get(name)
    if draw.random() < 0.5 or field is None:
        return draw.choice(ODD)
    if field.plugin:
        name = draw.choice(names[field.plugin])
        return (name,) if isinstance(field.default, tuple) else name
    if field.choices:
        return draw.choice(field.choices)
    if field.duration:
        return f"{draw.choice((1, 2.5, 1000, 1e9))} {draw.choice(config.UNITS)}"
    kind = type(field.default)
    if kind is bool:
        return draw.random() < 0.5
    low, high = max(field.low, 0), min(field.high, draw.choice((1, 10, 1e6)))
    if kind is int:
        return draw.randint(int(low), int(max(low, high)))
    if kind is float:
        return draw.uniform(low, max(low, high))
    return draw.choice((field.default, draw.choice(ODD)))


def drawn(seed, names):
    """Changes of a base config: dotted key -> value."""
    draw = random.Random(seed)
    changes = {}
    if draw.random() < 0.8:
        changes["model.name"] = draw.choice(names["models"])
        parameters = registry.get("models", changes["model.name"]).parameters
        for name in draw.sample(list(parameters), draw.randint(0, min(2, len(parameters)))):
            default = parameters[name]
            near = [default, draw.choice(ODD)]
            if isinstance(default, int | float) and not isinstance(default, bool):
                near += [default + 1, default * 2, default // 2, -default]
            if isinstance(default, tuple):
                near += [default[:-1], default * 2, tuple(reversed(default))]
            changes[f"model.{name}"] = draw.choice(near)
    if draw.random() < 0.3:
        changes["data.name"] = draw.choice(names["data"])
    for key in draw.sample(keys(), draw.randint(0, 4)):
        changes[key] = value_for(draw, key, names)
    return changes


@pytest.fixture(scope="module")
def names():
    return {folder: list(registry.plugins(folder)) for folder in registry.FUNCTIONS}


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


BASE = config.base()


def resolved(changes):
    """The config with these changes, or `None` after an error that is told."""
    try:
        return config.resolve(config.override(BASE, changes, "fuzz"), "fuzz")
    except CnnlabError:
        return None


def test_a_thousand_configs_resolve_or_say_why_not(names):
    outcomes = {True: 0, False: 0}
    for seed in range(1000):
        changes = drawn(seed, names)
        try:
            made = resolved(changes)
            if made is not None and seed % 10 == 0:
                again = config.resolve(config.from_plain(config.plain(made)), "saved")
                assert config.identity(again) == config.identity(made)
                assert config.program(again) == config.program(made)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {changes!r}: {error!r}") from error
        outcomes[made is not None] += 1
    assert min(outcomes.values()) > 150  # the fuzz is neither all nonsense nor all tame


def test_models_of_fuzzed_configs_build_or_say_why_not(names):
    """Shapes alone; those of at most a few layers, so that a thousand draws stay cheap."""
    small = [name for name in names["models"] if name.startswith(("lenet", "simple", "vgg_small"))]
    small += [
        n
        for n in ("resnet8", "resnet20", "squeezenet1_1", "separable_stack12")
        if n in names["models"]
    ]
    built = told = 0
    for seed in range(60):
        changes = drawn(seed, {**names, "models": small})
        changes = {key: value for key, value in changes.items() if key.startswith("model.")}
        made = resolved(changes)
        if made is None:
            continue
        size = random.Random(seed).choice((8, 28, 32))
        image = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        fields = {key: value for key, value in made.model.items() if key != "name"}

        def init(rngs, images, name=made.model.name, fields=fields):
            return models.create(name, num_outputs=10, **fields).init(rngs, images, train=True)

        try:
            jax.eval_shape(init, rngs, image)
            built += 1
        except CnnlabError:
            told += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {size} pixels: {changes!r}: {error!r}") from error
    assert built > 8
    assert told > 0


def test_configs_of_strange_shapes_are_told():
    """What a config file may return, or a saved `config.json` may hold."""
    for value in (*ODD, ConfigDict(), ConfigDict({"model": 3}), ConfigDict({"model": {"name": 3}})):
        with pytest.raises(CnnlabError):
            config.resolve(value, "fuzz")
    for section, odd in itertools.product(SECTIONS, (None, 3, "x", (), {"name": {}})):
        made = config.base().to_dict() | {section: odd}
        with pytest.raises(CnnlabError):
            config.resolve(ConfigDict(made), "fuzz")


WORDS = (
    "--config", "--config=", "configs/tiny.py", "nothing.py", "--config.seed", "--config.seed=",
    "--config.seed=x",
    "--config.=1", "--config..=1", "--config.model.name=ä", "--config.model.width", "=", "--",
    "--runs", "--traceback=1", "--seeds", "0-", "-1", "--rows", "--together", "x", "1e9", "--eps",
    "nan", "--json", "", "\udcff", "🦊", "--config.optim.learning_rate=nan", "--dry-run",
    "--images",
)  # fmt: skip
COMMANDS = ("train", "table", "eval", "attack", "certify", "show", "describe", "list")


def test_command_lines_are_understood_or_refused(capsys):
    """None names a file that exists, so that none may do anything."""
    for seed in range(200):
        draw = random.Random(seed)
        words = [draw.choice(COMMANDS), *draw.choices(WORDS, k=draw.randint(0, 5))]
        words = [word for word in words if word not in ("--traceback=1",)]
        try:
            code = cli.main(words)
        except SystemExit as left:  # argparse's own refusal
            code = left.code
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)!r}: {error!r}") from error
        said = capsys.readouterr().err
        assert code in (0, 2), f"{words}: {code}: {said}"
        assert "unexpected" not in said, f"{words}: {said}"
