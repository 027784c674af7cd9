"""Full checkpoints: whole or absent, verified, and never run."""

import os
import pickle
import random
import resource
import zipfile

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn

from lightning_muon.checkpoint import atomic
from lightning_muon.checkpoint.check import check_weights
from lightning_muon.checkpoint.errors import CheckpointError
from lightning_muon.checkpoint.files import load_file, save_file, verify_file
from lightning_muon.fabric.checkpoint_io import MuonCheckpointIO, read_together

CHECKPOINT = {
    "state_dict": {"weight": torch.arange(5000.0), "half": torch.ones(7, dtype=torch.bfloat16)},
    "epoch": 3,
    "names": ["a", "b"],
    "betas": (0.9, 0.95),
}


def assert_is(loaded, expected):
    assert loaded.keys() == expected.keys()
    for key, value in expected["state_dict"].items():
        assert torch.equal(loaded["state_dict"][key], value)
    assert {key: loaded[key] for key in loaded if key != "state_dict"} == {
        key: value for key, value in expected.items() if key != "state_dict"
    }


def hidden(folder):
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new folder" / "last.ckpt"
    save_file(CHECKPOINT, path)
    assert_is(load_file(path), CHECKPOINT)
    assert not hidden(path.parent)


def test_a_loaded_checkpoint_outlives_its_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(CHECKPOINT, path)
    loaded = load_file(path)
    save_file({"state_dict": {}}, path)
    assert_is(loaded, CHECKPOINT)


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(CHECKPOINT, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_file({"weight": torch.ones(3), "hook": lambda: None}, path)
    assert_is(load_file(path), CHECKPOINT)
    assert not hidden(tmp_path)


def test_no_room_is_said_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(CHECKPOINT, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written \(File too large; .* free there\).*before is intact"):
            save_file({"state_dict": {"weight": torch.ones(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_is(load_file(path), CHECKPOINT)
    assert not hidden(tmp_path)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    path = tmp_path / "last.ckpt"
    atomic.saving_path(path).mkdir()
    (atomic.saving_path(path) / "torn").write_bytes(b"x")
    save_file(CHECKPOINT, path)
    assert not hidden(tmp_path)


def test_saving_through_a_link_leaves_its_target_alone(tmp_path):
    target, link = tmp_path / "epoch=1.ckpt", tmp_path / "last.ckpt"
    save_file(CHECKPOINT, target)
    link.symlink_to(target.name)
    save_file({"state_dict": {}}, link)
    assert_is(load_file(target), CHECKPOINT)
    assert load_file(link) == {"state_dict": {}}


def fill(path, folder, text):
    if folder:
        path.mkdir()
        (path / "inner").mkdir()
        (path / "inner" / "data").write_text(text)
        (path / "meta.pt").touch()  # what tells a checkpoint from other folders
    else:
        path.write_text(text)


def text_of(path):
    return (path / "inner" / "data" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("old", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("new", [True, False], ids=["by folder", "by file"])
def test_files_and_folders_replace_each_other(tmp_path, monkeypatch, old, new, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    path = tmp_path / "last.ckpt"
    fill(path, old, "old")
    with atomic.replacing(path) as staged:
        fill(staged, new, "new")
        assert text_of(path) == "old"
    assert text_of(path) == "new"
    assert path.is_dir() == new
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_half_a_replacement_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    path = tmp_path / "last.ckpt"
    fill(path, True, "old")
    original = os.rename

    def die_before_the_second(source, target):
        if os.fspath(source).endswith(".saving"):
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "rename", die_before_the_second)
    monkeypatch.setattr(atomic, "discard", lambda path: None)
    fill(atomic.begin(path), True, "new")
    with pytest.raises(KeyboardInterrupt):
        atomic.commit(path)
    assert not path.exists()
    monkeypatch.setattr(os, "rename", original)
    atomic.recover(path)
    assert text_of(path) == "old"


def test_another_process_may_have_repaired_it(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    for half in (path, path.with_name(f".{path.name}.replaced")):
        fill(half, True, "old")

    def was_faster(replaced):
        raise FileNotFoundError(replaced)

    monkeypatch.setattr(atomic, "_remove", was_faster)
    atomic.recover(path)
    assert text_of(path) == "old"


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_a_checkpoint_loses_its_name_before_its_contents(tmp_path, monkeypatch, folder):
    path = tmp_path / "last.ckpt"
    fill(path, folder, "old")
    names = []
    original = atomic._remove
    monkeypatch.setattr(atomic, "_remove", lambda removed: (names.append(path.exists()), original(removed)))
    atomic.remove(path)
    assert names[-1] is False
    assert not os.listdir(tmp_path)
    atomic.remove(path)


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(CHECKPOINT, path)
    good = path.read_bytes()
    generator = random.Random(0)
    found = 0
    for _ in range(300):
        position = generator.randrange(len(good))
        bad = bytearray(good)
        bad[position] ^= 1 << generator.randrange(8)
        path.write_bytes(bad)
        try:
            loaded = load_file(path)
        except CheckpointError:
            found += 1
        else:  # padding between the tensors
            assert_is(loaded, CHECKPOINT)
    assert found > 200


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99, 0.9999])
def test_a_cut_off_file_is_refused(tmp_path, share):
    save_file(CHECKPOINT, tmp_path / "epoch=1.ckpt")
    path = tmp_path / "last.ckpt"
    whole = (tmp_path / "epoch=1.ckpt").read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: It is cut off.*Resume from another one.*epoch=1\.ckpt"):
        load_file(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"no such checkpoint.*no other checkpoint beside it"):
        load_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        load_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        load_file(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"state_dict": {}, "hparams": Evil()}, "last.ckpt")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*add_safe_globals"):
        load_file("last.ckpt")
    assert not (tmp_path / "evil").exists()
    load_file("last.ckpt", weights_only=False)
    assert (tmp_path / "evil").exists()


def test_verification_can_be_shared(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file(CHECKPOINT, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(5000.0).numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)
    verdicts = []
    for rank in range(3):
        try:
            verify_file(path, rank=rank, world_size=3)
        except CheckpointError:
            verdicts.append(rank)
    assert len(verdicts) == 1


def test_a_file_has_checksums_even_where_they_are_switched_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_file(CHECKPOINT, tmp_path / "last.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    load_file(tmp_path / "last.ckpt")


def test_weights_of_another_model_are_refused():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    check_weights(module.state_dict(), module)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    with pytest.raises(
        CheckpointError,
        match=r"last\.ckpt: .*also has 2\.bias, 2\.weight\. .*0\.weight is \(5, 3\) there and \(4, 3\) here",
    ):
        check_weights(other.state_dict(), module, source="last.ckpt")
    with pytest.raises(CheckpointError, match=r"lacks 1\.bias, 1\.weight"):
        check_weights(nn.Sequential(nn.Linear(3, 4)).state_dict(), module)
    check_weights(nn.Sequential(nn.Linear(3, 4)).state_dict(), module, strict=False)
    wrapped = {f"_orig_mod.{name}": value for name, value in module.state_dict().items()}
    check_weights(wrapped, module)


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path):
    thesis = tmp_path / "results" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years")
    with pytest.raises(OSError, match="no checkpoint"):
        save_file({"a": 1}, tmp_path / "results")
    assert thesis.read_text() == "three years"
    empty = tmp_path / "empty"
    empty.mkdir()
    save_file({"a": 1}, empty)
    assert load_file(empty) == {"a": 1}


def test_paths_with_a_protocol_go_lightnings_own_way():
    MuonCheckpointIO().save_checkpoint({"step": 3}, "memory://last.ckpt")
    assert MuonCheckpointIO().load_checkpoint("memory://last.ckpt") == {"step": 3}
    MuonCheckpointIO().remove_checkpoint("memory://last.ckpt")


def test_a_plugin_of_lightnings_reads_for_all_processes(tmp_path):
    TorchCheckpointIO().save_checkpoint({"step": 3}, tmp_path / "last.ckpt")
    assert read_together(TorchCheckpointIO(), tmp_path / "last.ckpt", None) == {"step": 3}
