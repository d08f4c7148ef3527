"""The base config: every setting with its default, range and meaning, each of them once.

A config is an `ml_collections.ConfigDict` with the sections of `FIELDS` and a `seed`. The sections
`model` and `data` also take the keyword arguments of the chosen plug-in, whose defaults stand in
its signature. `resolve` fills those in and checks everything; the resolved config is saved with
each run and its hash is the run's identity.

Every setting has a role. `static` ones shape the compiled program. `traced` ones are numbers that
the program takes as arguments (`types.Hyper`). `host` ones only steer the loop around it. Runs that
differ in traced and host settings and in the seed share one compilation (`program`).
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from cnnlab import registry
from cnnlab.registry import did_you_mean
from cnnlab.types import CnnlabError

Role = Literal["static", "traced", "host"]


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        default: its value where nothing else is said; its type is the setting's type.
        help: one line on what it does, with its unit.
        role: see the module's docstring.
        low: the least value allowed (of each element, for a tuple).
        high: the greatest value allowed.
        above: the value must be greater than this.
        choices: the only values allowed.
        plugin: the registry folder whose names are allowed.
        duration: whether it is a duration such as `"10 epochs"`.
        element: the type of each element of a tuple.
        scalar: whether a tuple may also be given as a single number.
        neutral: the default does what runs did before there was the setting; saved configs and
            identities leave it out then, so that earlier runs stay what they are.
    """

    default: Any
    help: str
    role: Role = "static"
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    choices: tuple[str, ...] = ()
    plugin: str = ""
    duration: bool = False
    element: type = str
    scalar: bool = False
    neutral: bool = False


