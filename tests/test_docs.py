"""The documentation holds: its commands parse, its links lead somewhere, its notebook runs."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cnnlab import cli, doctor
from cnnlab.reporting import figures

PLACEHOLDERS = {"N": "1", "R": "0.5", "S": "1", "Q": "90", "...": None}
ENDS = ("&&", "||", "|", ";", "&", ">")
MADE_BY_THE_READER = {"experiments/learning_rates.py", "configs/mine.py", "experiments/mine.py"}


def documents(root):
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


def blocks(text):
    """The shell code in a Markdown text, fenced or indented; continued lines are joined."""
    found, fenced = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = line[3:] if fenced is None else None
        elif fenced in ("", "bash", "sh") or (fenced is None and line.startswith("    ")):
            found.append(line.strip())
    return "\n".join(found).replace("\\\n", " ").splitlines()


def commands(line):
    """The words of each cnnlab command in a line, of alternatives the first."""
    try:
        words = shlex.split(line.replace(";", " ; "), comments=True)
    except ValueError:  # one line of a string over several
        words = line.split()
    for number, word in enumerate(words):
        before = words[number - 1] if number else "&&"
        begins = before in {*ENDS, "until"} or re.match(r"[A-Z_]+=", before)
        if begins and re.fullmatch(r"!?(\.venv/bin/)?cnnlab", word):
            end = next((i for i, w in enumerate(words) if i > number and w in ENDS), len(words))
            taken = [each.strip('[]"').partition("|")[0] for each in words[number + 1 : end]]
            taken = [PLACEHOLDERS.get(each, each) for each in taken]
            yield [each for each in taken if each]


def parse(words):
    """Raises SystemExit or CnnlabError where the command line would."""
    options, rest = cli._parser().parse_known_args(cli._joined(words))
    assert hasattr(options, "command"), f"no command: {words}"
    cli._changes(rest, options)
    return options


def test_the_checks_find_commands_and_their_mistakes(capsys):
    text = "x\n\n    A=1 .venv/bin/cnnlab train --config c.py \\\n        --config.a=1 # why\n"
    text += "```bash\nuntil cnnlab table e.py [--rows ROW ...] --together N; do\n```\n"
    found = [words for line in blocks(text) for words in commands(line)]
    assert found == [
        ["train", "--config", "c.py", "--config.a=1"],
        ["table", "e.py", "--rows", "ROW", "--together", "1"],
    ]
    assert parse(found[0]).config.name == "c.py"
    with pytest.raises(SystemExit):
        parse(["tabel", "e.py"])
    capsys.readouterr()


def test_every_command_in_the_documents_parses(root, capsys):
    wrong, count = [], 0
    for document in documents(root):
        for line in blocks(document.read_text()):
            for words in commands(line):
                count += 1
                try:
                    parse(words)
                except (SystemExit, Exception) as error:
                    said = capsys.readouterr().err.strip().rpartition("\n")[2]
                    wrong.append(f"{document.name}: {line}\n    {said or error}")
    assert count > 30
    assert not wrong, "\n".join(wrong)


def test_every_command_named_in_a_sentence_exists(root):
    parser = cli._parser()
    (subparsers,) = (a for a in parser._actions if hasattr(a, "choices") and a.choices)
    known = {
        name: {option for action in sub._actions for option in action.option_strings}
        for name, sub in subparsers.choices.items()
    }
    for document in documents(root):
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`cnnlab ([^`]+)`", text):
            name, *rest = code.split()
            assert name in {*known, "--help"}, f"{document.name}: cnnlab {code}"
            options = {w.strip("[]").partition("=")[0] for w in rest if w.startswith("--")}
            options = {o for o in options if not re.match(r"--(config|model|data)\.", o)}
            assert options <= known.get(name, set()), f"{document.name}: cnnlab {code}"


def test_every_relative_link_and_file_exists(root):
    for document in documents(root):
        text = document.read_text()
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path = link.partition("#")[0]
            if path and "://" not in path:
                assert (document.parent / path).exists(), f"{document.name}: {link}"
        for file in re.findall(r"\b(?:experiments|configs|notebooks)/\w+\.(?:py|ipynb)\b", text):
            assert file in MADE_BY_THE_READER or (root / file).exists(), f"{document.name}: {file}"


# --- the notebook --------------------------------------------------------------------------------

EXPERIMENT = '''"""A small quickstart."""
from cnnlab.sweep import Experiment
from configs import lenet5_fashion_mini


def get_experiment():
    return Experiment(
        base=lenet5_fashion_mini.get_config(),
        rows={"one": {}, "two": {"optim.learning_rate": 0.01}},
        seeds=range(2),
        baseline="one",
        columns=("top1", "parameters", "seconds"),
    )
'''
CONFIG = '''"""A tiny recipe under the name of the one that the notebook uses."""
from cnnlab import config


def get_config(argument=""):
    return config.base(
        model="simple_conv", data="digits", optim={"learning_rate": 0.02},
        train={"duration": "4 steps", "batch_size": 64},
    )
'''


@pytest.fixture
def notebook(root):
    return json.loads((root / "notebooks/quickstart.ipynb").read_text())


def test_the_notebook_is_nbformat_4_without_outputs(notebook):
    assert notebook["nbformat"] == 4
    assert notebook["nbformat_minor"] >= 5
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"[\w-]{1,64}", each) for each in identifiers)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None
            assert cell["outputs"] == []
        assert set(cell) == wanted
        lines = cell["source"]
        assert 0 < len(lines) <= 24
        assert all(line.endswith("\n") for line in lines[:-1])
        assert max(map(len, lines)) <= 101


class Notebook:
    """Runs code cells as IPython would, but with this environment's commands and no installing."""

    def __init__(self):
        self.names, self.shown, self.ran = {}, [], []
        self.names["_shell"] = self.shell

    def run(self, source):
        first, _, rest = source.partition("\n")
        if first.startswith("%%writefile "):
            with open(first.split()[1], "w") as file:
                file.write(rest)
            return
        lines = [
            re.sub(r"^(\s*)([!%])(.*)$", lambda m: f"{m[1]}_shell({m[3]!r})", line)
            for line in source.splitlines()
        ]
        exec("\n".join(lines), self.names)

    def shell(self, line):
        line = re.sub(r"\$([A-Z]+)", lambda m: str(self.names[m[1]]), line)
        self.ran.append(line)
        tool, *words = shlex.split(line)
        if tool == "cnnlab":
            assert cli.main(words) == 0, line
        elif tool == "python":
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
        else:
            assert tool == "pip"
            if words[0] == "install":
                assert "--constraint" in words  # the image's own JAX must stay


