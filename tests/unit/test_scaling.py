"""`lightning-muon fit`, from logs that Lightning's loggers wrote to the table, the JSON and the picture."""

import json
import math
import re

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_muon.cli import main
from lightning_muon.logs import ModelDescription, ParameterDescription
from lightning_muon.scaling.depths import depth_classes
from lightning_muon.scaling.ladder import Place, read_ladder, value_of_run
from lightning_muon.scaling.report import short_names
from lightning_muon.scaling.sequences import label

WIDTHS = (32, 64, 128, 256)
BLOCKS = 8
ALPHA = {"mid-early": 0.2, "mid": 0.25, "mid-late": 0.3, "final": 0.6}
DEPTH_OF_BLOCK = {1: "mid-early", 3: "mid", 5: "mid-late", 7: "final"}


def size_of(width):
    return 12 * width**2


def record(folder, logger_class, width, scale=1.0, describe=True, key="momentum_q50"):
    """A run whose q_proj follows ALPHA by depth from the last quarter of its steps on, and whose stem is constant."""
    logger = logger_class(folder, name=f"width{width}-{scale}")
    sigmas = {"stem.weight": 0.3}
    for block in range(BLOCKS):
        alpha = ALPHA.get(DEPTH_OF_BLOCK.get(block), 5.0)  # blocks that are at no depth must not matter
        sigmas[f"net.layers.{block}.q_proj.weight"] = scale * 2 * size_of(width) ** -alpha
    for step in range(10, 210, 10):
        burn_in = 1.0 if step > 150 else 3.0
        metrics = {f"muon/{key}/{name}": burn_in * sigma for name, sigma in sigmas.items()}
        metrics |= {f"{name}.min": value / 2 for name, value in metrics.items()}
        logger.log_metrics({**metrics, f"muon/{key}/_mean": 7.0}, step=step)
        logger.log_metrics({"train/loss": 2.0}, step=step)
    logger.finalize("success")
    parameters = {name: ParameterDescription(((width, 4 * width, 1),), "polar_express5", "float32") for name in sigmas}
    if describe:
        ModelDescription(size_of(width), parameters).write(logger.log_dir)


@pytest.fixture
def ladder(tmp_path):
    """Four sizes, two of them by either logger."""
    for number, width in enumerate(WIDTHS):
        record(tmp_path / "ladder", (CSVLogger, TensorBoardLogger)[number % 2], width)
    return tmp_path / "ladder"


