"""``lightning-muon report``: what its page shows is what was logged."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_muon.cli import main
from lightning_muon.logs import ModelDescription, ParameterDescription
from lightning_muon.logs.rows import arrange
from lightning_muon.orthogonalize import Auto, polynomial_sequence
from lightning_muon.reporting.grid import color_limits, grid, thin
from lightning_muon.reporting.zone import failure_limits, failure_threshold

NAMES = [f"model.layers.{block}.{kind}.weight" for block in range(3) for kind in ("mlp.up", "attn.q")]
SQUARE = ParameterDescription(((64, 64, 1),), "polar_express5", "float32")
STEPS = range(10, 90, 10)


def synthetic(family, name, step):
    """A number of its own for each."""
    return 0.001 + 0.9 * (hash_of(family, name) + step) % 97 / 97


def hash_of(*texts):
    return sum(ord(character) * (place + 1) for place, character in enumerate("".join(texts)))


def write_run(folder, keys, logger=CSVLogger, parameters=None, steps=STEPS, value=synthetic):
    """A run whose value of a key at a step is ``value``."""
    log = logger(folder, name="run", version="")
    for step in steps:
        log.log_metrics({key: value(*key.rpartition("/")[::2], step) for key in keys}, step=step)
    log.finalize("success")
    if parameters is not None:
        ModelDescription(12345, parameters).write(log.log_dir)
    return folder


def keys_of(*families, names=NAMES):
    return [f"{family}/{name}" for family in families for name in names]


class Page(HTMLParser):
    """What a browser would see of the page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.charts, self.texts = [], {}, []
        self._title, self._inside = None, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        tag, attributes = self._inside or ("", {})
        if tag == "h3":
            self._title = data
        if tag == "script" and attributes.get("type") == "application/json":
            assert "<" not in data  # nothing in it can end the element
            self.charts[self._title] = json.loads(data)
        elif tag not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def numbers(packed):
    array = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    return array.reshape([int(size) for size in packed["shape"].split(", ")]) if "shape" in packed else array


def report(tmp_path, *arguments):
    path = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, arguments), "-o", str(path)]) == 0
    return Page(path)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_heat_maps_hold_what_was_logged(tmp_path, logger):
    titles = {
        "muon/update_rms": "Update RMS",
        "muon/weight_svd_entropy": "SVD entropy of the weights",
        "muon/momentum_q50": "Median singular value of the momentum",
        "muon/momentum_scaled_q50": "The same times √r",
        "muon/ns_fail_frac": "Directions that Newton–Schulz misses",
    }
    page = report(tmp_path, write_run(tmp_path / "a", keys_of(*titles), logger, dict.fromkeys(NAMES, SQUARE)))
    for family in titles:
        (figure,) = page.charts[titles[family]]
        (trace,) = figure["data"]
        assert trace["x"] == list(STEPS)
        assert trace["y"] == [name for kind in ("mlp.up", "attn.q") for name in NAMES if kind in name]
        found = numbers(trace["customdata"] if "momentum" in family else trace["z"])
        wanted = [[synthetic(family, name, step) for step in STEPS] for name in trace["y"]]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        labels = figure["layout"]["yaxis"]["ticktext"]
        assert labels == ["mlp.up  0", "1", "2", "attn.q  0", "1", "2"]
    (trace,) = page.charts[titles["muon/momentum_q50"]][0]["data"]
    np.testing.assert_allclose(numbers(trace["z"]), np.log10(numbers(trace["customdata"])), atol=1e-6)
    assert "12,345" in page.text


def test_plotly_knows_every_attribute(tmp_path):
    quantiles = [f"muon/momentum_q{percent}" for percent in (10, 25, 50, 75, 90, 95)]
    families = ("muon/update_rms", "muon/weight_rms", "muon/momentum_participation_rank", *quantiles)
    keys = [*keys_of(*families), "train/loss", "muon/grad_norm", "muon/alarms/logits"]
    one = write_run(tmp_path / "a", keys, parameters=dict.fromkeys(NAMES, SQUARE))
    other = write_run(tmp_path / "b", keys, value=lambda family, name, step: synthetic(family, name, step + 1))
    page = report(tmp_path, one, other)
    assert {"Alarms", "Loss", "Update RMS", "Weight RMS", "Spectrum of one matrix"} <= set(page.charts)
    for figures in page.charts.values():
        for figure in figures:
            go.Figure(figure)


