"""The layer rule: a file imports from lower layers and its own folder only, without circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cnnlab"
PLUGINS = ("models", "augment", "attacks", "tasks", "data")
LAYERS = (
    ("types", "keys", "registry", "geometry", "encoding", "backend", "parallel", "ops"),
    ("config", "layers"),
    (*PLUGINS, "describe"),
    (
        "pipeline",
        "record",
        "checkpoint",
        "faults",
        "packing",
        "weights",
        "pretrained",
        "exporting",
        "predict",
        "doctor",
    ),
    ("evaluation", "reporting"),
    ("training",),
    ("sweep",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """The modules of cnnlab that a module's source imports, `cnnlab.a.b` as written."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules(package: Path = PACKAGE) -> dict[str, tuple[str, bool]]:
    """Module name -> (source, whether it is a package)."""
    found = {}
    for path in package.rglob("*.py"):
        parts = ("cnnlab", *path.relative_to(package).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found[name] = (path.read_text(), is_package)
    return found


def breaches(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Every import that breaks a rule."""
    wrong, edges = [], {}
    for module, (source, is_package) in sources.items():
        if module == "cnnlab":
            continue
        mine = module.split(".")[1]
        if mine not in LEVEL:
            wrong.append(f"{module}: no layer is given for {mine!r}")
            continue
        edges[module] = set()
        for target in imports(source, module, is_package):
            top = target.split(".")[0]
            if top in ("configs", "experiments", "tests"):
                wrong.append(f"{module} imports {top}")
            if top != "cnnlab" or target == "cnnlab.__version__":
                continue
            if target == "cnnlab":
                continue
            theirs = target.split(".")[1]
            known = target
            while known not in sources and "." in known:
                known = known.rpartition(".")[0]
            if known not in (module, "cnnlab"):
                edges[module].add(known)
            if theirs == mine:
                continue
            if theirs not in LEVEL:
                wrong.append(f"{module} imports {target}, which is no module of cnnlab")
            elif mine in PLUGINS and theirs in PLUGINS:
                wrong.append(f"{module}: a plug-in imports another plug-in folder, {target}")
            elif LEVEL[theirs] > LEVEL[mine]:
                wrong.append(f"{module} imports from a higher layer: {target}")
    return wrong + [f"a circle: {' -> '.join(path)}" for path in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every circle of imports, found depth first."""
    found, done = [], set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
            return
        if node not in done:
            for target in sorted(edges.get(node, ())):
                visit(target, [*path, node])
            done.add(node)

    for node in sorted(edges):
        visit(node, [])
    return found


def test_no_file_breaks_the_layer_rule():
    assert breaches(modules()) == []


@pytest.mark.parametrize(
    ("module", "line", "what"),
    [
        ("cnnlab.keys", "from cnnlab import config", "higher layer"),
        ("cnnlab.models.lenet", "from cnnlab.data import digits", "another plug-in folder"),
        ("cnnlab.training.loop", "import cnnlab.sweep.executor", "higher layer"),
        ("cnnlab.data.digits", "from ..training import loop", "higher layer"),
        ("cnnlab.cli", "from configs import lenet", "imports configs"),
        ("cnnlab.evaluation.scores", "def f():\n    from cnnlab import cli", "higher layer"),
        ("cnnlab.types", "from cnnlab import keys\nimport cnnlab.keys", "circle"),
        ("cnnlab.brand_new", "import jax", "no layer is given"),
    ],
)
def test_every_kind_of_breach_is_found(module, line, what):
    sources = modules()
    source, is_package = sources.get(module, ("", False))
    sources[module] = (f"{source}\n{line}\n", is_package)
    if what == "circle":
        sources["cnnlab.keys"] = ("from cnnlab import types\n", False)
    assert any(what in breach for breach in breaches(sources))
