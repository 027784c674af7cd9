"""Pictures for TensorBoard: read back from a real event file."""

import io
import random
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

import lightning_muon as lm
from lightning_muon.logs.rows import arrange
from lightning_muon.pytorch.callbacks import pictures as pictures_module
from lightning_muon.pytorch.callbacks.pictures import LayerPictures
from lightning_muon.reporting.catalogue import QUANTITIES
from lightning_muon.reporting.grid import Grid
from lightning_muon.reporting.history import History
from lightning_muon.reporting.image import heat_map_image
from lightning_muon.reporting.layout import custom_scalars_layout

UPDATE_RMS = next(one for one in QUANTITIES if one.family == "muon/update_rms")
NAMES = [f"layers.{block}.{kind}.weight" for block in range(12) for kind in ("up", "experts")]


def values_at(step, families=("update_rms",), names=NAMES):
    values = {}
    for family in families:
        values |= {f"muon/{family}/{name}": 0.1 + 0.01 * place + 1e-4 * step for place, name in enumerate(names)}
        values |= {f"muon/{family}/_{which}": 0.2 for which in ("min", "mean", "max")}
    return values


def record(folder, steps, at=values_at, **options):
    """The events of a run of these steps, all of them measured."""
    pictures = LayerPictures(**options)
    with SummaryWriter(folder) as writer:
        for step in steps:
            pictures.add(step, at(step))
            pictures.draw([writer], step)
        pictures.finish([writer], steps[-1])
    return events(folder)


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def layouts(found):
    protos = found.Tensors("custom_scalars__config__") if "custom_scalars__config__" in found.Tags()["tensors"] else []
    return [layout_pb2.Layout.FromString(one.tensor_proto.string_val[0]) for one in protos]


def test_drawn_after_doubling_numbers_of_measurements_and_at_the_end(tmp_path):
    found = record(tmp_path, range(10, 710, 10))
    assert found.Tags()["images"] == ["muon/pictures/update_rms"]
    assert [one.step for one in found.Images("muon/pictures/update_rms")] == [160, 320, 640, 700]


def test_a_short_run_is_drawn_at_the_end_and_nothing_twice(tmp_path):
    assert [one.step for one in record(tmp_path / "a", [1, 2]).Images("muon/pictures/update_rms")] == [2]
    found = record(tmp_path / "b", range(1, 17))
    assert [one.step for one in found.Images("muon/pictures/update_rms")] == [16]


def test_a_quantity_has_a_picture_if_it_was_logged(tmp_path):
    def at(step):
        return {
            **values_at(step, ("update_rms", "weight_svd_entropy", "momentum_q50", "ns_fail_frac", "ns_residual")),
            "moe/max_vio/layers.1.mlp": 0.5,
            "attention/max_logit/layers.1.attn": 30.0,
            "train/loss": 1.0,
        }

    tags = record(tmp_path, [1, 2], at).Tags()["images"]
    names = ["update_rms", "weight_svd_entropy", "momentum_q50", "ns_fail_frac", "moe_max_vio", "attention_max_logit"]
    assert sorted(tags) == sorted(f"muon/pictures/{name}" for name in names)


def test_picture_is_what_the_history_says(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures_module, "heat_map_image", lambda *args: drawn.append(args) or heat_map_image(*args))
    found = record(tmp_path, [5, 6, 7])
    quantity, rows, grid = drawn[-1]
    assert quantity is UPDATE_RMS
    assert grid.steps == (5, 6, 7)
    wanted = [[values_at(step)[f"muon/update_rms/{row.name}"] for step in (5, 6, 7)] for row in rows]
    np.testing.assert_array_equal(grid.values, wanted)
    assert {row.name for row in rows} == set(NAMES)
    (image,) = found.Images("muon/pictures/update_rms")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(pixels, heat_map_image(quantity, rows, grid))


