"""``lightning-muon advise``: on spectra made up, and from a run to the optimizer that its code builds."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lightning_muon as lm
from lightning_muon.advising import Need, advise
from lightning_muon.advising.config import patterns, snippet
from lightning_muon.advising.observed import observe
from lightning_muon.advising.places import Place, places
from lightning_muon.cli import main
from lightning_muon.logs import LogError, ModelDescription, ParameterDescription, layers
from lightning_muon.orthogonalize import Auto, orthogonalization_flops, polynomial_sequence
from tests.lightning_runs import AwkwardLightningModule, trainer

AUTO = Auto()
SQUARE = ParameterDescription(((64, 64, 1),), "polar_express5", "float32")


def need(name="w", sigma=0.05, place=None, description=SQUARE, rank=16.0, **others):
    sigmas = {95: sigma, **{int(key[1:]): value for key, value in others.items()}}
    return Need(name, place or Place(name), description, sigmas, rank)


def test_steps_are_the_fewest_that_reach_the_quantile():
    for steps in range(2, 8):
        (found,) = advise([need(sigma=AUTO.reach(steps) * 1.001)], 95, AUTO)
        assert found.steps == steps
        (found,) = advise([need(sigma=AUTO.reach(steps) * 0.999)], 95, AUTO)
        assert found.steps == steps + 1
        sequence = polynomial_sequence(found.orthogonalization)
        assert 1 - AUTO.band - 1e-3 <= sequence(AUTO.reach(steps) * 0.999) <= 1 + AUTO.band + 1e-3


def test_precision_bounds_what_is_lifted():
    bfloat16 = ParameterDescription(((64, 256, 1),), "polar_express5", "bfloat16")
    (low,) = advise([need(sigma=1e-12, description=bfloat16)], 95, AUTO)
    floor = AUTO.floor((64, 256), torch.bfloat16) * 16**0.25
    assert low.floor == pytest.approx(floor)
    assert AUTO.reach(low.steps) <= floor < AUTO.reach(low.steps - 1)
    (exact,) = advise([need(sigma=1e-12)], 95, AUTO)
    assert exact.steps == AUTO.most_steps


def test_the_neediest_parameter_decides_for_its_place():
    place = Place("layers.*.w", (0, 1))
    easy, hard = need("layers.0.w", 0.1, place), need("layers.1.w", 0.01, place)
    (found,) = advise([easy, hard], 95, AUTO)
    assert found.steps == advise([hard], 95, AUTO)[0].steps > advise([easy], 95, AUTO)[0].steps
    assert found.sigma == 0.01
    each = orthogonalization_flops(64, 64, polynomial_sequence(found.orthogonalization))
    assert found.flops == 2 * each
    assert found.flops_of_run == 2 * orthogonalization_flops(64, 64, polynomial_sequence("polar_express5"))


def test_what_stays_below_lies_between_logged_quantiles():
    lower = AUTO.reach(4)
    quantiles = {"q50": 3 * lower, "q75": 1.5 * lower, "q90": lower / 2}
    (found,) = advise([need(sigma=lower / 4, **quantiles)], 75, AUTO)
    assert found.steps == 4
    assert found.left_below == pytest.approx((0.10, 0.25))
    (found,) = advise([need(sigma=lower / 4, **quantiles)], 95, AUTO)
    assert found.left_below == pytest.approx((0, 0.05))


def test_places_are_types_and_quarters():
    names = [f"layers.{block}.{kind}" for block in range(8) for kind in ("wq", "experts.0.up", "experts.1.up")]
    found = places([*names, "final.proj"])
    assert found["final.proj"] == Place("final.proj")
    assert found["layers.5.wq"] == Place("layers.*.wq", (4, 5))
    assert found["layers.4.experts.1.up"] == found["layers.5.experts.1.up"] == Place("layers.*.experts.1.up", (4, 5))
    assert found["layers.4.experts.0.up"] == Place("layers.*.experts.0.up", (4, 5))
    assert [Place("t", blocks).depth for blocks in ((), (3,), (4, 5), (1, 3))] == ["–", "3", "4-5", "1,3"]


def test_layers_of_a_sequential_in_a_block_are_apart_as_in_fit():
    names = [f"blocks.{block}.mlp.{number}.weight" for block in range(4) for number in (0, 2)]
    of = places(names)
    assert {name: place.type for name, place in of.items()} == {name: one.type for name, one in layers(names).items()}
    sigma = {name: 0.3 if ".mlp.0." in name else 0.01 for name in names}
    few, many = (advise([need(sigma=one)], 95, AUTO)[0].steps for one in (0.3, 0.01))
    found = patterns(advise([need(name, sigma[name], of[name]) for name in names], 95, AUTO))
    assert found == {r"^blocks\.\d+\.mlp\.0\.weight$": few, r"^blocks\.\d+\.mlp\.2\.weight$": many}


def test_patterns_match_their_parameters_and_no_others():
    names = [f"layers.{block}.{kind}.weight" for block in range(16) for kind in ("wq", "ex.0.up", "ex.1.up")]
    names += ["proj.weight"]
    of = places(names)
    sigma = {name: 0.3 if of[name].blocks[:1] == (0,) else 0.02 for name in names}
    sigma |= {name: 0.02 for name in names if "wq" in name}
    advices = advise([need(name, sigma[name], of[name]) for name in names], 95, AUTO)
    wanted = {name: one.steps for one in advices for name in (need.name for need in one.needs)}
    found = patterns(advices)
    assert sum("wq" in pattern for pattern in found) == 1  # all blocks alike
    assert sum("ex\\.0" in pattern for pattern in found) == 2  # the first quarter, and the rest
    for name in [*names, "layers.1.wq.weight.more", "a.layers.0.ex.0.up.weight"]:
        matching = {steps for pattern, steps in found.items() if re.search(pattern, name)}
        assert matching == ({wanted[name]} if name in wanted else set())


def write_run(folder, series, logger=CSVLogger, parameters=None, prefix="muon/momentum_", every=10):
    """``series`` has values by family and parameter, one per logged step."""
    log = logger(folder, name="run", version="")
    for step in range(max(map(len, series.values()))):
        values = {f"{prefix}{key}": one[step] for key, one in series.items() if step < len(one)}
        log.log_metrics(values, step=every * (step + 1))
    log.finalize("success")
    ModelDescription(1000, parameters or {"w": SQUARE}).write(log.log_dir)
    return folder


SERIES = {
    "q95/w": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.02, 0.04],
    "q50/w": [0.5] * 8,
    "participation_rank/w": [1.0] * 6 + [16.0, 16.0],
}


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_lowest_of_the_last_quarter_counts(tmp_path, logger):
    found = observe(write_run(tmp_path, SERIES, logger), 95)
    assert found.steps == (70, 80)
    assert list(found.needs[0].by_step) == [70, 80]
    assert found.needs[0].by_step[70] == pytest.approx((0.04, 16))
    assert found.needs[0].by_step[80] == pytest.approx((0.08, 16))
    assert found.needs[0].sigmas == pytest.approx({95: 0.02 * 2, 50: 0.5 * 2})
    assert found.needs[0].participation_rank == 16


def test_the_lowest_of_a_stack_counts(tmp_path):
    series = {**SERIES, "q95/w.min": [0.01] * 8, "participation_rank/w.min": [1.0] * 8}
    assert observe(write_run(tmp_path, series), 95).needs[0].sigmas[95] == pytest.approx(0.01)


def test_steps_that_say_nothing_do_not_count(tmp_path):
    series = {**SERIES, "q95/w": [*SERIES["q95/w"][:6], math.nan, 0.04]}
    found = observe(write_run(tmp_path, series), 95)
    assert found.needs[0].sigmas[95] == pytest.approx(0.08)


def test_clear_errors(tmp_path, capsys):
    run = write_run(tmp_path / "a", SERIES)
    with pytest.raises(LogError, match="see to --include and --exclude"):
        observe(run, 95, include="nowhere")
    with pytest.raises(LogError, match="no muon/momentum_q90"):
        observe(run, 90)
    write_run(tmp_path / "b", {**SERIES, "q95/w": [*SERIES["q95/w"][:-1], 0.041]})
    with pytest.raises(LogError, match="several runs: give the folder of one"):
        observe(tmp_path, 95)
    with pytest.raises(LogError, match="train with MomentumSpectrumMonitor"):
        observe(write_run(tmp_path / "c", {"w": [1.0]}, prefix="muon/weight_rms/"), 95)
    assert main(["advise", str(tmp_path / "nowhere")]) == 2
    assert "advise: error" in capsys.readouterr().err
    for arguments in (["--band", "0.9"], ["--band", "wide"], ["--include", "("], ["--quantil", "q75", "q80"]):
        with pytest.raises(SystemExit):
            main(["advise", str(run), *arguments])
        message = capsys.readouterr().err
        assert message.startswith("usage: lightning-muon advise ")
        assert "expected a" in message or "unrecognized arguments: q80" in message


def test_table_and_json_say_the_same(tmp_path, capsys):
    parameters = {"w": SQUARE, "x": ParameterDescription(((8, 16, 3),), "auto", "float32")}
    run = write_run(tmp_path, SERIES, parameters=parameters)
    path = tmp_path / "out" / "advice.json"
    assert main(["advise", str(run), "--quantile", "q95", "--json", str(path)]) == 0
    text, found = capsys.readouterr().out, json.loads(path.read_text())
    (advice,) = found["advice"]
    steps = Auto().choose(0.04, 0.0)
    assert advice["steps"] == steps
    row = next(re.split(r"\s{2,}", line) for line in text.splitlines() if line.startswith("w "))
    assert row == ["w", "–", "1 of 64x64", "0.04", str(steps), "5", "≤ 5%", f"{advice['flops']['advised'] / 1e9:.3f}"]
    assert found["unknown"] == ["x"]
    assert "left as it is: 1 parameter (x)." in text
    assert found["snippet"] in text
    saved = found["flops"]["saved"] / found["flops"]["run"]
    assert f"{saved:.1%} less" in text
    assert 'orthogonalization="auto"' in text
    assert main(["advise", str(run), "--quantile", "q50", "--band", "0.3"]) == 0
    assert f" {Auto(band=0.3).choose(1.0, 0.0)} " in capsys.readouterr().out


def warnings_of(capsys, run, *arguments):
    assert main(["advise", str(run), "--quantile", "q95", "--json", str(run / "advice.json"), *arguments]) == 0
    found = json.loads((run / "advice.json").read_text())["warnings"]
    text = capsys.readouterr().out
    assert all(f"\n  {warning}\n" in text for warning in found)
    assert ("\nwarnings\n" in text) == bool(found)
    return found


def test_warnings_of_few_and_early_steps_and_of_spectra_that_breathe(tmp_path, capsys):
    series = {**SERIES, "q95/w": [*SERIES["q95/w"][:6], 0.1, 0.01]}
    few, early, breathing = warnings_of(capsys, write_run(tmp_path / "short", series))
    assert few.startswith("the last quarter of the logged steps is 2 steps: ")
    assert early.startswith("the last logged step is 80: ")
    fewest, most = (AUTO.choose(sigma, 0.0) for sigma in (0.2, 0.02))
    assert fewest < most
    assert breathing.endswith(f": w ({fewest} to {most})")
    (few,) = warnings_of(capsys, write_run(tmp_path / "one", {key: [1.0] * 4 for key in SERIES}, every=50))
    assert "is 1 step: " in few
    assert warnings_of(capsys, write_run(tmp_path / "long", {key: [1.0] * 20 for key in SERIES})) == []


@pytest.mark.parametrize("last", [0.04, math.nan])
def test_one_training_of_two_loggers_is_read_once(tmp_path, capsys, last):
    series = {**SERIES, "q50/w": [0.123456789] * 7 + [last]}
    for name, logger in (("a", CSVLogger), ("b", TensorBoardLogger)):
        write_run(tmp_path / name, series, logger)
    found = observe(tmp_path, 95)
    assert [path.parent.name for path in (found.run, *found.repeats)] == ["a", "b"]
    assert warnings_of(capsys, tmp_path)[0].endswith("repeats the figures of this run: left out")
    write_run(tmp_path / "c", {**series, "q95/w": [*SERIES["q95/w"], 0.04]})
    with pytest.raises(LogError, match="several runs"):
        observe(tmp_path, 95)


def test_a_run_of_auto_is_counted_by_the_steps_that_it_took(tmp_path, capsys):
    parameters = {
        name: ParameterDescription(((64, 64, count),), "auto", "float32") for name, count in (("w", 1), ("x", 3))
    }
    series = {
        key: [0.5] * 4 for name in parameters for key in (f"momentum_q95/{name}", f"momentum_participation_rank/{name}")
    }
    run = write_run(tmp_path / "unknown", series, parameters=parameters, prefix="muon/")
    assert [need.steps_taken for need in observe(run, 95).needs] == [None, None]
    warnings_of(capsys, run)
    nominal = json.loads((run / "advice.json").read_text())["flops"]["run"]
    assert nominal == 4 * orthogonalization_flops(64, 64, AUTO.sequence(5))
    series |= {"ns_steps/w": [9, 9, 9, 3], "ns_steps/x": [4] * 4, "ns_steps/x.min": [2] * 4, "ns_steps/x.max": [7] * 4}
    run = write_run(tmp_path / "known", series, parameters=parameters, prefix="muon/")
    assert [need.steps_taken for need in observe(run, 95).needs] == [(3, 3, 3), (2, 4, 7)]
    path = tmp_path / "advice.json"
    assert main(["advise", str(run), "--quantile", "q95", "--json", str(path)]) == 0
    rows = {row[0]: row for row in (re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())}
    assert [rows[name][5] for name in parameters] == ["auto: 3", "auto: 2 to 7"]
    series |= {f"momentum_q95/{name}": [1e-3] * 4 for name in parameters}
    run = write_run(tmp_path / "low", series, parameters=parameters, prefix="muon/")
    assert main(["advise", str(run), "--quantile", "q95"]) == 0
    text = capsys.readouterr().out
    assert " more.\n" in text
    assert "own sequences do not reach so far" not in text  # which is said of sequences that were fixed
    found = json.loads(path.read_text())
    expected = (orthogonalization_flops(64, 64, AUTO.sequence(steps)) for steps in (3, 4))
    assert found["flops"]["run"] == sum(count * flops for count, flops in zip((1, 3), expected, strict=True))
    taken = found["advice"][1]["parameters"]["x"]["ns_steps_of_run"]
    assert taken == {"fewest": 2, "median": 4, "most": 7}


class Convolutional(nn.Module):
    """Routes that only the types of the modules give away, and a tied weight."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(2))
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight


def snippet_of(needs):
    scope = {}
    exec(snippet(advise(needs, 95, AUTO)), scope)
    return scope


def test_code_keeps_the_routes_of_the_module():
    model = Convolutional()
    of = places(name for name, _ in model.named_parameters())
    names = ["blocks.0.weight", "blocks.1.weight", "one.weight"]
    sigma = dict(zip(names, (0.3, 0.01, 0.3), strict=True))
    scope = snippet_of([need(name, sigma[name], of[name]) for name in names])
    optimizer = scope["build"](model, lr=1e-3, weight_decay=0.3)
    assert {group["weight_decay"] for group in optimizer.param_groups} >= {0.3}
    assert dict(optimizer.routes) == dict(lm.Muon(model).routes)
    steps = {
        name: group["orthogonalization"]["steps"]
        for group in optimizer.param_groups
        if isinstance(group["orthogonalization"], dict)
        for name in group["param_names"]
        if optimizer.routes[name].algorithm == "muon"
    }
    few, many = (advise([need(sigma=one)], 95, AUTO)[0].steps for one in (0.3, 0.01))
    assert steps == {"blocks.0.weight": few, "blocks.1.weight": many, "one.weight": few}
    with pytest.raises(ValueError, match="no parameter's name matches"):
        scope["param_groups"](nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:.*end below 0.1")  # a toy with few directions
def test_from_a_run_to_the_optimizer(tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    monitor = lm.MomentumSpectrumMonitor(every_n_steps=1, exclude="one_")
    module = AwkwardLightningModule(num_steps=8)
    trainer(8, "auto", accelerator="cpu", logger=logger, callbacks=[monitor]).fit(module)
    assert main(["advise", str(tmp_path), "--quantile", "q50", "--json", str(tmp_path / "advice.json")]) == 0
    text = capsys.readouterr().out
    pasted = text[text.index("import re\n") :]
    scope = {}
    exec(pasted, scope)
    assert "return build(self, lr=...)" in pasted
    optimizer = scope["build"](module, lr=1e-3)
    table = optimizer.explain()
    advice = json.loads((tmp_path / "advice.json").read_text())["advice"]
    assert len({one["steps"] for one in advice}) > 1
    for one in advice:
        for name in one["parameters"]:
            group = next(group for group in optimizer.param_groups if name in group["param_names"])
            assert group["orthogonalization"] == one["orthogonalization"]
            assert str(one["orthogonalization"]) in table
    rest = next(group for group in optimizer.param_groups if "model.one_row.weight" in group["param_names"])
    assert "orthogonalization" not in rest or not isinstance(rest["orthogonalization"], dict)
    module.model.loss(module.batches[0]).backward()
    optimizer.step()
    # the advised sequences do what was promised, on the spectra of the last step's kind
    for one in advice:
        sequence = polynomial_sequence(one["orthogonalization"])
        if one["sigma_schatten4"] > one["noise_floor_schatten4"] and one["steps"] < AUTO.most_steps:
            assert sequence(one["sigma_schatten4"]) >= 1 - 0.1 - 1e-3


def test_documents_show_the_code():
    document = (Path(__file__).parents[2] / "docs" / "orthogonalization.md").read_text()
    shown = re.search(r"\ndef param_groups.*?\ndef build.*?\n(?=\n\n)", document, flags=re.DOTALL).group()
    assert shown in "\n" + snippet(advise([need()], 95, AUTO))