def fit(capsys, *arguments):
    status = main(["fit", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def rows_of(text):
    cells = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return {tuple(row[:2]): row[2:] for row in cells if len(row) > 6 and row[0] != "layer type"}


def test_planted_exponents_come_out_of_logs(ladder, capsys):
    rows = rows_of(fit(capsys, ladder))
    assert list(rows) == [*(("q_proj", depth) for depth in ALPHA), ("stem.weight", "–")]
    for (_, depth), (runs, plain, corrected, r_squared, slopes, curved) in rows.items():
        alpha = ALPHA.get(depth, 0.0)
        assert runs == "4"
        assert plain == f"{alpha:+.3f} ± 0.000" or depth == "–"
        assert corrected == f"{alpha - 0.25:+.3f} ± 0.000"  # size ∝ width², so √r ∝ size^0.25
        assert r_squared == "1.000" or depth == "–"
        assert slopes == " ".join([f"{-alpha:+.2f}"] * 3) or depth == "–"
        assert curved == "no"


def test_json_and_table_agree_on_the_extrapolation(ladder, capsys, tmp_path):
    text = fit(capsys, ladder, "--target-size", "300e9", "--json", tmp_path / "out" / "laws.json")
    found = json.loads((tmp_path / "out" / "laws.json").read_text())
    assert found["quantile"] == "q50"
    assert found["target"] == {"size": 300e9, "rank": None}
    rows = rows_of(text)
    for law in found["laws"]:
        sigma = law["target"]["sigma"]
        expected = 2 * 300e9 ** -ALPHA[law["depth"]] if law["depth"] in ALPHA else 0.3
        assert sigma["value"] == pytest.approx(expected, rel=1e-4)
        assert sigma["low"] <= sigma["value"] <= sigma["high"]
        row = rows["q_proj" if law["depth"] in ALPHA else "stem.weight", law["depth"]]
        assert row[6].startswith(f"{sigma['value']:.2g} ")
        assert row[7] == label(law["target"]["smallest_sequence"])
        assert [point["rank"] for point in law["points"]] == list(WIDTHS)
        assert [point["size"] for point in law["points"]] == list(map(size_of, WIDTHS))
    assert "all: extrapolated to 3.81e+05 times the largest size" in text


def test_a_known_rank_at_the_target_makes_the_width_corrected_law_count(ladder, capsys, tmp_path):
    arguments = ("--target-size", "1e6", "--target-rank", "1024", "--include", "stem", "--json", tmp_path / "laws.json")
    fit(capsys, ladder, *arguments)
    (law,) = json.loads((tmp_path / "laws.json").read_text())["laws"]
    # σ·√r = 0.3·√width and size = 12·width²: a fourth root
    at_target = 0.3 * (1e6 / 12) ** 0.25 / math.sqrt(1024)
    assert law["target"]["sigma"]["value"] == pytest.approx(at_target, rel=1e-6)


def test_what_is_infinite_is_null_in_json(tmp_path, capsys):
    for width in WIDTHS[:2]:
        record(tmp_path / "two", CSVLogger, width)
    text = fit(capsys, tmp_path / "two", "--target-size", "1e5", "--json", tmp_path / "laws.json")
    found = json.loads((tmp_path / "laws.json").read_text(), parse_constant=pytest.fail)
    assert found["laws"][0]["plain"]["exponent"]["low"] is None
    assert "± ∞" in text
    assert "all: fitted to 2 sizes" in text


def test_other_quantiles_and_names(ladder, capsys):
    for width in WIDTHS:
        record(ladder, CSVLogger, width, scale=0.5, key="momentum_q90")
    text = fit(capsys, ladder, "--quantile", "q90", "--include", "layers", "--exclude", r"\.7\.")
    assert text.startswith("σ_q90")
    assert [depth for _, depth in rows_of(text)] == ["mid-early", "mid", "mid-late"]
    assert text.count("logged no muon/momentum_q90/…: left out") == 4  # the runs of the other quantile


def test_a_curved_law_is_called_so(tmp_path, capsys):
    for width, scale in zip(WIDTHS, (1.0, 0.9, 0.6, 0.2), strict=True):
        record(tmp_path, TensorBoardLogger, width, scale)
        record(tmp_path, TensorBoardLogger, width, scale * 1.02)
    text = fit(capsys, tmp_path, "--include", "q_proj")
    assert {row[-1] for row in rows_of(text).values()} == {"σ, σ·√r"}
    assert "warnings\n  all: curved: no power law" in text


def test_a_run_logged_twice_counts_once(ladder, capsys):
    record(ladder / "again", TensorBoardLogger, WIDTHS[0])
    text = fit(capsys, ladder)
    assert {row[0] for row in rows_of(text).values()} == {"4"}
    assert "repeats the figures of another run: left out" in text


def test_seeds_of_one_size_are_points_of_their_own(ladder, capsys):
    record(ladder, CSVLogger, WIDTHS[0], scale=1.1)
    assert {row[0] for row in rows_of(fit(capsys, ladder)).values()} == {"5"}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_a_picture(ladder, capsys, tmp_path, suffix):
    path = tmp_path / "pictures" / f"laws.{suffix}"
    fit(capsys, ladder, "--plot", path, "--target-size", "1e9")
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert b"q_proj" in content
        assert b"sideways" in content
        assert content.count(b"<!-- target -->") == 2  # in each of the panels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "nowhere is no folder"),
        ("{ladder} --include fused", "no run logged muon/momentum_q50/<parameter> of a parameter that is wanted"),
        ("{ladder} --quantile q95", "no run logged muon/momentum_q95"),
        ("{ladder} --target-rank 64", "give both"),
        ("{ladder} --target-size 1e9 --target-rank 0", "1 or more"),
        ("{ladder} --plot laws.gif", "got '.gif'"),
        ("{one}", "at least 2 sizes"),
        ("{bare}", "muon_model.json is missing"),
    ],
)
def test_errors_are_one_message_and_status_2(arguments, message, ladder, tmp_path, capsys):
    record(tmp_path / "one", CSVLogger, 32)
    record(tmp_path / "one", CSVLogger, 32, scale=1.5)
    record(tmp_path / "bare", CSVLogger, 32, describe=False)
    folders = {name: tmp_path / name for name in ("ladder", "one", "bare")}
    assert main(["fit", *arguments.format(**folders).split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lightning-muon fit: error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    ["", "x --target-size 0", "x --target-size inf", "x --include (", "x --quantile 0.5", "x --no-such-option"],
)
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments.split()])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: lightning-muon fit ")
    assert "lightning-muon fit: error:" in message


@pytest.mark.parametrize(("text", "size"), [("300B", 300e9), ("7M", 7e6), ("1.5K", 1500), ("2t", 2e12), ("3e8", 3e8)])
def test_sizes_may_have_units(text, size, ladder, capsys, tmp_path):
    fit(capsys, ladder, "--target-size", text, "--json", tmp_path / "laws.json")
    assert json.loads((tmp_path / "laws.json").read_text())["target"]["size"] == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("text", ["", "B", "0B", "-7M", "7G", "infB", "nan", "many"])