FIELDS: dict[str, dict[str, Field]] = {
    "data": {
        "name": Field("fashion_mini", "the data set", plugin="data"),
        "validation": Field(
            0.1, "part of the training set held out, drawn by seed", "host", low=0.0, high=0.5
        ),
    },
    "model": {
        "name": Field("lenet5_modern", "the network", plugin="models"),
        "aux": Field((), "features that get an auxiliary head while training"),
        "aux_hidden": Field(0, "units of a hidden layer in each of these heads; 0: none", low=0),
    },
    "task": {
        "name": Field("classification", "what is trained and scored for", plugin="tasks"),
        "label_smoothing": Field(
            0.0, "probability spread evenly over all classes", "traced", low=0.0, high=0.9
        ),
        "consistency": Field(
            0.0,
            "weight of AugMix's consistency loss (12 in the paper), for which `augmix` must be "
            "the last transform; 0: none",
            "traced",
            low=0.0,
            neutral=True,
        ),
        "aux_weight": Field(
            (0.3,),
            "weight of the auxiliary losses: one for all heads, or one a head",
            "traced",
            low=0.0,
            element=float,
            scalar=True,
        ),
        "aux_schedule": Field(
            "constant",
            "how these weights go from their value to zero over the run",
            choices=("constant", "linear", "cosine"),
        ),
    },
    "augment": {
        "transforms": Field(
            (),
            'applied to training images, in this order, as in ("crop(padding=4)", "flip")',
            "traced",  # the floats among the arguments; the rest shapes the program
            plugin="augment",
        ),
        "repeats": Field(
            1,
            "how often an image comes in a row, each time transformed anew",
            "host",
            low=1,
            neutral=True,
        ),
    },
    "defence": {
        "name": Field(
            "none",
            "adversarial training, see cnnlab.training.defence",
            choices=("none", "pgd_at", "trades", "mart", "fast", "free"),
            neutral=True,
        ),
        "eps": Field(
            8 / 255, "radius of the ball around each image", "traced", low=0.0, neutral=True
        ),
        "norm": Field("linf", "of the ball", choices=("linf", "l2", "l1"), neutral=True),
        "steps": Field(10, "of the attack; fast and free make one", low=1, neutral=True),
        "relative_step": Field(
            0.0,
            "length of the attack's steps together, in units of eps; 0: 2.5, of fast 1.25, of "
            "free 1",
            "traced",
            low=0.0,
            neutral=True,
        ),
        "beta": Field(
            6.0, "weight of the robust term of trades and mart", "traced", low=0.0, neutral=True
        ),
        "replays": Field(8, "of free: updates in a row on the same batch", low=1, neutral=True),
        "awp": Field(
            0.0,
            "adversarial weight perturbation: its size relative to each kernel's norm (0.005 in "
            "the paper); 0: none",
            "traced",
            low=0.0,
            neutral=True,
        ),
    },
    "optim": {
        "name": Field("sgd", "the optimizer", choices=("sgd", "adam", "adamw", "lamb", "lion")),
        "learning_rate": Field(0.1, "peak learning rate", "traced", low=0.0),
        "momentum": Field(0.9, "of sgd", "traced", low=0.0, high=1.0),
        "nesterov": Field(False, "whether sgd's momentum is Nesterov's"),
        "beta1": Field(0.9, "decay of the first moment", "traced", low=0.0, high=1.0),
        "beta2": Field(0.999, "decay of the second moment", "traced", low=0.0, high=1.0),
        "epsilon": Field(1e-8, "added to the denominator of adam, adamw, lamb", "traced", low=0.0),
        "weight_decay": Field(
            0.0,
            "of kernels, not of norms and biases: added to the gradient (sgd, adam) or decoupled "
            "and scaled by the learning rate (adamw, lamb, lion)",
            "traced",
            low=0.0,
        ),
        "clip_norm": Field(
            0.0, "largest global norm of the gradient; 0: no limit", "traced", low=0.0
        ),
        "schedule": Field(
            "cosine",
            "of the learning rate after warm-up",
            choices=("constant", "step", "cosine", "one_cycle", "wsd"),
        ),
        "warmup": Field(
            "0 epochs", "linear rise from 0 before the schedule", "traced", duration=True, low=0.0
        ),
        "milestones": Field(
            (0.5, 0.75),
            "of schedule step: where the rate is multiplied by `factor`, as parts of the run",
            "traced",
            element=float,
            low=0.0,
            high=1.0,
        ),
        "factor": Field(0.1, "of schedule step", "traced", low=0.0, high=1.0),
        "final": Field(
            0.0,
            "of cosine, one_cycle, wsd: the last rate as a part of the peak",
            "traced",
            low=0.0,
            high=1.0,
        ),
        "rise": Field(0.3, "of one_cycle: part of the run that rises", "traced", low=0.0, high=1.0),
        "initial": Field(
            0.04, "of one_cycle: the first rate as a part of the peak", "traced", low=0.0, high=1.0
        ),
        "decay": Field(
            0.2, "of wsd: part of the run after warm-up that decays", "traced", low=0.0, high=1.0
        ),
        "ema_decay": Field(
            0.0,
            "of the average of parameters and batch statistics that is scored; 0: none",
            "traced",
            low=0.0,
            high=0.999999,
        ),
    },
    "train": {
        "duration": Field("10 epochs", "how long to train", "host", duration=True, above=0.0),
        "batch_size": Field(128, "examples a step, over all devices", low=1),
        "accumulate": Field(
            1,
            "pieces that a batch is worked through in, one after another, to save memory: the "
            "gradient is that of the whole, but batch statistics are each piece's",
            low=1,
            neutral=True,
        ),
        "sub_batches": Field(
            1,
            "equal parts of a batch (or of a piece of it) that are normalised each by its own "
            "statistics, as so many devices without synchronised statistics do",
            low=1,
            neutral=True,
        ),
        "log_every": Field(
            "1 epochs", "between rows of training metrics", "host", duration=True, above=0.0
        ),
        "eval_every": Field(
            "1 epochs", "between scores of the validation split", "host", duration=True, above=0.0
        ),
        "checkpoint_every": Field(
            "1 epochs", "between checkpoints", "host", duration=True, above=0.0
        ),
        "monitor": Field(
            "top1",
            "the validation metric that early stopping and `keep` watch",
            "host",
            choices=("top1", "nll", "robust"),
        ),
        "patience": Field(
            0, "stop after so many evaluations without a better one; 0: never", "host", low=0
        ),
        "keep": Field(
            "last", "the parameters that are scored at the end", "host", choices=("last", "best")
        ),
    },
    "eval": {
        "batch_size": Field(512, "examples a step of scoring, over all devices", low=1),
        "attack": Field(
            "",
            "on the validation split at each evaluation, as in 'pgd(eps=0.1, steps=10)'; gives "
            "the metric `robust`",
            neutral=True,
        ),
        "calibration_bins": Field(15, "of the expected calibration error", "host", low=1),
    },
    "parallel": {
        "devices": Field(1, "how many devices share a batch; 0: all there are", low=0),
        "state": Field(
            "replicated",
            "where parameters, averages and the optimizer's numbers are: whole on each device, or "
            "in parts, which takes less memory and more traffic",
            choices=("replicated", "sharded"),
            neutral=True,
        ),
    },
}