def test_colours_are_the_values():
    rows = arrange(["a", "b", "c"], 10)
    values = np.array([[0.0, 0.5, 1.0], [0.5, 0.5, 0.5], [1.0, np.nan, 0.0]])
    quantity = next(one for one in QUANTITIES if one.family == "muon/gradient_momentum_cosine")
    image = heat_map_image(quantity, rows, Grid((10, 20, 30), values, 3))
    # the inner part of the map: whatever differs from white over whole columns
    left, right, top, bottom = map_edges(image)
    for row in range(3):
        for column in range(3):
            y = top + (bottom - top) * (2 * row + 1) // 6
            x = left + (right - left) * (4 * column + 1) // 12
            value = values[row, column]
            expected = np.array([0xDD] * 3) if np.isnan(value) else colour("RdBu", (value + 1) / 2)
            np.testing.assert_allclose(image[y, x].astype(int), expected, atol=2)


def map_edges(image):
    """Of the frame of the map, which is black all around."""
    dark = (image < 60).all(axis=2)
    rows = np.flatnonzero(dark.sum(axis=1) > 500)
    columns = np.flatnonzero(dark[rows[0] : rows[-1]].mean(axis=0) > 0.9)
    return columns[0], columns[columns < columns[0] + 610][-1], rows[0], rows[-1]


def colour(name, share):
    return np.array(colormaps[name](share)[:3]) * 255


def test_no_more_is_remembered_than_can_be_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures_module, "heat_map_image", lambda *args: drawn.append(args[2]) or heat_map_image(*args))
    pictures = LayerPictures()
    steps = range(1, 5001)
    for step in steps:
        pictures.add(step, {"muon/update_rms/w": float(step)})
        assert len(pictures._history[UPDATE_RMS].grid(["w"]).steps) <= 240
    with SummaryWriter(tmp_path) as writer:
        pictures.finish([writer], 5000)
    (grid,) = drawn
    assert len(grid.steps) >= 120
    np.testing.assert_array_equal(grid.values[0], grid.steps)
    assert (grid.steps[0], grid.steps[-1]) == (1, 5000)
    assert set(np.diff(grid.steps[:-1])) == {32}


def test_layers_may_come_late_stay_away_and_be_measured_in_two_parts():
    history = History(3)
    history.add(1, {"a": 1.0})
    history.add(2, {})
    history.add(2, {"b": 20.0, "a": 2.0})
    history.add(3, {"b": 30.0})
    history.add(3, {"a": 3.0, "b": 31.0})
    found = history.grid(["b", "a"])
    assert (found.steps, history.names) == ((1, 2, 3), ("a", "b"))
    np.testing.assert_array_equal(found.values, [[np.nan, 20, 31], [1, 2, 3]])
    for step in range(4, 8):
        history.add(step, {"a": float(step)})
        assert history.grid(["a"]).steps[-1] == step
    assert history.grid(["a"]).steps == (1, 5, 7)  # every fourth, and the newest


def test_layout_charts_match_their_keys_and_no_others(tmp_path):
    families = ("update_rms", "weight_svd_entropy", "momentum_q10", "momentum_q50", "momentum_q95")
    keys = values_at(1, families)
    beside = {f"{key}.min": 0.1 for key in keys} | {f"{key}.0": 0.1 for key in keys}
    keys |= beside | {"muon/grad_norm": 1.0, "muon/grad_norm_adamw": 1.0}
    (layout,) = layouts(record(tmp_path, [1, 2], lambda step: keys))
    charts = {
        (category.title, chart.title): [
            {key for key in keys if re.match(tag, key)} for tag in chart.multiline.tag
        ]  # as TensorBoard does
        for category in layout.category
        for chart in category.chart
        if chart.HasField("multiline")
    }
    assert charts["Update RMS", "up"] == [{f"muon/update_rms/{name}" for name in NAMES if ".up." in name}]
    assert len(charts["SVD entropy of the weights", "experts"][0]) == 12
    quantiles = {f"muon/momentum_q{q}/layers.6.up.weight" for q in (10, 50, 95)}
    assert charts["Spectrum of the momentum", "up of block 6"] == [quantiles]
    overview = next(iter(layout.category))
    assert charts[overview.title, "Norm of the gradient"] == [{"muon/grad_norm"}, {"muon/grad_norm_adamw"}]
    bands = {chart.title: chart.margin.series[0] for chart in overview.chart if chart.HasField("margin")}
    update = bands["Update RMS"]
    assert [update.value, update.lower, update.upper] == [f"muon/update_rms/_{one}" for one in ("mean", "min", "max")]