def test_curves_hold_what_was_logged_and_each_once(tmp_path):
    keys = ["train/loss", "val_loss", "val/loss", "train/lossless", "muon/grad_norm", "muon/grad_norm_muon"]

    def value(family, name, step):
        key = f"{family}/{name}" if family else name
        return {"val/loss": 3.5, "val_loss": 3.5, "muon/grad_norm_muon": 0.0}.get(key, synthetic(family, name, step))

    page = report(tmp_path, write_run(tmp_path / "a", keys, value=value))
    lines = {line["name"]: line for line in page.charts["Loss"][0]["data"]}
    assert set(lines) == {"train/loss", "val/loss"}
    assert lines["train/loss"]["x"] == list(STEPS)
    np.testing.assert_allclose(numbers(lines["train/loss"]["y"]), [synthetic("train", "loss", s) for s in STEPS])
    assert [line["name"] for line in page.charts["Norm of the gradient"][0]["data"]] == ["muon/grad_norm"]
    page = report(tmp_path, tmp_path / "a", "--loss", "lossless")
    assert [line["name"] for line in page.charts["Loss"][0]["data"]] == ["train/lossless"]


def test_panels_show_median_and_range_over_blocks(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "a", keys_of("muon/weight_rms")))
    low, high, middle = page.charts["Weight RMS"][0]["data"][:3]  # of attn.q, the first by name
    names = [name for name in NAMES if "attn.q" in name]
    values = np.array([[synthetic("muon/weight_rms", name, step) for step in STEPS] for name in names])
    np.testing.assert_allclose(numbers(low["y"]), values.min(0), rtol=1e-6)
    np.testing.assert_allclose(numbers(high["y"]), values.max(0), rtol=1e-6)
    np.testing.assert_allclose(numbers(middle["y"]), np.median(values, 0), rtol=1e-6)


def spectrum_value(family, name, step):
    if family.endswith("participation_rank"):
        return 16.0
    if family == "muon/ns_steps":
        return 3.0 if step < 50 else 6.0
    lowest = 0.5 if name == NAMES[3] else 1.0
    return lowest / (1 + int(family.partition("_q")[2]))


@pytest.mark.parametrize("orthogonalization", ["keller5", {"name": "keller5", "norm": "schatten4"}, "auto", "exact"])
def test_spectra_and_where_the_sequence_fails(tmp_path, orthogonalization):
    percents = (10, 25, 50, 75, 90, 95)
    families = (*(f"muon/momentum_q{p}" for p in percents), "muon/momentum_participation_rank", "muon/ns_steps")
    description = ParameterDescription(((64, 64, 1),), orthogonalization, "float32")
    run = write_run(
        tmp_path / "a", keys_of(*families), parameters=dict.fromkeys(NAMES, description), value=spectrum_value
    )
    page = report(tmp_path, run)
    figures = page.charts["Spectrum of one matrix"]
    options = [(dict(attrs)["value"]) for tag, attrs in page.tags if tag == "option"]
    assert sorted(options) == sorted(map(str, range(len(NAMES))))
    assert len(figures) == len(NAMES)
    by_name = {trace["name"]: trace for trace in figures[0]["data"]}  # the lowest median is first
    for percent in percents:
        np.testing.assert_allclose(numbers(by_name[f"q{percent}"]["y"]), [0.5 / (1 + percent)] * len(STEPS), rtol=1e-6)
    if orthogonalization == "exact":
        assert "f(σ) < 0.1" not in by_name
        return
    for step, limit in zip(STEPS, numbers(by_name["f(σ) < 0.1"]["y"]), strict=True):
        if orthogonalization == "auto":
            sequence, norm = Auto().sequence(3 if step < 50 else 6), 16**-0.25
        else:
            sequence, norm = polynomial_sequence(orthogonalization), 1 if orthogonalization == "keller5" else 16**-0.25
        assert sequence(0.999 * limit / norm) < 0.1 <= sequence(1.001 * limit / norm)
    floor = by_name["floor"]["y"][0]
    assert math.log10(floor) == pytest.approx(figures[0]["layout"]["yaxis"]["range"][0])


