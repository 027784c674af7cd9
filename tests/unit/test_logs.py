"""What stands beside a run is read back as it was written, by Lightning's own loggers and by ours."""

import json
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_muon.logs import Layer, LogError, ModelDescription, ParameterDescription, find_runs, layers, read_scalars

DESCRIPTION = ModelDescription(
    1234,
    {
        "layers.0.qkv.weight": ParameterDescription(((16, 32, 1), (8, 32, 2)), "polar_express5", "bfloat16"),
        "layers.0.up.weight": ParameterDescription(((64, 32, 8),), ((2.0, -1.5, 0.5), (2.0, -1.5, 0.5)), "float32"),
        "head.weight": ParameterDescription(((5, 7, 1),), {"interval": [1e-3, 1.0], "steps": 5}, "float32"),
    },
)


def test_description_survives_a_file(tmp_path):
    path = DESCRIPTION.write(tmp_path / "new" / "folder")
    assert [entry.name for entry in path.parent.iterdir()] == ["muon_model.json"]
    assert ModelDescription.read(path.parent) == DESCRIPTION


def test_file_has_the_documented_form(tmp_path):
    assert json.loads(DESCRIPTION.write(tmp_path).read_text()) == {
        "format": 1,
        "num_parameters": 1234,
        "parameters": {
            "layers.0.qkv.weight": {
                "matrices": [[16, 32, 1], [8, 32, 2]],
                "orthogonalization": "polar_express5",
                "dtype": "bfloat16",
            },
            "layers.0.up.weight": {
                "matrices": [[64, 32, 8]],
                "orthogonalization": [[2.0, -1.5, 0.5], [2.0, -1.5, 0.5]],
                "dtype": "float32",
            },
            "head.weight": {
                "matrices": [[5, 7, 1]],
                "orthogonalization": {"interval": [1e-3, 1.0], "steps": 5},
                "dtype": "float32",
            },
        },
    }


def test_rank_is_that_of_the_middle_matrix():
    assert [one.rank for one in DESCRIPTION.parameters.values()] == [8, 32, 5]
    assert ParameterDescription(((9, 9, 1), (3, 9, 1)), "keller5", "float32").rank == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("{", "is not JSON"),
        ("[]", "format None"),
        ('{"format": 2}', "format 2, expected 1"),
        ('{"format": 1, "parameters": {}}', "KeyError"),
        ('{"format": 1, "num_parameters": 0, "parameters": {}}', "got 0"),
        ('{"format": 1, "num_parameters": true, "parameters": {}}', "got True"),
        ('{"format": 1, "num_parameters": 5, "parameters": []}', "AttributeError"),
        (
            '{"format": 1, "num_parameters": 5, "parameters": {"w": {"matrices": [], "orthogonalization": "cubic5",'
            ' "dtype": "float32"}}}',
            "without matrices",
        ),
        (
            '{"format": 1, "num_parameters": 5, "parameters": {"w": {"matrices": [[2, 3]], "orthogonalization":'
            ' "cubic5", "dtype": "float32"}}}',
            "ValueError",
        ),
    ],
)
def test_a_description_that_cannot_be_used_is_a_clear_error(text, message, tmp_path):
    if text is not None:
        (tmp_path / "muon_model.json").write_text(text)
    with pytest.raises(LogError, match=message) as raised:
        ModelDescription.read(tmp_path)
    assert "muon_model.json" in str(raised.value)


def log(logger, steps, offset=0.0):
    for step in steps:
        logger.log_metrics({"muon/momentum_q50/a.weight": offset + step / 8}, step=step)
        logger.log_metrics({"train/loss": 1.0}, step=step)
    logger.finalize("success")


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_scalars_of_lightnings_loggers(kind, tmp_path):
    logger = kind(tmp_path, name="small")
    steps = range(0, 20_100, 2)  # more than TensorBoard keeps by default
    log(logger, steps)
    (run,) = find_runs([tmp_path])
    assert run == (tmp_path / "small" / "version_0").resolve()
    assert read_scalars(run, "muon/") == {"muon/momentum_q50/a.weight": {step: step / 8 for step in steps}}
    assert "train/loss" in read_scalars(run)


def test_a_resumed_run_continues_its_series(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    log(TensorBoardLogger(tmp_path, name="", version="run"), (0, 10, 20))
    monkeypatch.setattr("time.time", lambda: 1_700_000_100.0)
    log(TensorBoardLogger(tmp_path, name="", version="run"), (20, 30), offset=1.0)
    (run,) = find_runs([tmp_path])
    series = read_scalars(run)["muon/momentum_q50/a.weight"]
    assert series == {0: 0.0, 10: 1.25, 20: 3.5, 30: 4.75}
    assert list(series) == [0, 10, 20, 30]


def test_runs_are_found_once_at_any_depth(tmp_path):
    for name in ("a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.csv").write_text("step,x\n1,2.5\n2,\n")
    assert find_runs([tmp_path, tmp_path / "c", str(tmp_path / "a")]) == [tmp_path / "a" / "b", tmp_path / "c"]
    assert read_scalars(tmp_path / "c") == {"x": {1: 2.5}}


def test_what_has_no_scalars_is_a_clear_error(tmp_path, monkeypatch):
    with pytest.raises(LogError, match="is no folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(LogError, match=r"neither TensorBoard event files nor a metrics\.csv"):
        find_runs([tmp_path])
    (tmp_path / "metrics.csv").write_text("x\n2.5\n")
    with pytest.raises(LogError, match="no column `step`"):
        read_scalars(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,x\n1,2.5\n2,much\n")
    with pytest.raises(LogError, match="line 3: x='much' at step '2'"):
        read_scalars(tmp_path)
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    with pytest.raises(LogError, match=r"pip install 'lightning-muon\[tensorboard\]'"):
        read_scalars(tmp_path)


def test_the_first_integer_that_counts_a_repeated_block_is_replaced():
    found = layers(
        [
            "model.0.layers.0.mlp.gate.weight",  # a first block that is dense
            "model.0.layers.1.experts.0.up.weight",
            "model.0.layers.1.experts.1.up.weight",
            "model.0.layers.2.experts.0.up.weight",
            "model.0.layers.2.experts.1.up.weight",
            "embed.weight",
            "head.7.weight",
        ]
    )
    assert found == {
        "model.0.layers.0.mlp.gate.weight": Layer("model.0.layers.*.mlp.gate.weight", 0, 3),
        "model.0.layers.1.experts.0.up.weight": Layer("model.0.layers.*.experts.0.up.weight", 1, 3),
        "model.0.layers.1.experts.1.up.weight": Layer("model.0.layers.*.experts.1.up.weight", 1, 3),
        "model.0.layers.2.experts.0.up.weight": Layer("model.0.layers.*.experts.0.up.weight", 2, 3),
        "model.0.layers.2.experts.1.up.weight": Layer("model.0.layers.*.experts.1.up.weight", 2, 3),
        "embed.weight": Layer("embed.weight"),
        "head.7.weight": Layer("head.7.weight"),
    }
