"""Experiment files: what they expand to, and every file of the project."""

from pathlib import Path

import pytest

from cnnlab import config
from cnnlab.sweep import Benchmark, experiment
from cnnlab.types import CnnlabError

ROOT = Path(__file__).resolve().parent.parent.parent

FILE = '''"""A title.

More words.
"""
from cnnlab import config
from cnnlab.sweep import Experiment


def get_experiment():
    return Experiment(
        base=config.base(model="simple_conv", data="digits"),
        rows={"a": {}, "b": {"optim.learning_rate": 0.3}, "c": {"model.name": "lenet5"}},
        seeds=(3, 5),
        baseline="a",
        columns=("top1",),
    )
'''


def write(folder, text=FILE, name="mine.py"):
    (folder / "experiments").mkdir(exist_ok=True)
    path = folder / "experiments" / name
    path.write_text(text)
    return path


def test_rows_times_seeds(tmp_path):
    loaded = experiment.load(write(tmp_path))
    assert [(r.row, r.seed) for r in loaded.runs] == [(r, s) for r in "abc" for s in (3, 5)]
    assert all(r.config.seed == r.seed for r in loaded.runs)
    assert loaded.runs[2].config.optim.learning_rate == 0.3
    assert loaded.runs[4].config.model.name == "lenet5"
    assert (loaded.name, loaded.spec.title) == ("mine", "A title.")
    assert loaded.spec.command == "cnnlab table experiments/mine.py"
    assert len({r.folder for r in loaded.runs}) == 6
    assert {"optim.learning_rate", "model.name"} <= set(loaded.spec.varied)
    assert "train.batch_size" not in loaded.spec.varied


def test_findings_are_allowed_by_name(tmp_path):
    text = FILE.replace('columns=("top1",),', 'columns=("top1",), allow=("zero-gradients",),')
    assert experiment.load(write(tmp_path, text)).allow == ("zero-gradients",)
    with pytest.raises(CnnlabError, match=r"allow: unknown check 'zero-gradient'.*did you mean"):
        experiment.load(write(tmp_path, text.replace("zero-gradients", "zero-gradient")))


def test_attacks_and_certificates_are_columns(tmp_path):
    given = 'columns=("top1",), attacks=("pgd(eps=0.1)",), certified=("certified(sigma=0.25)",),'
    loaded = experiment.load(write(tmp_path, FILE.replace('columns=("top1",),', given)))
    extras = ("pgd(eps=0.1), first 1000", "certified(sigma=0.25), first 500")
    assert loaded.extras == extras
    assert tuple(loaded.spec.columns) == ("top1", *extras)
    for wrong, message in (
        (given.replace("sigma", "sigmas"), "certified: certified: unknown argument 'sigmas'"),
        (given.replace("pgd", "pgt"), "attacks: unknown attack 'pgt'"),
        (given + "certified_examples=0", "certified_examples: expected at least 1, got 0"),
        (given + "attack_examples=0", "attack_examples: expected at least 1, got 0"),
    ):
        with pytest.raises(CnnlabError, match=message):
            experiment.load(write(tmp_path, FILE.replace('columns=("top1",),', wrong)))


def test_a_run_is_its_config_whatever_the_row_is_called(tmp_path):
    one = experiment.load(write(tmp_path))
    other = experiment.load(write(tmp_path, FILE.replace('"b": {', '"other": {'), "other.py"))
    assert [r.folder for r in one.runs] == [r.folder for r in other.runs]


def test_selecting_rows_and_seeds(tmp_path):
    loaded = experiment.load(write(tmp_path))
    assert [(r.row, r.seed) for r in experiment.select(loaded, ["c", "a"], [5])] == [
        ("a", 5),
        ("c", 5),
    ]
    with pytest.raises(CnnlabError, match="no seed 4; its seeds are 3, 5"):
        experiment.select(loaded, [], [4])


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_every_experiment_of_the_project_expands(path):
    module, made = experiment.read(path)
    if isinstance(made, Benchmark):
        return  # test_benchmark.py expands those
    loaded = experiment.expand(path, module, made)
    assert len(loaded.runs) == len(loaded.spec.rows) * len(loaded.spec.seeds)
    assert f"cnnlab table experiments/{path.name}" in path.read_text()
    assert loaded.spec.baselines
    assert set(loaded.spec.baselines) <= set(loaded.spec.rows)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_of_the_project_resolves(path):
    made = config.resolve(experiment.load_config(path), str(path))
    assert f"--config configs/{path.name}" in path.read_text()
    assert made.data.name in path.stem


def test_rows_that_differ_in_punctuation_only_keep_files_of_their_own(tmp_path):
    from cnnlab.sweep import results

    text = FILE.replace('"a": {}', '"shift 1": {}').replace('"b": {', '"shift -1": {')
    loaded = experiment.load(write(tmp_path, text.replace('baseline="a"', 'baseline="c"')))
    names = results.file_names(loaded)
    assert len(set(names.values())) == 6
    assert names["c", 3] == "c-s3.json"
    assert names["shift 1", 3].startswith("shift-1-")
