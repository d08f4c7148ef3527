"""Tables from synthetic records: numbers, marks, refusals, layout."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest

from cnnlab.encoding import encode_labels
from cnnlab.reporting import statistics, tables
from cnnlab.reporting.tables import TableSpec
from cnnlab.types import CnnlabError

SEEDS = (0, 1, 2)
ACCURACY = {"plain": 0.85, "worse": 0.78, "better": 0.91, "same": 0.853}


def spec(**changes) -> TableSpec:
    fields = {
        "name": "demo",
        "title": "Four rows",
        "rows": tuple(ACCURACY),
        "seeds": SEEDS,
        "columns": ("top1", "nll", "parameters"),
        "baseline": "plain",
        "varied": ("model.name",),
    }
    return TableSpec(**(fields | changes))


@pytest.fixture
def records(run):
    return [run(row, seed, accuracy) for row, accuracy in ACCURACY.items() for seed in SEEDS]


def _row(table, name):
    return next(row for row in table.rows if row.name == name)


def _notes(table):
    return "\n".join(table.notes)


def test_cells_are_mean_and_std_over_seeds(records):
    table = tables.build(spec(), reversed(records))
    top1 = [100 * r["scores"]["test"]["top1"] for r in records if r["row"] == "plain"]
    cell = _row(table, "plain").cells["top1"]
    assert cell.summary.mean == pytest.approx(np.mean(top1))
    assert cell.text == f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}"
    assert re.fullmatch(r"0\.4\d{3} ± 0\.\d{4}", _row(table, "plain").cells["nll"].text)
    assert "±" not in _row(table, "plain").cells["parameters"].text
    assert [row.name for row in table.rows] == list(ACCURACY)
    assert "over 3 seeds (0, 1, 2)" in _notes(table)
    assert "n=" not in tables.to_markdown(table)


def test_test_against_the_baseline(records):
    table = tables.build(spec(), records)
    correct = {
        row: np.stack([tables.correct(r) for r in records if r["row"] == row]) for row in ACCURACY
    }
    raw = {
        row: statistics.paired_bootstrap(
            correct[row], correct["plain"], rng=np.random.default_rng(0)
        )
        for row in ("worse", "better", "same")
    }
    adjusted = statistics.holm([found.p for found in raw.values()])
    for (name, found), p in zip(raw.items(), adjusted, strict=True):
        test = _row(table, name).tests["top1"]
        assert test.p_holm == pytest.approx(p)
        assert test.comparison.difference == pytest.approx(100 * found.difference)
    verdicts = {row.name: row.tests["top1"].verdict for row in table.rows if row.tests}
    assert verdicts == {"worse": "worse", "better": "better", "same": ""}
    assert not _row(table, "plain").tests
    assert "paired bootstrap over 3 seeds and 600 test examples" in _notes(table)
    assert "over 3 comparisons" in _notes(table)


def test_only_significantly_better_is_bold(records):
    text = tables.to_markdown(tables.build(spec(), records))
    bold = re.findall(r"\*\*(.*?)\*\*", text)
    assert len(bold) == 1
    assert bold[0] in next(line for line in text.splitlines() if line.startswith("| better"))
    assert "†" in next(line for line in text.splitlines() if line.startswith("| worse"))
    without = tables.to_markdown(tables.build(spec(baseline=None), records))
    assert "**" not in without
    assert "baseline" not in without


def test_error_columns_are_better_when_smaller(records):
    table = tables.build(spec(columns=("top1_error",)), records)
    test = _row(table, "better").tests["top1_error"]
    assert test.verdict == "better"
    assert test.comparison.low < test.comparison.difference < test.comparison.high < 0
    both = tables.build(spec(columns=("top1", "top1_error")), records)
    assert "over 3 comparisons" in _notes(both)  # one test, two ways to print it
    line = next(x for x in tables.to_markdown(both).splitlines() if x.startswith("| better"))
    assert line.count("**") == 4


def test_one_seed_is_mcnemar_without_spread(run):
    one = [run(row, 0, accuracy) for row, accuracy in ACCURACY.items()]
    table = tables.build(spec(seeds=(0,)), one)
    assert _row(table, "better").tests["top1"].comparison.test == "mcnemar"
    assert "±" not in _row(table, "plain").cells["top1"].text
    assert "exact McNemar test" in _notes(table)
    assert "no spread" in _notes(table)
    with pytest.raises(CnnlabError, match="two single runs"):
        tables.build(spec(test="mcnemar", seeds=(0, 1)), [*one, *(run(row, 1) for row in ACCURACY)])


def test_catastrophic_overfitting_is_told_below_the_table(records):
    records[3] |= {"overfitted_step": 40}
    records[4] |= {"overfitted_step": None}
    notes = _notes(tables.build(spec(), records))
    assert "worse: catastrophic overfitting (seed 0 from step 40)" in notes
    assert notes.count("overfitting") == 1


def test_missing_and_diverged_runs_are_named(records, diverged):
    kept = [
        r for r in records
        if (r["row"], r["seed"]) not in {("same", 2), ("better", 1), ("worse", 0), ("worse", 1),
                                         ("worse", 2)}
    ]  # fmt: skip
    table = tables.build(spec(), [*kept, diverged("better", 1, 1234)])
    notes = _notes(table)
    assert "Missing: worse seeds 0, 1, 2; same seed 2 (not run)." in notes
    assert "better: 1 of 3 diverged (seed 1 at step 1234); the mean is over the others." in notes
    assert _row(table, "worse").cells["top1"].text == "–"
    assert _row(table, "same").cells["top1"].text.endswith("(n=2)")
    better = [100 * r["scores"]["test"]["top1"] for r in kept if r["row"] == "better"]
    assert _row(table, "better").cells["top1"].summary.mean == pytest.approx(np.mean(better))
    assert _row(table, "better").tests["top1"].comparison.seeds == 2
    assert "Not tested, for want of a seed finished by both: worse." in notes


def test_a_row_that_always_diverged(records, diverged):
    gone = [r for r in records if r["row"] != "better"]
    table = tables.build(spec(), gone + [diverged("better", s, 10 + s) for s in SEEDS])
    row = _row(table, "better")
    assert row.cells["top1"].text == "diverged"
    assert row.cells["parameters"].summary is not None
    assert "3 of 3 diverged (seed 0 at step 10, seed 1 at step 11, seed 2 at step 12)." in _notes(
        table
    )


def test_no_runs_at_all():
    table = tables.build(spec(), [])
    assert all(cell.text == "–" for row in table.rows for cell in row.cells.values())
    assert "Missing: plain seeds 0, 1, 2" in _notes(table)
    for write in (tables.to_markdown, tables.to_latex, tables.to_csv):
        assert "plain" in write(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"row": "plain", "seed": 2, "config__optim__learning_rate": 0.3},
            r"row 'plain' mixes runs of different settings: optim.learning_rate is 0.1 for seed 0 "
            r".* and 0.3 for seed 2",
        ),
        (
            {"row": "same", "seed": 0, "config__optim__betas": [0.9, 0.9]},
            r"row 'same' mixes .* optim.betas is \[0.9, 0.9\] for seed 0 .* and \[0.9, 0.99\]",
        ),
        (
            {"row": "same", "seed": 1, "config__model__width": 8},
            r"row 'same' mixes .* model.width is not set for seed 0 .* and 8 for seed 1",
        ),
        (
            {"row": "same", "seed": 1, "test_set__fingerprint": "f" * 16},
            r"different test sets: .*0123456789abcdef \(600 examples\) and .*ffffffffffffffff",
        ),
        ({"row": "saem", "seed": 1}, r"unknown row of a record 'saem'.*did you mean 'same'\?"),
        ({"row": "same", "seed": 7}, r"same seed 7: expected a seed out of 0, 1, 2"),
        ({"row": "same", "seed": 1, "schema": 2}, r"expected a record of schema 1, got 2"),
        ({"row": "same", "seed": 1, "status": "failed"}, r"status is 'failed'"),
    ],
)
def test_refuses_what_does_not_belong_together(records, run, change, message):
    kept = [r for r in records if (r["row"], r["seed"]) != (change["row"], change["seed"])]
    with pytest.raises(CnnlabError, match=message):
        tables.build(spec(), [*kept, run(**change)])


def test_rows_differ_only_in_what_the_experiment_varies(run):
    wide = [run("plain", 0), run("same", 0, config__model__depth=20)]
    for varied in (("model.name",), ("model.name", "mod", "model.dep")):
        with pytest.raises(
            CnnlabError, match=r"'plain' and 'same' differ in model.depth \(8 and 20\)"
        ):
            tables.build(spec(rows=("plain", "same"), varied=varied), wide)
    for varied in (("model.name", "model.depth"), ("model",)):
        tables.build(spec(rows=("plain", "same"), varied=varied), wide)


def test_data_sets_may_be_rows_when_nothing_is_compared(run):
    other = {"config__data__name": "digits", "test_set__fingerprint": "f" * 16,
             "test_set__name": "digits"}  # fmt: skip
    pair = [run("plain", 0), run("same", 0, **other)]
    fields = {"rows": ("plain", "same"), "varied": ("model.name", "data.name")}
    table = tables.build(spec(baseline=None, **fields), pair)
    assert "digits test, 600 examples (same)" in _notes(table)
    with pytest.raises(CnnlabError, match="different test sets"):
        tables.build(spec(**fields), pair)


def test_duplicates_are_refused(records, run):
    with pytest.raises(CnnlabError, match=r"plain seed 1 is given twice: runs \w+ and \w+"):
        tables.build(spec(), [*records, run("plain", 1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ("top1", "paramters")}, r"unknown column 'paramters'.*did you mean 'para"),
        ({"baseline": "plian"}, r"unknown baseline 'plian'.*did you mean 'plain'\?"),
        ({"rows": ("plain", "plain")}, r"names the row 'plain' twice"),
        ({"seeds": ()}, r"has no seeds"),
        ({"test": "wilcoxon"}, r"test is 'wilcoxon'; expected 'auto'"),
        ({"published": {"plain": {"top1": 1.0}}}, r"without a published_source"),
        (
            {"published": {"plian": {"top1": 1.0}}, "published_source": "x"},
            r"unknown row with published numbers 'plian'.*did you mean 'plain'\?",
        ),
        (
            {"published": {"plain": {"top5": 1.0}}, "published_source": "x"},
            r"unknown column with a published number of 'plain' 'top5'",
        ),
    ],
)
def test_a_wrong_specification_is_refused(change, message):
    with pytest.raises(CnnlabError, match=message):
        spec(**change)


def test_a_number_that_a_record_lacks(records):
    del records[0]["scores"]["test"]["top5"]
    with pytest.raises(CnnlabError, match=r"column 'top5': plain seed 0 .*'top5' is missing"):
        tables.build(spec(columns=("top5",)), records)


def test_published_numbers_and_their_difference(records):
    published = {"plain": {"top1": 88.4}, "same": {"top1": (85.25, 0.2), "parameters": 61_000}}
    table = tables.build(spec(published=published, published_source="A 2015, table 2"), records)
    mean = _row(table, "plain").cells["top1"].summary.mean
    lines = {x.split("|")[1].strip(): x for x in tables.to_markdown(table).splitlines() if "|" in x}
    assert f"| 88.4 | {mean - 88.4:.1f} |".replace("-", "−") in re.sub(" +", " ", lines["plain"])
    assert "85.25 ± 0.2" in lines["same"]
    assert "61.0k" in lines["same"]
    assert "Published: A 2015, table 2." in _notes(table)
    fields = next(csv.DictReader(io.StringIO(tables.to_csv(table))))
    assert fields["top1_published"] == "88.4"


def test_code_and_environment_are_named(records, run):
    notes = _notes(tables.build(spec(), records))
    assert "Code: 0.1.0 (abc1234; sources 0f1e2d3c4b5a), 12 runs." in notes
    assert "jax 0.12.0.1" in notes
    assert "Warning" not in notes
    kept = [r for r in records if (r["row"], r["seed"]) != ("same", 1)]
    mixed = [*kept, run("same", 1, code__commit=None, code__dirty=True, code__digest="ff")]
    table = tables.build(spec(), mixed)
    assert "Code: 0.1.0 (abc1234; sources 0f1e2d3c4b5a), 11 runs; 0.1.0 (no commit" in _notes(table)
    warning = [note for note in table.notes if note.startswith("Warning")]
    assert len(warning) == 1
    assert "different code" in warning[0]
    assert "same" in warning[0]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"kept_heap": True}, ", CNNLAB_CPU=fast"),
        ({"cnnlab_cpu": "plain", "kept_heap": False, "compiler_options": {}}, ""),
        ({"cnnlab_cpu": "eigen", "compiler_options": {"a": 1}}, ", CNNLAB_CPU=eigen"),
    ],
)
def test_what_makes_cpu_fast_is_named(environment, said, run):
    changes = {f"environment__{name}": value for name, value in environment.items()}
    table = tables.build(spec(rows=("plain",), seeds=(0,)), [run("plain", 0, **changes)])
    assert f"cpu (cpu){said}, 1 run." in _notes(table)


def test_markdown_lines_up_as_text(run):
    name = "a|b *c* 漢字 _d_ x_y"
    table = tables.build(spec(rows=("plain", name), seeds=(0,)), [run("plain", 0), run(name, 0)])
    lines = [x for x in tables.to_markdown(table).splitlines() if x.startswith("|")]
    assert len({tables._width(line) for line in lines}) == 1
    assert r"a\|b \*c\* 漢字 \_d\_ x_y" in lines[3]
    unescaped = [re.findall(r"(?<!\\)\|", line) for line in lines]
    assert len({len(found) for found in unescaped}) == 1


def test_latex_is_escaped_and_balanced(run):
    name = r"[50%] a_b & c\d #1 ~ $x^2$ {y}"
    table = tables.build(
        spec(rows=("plain", name), seeds=(0, 1), title="100% & more"),
        [run(row, seed) for row in ("plain", name) for seed in (0, 1)],
    )
    text = tables.to_latex(table)
    assert r"\caption{100\% \& more}" in text
    assert (
        r"{}[50\%] a\_b \& c\textbackslash{}d \#1 \textasciitilde{} \$x\textasciicircum{}2\$ \{y\}"
        in text
    )
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")].splitlines()
    counts = {len(re.findall(r"(?<!\\)&", line)) for line in body if line.endswith(r"\\")}
    assert counts == {len(re.search(r"\{(lr+)\}", text)[1]) - 1}
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert sorted(re.findall(r"\\begin\{(\w+)\}", text)) == sorted(
        re.findall(r"\\end\{(\w+)\}", text)
    )
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    assert re.search(r"\d \$\\pm\$ \d", text)
    assert not set("±−–†") & set(text)


def test_csv_has_full_precision(records):
    table = tables.build(spec(), records)
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(table))))
    assert [line["row"] for line in lines] == list(ACCURACY)
    for line, row in zip(lines, table.rows, strict=True):
        assert float(line["top1_mean"]) == row.cells["top1"].summary.mean
        assert float(line["nll_std"]) == row.cells["nll"].summary.std
        assert line["top1_n"] == "3"
    assert lines[0]["top1_p_holm"] == ""
    assert float(lines[2]["top1_p_holm"]) == table.rows[2].tests["top1"].p_holm
    assert lines[0]["code"].startswith("0.1.0 (abc1234")


def test_terminal_shows_the_same_numbers(records):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    table = tables.build(spec(title="[bold]not markup[/]"), records)
    console.print(tables.to_rich(table))
    text = console.file.getvalue()
    assert "[bold]not markup[/]" in text
    for row in table.rows:
        assert row.cells["top1"].text in text


def test_write_leaves_whole_files_only(records, tmp_path):
    table = tables.build(spec(), records)
    paths = tables.write(table, tmp_path / "results" / "demo")
    assert [p.name for p in paths] == ["table.md", "table.tex", "table.csv"]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [
        "table.csv",
        "table.md",
        "table.tex",
    ]
    assert paths[0].read_text(encoding="utf-8") == tables.to_markdown(table)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tables.write(table, tmp_path / "file")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1.00k"), (61_706, "61.7k"), (416_520, "417k"),
     (999_499, "999k"), (999_950, "1.00M"), (1_234_567, "1.23M"), (9_996_000, "10.0M"),
     (4.09e9, "4.09G"), (0.5, "0.5")],
)  # fmt: skip
def test_compact(value, text):
    assert tables.compact(value) == text


def test_every_column_reads_a_record(records):
    for record in records:
        if record["status"] == "done":
            record["scores"]["corrupted"] = {"top1": 0.5, "mce": 0.9}
    table = tables.build(spec(columns=tuple(tables.COLUMNS)), records)
    texts = {name: cell.text for name, cell in _row(table, "plain").cells.items()}
    assert texts["steps"] == "420"
    assert texts["epochs"] == "6"
    assert texts["images_per_second"] == "5000 ± 0"
    top1, error = (_row(table, "plain").cells[c].summary for c in ("top1", "top1_error"))
    assert top1.mean + error.mean == pytest.approx(100)
    assert top1.std == pytest.approx(error.std)


def test_a_column_under_attack_is_tested_example_by_example(run):
    name = "pgd(eps=0.1, steps=4), first 200"
    records = []
    for row, robust in (("weak", 60), ("strong", 140)):
        for seed in range(3):
            records.append(run(row, seed))
            outcomes = np.arange(200) < robust + seed
            records[-1]["scores"][name] = {
                "top1": float(outcomes.mean()),
                "robust": encode_labels(outcomes.astype(np.int32)),
            }
    made = tables.TableSpec(
        "t", "T", ("weak", "strong"), (0, 1, 2), (name,), baseline="weak", varied=("model",)
    )
    table = tables.build(made, records)
    assert _row(table, "strong").cells[name].text.startswith("70.50")
    (tested,) = _row(table, "strong").tests.values()
    assert tested.comparison.difference == pytest.approx(40)
    assert "pgd(eps=0.1, steps=4), first 200 (%)" in tables.to_markdown(table)


def test_the_command_stands_below_the_table(records):
    table = tables.build(spec(command="cnnlab table experiments/demo.py"), records)
    assert table.notes[-1] == "Made by: cnnlab table experiments/demo.py"


def test_with_several_baselines_each_block_has_its_own(run):
    rows = {"a": 0.70, "a+": 0.90, "b": 0.90, "b+": 0.90}
    records = [run(row, seed, accuracy) for row, accuracy in rows.items() for seed in range(3)]
    spec = tables.TableSpec(
        "t", "T", tuple(rows), (0, 1, 2), ("top1",), baseline=("a", "b"), varied=("model",)
    )
    table = tables.build(spec, records)
    by_name = {row.name: row for row in table.rows}
    assert [spec.baseline_of(row) for row in rows] == ["a", "a", "b", "b"]
    assert by_name["a+"].tests["top1"].verdict == "better"
    assert by_name["b+"].tests["top1"].verdict == ""
    assert abs(by_name["b+"].tests["top1"].comparison.difference) < 3
    assert not by_name["a"].tests
    assert not by_name["b"].tests
    latex = tables.to_latex(table)
    assert latex.count(r"\midrule") == 2
    assert latex.index("a+ ") < latex.rindex(r"\midrule") < latex.index("b+ ")
    with pytest.raises(CnnlabError, match="first row, 'x'"):
        tables.TableSpec("t", "T", ("x", "a", "b"), (0,), ("top1",), baseline=("a", "b"))