@pytest.fixture
def own_configs():
    """Forgets the modules of `configs` before a test that has others, and those after it."""

    def forget():
        names = [name for name in sys.modules if name.split(".")[0] == "configs"]
        return {name: sys.modules.pop(name) for name in names}

    known = forget()
    yield
    forget()
    sys.modules.update(known)


@pytest.mark.usefixtures("own_configs")
def test_the_notebook_runs(notebook, root, tmp_path, monkeypatch, capsys):
    for folder, name, text in (
        ("experiments", "quickstart.py", EXPERIMENT),
        ("configs", "lenet5_fashion_mini.py", CONFIG),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny = doctor.Work(matrix=16, images=(2, 8, 8, 64), copy=4096, calls=1)
    monkeypatch.setitem(doctor.WORK, "cpu", tiny)
    # The one kind of figure that the notebook shows; drawing all takes longer than training.
    draw = figures.write_all
    monkeypatch.setattr(
        figures, "write_all", lambda *given, which: draw(*given, which=("score_cost",))
    )
    machine = Notebook()
    display = types.SimpleNamespace(
        display=machine.shown.append,
        Markdown=lambda path: Path(path).read_text(),
        Image=lambda path: Path(path).stat().st_size,
    )
    monkeypatch.setattr(
        os.path,
        "isdir",
        lambda path, real=os.path.isdir: (
            not path.startswith(("/kaggle", "/content")) and real(path)
        ),
    )
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            with monkeypatch.context() as patched:
                if "IPython" in source:  # and only there: matplotlib looks for it, too
                    patched.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
                    patched.setitem(sys.modules, "IPython.display", display)
                machine.run(source)
    table, figure = machine.shown
    assert "| two |" in table
    assert figure > 1000
    assert (tmp_path / "results/learning_rates/table.md").exists()
    assert sum("unfinished" in line for line in capsys.readouterr().out.splitlines()) == 0
    # The notebook's second experiment has a row of the first one, which is not trained again.
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 4 + 4
    assert [line.split()[:2] for line in machine.ran if line.startswith("cnnlab")] == [
        ["cnnlab", "doctor"],
        ["cnnlab", "table"],
        ["cnnlab", "table"],
        ["cnnlab", "list"],
    ]
