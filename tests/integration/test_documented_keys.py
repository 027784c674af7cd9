"""The keys in docs/monitors.md are the keys that are logged: none more, none less."""

import re
from pathlib import Path

import lightning_muon as lm
from lightning_muon.monitoring.bounds import WeightBounds
from lightning_muon.monitoring.families import FAMILIES
from lightning_muon.monitoring.troubles import NOT_FINITE, judges
from tests.integration.test_monitors import events
from tests.lightning_runs import AwkwardLightningModule, trainer
from tests.processes import run_processes

DOCUMENT = (Path(__file__).parents[2] / "docs" / "monitors.md").read_text(encoding="utf-8")
HISTOGRAMS = {"muon/weight_singular_values", "muon/momentum_singular_values"}


def documented():
    """Families of keys: what stands before the name; ``momentum_q10`` is followed by its other quantiles."""
    found = set()
    for line in DOCUMENT.splitlines():
        for family, others in re.findall(r"`(muon/\w+?)/<name>`((?:, `q\d+`)*)", line):
            found.add(family)
            found |= {re.sub(r"q\d+$", other, family) for other in re.findall(r"q\d+", others)}
        found |= set(re.findall(r"`(muon/grad_norm\w*)`", line))
    return found


def alarms():
    section = DOCUMENT.split("## Alarms")[1].split("## ")[0]
    return set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))


def train(folder):
    from lightning.pytorch.loggers import TensorBoardLogger

    monitors = (lm.UpdateRMSMonitor, lm.WeightNormMonitor, lm.SpectrumMonitor, lm.MomentumSpectrumMonitor)
    trainer(
        2,
        logger=TensorBoardLogger(folder, name="tb", version=""),
        callbacks=[one(every_n_steps=1) for one in monitors],
        gradient_clip_val=1.0,
    ).fit(AwkwardLightningModule())


def test_the_keys_of_the_document_are_those_that_are_logged(tmp_path):
    run_processes(2, train, str(tmp_path))
    scalars, histograms = events(tmp_path)
    logged = {re.sub(r"^(muon/\w+)/.*", r"\1", tag) for tag in (*scalars, *histograms) if tag.startswith("muon/")}
    assert {tag.rpartition("/")[2] for tag in scalars if tag.startswith("muon/alarms/")} == alarms()
    assert logged - {"muon/alarms"} == documented()


def test_nothing_is_left_undocumented():
    assert documented() - HISTOGRAMS - {f"muon/grad_norm{which}" for which in ("", "_muon", "_adamw")} == {
        f"muon/{family}" for family in FAMILIES
    }
    assert alarms() == {NOT_FINITE, *(judge.kind for judge in judges(WeightBounds()))}
