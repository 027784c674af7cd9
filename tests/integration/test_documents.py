"""The README is true: its Python runs, its links lead somewhere, its commands exist and print what it shows."""

import ast
import contextlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_muon as lm
from benchmarks.claims.description import Run
from examples.moe_lm.demo import LEARNING_RATES
from lightning_muon.cli import main
from lightning_muon.orthogonalize import available_sequences, polynomial_sequence

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "moe_lm" / "README.md",
]
BLOCKS = [  # with what they print, where that is shown below
    match.groups()
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for match in re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", document.read_text(), flags=re.DOTALL)
]
CONSOLE_BLOCKS = [
    block
    for document in DOCUMENTS
    for block in re.findall(r"```console\n(.*?)```", document.read_text(), flags=re.DOTALL)
]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The folders in which the blocks have run."""
    folders = []
    for block, _ in BLOCKS:
        folder = tmp_path_factory.mktemp("block")
        (folder / "train.py").write_text(block.replace("devices=8", 'devices=1, accelerator="cpu"'))
        folders.append(folder)
    script = Path(__file__).with_name("blocks_script.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, folders)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=280) == 0
    finally:  # a block that hangs is a grandchild
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return folders


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number, blocks):
    folder, shown = blocks[number], BLOCKS[number][1]
    assert (folder / "code").exists(), (folder / "err").read_text()
    assert (folder / "code").read_text() == "0", (folder / "err").read_text()
    assert shown is None or (folder / "out").read_text() == shown


@pytest.mark.parametrize("block", CONSOLE_BLOCKS, ids=range(len(CONSOLE_BLOCKS)))
def test_console_block_shows_what_the_command_prints(block, capsys, monkeypatch):
    command, shown = block.split("\n", maxsplit=1)
    program, *arguments = shlex.split(command.removeprefix("$ "))
    monkeypatch.chdir(ROOT)
    assert program == "lightning-muon"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    if shown.endswith("\n…\n"):  # the rest is left out
        shown = shown.removesuffix("…\n")
        printed = printed[: len(shown)]
    assert printed == shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + "/" + path.name)
def test_links_resolve(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"^make (\w+)", document.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("folder", ["lightning_muon", "benchmarks"])
def test_map_of_the_house_names_what_is_there(folder):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    house = re.search(rf"```\n{folder}/\n(.*?)```", text, flags=re.DOTALL).group(1)
    named = set(re.findall(r"\b(\w+)\.py\b", house))
    present = {path.stem for path in (ROOT / folder).rglob("*.py")} - {"__init__", "__main__"}
    named -= {"__main__"}
    assert named == present, named ^ present


def test_table_of_sequences_is_the_registry():
    table = (ROOT / "docs" / "orthogonalization.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| (\d+) \| ([\d.]+) \| ([\d.]+) – ([\d.]+) \| ([\d.]+) \|$", table, flags=re.MULTILINE
    )
    found = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    sequences = [polynomial_sequence(name) for name in available_sequences() if name != "exact"]
    assert found == {s.name: (len(s.steps), *s.guarantee, s.safety) for s in sequences}


def test_messages_of_the_troubleshooting_page_are_messages_of_the_library():
    """Quoted beginnings of messages, cut where the page or the message leaves something open."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [one for one in re.findall(r"^\*\*`([^`]+)`", page, flags=re.MULTILINE) if " " in one]
    lightnings = "You selected an invalid strategy name"
    pieces = [piece.strip() for one in quoted if not one.startswith(lightnings) for piece in one.split("…")]
    trees = [ast.parse(path.read_text()) for path in (ROOT / "lightning_muon").rglob("*.py")]
    docstrings = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    literals = [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
    ]
    assert len(quoted) >= 9
    assert [piece for piece in pieces if " " in piece and not any(piece in literal for literal in literals)] == []


def test_wheel_holds_the_package_alone(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"lightning_muon"}
    assert "lightning_muon/py.typed" in names


def results_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_figures_in_prose_are_the_committed_ones():
    """Those outside the tables that `write_docs` writes; lines may break anywhere."""

    def page(path):
        return " ".join((ROOT / path).read_text().split())

    of_demo = results_of("muon_vs_adamw")
    muon, adamw = (f"{one['val_bpb_mean']:.3f} ± {one['val_bpb_sd']:.3f}" for one in of_demo.values())
    assert f"{muon} bits per byte by Muon and {adamw} by AdamW" in page("benchmarks/results/README.md")
    assert {name: (one["lr"], one["adamw_lr"]) for name, one in of_demo.items()} == LEARNING_RATES

    short, long = results_of("steps_to_loss"), results_of("steps_to_loss_longer")
    short_gain, long_gain = (f"{one['one_rate_against_adamw']['mean']:.3f}" for one in (short, long))
    assert (
        f"gained it {short_gain} nats per byte over {short['steps']} steps, and {long_gain} over {long['steps']:,}."
        in page("docs/troubleshooting.md")
    )
    for of_lengths in (short["tuning"], long["tuning"]):
        assert of_lengths["muon"]["lr"] == 2 * of_lengths["adamw"]["lr"]
        assert of_lengths["muon"]["adamw_lr"] == 2 * of_lengths["muon"]["lr"]

    of_machine = results_of("strategies")["by_processes"]
    one_machine = page("benchmarks/results/README.md")
    two, eight = (
        [round(of_machine[n][name]["median_ms"]) for name in ("Muon on every process, DDP", "muon_zero1", "AdamW, DDP")]
        for n in ("2", "8")
    )
    assert f"{two[0]} and {two[1]} ms, where AdamW takes {two[2]}" in one_machine
    assert f"{eight[0]} and {eight[1]} ms on eight" in one_machine

    of_decay = results_of("weight_decay")
    with_decay, without = (
        statistics.mean(by_step[-1][1] for by_step in of_decay["weight_rms"][arm].values())
        for arm in ("long, decay", "long, none")
    )
    rate, weight_decay = of_decay["tuning"]["muon"]["lr"], Run.weight_decay
    expected = 0.2 * math.sqrt(rate / (2 * weight_decay))
    text = page("docs/hyper-parameters.md")
    assert f"rate of {rate}, it is {with_decay:.2f} and not {expected:.2f}, and grows to {without:.2f} without" in text
    width = of_decay["model"]["hidden_size"]
    assert f"at width {width} Muon's best rate is twice AdamW's, and the embedding's and the head's twice that" in text


def test_table_of_arguments_has_all_of_them():
    page = (ROOT / "docs" / "hyper-parameters.md").read_text()
    table = page[page.index("## All arguments") : page.index("## When not to use Muon")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(inspect.signature(lm.Muon).parameters) - {"params"}