SEED = Field(0, "every random draw of the run follows from it", "host", low=0, high=2**31 - 1)

SWITCHES = ("optim.clip_norm", "optim.ema_decay", "task.consistency", "defence.awp")
"""Traced numbers that are not used at 0, so that being above it shapes the program."""

UNITS = ("steps", "epochs", "examples")


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training: a count of exactly one unit (`steps`, `epochs` or `examples`)."""

    count: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Reads `"10 epochs"`, `"1 epoch"`, `"500 steps"`, `"1e6 examples"`.

        Raises:
            ValueError: it is none of these.
        """
        count, _, unit = str(text).strip().partition(" ")
        unit = unit.strip()
        unit = unit if unit.endswith("s") else unit + "s"
        try:
            number = float(count)
        except ValueError:
            number = math.nan
        if unit not in UNITS or not math.isfinite(number):
            raise ValueError(
                "a count and one unit of steps, epochs or examples, such as '10 epochs'"
            )
        return cls(number, unit)

    def steps(self, *, batch_size: int, examples: int) -> int:
        """This many updates, rounded up.

        Args:
            batch_size: examples a step.
            examples: examples an epoch.
        """
        seen = {"steps": batch_size, "epochs": examples, "examples": 1}[self.unit] * self.count
        # Ten digits: 0.1 epochs of 1,000 examples is 100 examples, not 100.00000000000001.
        return math.ceil(round(seen / batch_size, 10))


def base(
    *, model: str | Mapping[str, Any] = "", data: str | Mapping[str, Any] = "", **sections: Any
) -> ConfigDict:
    """A locked config with every default, the fields of the chosen plug-ins included.

    Args:
        model: name of the network, or its whole section as below; the default where empty.
        data: name of the data set, likewise.
        **sections: settings by section, as in `optim={"learning_rate": 0.3}`, and `seed`.

    Raises:
        CnnlabError: a name is unknown or a value does not fit.
    """
    config = ConfigDict(
        {s: {k: f.default for k, f in fields.items()} for s, fields in FIELDS.items()}
    )
    config.seed = SEED.default
    config.lock()
    changes: dict[str, Any] = {}
    for section, settings in (("model", model), ("data", data)):
        if settings:
            sections[section] = {"name": settings} if isinstance(settings, str) else settings
    for section, settings in sections.items():
        if isinstance(settings, Mapping):
            changes |= {f"{section}.{key}": value for key, value in settings.items()}
        else:
            changes[section] = settings
    _fill_plugin_fields(config)
    return override(config, changes, where="config.base()")


def override(config: ConfigDict, changes: Mapping[str, Any], where: str) -> ConfigDict:
    """A copy with settings changed; strings are read as the setting's type.

    A new `model.name` or `data.name` first replaces that plug-in's own fields by the defaults of
    the new one, whatever the order of `changes`.

    Args:
        config: the config to start from; stays as it is.
        changes: dotted key (`optim.learning_rate`) -> value.
        where: what to name in an error: the file and the row, or the command line.

    Raises:
        CnnlabError: an unknown key, a wrong type or a value out of range.
    """
    config = ConfigDict(config.to_dict())
    for key in sorted(changes, key=lambda k: k not in ("model.name", "data.name")):
        field = _field(config, key, where)
        value = _checked(field, changes[key], key, where)
        section, _, name = key.partition(".")
        if not name:
            config[section] = value
            continue
        another = field.plugin and name == "name" and value != config[section].name
        with config.ignore_type():
            config[section][name] = value
        if another:
            _fill_plugin_fields(config, section)
    config.lock()
    return config


