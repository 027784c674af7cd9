"""The command line: what it prints, and what it says to input that it cannot use."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_muon.cli import main
from lightning_muon.planning.costs import SCHEMES

FOLDER = Path(__file__).parents[2] / "examples" / "moe_lm" / "configs"
SHAPES = "embed_tokens.weight,50x16\nlayers.0.w.weight,16x48\nlayers.1.w.weight,48x16\nlayers.2.w.weight,16x16\n"


@pytest.fixture
def shapes(tmp_path):
    (tmp_path / "shapes.csv").write_text(SHAPES)
    return str(tmp_path / "shapes.csv")


def plan(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_table_shows_what_json_says(shapes, capsys):
    options = ("--shapes", shapes, "--world-size", "2", "--tokens-per-rank", "64", "--link-speed", "0.001")
    found, text = json.loads(plan(capsys, *options, "--json")), plan(capsys, *options)
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    cells = {row[0]: row[1:] for row in rows if len(row) == len(SCHEMES) + 1}
    assert cells.pop("per rank and step") == list(SCHEMES.values())
    schemes = list(found["schemes"].values())
    for title, shown in cells.items():
        name, _, of_ranks = title.partition(", ")
        if title.startswith("exposed") or title == "whole step":
            key = {"exposed, together": "exposed", "whole step": "step"}.get(title, title.removeprefix("exposed: "))
            expected = [f"{1e3 * scheme['seconds'][key]:,.2f} ms" for scheme in schemes]
        elif name == "Newton–Schulz":
            expected = [f"{scheme['newton_schulz_flops'][of_ranks] / 1e9:,.3f} GFLOP" for scheme in schemes]
        else:
            expected = [f"{scheme[f'{name}_bytes'][of_ranks] / 2**20:,.2f} MiB" for scheme in schemes]
        assert shown == expected, title
    assert len(cells) == 13
    for rank in found["schemes"]["muon_zero1"]["ranks"]:
        shown = next(row for row in rows if row[0] == str(rank["rank"]))
        assert shown[1] == f"{rank['state_bytes'] / 2**20:,.2f} MiB"
        assert shown[-1] == ", ".join(f"{count} of {shape}" for shape, count in rank["matrices"].items())


def test_json_names_what_each_rank_owns(shapes, capsys):
    found = json.loads(plan(capsys, "--shapes", shapes, "--world-size", "3", "--json"))
    owned = sorted((e["parameter"], e["start"], e["stop"]) for rank in found["owned"] for e in rank)
    ends = {}
    for name, start, stop in owned:
        assert start == ends.get(name, 0)
        ends[name] = stop
    sizes = dict(line.split(",") for line in SHAPES.splitlines())
    assert ends == {name: int(size.split("x")[0]) * int(size.split("x")[1]) for name, size in sizes.items()}
    assert sum(entry["matrices"] for rank in found["owned"] for entry in rank) == found["model"]["matrices"] == 3
    assert found["model"]["trained_parameters"] == sum(ends.values())


def test_bfloat16_halves_the_bytes_and_not_the_momentum(shapes, capsys):
    full, half = (
        json.loads(plan(capsys, "--shapes", shapes, "--world-size", "2", "--json", "--dtype", dtype))["schemes"]
        for dtype in ("float32", "bfloat16")
    )
    assert full["muon_zero1"]["sent_bytes"]["sum"] == 2 * half["muon_zero1"]["sent_bytes"]["sum"]
    muon, adamw = 16 * 48 * 2 + 16 * 16, 50 * 16
    assert full["muon_ddp"]["state_bytes"]["mean"] == 4 * muon + 8 * adamw
    assert half["muon_ddp"]["state_bytes"]["mean"] == 4 * muon + 4 * adamw


def test_frozen_parameters_send_nothing(capsys, tmp_path, monkeypatch):
    (tmp_path / "partly.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    print('not for the JSON')\n"
        "    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))\n"
        "    model[0].requires_grad_(False)\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)  # where --model is searched too
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    found = json.loads(plan(capsys, "--model", "partly.build", "--world-size", "2", "--json"))
    assert found["model"]["frozen_parameters"] == found["model"]["trained_parameters"] == 64
    assert found["schemes"]["adamw_ddp"]["sent_bytes"]["largest"] == 64 * 4


def test_a_mixture_of_16_billion_over_64_ranks(capsys):
    """On the meta device: with memory behind it, this could not pass."""
    configs = [f"--config={FOLDER / name}.yaml" for name in ("small", "moonlight_16b_a3b")]
    options = ["--model", "examples.moe_lm.model.MoELM", *configs, "--world-size", "64", "--json"]
    found = json.loads(plan(capsys, *options))
    assert found["model"]["optimizer"] == "configure_optimizers()"
    assert found["model"]["matrices"] == 5207
    ours = found["schemes"]["muon_zero1"]
    assert ours["newton_schulz_flops"]["sum"] == found["schemes"]["muon_ddp"]["newton_schulz_flops"]["mean"]
    assert ours["newton_schulz_flops"]["largest_over_mean"] <= 1.05
    assert ours["state_bytes"]["largest_over_mean"] <= 1.05
    assert main(["plan", *options, "--tokens-per-rank", "8192"]) == 2
    assert "--active-parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--world-size 2", "give the model by one of"),
        ("--world-size 2 --shapes {shapes} --hf x", "give the model by one of"),
        ("--world-size 2 --shapes nowhere.csv", "nowhere.csv"),
        ("--world-size 2 --config nowhere.yaml", "nowhere.yaml"),
        ("--world-size 2 --config {shapes}", "expected what LightningCLI takes"),
        ("--world-size 2 --shapes {shapes} --device abacus", "'abacus' is not known"),
        ("--world-size 2 --shapes {shapes} --args {{}}", "--args are the arguments of --model"),
        ("--world-size 2 --model torch.nn.Linear --args {{}}", "in_features"),
        ("--world-size 2 --model Linear", "cannot import 'Linear'"),
        ('--world-size 2 --model torch.nn.LazyLinear --args {{"out_features":4}}', "'weight' gets its shape"),
        ("--world-size 2 --model torch.manual_seed --config {configs}/tiny.yaml", "tiny.yaml: "),
        ("--world-size 2 --model torch.nn.Linear --config {configs}/tiny.yaml", "tiny.yaml: "),
    ],
)
def test_errors_are_one_message_and_status_2(arguments, message, shapes, capsys):
    assert main(["plan", *arguments.format(shapes=shapes, configs=FOLDER).split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lightning-muon plan: error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", ["", "plan", "plan --world-size 0", "plan --world-size 2 --muon []", "fly"])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_module_and_help(shapes):
    command = [sys.executable, "-m", "lightning_muon", "plan"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "2 x active parameters x tokens" in done.stdout
    done = subprocess.run([*command, "--world-size", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
