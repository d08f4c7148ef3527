"""Scores that are measured after training."""

import json

import numpy as np
import pytest

from cnnlab import config, encoding
from cnnlab.evaluation import certification, corruption
from cnnlab.training import run
from cnnlab.training.step import Programs
from cnnlab.types import CnnlabError

PROGRAMS = Programs()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    # Two corruptions of one severity: all 75 take as long as they say.
    monkeypatch.setattr(corruption, "CORRUPTIONS", ("brightness", "pixelate"))
    monkeypatch.setattr(corruption, "SEVERITIES", (5,))
    made = config.base(
        model="simple_conv",
        data="digits",
        train={"duration": "30 steps", "batch_size": 32},
        eval={"batch_size": 128},
    )
    made = config.override(made, {"model.widths": (8,), "model.hidden": 16}, "t")
    path = tmp_path / "run"
    run.train([run.Job(config.resolve(made, "t"), path, "r")], programs=PROGRAMS)
    return path


def test_corrupted_scores_are_those_of_the_corrupted_images_and_kept(trained, monkeypatch):
    made = run.extend(trained, ["corrupted"], PROGRAMS)
    assert json.loads((trained / "result.json").read_text()) == json.loads(json.dumps(made))
    restored, program, state, _ = run.restore(trained, PROGRAMS)
    split = run.load_split(restored, "test")
    everything = np.arange(len(split), dtype=np.int32)
    images = corruption.corrupt(split.get(everything).images, "pixelate", 5)
    fed = split.with_images(images).fed(everything)
    logits = program.logits(state.params, state.batch_stats, fed)
    wrong = (np.asarray(logits).argmax(1) != split.labels).mean()
    found = made["scores"]["corrupted"]
    assert found["errors"]["pixelate"] == [pytest.approx(wrong)]
    assert found["errors"]["brightness"] != found["errors"]["pixelate"]
    assert found["top1"] == pytest.approx(1 - np.mean(list(found["errors"].values())))

    def fail(*_):
        raise AssertionError("measured twice")

    monkeypatch.setitem(run.EXTRAS, "corrupted", fail)
    assert run.extend(trained, ["corrupted"], PROGRAMS) == made


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(CnnlabError, match="not finished"):
        run.extend(tmp_path, ["corrupted"], PROGRAMS)


def test_certified_columns_share_their_draws_and_count_what_reaches_the_radius(trained):
    at = [f"certified(sigma=0.1, radius={r}, samples=200, select=20), first 30" for r in (0.0, 0.1)]
    made = run.extend(trained, at, PROGRAMS)
    (file,) = trained.glob("certified-*.json")
    kept = json.loads(file.read_text())
    assert len(kept["radii"]) == 30
    for name, radius in zip(at, (0.0, 0.1), strict=True):
        standing = np.array(kept["right"]) & (np.array(kept["radii"]) >= radius)
        score = made["scores"][name]
        assert score["top1"] == pytest.approx(standing.mean())
        np.testing.assert_array_equal(encoding.decode_labels(score["robust"]), standing)
    assert 0 < made["scores"][at[1]]["top1"] < made["scores"][at[0]]["top1"] < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("certified(radius=0.5)", "sigma, the noise, is missing"),
        ("certified(sigma=0.25, radii=0.5)", "unknown argument 'radii'.*did you mean 'radius'"),
        ("certified(sigma='a')", "sigma: expected a number, got 'a'"),
        ("certified(sigma=0.25, radius=5)", r"radius: expected at least 0 and at most 0\.61"),
        ("certify(sigma=0.25)", "expected what to certify, such as"),
        ("certified(sigma=-1)", "sigma: expected a finite number above 0"),
    ],
)
def test_what_can_not_be_certified_is_refused(text, message):
    with pytest.raises(CnnlabError, match=message):
        certification.parse(text)
