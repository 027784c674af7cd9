"""Sharded checkpoints, on one process: complete, verified, and never run."""

import json
import os
import pickle
import random
import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

import lightning_muon as lm
from lightning_muon.checkpoint.canonical import load_canonical
from lightning_muon.checkpoint.errors import CheckpointError
from lightning_muon.checkpoint.folders import is_sharded, load_folder, load_whole, read_shapes, save_folder
from lightning_muon.checkpoint.named import from_named, to_named
from tests.models import awkward_model, token_batches

META = {"epoch": 3, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "rng": torch.arange(4)}


def state(offset=0.0):
    return {
        "state_dict": {"a.weight": torch.arange(12.0).view(3, 4) + offset, "half": torch.ones(7).bfloat16() * offset},
        "optimizer_0": {"a.weight": {"momentum_buffer": torch.arange(12.0).view(3, 4) - offset}},
        "count": torch.tensor(5 + int(offset)),
    }


def assert_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_state(value, other[key])
        else:
            assert value.dtype == other[key].dtype
            assert torch.equal(value, other[key])


def assert_meta(meta):
    assert meta["groups"] == META["groups"]
    assert torch.equal(meta["rng"], META["rng"])


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_folder(path, state(1), META)
    return path


def test_half_a_replacement_is_repaired_by_whoever_loads_next(saved):
    """A process was killed between two renames; what it leaves is asked for as a whole checkpoint."""
    saved.rename(saved.with_name(f".{saved.name}.replaced"))
    assert load_canonical(saved)["epoch"] == META["epoch"]
    assert saved.is_dir()


def test_what_is_saved_is_loaded(saved):
    assert is_sharded(saved)
    assert [entry.name for entry in saved.parent.iterdir()] == ["last.ckpt"]
    target = state()
    assert_meta(load_folder(saved, target))
    assert_state(target, state(1))
    whole, meta = load_whole(saved)
    assert_meta(meta)
    assert_state(whole, state(1))
    assert read_shapes(saved)["state_dict"]["half"].shape == (7,)


def test_a_part_can_be_loaded(saved):
    target = {"state_dict": {"half": torch.zeros(7, dtype=torch.bfloat16)}}
    load_folder(saved, target)
    assert target["state_dict"]["half"].eq(1).all()


def test_what_lightnings_strategies_write_can_be_read_unverified(tmp_path):
    path = tmp_path / "theirs"
    groups = {"param_groups": [{"lr": 0.1}]}
    dcp.save({**state(1), "optimizer_0": {**state(1)["optimizer_0"], **groups}}, checkpoint_id=path, no_dist=True)
    torch.save(META, path / "meta.pt")
    refused(path, r"has no manifest\.json: it was not completed, or not saved by lightning_muon")
    target = state()
    assert_meta(load_folder(path, target, verify=False))
    assert_state(target, state(1))
    with pytest.raises(CheckpointError, match=r"pickled and not tensors: optimizer_0\.param_groups.*consolidate"):
        load_whole(path, verify=False)


def test_lightnings_tool_makes_one_file_of_it(saved, tmp_path):
    output = tmp_path / "one.ckpt"
    command = [sys.executable, "-m", "lightning.fabric.utilities.consolidate_checkpoint", str(saved)]
    subprocess.run([*command, "--output_file", str(output)], check=True, capture_output=True)
    loaded = torch.load(output, weights_only=True)
    assert_meta(loaded)
    assert_state({key: loaded[key] for key in state()}, state(1))


def test_a_folder_takes_the_place_of_a_file_and_of_a_folder(saved):
    save_folder(saved, state(2), META)
    assert_state(load_whole(saved)[0], state(2))
    file = saved.with_name("file.ckpt")
    file.write_text("old")
    save_folder(file, state(3), META)
    assert_state(load_whole(file)[0], state(3))
    assert sorted(entry.name for entry in saved.parent.iterdir()) == ["file.ckpt", "last.ckpt"]