def test_a_size_that_is_none_is_a_clear_error(text, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "x", f"--target-size={text}"])
    assert f"like 300e9 or 300B; got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "warns"), [(0.49, True), (0.51, False), (9.9, False)])
def test_a_target_far_below_the_ladder_is_an_extrapolation(ladder, capsys, share, warns):
    text = fit(capsys, ladder, "--target-size", share * size_of(WIDTHS[0]))
    assert ("all: extrapolated to 0.49 times the smallest size, below 0.5" in text) is warns
    assert ("extrapolated to" in text) is warns


def test_no_singular_value_is_above_1(ladder, capsys, tmp_path):
    fit(capsys, ladder, "--target-size", "1", "--include", "q_proj", "--json", tmp_path / "laws.json")  # σ = 2 at 1
    laws = json.loads((tmp_path / "laws.json").read_text())["laws"]
    assert {tuple(law["target"]["sigma"].values()) for law in laws} == {(1.0, 1.0, 1.0)}


def test_a_run_that_is_not_described_is_left_out(ladder, capsys):
    record(ladder / "bare", CSVLogger, 48, describe=False)
    text = fit(capsys, ladder)
    assert {row[0] for row in rows_of(text).values()} == {"4"}
    assert "has no muon_model.json, which says how large the model is: left out" in text


def test_value_of_a_run_is_the_geometric_mean_of_the_last_quarter():
    assert value_of_run({step: 10.0**step for step in range(8)}) == pytest.approx(10**6.5)
    assert value_of_run({step: float(step) for step in range(1, 6)}) == pytest.approx(math.sqrt(20))
    assert value_of_run({3: 0.25}) == 0.25
    assert value_of_run({1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0, 5: 0.0}) == 4.0
    assert value_of_run({1: 4.0, 2: 0.0}) is None


def test_a_parameter_without_positive_values_is_left_out_and_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,muon/momentum_q50/a,muon/momentum_q50/b\n1,0.0,0.5\n2,nan,0.5\n")
    one = ParameterDescription(((4, 4, 1),), "cubic5", "float32")
    ModelDescription(100, {"a": one, "b": one}).write(tmp_path)
    ladder = read_ladder([tmp_path])
    assert list(ladder.points) == [Place("b", "–")]
    (warning,) = ladder.warnings
    assert "a has no positive value" in warning


@pytest.mark.parametrize(
    ("blocks", "num_blocks", "expected"),
    [
        (range(12), 12, {2: "mid-early", 5: "mid", 8: "mid-late", 11: "final"}),
        (range(27), 27, {6: "mid-early", 13: "mid", 19: "mid-late", 26: "final"}),
        (range(4), 4, {0: "mid-early", 1: "mid", 2: "mid-late", 3: "final"}),
        (range(1, 4), 4, {1: "mid", 2: "mid-late", 3: "final"}),  # dense first, then experts
        (range(3), 3, {0: "mid-early", 1: "mid-late", 2: "final"}),
        (range(2), 2, {0: "mid", 1: "final"}),
        (range(2), 12, {1: "mid-early"}),  # the first two of twelve
        ([0], 12, {0: "–"}),
    ],
)
def test_depths_are_quarters_of_the_stack(blocks, num_blocks, expected):
    assert depth_classes(blocks, num_blocks) == expected


def test_names_in_the_table_are_as_short_as_they_may_be():
    types = ["net.layers.*.up.weight", "vision.layers.*.q.weight", "text.layers.*.q.weight", "stem.weight"]
    assert short_names([*types, types[0]]) == {types[0]: "up", **{name: name for name in types[1:]}}


@pytest.mark.parametrize(
    ("number", "named"), [(1, "a.weight"), (3, "a.weight, b.weight, c.weight"), (4, "4 of 5 rows")]
)
def test_a_warning_names_few_rows_and_counts_many(number, named, tmp_path, capsys):
    """Of five parameters, some are missing at the fourth size."""
    one = ParameterDescription(((8, 8, 1),), "cubic5", "float32")
    for size in (100, 200, 400, 800):
        names = [f"{letter}.weight" for letter in "abcde"][number if size == 800 else 0 :]
        folder = tmp_path / str(size)
        ModelDescription(size, dict.fromkeys(names, one)).write(folder)
        columns = ",".join(f"muon/momentum_q50/{name}" for name in names)
        (folder / "metrics.csv").write_text(f"step,{columns}\n1,{','.join([str(size**-0.5)] * len(names))}\n")
    text = fit(capsys, tmp_path)
    assert f"\n  {named}: fitted to 3 sizes" in text