@pytest.mark.parametrize("name", ["keller5", "you5", "polar_express5", "cubic5", "deepseek_v4"])
def test_all_below_the_threshold_fail(name):
    sequence = polynomial_sequence(name)
    threshold = failure_threshold(sequence)
    below = [10 ** (math.log10(threshold) - number / 200) for number in range(1, 800)]
    assert all(sequence(sigma) < 0.1 for sigma in below)
    assert sequence(threshold * (1 + 1e-9)) >= 0.1


def test_limits_need_what_they_are_made_of():
    auto = ParameterDescription(((64, 64, 1),), "auto", "float32")
    assert failure_limits(auto, {10: 4.0, 20: 4.0}, {20: 5.0}).keys() == {20}
    assert failure_limits(SQUARE, {}, {20: 5.0}) == {}


def test_of_a_stack_only_its_own_value_is_a_row(tmp_path):
    stack = "layers.0.experts"
    parts = [f"{stack}.min", f"{stack}.max", f"{stack}.0", f"{stack}.11", "_mean", "_min", "_max"]
    page = report(tmp_path, write_run(tmp_path / "a", keys_of("muon/update_rms", names=[stack, "a.max", *parts])))
    assert page.charts["Update RMS"][0]["data"][0]["y"] == ["a.max", stack]


def test_vectors_are_no_rows_where_matrices_are_known(tmp_path):
    keys = [*keys_of("muon/update_rms", names=["a.weight", "norm.weight"]), "muon/weight_svd_entropy/a.weight"]
    page = report(tmp_path, write_run(tmp_path / "a", keys))
    assert page.charts["Update RMS"][0]["data"][0]["y"] == ["a.weight"]
    page = report(tmp_path, write_run(tmp_path / "b", keys[:2]))
    assert page.charts["Update RMS"][0]["data"][0]["y"] == ["a.weight", "norm.weight"]


def test_runs_are_side_by_side_on_the_same_colours(tmp_path):
    muon = write_run(tmp_path / "muon", keys_of("muon/update_rms", "muon/ns_fail_frac"))
    adamw = write_run(tmp_path / "adamw", keys_of("muon/update_rms", names=NAMES[:2]), value=lambda *_: 0.25)
    page = report(tmp_path, muon, adamw)
    figure = page.charts["Update RMS"][0]
    assert [title["text"] for title in figure["layout"]["annotations"]] == ["muon", "adamw"]
    assert [trace["coloraxis"] for trace in figure["data"]] == ["coloraxis", "coloraxis"]
    first, second = figure["data"]
    assert first["y"] == second["y"]
    found = numbers(second["z"])
    assert [np.isfinite(row).all() for row in found] == [name in NAMES[:2] for name in second["y"]]
    assert (found[np.isfinite(found)] == 0.25).all()
    assert "1 of the runs did not log it." in page.text
    page = report(tmp_path, adamw, muon)
    assert [one["text"] for one in page.charts["Update RMS"][0]["layout"]["annotations"]] == ["adamw", "muon"]


def test_a_run_that_two_loggers_logged_is_shown_once(tmp_path, capsys):
    for logger in (CSVLogger, TensorBoardLogger):
        write_run(tmp_path / logger.__name__, keys_of("muon/update_rms"), logger)
    page = report(tmp_path, tmp_path)
    assert len(page.charts["Update RMS"][0]["data"]) == 1
    assert "repeats the figures" in capsys.readouterr().out
    assert "repeats the figures" in page.text


def test_two_trainings_with_the_same_figures_are_two(tmp_path):
    """Both strategies from one seed."""
    for name in ("muon_zero1", "muon_fsdp"):
        write_run(tmp_path / name, keys_of("muon/update_rms"), TensorBoardLogger)
    page = report(tmp_path, tmp_path)
    assert len(page.charts["Update RMS"][0]["data"]) == 2
    assert "repeats the figures" not in page.text