def test_a_failing_save_leaves_the_old_one(saved):
    with pytest.raises(TypeError, match=r"'optimizer_0\.step' is a int"):
        save_folder(saved, {"optimizer_0": {"step": 3}}, META)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_folder(saved, state(2), {"hook": lambda: None})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written \(File too large.*before is intact"):
            save_folder(saved, {"big": torch.ones(100_000)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_state(load_whole(saved)[0], state(1))
    assert [entry.name for entry in saved.parent.iterdir()] == ["last.ckpt"]


def refused(path, match):
    target = state()
    for load in (lambda: load_folder(path, target), lambda: load_whole(path)):
        with pytest.raises(CheckpointError, match=match):
            load()
    assert_state(target, state())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt", "manifest.json"])
def test_every_file_is_needed_whole_and_as_it_was(saved, name):
    file = saved / name
    good = file.read_bytes()
    file.unlink()
    refused(saved, f"{name} is missing|has no {name}")
    file.write_bytes(good[:-1] if name != "manifest.json" else good[:-10])
    refused(saved, rf"{name} has [\d,]+ of [\d,]+ bytes|{name} is altered")
    if name != "manifest.json":
        generator = random.Random(1)
        for _ in range(20):
            bad = bytearray(good)
            bad[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
            file.write_bytes(bad)
            refused(saved, rf"{name} is not as it was written")


def test_no_folder_no_checkpoint(tmp_path):
    refused(tmp_path / "last.ckpt", "no such checkpoint")
    (tmp_path / "last.ckpt").write_text("text")
    refused(tmp_path / "last.ckpt", "is a file, not a folder")


def test_another_model_is_refused(saved):
    target = state()
    target["state_dict"]["half"] = torch.zeros(8)
    target["state_dict"]["extra"] = torch.zeros(2)
    with pytest.raises(
        CheckpointError, match=r"lacks state_dict\.extra\. Shapes differ: state_dict\.half is \(7,\) there and \(8,\)"
    ):
        load_folder(saved, target)
    assert target["state_dict"]["a.weight"].eq(state()["state_dict"]["a.weight"]).all()


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [Evil(os.mkdir, "evil"), Evil(eval, "__import__('os').mkdir('evil')"), Evil(getattr, "a", "upper"), {"a": 1}],
    ids=["mkdir", "eval", "getattr", "no index"],
)
def test_code_in_the_index_is_not_run(saved, monkeypatch, evil):
    monkeypatch.chdir(saved.parent)
    (saved / ".metadata").write_bytes(pickle.dumps(evil))
    target = state()
    for load in (lambda: load_folder(saved, target, verify=False), lambda: load_whole(saved, verify=False)):
        with pytest.raises(CheckpointError, match="altered or unsafe"):
            load()
    assert not (saved.parent / "evil").exists()


def test_the_index_stays_in_its_folder(saved):
    index = pickle.loads((saved / ".metadata").read_bytes())
    assert isinstance(index, Metadata)
    for info in index.storage_data.values():
        info.relative_path = "../other/__0_0.distcp"
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"points to files that are not its own: \.\./other"):
        load_whole(saved, verify=False)


def test_code_in_meta_is_not_run(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    torch.save({"x": Evil(os.mkdir, "evil")}, saved / "meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt.*posix\.mkdir"):
        load_folder(saved, state(), verify=False)
    assert not (saved.parent / "evil").exists()


def test_a_big_file_is_checked_in_pieces(tmp_path, monkeypatch):
    from lightning_muon.checkpoint import manifest

    monkeypatch.setattr(manifest, "_PIECE_BYTES", 1000)
    path = tmp_path / "last.ckpt"
    save_folder(path, {"a": torch.arange(1000.0)}, META)
    content = manifest.read_manifest(path)
    assert len(content["files"]["__0_0.distcp"]["crc32"]) > 4
    assert load_whole(path)[0]["a"][-1] == 999
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[2500] ^= 1
    file.write_bytes(data)
    verdicts = []
    for rank in range(3):
        try:
            manifest.verify_pieces(path, content, rank=rank, world_size=3)
        except CheckpointError as error:
            verdicts.append(str(error))
    assert len(verdicts) == 1
    assert "after byte 2,000" in verdicts[0]


@pytest.mark.parametrize("content", ["[]", '{"files": 1, "format": 1, "piece_bytes": 1}', '{"format": 2}', "not json"])
def test_a_strange_manifest_is_refused(saved, content):
    (saved / "manifest.json").write_text(content)
    refused(saved, "altered, or of a later version")


def test_a_manifest_names_no_file_outside(saved):
    content = json.loads((saved / "manifest.json").read_text())
    content["files"]["../x"] = {"bytes": 0, "crc32": []}
    (saved / "manifest.json").write_text(json.dumps(content))
    refused(saved, "altered")
    del content["files"]["../x"]
    del content["files"][".metadata"]
    (saved / "manifest.json").write_text(json.dumps(content))
    refused(saved, r"does not name meta\.pt and \.metadata")


def test_number_keys_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be text"):
        save_folder(tmp_path / "x", {"optimizer": {0: torch.ones(1)}}, {})


def test_an_optimizer_goes_through_a_folder(tmp_path):
    model = awkward_model()
    optimizer = lm.Muon(model, lr=0.05)
    model.loss(token_batches(1, 4)[0]).backward()
    optimizer.step()
    tensors, rest = to_named(optimizer.state_dict())
    assert set(tensors["square.weight"]) == {"momentum_buffer"}
    save_folder(tmp_path / "last.ckpt", {"optimizer": tensors}, {"optimizer_groups": rest})
    state, meta = load_whole(tmp_path / "last.ckpt")
    resumed = lm.Muon(awkward_model(seed=1), lr=0.05)
    resumed.load_state_dict(from_named(state["optimizer"], meta["optimizer_groups"]))
    one, other = optimizer.state_dict(), resumed.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index, entries in one["state"].items():
        assert all(torch.equal(value, other["state"][index][key]) for key, value in entries.items())
    other_recipe = lm.Muon(awkward_model(), lr=0.1)
    with pytest.raises(ValueError, match=r"lr=0\.05 saved, 0\.1 now"):
        other_recipe.load_state_dict(from_named(state["optimizer"], meta["optimizer_groups"]))