def test_no_chart_of_the_layout_is_empty():
    families = ("update_rms", "weight_rms", "momentum_q50")
    keys = values_at(1, families) | {"moe/max_vio/layers.1.mlp": 1.0}
    for charts in custom_scalars_layout(keys).values():
        for kind, tags in charts.values():
            for tag in tags:
                assert tag in keys if kind == "Margin" else any(re.match(tag, key) for key in keys)
    assert custom_scalars_layout({"train/loss": 1.0}) == {}


def test_layout_is_written_again_only_for_new_keys(tmp_path):
    def at(step):
        return values_at(step, ("update_rms", "momentum_q50") if step % 4 == 0 else ("update_rms",))

    first, second = layouts(record(tmp_path, range(1, 13), at))
    assert "Median singular value of the momentum" not in {one.title for one in first.category}
    assert "Median singular value of the momentum" in {one.title for one in second.category}


def test_without_matplotlib_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="matplotlib") as told:
        found = record(tmp_path, range(1, 40))
    assert len(told) == 1
    assert not found.Tags()["images"]
    assert len(layouts(found)) == 1


def test_rows_are_limited(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures_module, "heat_map_image", lambda *args: drawn.append(args[1]) or heat_map_image(*args))
    record(tmp_path, [1], max_rows=6)
    assert [row.name for row in drawn[0]] == [
        f"layers.{n}.{kind}.weight" for kind in ("up", "experts") for n in (0, 6, 11)
    ]


def test_vectors_are_left_out_where_matrices_are_known(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        pictures_module, "heat_map_image", lambda *args: drawn.append(args[:2]) or heat_map_image(*args)
    )

    def at(step):
        keys = {f"muon/update_rms/{name}": 0.2 for name in ("norm", "w")}
        return keys | ({"muon/weight_svd_entropy/w": 0.9} if step == 1 else {})

    record(tmp_path, [1, 2], at)
    assert [(one.family, [row.name for row in rows]) for one, rows in drawn] == [
        ("muon/update_rms", ["w"]),
        ("muon/weight_svd_entropy", ["w"]),
    ]


def test_odd_values_and_names_are_drawn(tmp_path):
    def at(step):
        odd = {1: float("nan"), 2: float("inf"), 3: 0.0}[step]
        return {f"muon/{family}/$a_{{$ <b>": odd for family in ("update_rms", "momentum_q50", "update_weight_ratio")}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(record(tmp_path, [1, 2, 3], at).Tags()["images"]) == 3


def test_drawing_leaves_random_numbers_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    record(tmp_path, range(1, 20))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_nobody_to_write_to_is_no_error():
    pictures = LayerPictures()
    pictures.add(1, values_at(1))
    pictures.finish([], 1)


def test_the_monitor_that_is_said_to_log_a_quantity_logs_it():
    monitors = (lm.UpdateRMSMonitor, lm.WeightNormMonitor, lm.SpectrumMonitor, lm.MomentumSpectrumMonitor)
    families = {monitor.__name__: {f"muon/{family}" for family in monitor.families} for monitor in monitors}
    said = [(one.family, one.logged_by) for one in QUANTITIES if one.logged_by in families]
    assert len(said) > 10
    assert [(family, by) for family, by in said if family not in families[by]] == []