def resolve(config: ConfigDict, where: str) -> ConfigDict:
    """Checks every setting of a config that a file may have changed by assignment.

    Raises:
        CnnlabError: a key or section is unknown or missing, a type is wrong, a value out of range,
            or two settings contradict each other.
    """
    if not isinstance(config, ConfigDict):
        raise CnnlabError(
            f"{where}: expected an ml_collections.ConfigDict made by cnnlab.config.base(), "
            f"got {type(config).__name__}"
        )
    flat = flatten(config)
    for section, fields in FIELDS.items():
        # Configs of runs made before there was a section lack it.
        if section not in config and not all(field.neutral for field in fields.values()):
            raise CnnlabError(
                f"{where}: the section {section!r} is missing; start from cnnlab.config.base()"
            )
    resolved = base(
        model=_checked(FIELDS["model"]["name"], flat.pop("model.name", None), "model.name", where),
        data=_checked(FIELDS["data"]["name"], flat.pop("data.name", None), "data.name", where),
    )
    resolved = override(resolved, flat, where)
    heads, weights = auxiliary_heads(resolved), resolved.task.aux_weight
    if len(weights) not in (1, len(heads)):
        raise CnnlabError(
            f"{where}: task.aux_weight: expected one weight, or one for each of the "
            f"{len(heads)} auxiliary heads {heads}, got {tuple(weights)}"
        )
    calls = [registry.call("augment", text) for text in resolved.augment.transforms]
    if resolved.task.consistency > 0 and [c.plugin.name for c in calls[-1:]] != ["augmix"]:
        raise CnnlabError(
            f"{where}: task.consistency compares two draws of augmix, so expected it as the last "
            f"of augment.transforms, got {tuple(resolved.augment.transforms)}"
        )
    _check_defence(resolved, where)
    if resolved.optim.schedule == "one_cycle" and parse_duration(resolved, "optim.warmup").count:
        raise CnnlabError(
            f"{where}: optim.warmup: schedule one_cycle has a rise of its own (optim.rise), so "
            f"expected '0 epochs', got {resolved.optim.warmup!r}"
        )
    if list(resolved.optim.milestones) != sorted(resolved.optim.milestones):
        raise CnnlabError(
            f"{where}: optim.milestones: expected ascending parts of the run, got "
            f"{tuple(resolved.optim.milestones)}"
        )
    if resolved.train.monitor == "robust" and not resolved.eval.attack:
        raise CnnlabError(
            f"{where}: train.monitor='robust' needs an attack, such as "
            "eval.attack='pgd(eps=0.1, steps=10)'"
        )
    if resolved.data.validation == 0 and (
        resolved.train.patience > 0 or resolved.train.keep == "best"
    ):
        raise CnnlabError(
            f"{where}: train.patience and train.keep='best' need a validation split, but "
            "data.validation is 0; the test split never selects anything"
        )
    return resolved


