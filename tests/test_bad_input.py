"""Forty ways to get it wrong, and the message for each: what, where, nearest name, what to do."""

import errno
import gzip
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from cnnlab import cli

ROOT = Path(__file__).resolve().parent.parent
CONFIG = '''"""A tiny recipe."""
from cnnlab import config


def get_config(argument=""):
    made = config.base(
        model="simple_conv",
        data="digits",
        train={"duration": "4 steps", "batch_size": 64},
    )
    # HERE
    return made
'''
EXPERIMENT = '''"""A title."""
from cnnlab import config
from cnnlab.sweep import Experiment


def get_experiment():
    base = config.base(
        model="simple_conv", data="digits", train={"duration": "4 steps", "batch_size": 64}
    )
    return Experiment(
        base=base,
        rows={"one": {}, "two": {"optim.learning_rate": 0.2}},
        seeds=range(2),
        baseline="one",
        columns=("top1",),
    )
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(CONFIG)
    (tmp_path / "experiments" / "rates.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path / "data"))
    return tmp_path


TRAIN = "train --config configs/tiny.py"
TABLE = "table experiments/rates.py"


def config_line(line):
    def change(project):
        (project / "configs" / "tiny.py").write_text(CONFIG.replace("# HERE", line))

    return change


def experiment(old, new):
    def change(project):
        assert old in EXPERIMENT
        (project / "experiments" / "rates.py").write_text(EXPERIMENT.replace(old, new))

    return change


def no_validation(project):
    experiment('("top1",)', '("validation_top1",)')(project)
    file = project / "experiments" / "rates.py"
    file.write_text(
        file.read_text().replace('data="digits"', 'data={"name": "digits", "validation": 0.0}')
    )


def truncated_data(project):
    folder = project / "data"
    folder.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x03" + b"\0" * 100, mtime=0)[:-20]
        )


def other_config(project):
    assert cli.main([*TRAIN.split(), "--folder", "mine"]) == 0


def damaged(name, content):
    def change(project):
        other_config(project)
        (project / "mine" / "result.json").unlink()
        (project / "mine" / name).write_text(content)

    return change


def damaged_result(project):
    assert cli.main(TRAIN.split()) == 0
    (folder,) = (project / "runs").iterdir()
    (folder / "result.json").write_text('{"schema": 1,')


def no_checkpoint(project):
    other_config(project)
    shutil.rmtree(project / "mine" / "checkpoints")


def nothing(project):
    pass


CASES = {
    # name: (what is done to the project first, the command, what the message must say)
    "unknown key": (nothing, f"{TRAIN} --config.optim.learning_rat=0.3", r"unknown key 'optim.learning_rat' \(did you mean 'learning_rate'"),
    "unknown section": (nothing, f"{TRAIN} --config.optin.name=sgd", r"unknown section 'optin'.*did you mean 'optim'"),
    "a section for a key": (nothing, f"{TRAIN} --config.model=lenet6", r"'model' is a section \(did you mean 'model.name'\?\)"),
    "unknown field of a model": (nothing, f"{TRAIN} --config.model.width=3", r"unknown key 'model.width' \(did you mean 'widths'\?\).*simple_conv"),
    "wrong type, number": (nothing, f"{TRAIN} --config.optim.learning_rate=fast", r"optim.learning_rate: expected a number, got 'fast'"),
    "wrong type, whole number": (nothing, f"{TRAIN} --config.train.batch_size=6.5", r"train.batch_size: expected a whole number, got 6.5"),
    "wrong type, true or false": (nothing, f"{TRAIN} --config.optim.nesterov=1", r"optim.nesterov: expected true or false, got 1"),
    "wrong type, tuple": (config_line("made.model.aux = 3"), TRAIN, r"tiny.py, line 11.*aux"),
    "wrong type in a file": (config_line("made.optim.name = 3"), TRAIN, r"tiny.py, line 11.*(name|str)"),
    "bool for a number in a file": (config_line("made.train.batch_size = True"), TRAIN, r"tiny.py: train.batch_size: expected a whole number, got True"),
    "out of range": (nothing, f"{TRAIN} --config.optim.momentum=1.5", r"optim.momentum: expected a number from 0 to 1, got 1.5"),
    "negative": (nothing, f"{TRAIN} --config.optim.weight_decay=-1", r"optim.weight_decay: expected a number of at least 0"),
    "not finite": (nothing, f"{TRAIN} --config.optim.learning_rate=1e999", r"expected a finite number"),
    "negative seed": (nothing, f"{TRAIN} --config.seed=-1", r"seed: expected a number from 0"),
    "unknown choice": (nothing, f"{TRAIN} --config.optim.schedule=cosin", r"expected one of constant, .*did you mean 'cosine'"),
    "unknown model": (nothing, f"{TRAIN} --config.model.name=resnet21", r"unknown model 'resnet21' \(did you mean 'resnet.*list models"),
    "unknown data set": (nothing, f"{TRAIN} --config.data.name=fashion_mni", r"unknown data set 'fashion_mni' \(did you mean 'fashion_mini'"),
    "unknown augmentation": (nothing, f"{TRAIN} --config.augment.transforms=flop", r"unknown augmentation 'flop' \(did you mean 'flip'"),
    "bad argument of an augmentation": (nothing, f"{TRAIN} --config.augment.transforms=crop(pad=4)", r"no argument 'pad' \(did you mean 'padding'"),
    "duration without a unit": (nothing, f"{TRAIN} --config.train.duration=10", r"train.duration: expected a count and one unit of steps, epochs or examples"),
    "duration of nothing": (nothing, [*TRAIN.split(), "--config.train.duration=0 epochs"], r"expected a duration above 0"),
    "value missing": (nothing, f"{TRAIN} --config.seed", r"--config.seed: expected a value"),
    "given twice": (nothing, f"{TRAIN} --config.seed=1 --config.seed=2", r"--config.seed is given twice"),
    "unknown argument": (nothing, f"{TABLE} --config.seed=1", r"unknown argument '--config.seed=1'"),
    "batch larger than the data": (nothing, f"{TRAIN} --config.train.batch_size=5000", r"train.batch_size: expected at most the 1293 training examples, got 5000"),
    "more devices than there are": (nothing, f"{TRAIN} --config.parallel.devices=64", r"parallel.devices: expected at most the 8 cpu"),
    "batch not divided by the devices": (nothing, f"{TRAIN} --config.parallel.devices=8 --config.train.batch_size=60", r"multiple of the 8 devices"),
    "aux weight for each head": (nothing, f"{TRAIN} --config.model.aux=stage1 --config.task.aux_weight=1,2", r"expected one weight, or one for each of the 1 auxiliary heads"),
    "unknown feature for a head": (nothing, f"{TRAIN} --config.model.aux=stage7", r"stage7.*(stage1)"),
    "selection without a validation split": (nothing, f"{TRAIN} --config.data.validation=0 --config.train.keep=best", r"need a validation split.*test split never selects"),
    "image too small": (nothing, f"{TRAIN} --config.model.name=vgg11", r"poolings need images of at least 32x32, got 8x8; set pools=3"),
    "depth that does not exist": (nothing, f"{TRAIN} --config.model.name=resnet20 --config.model.depth=21", r"depth must be 6n \+ 2, got 21; the nearest is 20"),
    "missing config file": (nothing, "train --config configs/tinny.py", r"no file configs/tinny.py \(did you mean 'tiny'"),
    "missing experiment file": (nothing, "table experiments/rate.py", r"no file experiments/rate.py \(did you mean 'rates'"),
    "typo in a config file": (config_line("made.optim.learning_rat = 1"), TRAIN, r"tiny.py, line 11: .*learning_rat"),
    "error in a config file": (config_line("1 / 0"), TRAIN, r"tiny.py, line 11: ZeroDivisionError"),
    "syntax error in an experiment": (experiment("rows={", "rows={{"), TABLE, r"rates.py is no Python file"),
    "no get_experiment": (experiment("get_experiment", "get_experimnt"), TABLE, r"rates.py must define get_experiment\(\)"),
    "not an experiment": (experiment("return Experiment(", "return dict("), TABLE, r"expected a cnnlab.sweep.Experiment, got dict"),
    "two rows of one name": (experiment('"two": {', '"one": {'), TABLE, r"rates.py, line 12: two entries named 'one'"),
    "unknown key in a row": (experiment("optim.learning_rate", "optim.lr"), TABLE, r"rates.py, row 'two': unknown key 'optim.lr'"),
    "seed set by a row": (experiment('"one": {}', '"one": {"seed": 1}'), TABLE, r"row 'one': a row can't set the seed"),
    "seeds twice": (experiment("range(2)", "(1, 1)"), TABLE, r"seeds: expected at least one, all different"),
    "seeds that are a number": (experiment("range(2)", "3"), TABLE, r"rates.py, line 10: seeds: expected whole numbers, as in range\(3\)"),
    "base that is no config": (experiment("base=base", "base={}"), TABLE, r"base: expected an ml_collections.ConfigDict.*got dict"),
    "rows that are a list": (experiment('rows={"one": {}, "two": {"optim.learning_rate": 0.2}}', 'rows=["one"]'), TABLE, r"rows: expected a dict of row name"),
    "row without settings": (experiment('"one": {}', '"one": None'), TABLE, r"rows: expected a name and a dict of changed settings, got 'one': None"),
    "column without its split": (no_validation, TABLE, r"row 'one': column 'validation_top1' needs a validation split"),
    "augmentation out of range": (experiment('"one": {}', '"one": {"augment.transforms": ("crop(padding=0)",)}'), TABLE, r"row 'one': augment.transforms: augmentation 'crop': padding: expected a number of at least 1, got 0"),
    "validation split of nothing": (nothing, f"{TRAIN} --config.data.validation=1e-5", r"data.validation: 1e-05 of 1437 examples is none"),
    "warm-up as long as the run": (nothing, [*TRAIN.split(), "--config.optim.warmup=4 steps"], r"optim.warmup: expected less than the 4 steps"),
    "warm-up of one_cycle": (nothing, [*TRAIN.split(), "--config.optim.schedule=one_cycle", "--config.optim.warmup=1 steps"], r"one_cycle has a rise of its own"),
    "unknown baseline": (experiment('baseline="one"', 'baseline="oen"'), TABLE, r"unknown baseline 'oen' \(did you mean 'one'"),
    "unknown column": (experiment('("top1",)', '("topl",)'), TABLE, r"unknown column 'topl' \(did you mean .*'top1'"),
    "unknown row asked for": (nothing, f"{TABLE} --rows tow", r"no row 'tow' \(did you mean 'two'"),
    "unknown seed asked for": (nothing, f"{TABLE} --seeds 7", r"no seed 7; its seeds are 0, 1"),
    "seeds that are no numbers": (nothing, f"{TABLE} --seeds x", r"--seeds: expected numbers such as 0 1 2 or 0-4, got 'x'"),
    "nothing to render": (nothing, f"{TABLE} --render", r"holds no results yet; train without --render"),
    "missing data": (nothing, f"{TRAIN} --config.data.name=fashion_mnist", r"dataset-fashion-mnist.*--data-dir"),
    "truncated data": (truncated_data, f"{TRAIN} --config.data.name=fashion_mnist", r"train-images-idx3-ubyte"),
    "run folder of another config": (other_config, f"{TRAIN} --folder mine --config.optim.learning_rate=0.7", r"mine holds a run of another config: optim.learning_rate \(0.1 there, 0.7 here\)"),
    "damaged config of a run": (damaged("config.json", "{"), f"{TRAIN} --folder mine", r"mine/config.json is damaged"),
    "damaged metrics of a run": (damaged("metrics.jsonl", '{"a\n{"step": 1}\n'), f"{TRAIN} --folder mine", r"metrics.jsonl: line 1 is damaged"),
    "damaged result of a run": (damaged_result, TRAIN, r"result.json is damaged"),
    "run that does not exist": (nothing, "eval runs/nothing", r"no run 'runs/nothing'; `cnnlab list runs` shows all"),
    "folder that is no run": (nothing, "eval configs", r"configs is no run's folder: it has no config.json"),
    "run without a checkpoint": (no_checkpoint, "eval mine", r"has no checkpoint yet"),
    "folder that can't be made": (nothing, f"{TRAIN} --folder configs/tiny.py/run", r"configs/tiny.py.*: Not a directory"),
    "no noise": (nothing, "certify mine --sigma 0", r"sigma: expected a finite number above 0, got 0.0"),
    "too few samples to certify": (nothing, "certify mine --sigma 0.25 --samples 5", r"samples: expected at least 10.*got 5"),
    "radius below zero": (nothing, "certify mine --sigma 0.25 --radii -1", r"--radii: expected numbers of at least 0, got \[-1.0\]"),
    "no examples to certify": (nothing, "certify mine --sigma 0.25 --examples 0", r"--examples: expected at least 1, got 0"),
    "run to certify that is not finished": (damaged("metrics.jsonl", ""), "certify mine --sigma 0.25", r"mine is not finished; train the run first"),
    "no radius of an attack": (nothing, "attack mine --attack pgd --eps big", r"eps: expected a number of at least 0, '8/255' or '8px'"),
    "one radius twice": (nothing, "attack mine --attack pgd --eps 8/255 8px", r"--eps: expected different radii, got 8/255 8px"),
    "curve of one radius": (nothing, "attack mine --attack pgd --eps 0.1 --plot c.png", r"--plot draws accuracy against eps: give several"),
    "gallery of two radii": (nothing, "attack mine --attack pgd --eps 0.1 0.2 --gallery g.png", r"--gallery shows one eps, got 2"),
    "unknown check allowed": (nothing, "attack mine --attack pgd --eps 0.1 --allow gradients", r"allow: unknown check 'gradients' \(did you mean 'zero-gradients'"),
    "checklist of no radius": (nothing, "attack mine --attack pgd --eps 0 --checklist", r"--checklist: expected an eps above 0, got 0"),
    "shape of an input": (nothing, "describe lenet5 --input 28x28", r"--input: expected HxWxC such as 28x28x1, got '28x28'"),
    "unknown model to describe": (nothing, "describe lenet55", r"unknown model 'lenet55' \(did you mean 'lenet5'"),
    "unknown field to describe": (nothing, "describe lenet5 --model.depth=3", r"unknown key 'model.depth'"),
    "no classes": (nothing, "describe lenet5 --classes 0", r"--classes: expected at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_message_says_what_where_and_what_to_do(case, project, capsys, monkeypatch):
    prepare, command, message = CASES[case]
    if case == "missing data" and Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("the whole Fashion-MNIST is installed on this machine")
    prepare(project)
    capsys.readouterr()
    before = set(project.rglob("result.json"))
    code = cli.main(command.split() if isinstance(command, str) else command)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("cnnlab: ")
    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error
    assert set(project.rglob("result.json")) >= before


def test_there_are_at_least_forty():
    assert len(CASES) >= 40


def test_traceback_shows_where(project):
    with pytest.raises(Exception, match="unknown model"):
        cli.main(["describe", "lenet55", "--traceback"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_with_a_message_and_everything_intact(project, capsys):
    from cnnlab import record

    assert cli.main([*TRAIN.split(), "--folder", "other"]) == 0
    capsys.readouterr()
    # The disk fills up right after the run has begun: any write to /dev/full says so.
    rewind = record.RunFolder.rewind

    def then_full(self, step):
        rewind(self, step)
        (self.path / "metrics.jsonl").unlink()
        (self.path / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.RunFolder, "rewind", then_full)
        assert cli.main([*TRAIN.split(), "--folder", "mine"]) == 2
    error = capsys.readouterr().err
    assert "no disk space left" in error
    assert "give the same command again" in error
    assert (project / "other" / "result.json").exists()

    (project / "mine" / "metrics.jsonl").unlink()
    assert cli.main([*TRAIN.split(), "--folder", "mine"]) == 0


def test_no_space_for_a_result_is_told_with_its_name(project, capsys, monkeypatch):
    from cnnlab import record

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(record, "write_atomic", full)
    assert cli.main([*TRAIN.split(), "--folder", "mine"]) == 2
    assert re.search(r"no disk space left to write .*mine/config.json", capsys.readouterr().err)