def test_what_is_missing_is_said(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "a", ["train/loss"]))
    assert set(page.charts) == {"Loss"}
    assert "Update RMS (muon/update_rms/…): UpdateRMSMonitor" in page.text
    assert "(muon/ns_fail_frac/…): MomentumSpectrumMonitor" in page.text
    assert "MaxVio" not in page.text
    page = report(tmp_path, write_run(tmp_path / "b", ["moe/max_vio/layers.1", "attention/max_logit/layers.1"]))
    assert {"MaxVio of the experts' load", "Largest attention logit"} == set(page.charts)
    assert "--loss REGEX" in page.text


def test_steps_of_the_iteration_are_shown_where_they_vary(tmp_path):
    fixed = write_run(tmp_path / "a", keys_of("muon/ns_steps"), value=lambda *_: 5.0)
    assert not report(tmp_path, fixed).charts
    auto = write_run(tmp_path / "b", keys_of("muon/ns_steps"), value=lambda family, name, step: 3.0 + step // 50)
    assert set(report(tmp_path, auto).charts) == {"Steps of the iteration"}


def test_filters_are_for_layers_and_not_for_alarms(tmp_path):
    run = write_run(tmp_path / "a", [*keys_of("muon/update_rms"), "muon/alarms/update_rms"])
    page = report(tmp_path, run, "--include", "attn", "--exclude", r"\.0\.")
    wanted = [name for name in NAMES if "attn" in name and ".0." not in name]
    assert page.charts["Update RMS"][0]["data"][0]["y"] == wanted
    assert page.charts["Alarms"][0]["data"][0]["y"] == ["update_rms"]


ODD = """<img src=x onerror=alert(1)>&"'</script><!--"""


def test_odd_names_are_text(tmp_path):
    families = ("muon/update_rms", "muon/momentum_q50", "muon/weight_rms")
    run = write_run(tmp_path / "<b>run&", keys_of(*families, names=[ODD]), parameters={ODD: SQUARE})
    other = write_run(tmp_path / "other", keys_of(*families, names=[ODD]), value=lambda *_: 0.5)
    page = report(tmp_path, run, other)
    assert not [tag for tag, _ in page.tags if tag in ("img", "b")]
    assert ODD in page.texts  # in the table
    for figures in page.charts.values():
        shown = json.dumps(figures, ensure_ascii=False)
        assert "<img" not in shown  # which plotly would read as its own markup
        assert "<b>run" not in shown
    assert "&lt;img" in page.charts["Update RMS"][0]["data"][0]["y"][0]


def test_nothing_is_loaded_from_anywhere(tmp_path):
    path = tmp_path / "out" / "report.html"
    page = report(tmp_path, write_run(tmp_path / "a", [*keys_of("muon/update_rms"), "loss"]))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    script = path.read_text(encoding="utf-8").rpartition("<script>")[2]
    assert '"use strict"' in script
    assert "://" not in script


def test_large_runs_are_thinned_and_it_is_said(tmp_path):
    names = [f"layers.{block}.{kind}" for block in range(40) for kind in ("up", "down", "q")]
    steps = range(0, 5000, 5)
    run = write_run(tmp_path / "a", keys_of("muon/update_rms", names=names), steps=steps)
    page = report(tmp_path, run, "--max-rows", "12")
    (trace,) = page.charts["Update RMS"][0]["data"]
    blocks = [int(name.split(".")[1]) for name in trace["y"]]
    assert blocks == [0, 13, 26, 39] * 3
    assert (trace["x"][0], trace["x"][-1], len(trace["x"])) == (0, 4995, 300)
    wanted = [[synthetic("muon/update_rms", name, step) for step in trace["x"]] for name in trace["y"]]
    np.testing.assert_allclose(numbers(trace["z"]), wanted, rtol=1e-6)
    assert "12 of 120 layers are shown" in page.text
    assert "Thinned to 300 of 1000 logged steps." in page.text


def test_experts_that_are_modules_are_one_type_where_rows_are_few():
    experts = [f"layers.{block}.experts.{expert}.up.weight" for block in range(8) for expert in range(16)]
    names = ["embed.weight", *experts, *(f"layers.{block}.q.weight" for block in range(8))]
    rows = arrange(names, 24)
    assert [row.label for row in rows] == [
        "embed",
        *("experts.*.up  0.0", "1.2", "2.4", "3.6", "4.9", "5.11", "6.13", "7.15"),
        *("q  0", *map(str, range(1, 8))),
    ]
    assert all(row.name in names for row in rows)
    everything = arrange(names, 1000)
    assert len(everything) == len(names)
    assert [row.label for row in everything[1:10]] == ["experts.0.up  0", *map(str, range(1, 8)), "experts.1.up  0"]
    sequential = arrange([f"b.{block}.mlp.{number}.weight" for block in range(3) for number in (0, 2)], 10)
    assert [row.label for row in sequential] == ["mlp.0  0", "1", "2", "mlp.2  0", "1", "2"]


def test_rows_logged_at_other_steps_leave_gaps_or_show_their_latest():
    found = grid([{1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {3: 30.0}], max_columns=4)
    np.testing.assert_array_equal(found.values, [[1, 2, 3, 4], [np.nan, np.nan, 30, np.nan]])
    found = grid([{1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {3: 30.0}], max_columns=2)
    assert (found.steps, found.logged_steps) == ((1, 4), 4)
    np.testing.assert_array_equal(found.values, [[1, 4], [np.nan, 30]])


def test_curves_keep_their_extremes():
    series = {step: math.sin(step / 50) for step in range(5000)} | {1234: 40.0, 4321: -7.0, 77: math.nan}
    steps, values = thin(series, 100)
    assert len(steps) <= 100
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 4999)
    assert {1234: 40.0, 4321: -7.0}.items() <= dict(zip(steps, values, strict=True)).items()
    assert all(series[step] == value for step, value in zip(steps, values, strict=True))
    assert thin({1: 1.0, 2: math.inf, 3: 3.0}, 100) == ([1, 3], [1.0, 3.0])


def test_what_is_not_finite_is_a_gap_and_the_table_says_it(tmp_path):
    def value(family, name, step):
        return {60: math.inf, 80: math.nan}.get(step, 0.0 if step == 70 else 0.2)

    page = report(tmp_path, write_run(tmp_path / "a", keys_of("muon/update_weight_ratio", names=["w"]), value=value))
    (trace,) = page.charts["Update over weight"][0]["data"]
    assert np.isnan(numbers(trace["z"])[0]).tolist() == [False] * 5 + [True] * 3
    assert not np.isinf(numbers(trace["customdata"])).any()
    cells = [(attrs, tag) for tag, attrs in page.tags if tag == "td" and "data-value" in attrs]
    assert [attrs["data-value"] for attrs, _ in cells] == ["1e999"]
    assert "nan" in page.texts


def test_colours_do_not_follow_outliers():
    values = np.linspace(0.1, 0.3, 1000)
    values[0], values[1] = 1e6, np.nan
    low, high = color_limits(values)
    assert 0.1 <= low < 0.11
    assert 0.29 < high < 0.31
    assert color_limits(np.array([np.nan])) == (0.0, 1.0)
    low, high = color_limits(np.array([5.0, 5.0]))
    assert low < 5 < high


def test_table_has_the_last_values(tmp_path):
    description = ParameterDescription(((8, 16, 4), (8, 8, 1)), "auto", "bfloat16")
    keys = keys_of("muon/update_rms", "muon/momentum_q50", names=["w"])
    page = report(tmp_path, write_run(tmp_path / "a", keys, parameters={"w": description}))
    assert "8×16 (4), 8×8" in page.texts
    assert f"{synthetic('muon/update_rms', 'w', 80):.4g}" in page.texts
    assert f"{synthetic('muon/momentum_q50', 'w', 80):.4g}" in page.texts
    assert "auto, bfloat16" in page.texts


def test_clear_errors(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "a", ["loss"])
    (tmp_path / "file").write_text("")
    cases = {
        "no folder": ["report", str(tmp_path / "nowhere")],
        "cannot write": ["report", str(run), "-o", str(tmp_path / "file" / "page.html")],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    (run / "run" / "muon_model.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    for arguments in (["--max-rows", "0"], ["--loss", "("]):
        with pytest.raises(SystemExit):
            main(["report", str(run), *arguments])
        assert "expected a" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'lightning-muon[report]'" in capsys.readouterr().err