def _check_defence(config: ConfigDict, where: str) -> None:
    """Refuses what a defence does not go together with."""
    name = config.defence.name
    if name != "none" and config.task.consistency > 0:
        raise CnnlabError(
            f"{where}: defence.name={name!r} and task.consistency both replace the images of a "
            "step; set one of them to none or 0"
        )
    if name == "free" and (config.defence.norm != "linf" or config.defence.awp > 0):
        raise CnnlabError(
            f"{where}: defence.name='free' expects defence.norm='linf' and defence.awp=0, got "
            f"{config.defence.norm!r} and {config.defence.awp:g}"
        )
    if name == "mart" and (config.task.label_smoothing > 0 or auxiliary_heads(config)):
        raise CnnlabError(
            f"{where}: defence.name='mart' has a loss of its own, for hard labels and one head: "
            "expected task.label_smoothing=0 and no auxiliary heads, got "
            f"{config.task.label_smoothing:g} and {auxiliary_heads(config)}"
        )


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, over all sections and `seed`; tuples stay whole."""
    flat: dict[str, Any] = {}
    for section, settings in config.items():
        if isinstance(settings, Mapping | ConfigDict):
            flat |= {f"{section}.{key}": value for key, value in settings.items()}
        else:
            flat[section] = settings
    return flat


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of JSON values: what `config.json` holds."""
    nested = _nested(config)
    for section, fields in FIELDS.items():
        for name, field in fields.items():
            if field.neutral and nested.get(section, {}).get(name) == field.default:
                del nested[section][name]
        if not nested.get(section, True):
            del nested[section]
    return typing.cast(dict[str, Any], json.loads(json.dumps(nested, sort_keys=True)))


def from_plain(nested: Mapping[str, Any]) -> ConfigDict:
    """The config that `plain` was made from; lists become tuples again."""
    return ConfigDict(
        {
            k: {n: tuple(v) if isinstance(v, list) else v for n, v in s.items()}
            if isinstance(s, Mapping)
            else s
            for k, s in nested.items()
        }
    )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], now: str) -> str:
    """The settings in which two plain configs differ, as text; empty where they agree.

    Args:
        theirs: the config found there.
        ours: the config at hand, called `now` in the text (`"here"`, `"now"`).
        now: see `ours`.
    """
    there, here = flatten(theirs), flatten(ours)
    return ", ".join(
        f"{key} ({there.get(key, 'absent')!r} there, {here.get(key, 'absent')!r} {now})"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    )


