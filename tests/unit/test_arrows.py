"""Imports go one way, as CONTRIBUTING says: a package imports from the layers below its own."""

import ast
from pathlib import Path

import lightning_muon

ROOT = Path(lightning_muon.__file__).parent
MODULES = "the modules of the root"
LAYERS = [
    {"pytorch"},
    {"fabric", "planning", "attention", "experts", "advising", "reporting", "scaling"},
    {"sharding", "monitoring"},
    {"checkpoint", "logs"},
    {MODULES},
    {"orthogonalize"},
]
FACADES = {"__init__.py", "__main__.py", "_register.py", "cli.py"}  # whose matter is to bring all of it together


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    layer = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    assert layer.keys() == {path.parent.name for path in ROOT.glob("*/__init__.py")} | {MODULES}
    wrong, seen = [], 0
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts
        if own[0] in FACADES:
            continue
        source = own[0] if len(own) > 1 else MODULES
        for name in imported(path):
            if name.startswith("lightning_muon."):
                part = name.split(".")[1]
                target = part if part in layer else MODULES
                seen += target != source
                if target != source and layer[target] <= layer[source]:
                    wrong.append((str(path.relative_to(ROOT)), name))
    assert seen > 100
    assert wrong == []