def identity(config: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits that two configs share only if they agree in every setting."""
    return _hash(plain(config))


def program(config: ConfigDict) -> str:
    """What the compiled program depends on, as canonical JSON.

    Runs with equal strings share one compilation. Traced numbers are left out, but whether clipping
    and averaging happen at all, and how many numbers a tuple has, shape the program.
    """
    static: dict[str, Any] = {}
    for key, value in flatten(config).items():
        field = SEED if key == "seed" else _field(config, key, "program")
        if field.plugin == "augment":
            calls = [registry.call("augment", text) for text in value]
            static[key] = [[made.plugin.name, made.static] for made in calls]
        elif field.role == "static":
            static[key] = value
        elif isinstance(value, tuple):
            static[key] = len(value)
        elif key in SWITCHES:
            static[key] = value > 0
    return json.dumps(static, sort_keys=True)


def auxiliary_heads(config: ConfigDict) -> tuple[str, ...]:
    """Names of the auxiliary heads, in the order of `Outputs.aux`.

    Those that the network has by itself (its file defines `own_heads(**fields)`), then one for each
    feature of `model.aux`.
    """
    plugin = registry.get("models", config.model.name)
    own = getattr(plugin.module, "own_heads", None)
    names = own(**{name: config.model[name] for name in plugin.parameters}) if own else ()
    return (*names, *(f"aux_{feature}" for feature in config.model.aux))


def parse_duration(config: ConfigDict, key: str) -> Duration:
    """The duration under a dotted key of a resolved config."""
    section, _, name = key.partition(".")
    return Duration.parse(config[section][name])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _nested(v) if isinstance(v, Mapping | ConfigDict) else v for k, v in config.items()}


def _fill_plugin_fields(config: ConfigDict, only: str = "") -> None:
    """Gives `model` and `data` the fields of their plug-in's signature, and no others."""
    for section, fields in FIELDS.items():
        folder = fields["name"].plugin if "name" in fields else ""
        if not folder or (only and section != only):
            continue
        with config.unlocked():
            for key in [k for k in config[section] if k not in fields]:
                del config[section][key]
            for key, value in registry.get(folder, config[section].name).parameters.items():
                if key not in fields:
                    config[section][key] = value


def _field(config: ConfigDict, key: str, where: str) -> Field:
    """The declaration of a dotted key, from `FIELDS` or from the plug-in's signature."""
    if key == "seed":
        return SEED
    section, _, name = key.partition(".")
    if section not in FIELDS:
        raise CnnlabError(
            f"{where}: unknown section {section!r} in {key!r}"
            f"{did_you_mean(section, [*FIELDS, 'seed'])}. Sections: {', '.join(FIELDS)}, seed"
        )
    if name in FIELDS[section]:
        return FIELDS[section][name]
    known = dict.fromkeys(FIELDS[section])
    folder = FIELDS[section]["name"].plugin if "name" in FIELDS[section] else ""
    whose = f"{section!r}"
    if folder:
        plugin = registry.get(folder, config[section].name)
        if name in plugin.parameters:
            default, hint = plugin.parameters[name], plugin.annotations[name]
            element = next((a for a in typing.get_args(hint) if a is not Ellipsis), str)
            return Field(default, "", element=element if isinstance(default, tuple) else str)
        known |= dict.fromkeys(plugin.parameters)
        whose += f" ({registry.SINGULAR[folder]} {plugin.name!r})"
    if not name:
        meant = f" (did you mean '{section}.name'?)" if "name" in known else ""
        raise CnnlabError(f"{where}: {key!r} is a section{meant}. It has: {', '.join(known)}")
    raise CnnlabError(
        f"{where}: unknown key {key!r}{did_you_mean(name, known)}. Section {whose} has: "
        f"{', '.join(known)}"
    )


def _checked(field: Field, value: Any, key: str, where: str) -> Any:
    """The value as the field's type, or an error that says what was expected."""

    def wrong(expected: str) -> CnnlabError:
        return CnnlabError(f"{where}: {key}: expected {expected}, got {value!r}")

    kind = type(field.default)
    if kind is tuple:
        if isinstance(value, str):
            text = value.strip()
            parsed = _literal(text)
            if field.element is str and not isinstance(parsed, tuple | list):
                parsed = tuple(part.strip() for part in _split(text)) if text else ()
            value = parsed
        if field.scalar and isinstance(value, int | float) and not isinstance(value, bool):
            value = (value,)
        if not isinstance(value, tuple | list):
            raise wrong(f"a tuple of {field.element.__name__}")
        part = dataclasses.replace(field, default=field.element(), scalar=False)
        return tuple(_checked(part, item, key, where) for item in value)
    if kind is str:
        if not isinstance(value, str):
            raise wrong("a string" if not field.duration else "a duration such as '10 epochs'")
        if field.plugin:
            try:
                (registry.call if field.plugin == "augment" else registry.get)(field.plugin, value)
            except CnnlabError as error:
                raise CnnlabError(f"{where}: {key}: {error}") from None
        if field.choices and value not in field.choices:
            raise wrong(f"one of {', '.join(field.choices)}{did_you_mean(value, field.choices)}")
        if field.duration:
            try:
                count = Duration.parse(value).count
            except ValueError as error:
                raise wrong(str(error)) from None
            if count < field.low or count <= field.above:
                raise wrong(f"a duration {'of at least 0' if field.low == 0 else 'above 0'}")
        return value
    if isinstance(value, str):
        over = re.fullmatch(r"(\d*\.?\d+)\s*/\s*(\d*\.?\d+)", value.strip())  # 8/255
        value = _literal(value.strip().replace("true", "True").replace("false", "False"))
        if over and kind is float and float(over[2]) > 0:
            value = float(over[1]) / float(over[2])
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong("a whole number" if kind is int else "a number")
    if kind is int and not float(value).is_integer():
        raise wrong("a whole number")
    number = kind(value)
    if not math.isfinite(number):
        raise wrong("a finite number")
    if number < field.low or number > field.high or number <= field.above:
        raise wrong(_range(field))
    return number


def _range(field: Field) -> str:
    if field.high < math.inf:
        return f"a number from {field.low:g} to {field.high:g}"
    return (
        f"a number of at least {field.low:g}"
        if field.low > -math.inf
        else f"a number above {field.above:g}"
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _split(text: str) -> list[str]:
    """Splits at commas outside parentheses: `crop(padding=4, x=1),flip` has two parts."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]
