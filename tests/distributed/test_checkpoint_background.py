"""Saves behind training: of the values when they began, one at a time, and never silent about an error."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_muon.checkpoint import folders
from lightning_muon.checkpoint.background import BackgroundSaver
from lightning_muon.checkpoint.check import check_weights
from lightning_muon.checkpoint.folders import load_folder, load_whole, read_shapes
from tests.distributed.test_checkpoint_folders import assert_whole, sharded_state
from tests.models import awkward_model
from tests.processes import run_processes


class HeldWrites:
    """No process writes anything before ``go_on``."""

    def __enter__(self):
        self.event = threading.Event()
        self.original = original = folders._Writer.write_data

        def write_data(*args):
            assert self.event.wait(60)
            return original(*args)

        folders._Writer.write_data = write_data
        return self

    def go_on(self):
        self.event.set()

    def __exit__(self, *_):
        self.event.set()
        folders._Writer.write_data = self.original


def add(state, value):
    for inner in state.values():
        for tensor in inner.values():
            tensor.add_(value)


def training_goes_on(path, layout):
    saver = BackgroundSaver()
    state, meta = sharded_state(layout, 1), {"epoch": 1, "seen": [torch.zeros(2)]}
    with HeldWrites() as writes:
        first = saver.save(path, state, meta)
        add(state, 1)
        meta["epoch"] = 2
        meta["seen"][0] += 1
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == dist.get_world_size()
        assert not first.done()
        assert not path.exists()
        writes.go_on()
    first.wait()
    if dist.get_rank() == 0:
        whole, saved = load_whole(path)
        assert_whole(whole, 1)
        assert saved["epoch"] == 1
        assert saved["seen"][0].eq(0).all()
    dist.barrier()
    saver.save(path, state, meta)
    add(state, 1)
    last = path.with_name("last.ckpt")
    saver.save(last, state, meta)  # waits for the other
    if dist.get_rank() == 0:
        assert_whole(load_whole(path)[0], 2)
    saver.close()


@pytest.mark.parametrize("layout", [(2,), (2, 2)], ids=["2", "2x2"])
def test_training_goes_on(tmp_path, layout):
    path = tmp_path / "epoch=1.ckpt"
    run_processes(torch.Size(layout).numel(), training_goes_on, path, layout)
    assert_whole(load_whole(path)[0], 2)
    assert_whole(load_whole(tmp_path / "last.ckpt")[0], 3)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["epoch=1.ckpt", "last.ckpt"]


def one_fails(path, where):
    saver = BackgroundSaver()
    state = sharded_state((2,), 1)
    saver.save(path, state, {}).wait()
    original = folders._Writer.write_data

    def fail(*args):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1 and where == "write":
        folders._Writer.write_data = fail
    failing = sharded_state((2,), 2)
    if dist.get_rank() == 1 and where == "copy":
        failing["steps"]["a"] = 3
    try:
        saver.save(path, failing, {})
        with pytest.raises((OSError, TypeError)) as raised:
            saver.wait()
    finally:
        folders._Writer.write_data = original
    saver.wait()  # it has been told
    if dist.get_rank() == 0:
        assert_whole(load_whole(path)[0], 1)
    dist.barrier()
    saver.save(path, sharded_state((2,), 5), {})
    saver.close()
    return str(raised.value)


@pytest.mark.parametrize(("where", "text"), [("write", "No space left on device"), ("copy", "'steps.a' is a int")])
def test_an_error_of_one_process_is_raised_by_all(tmp_path, where, text):
    path = tmp_path / "last.ckpt"
    assert all(text in found for found in run_processes(2, one_fails, path, where))
    assert_whole(load_whole(path)[0], 5)


def test_without_a_process_group(tmp_path):
    saver = BackgroundSaver()
    weight = torch.ones(3)
    for number in range(3):
        saver.save(tmp_path / "last.ckpt", {"weight": weight}, {"number": number})
        weight += 1
    saver.close()
    state, meta = load_whole(tmp_path / "last.ckpt")
    assert meta == {"number": 2}
    assert state["weight"].eq(3).all()


def test_an_error_nobody_has_waited_for_is_raised_by_the_next_save(tmp_path):
    (tmp_path / "file").write_text("no folder")
    saver = BackgroundSaver()
    saver.save(tmp_path / "file" / "last.ckpt", {"weight": torch.ones(3)}, {})
    with pytest.raises(OSError, match="could not be written"):
        saver.save(tmp_path / "last.ckpt", {"weight": torch.ones(3)}, {})
    assert not (tmp_path / "last.ckpt").exists()
    saver.save(tmp_path / "last.ckpt", {"weight": torch.ones(3)}, {})
    saver.close()
    assert load_whole(tmp_path / "last.ckpt")[0]["weight"].eq(1).all()


def shard_fully(path):
    model = awkward_model(seed=2)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    saver = BackgroundSaver()
    saver.save(path, {"state_dict": model.state_dict()}, {})
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    saver.close()
    if dist.get_rank() == 0:
        saved = load_whole(path)[0]["state_dict"]
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], value) for name, value in expected.items())
    state = {"state_dict": model.state_dict()}
    check_weights(read_shapes(path)["state_dict"], model)
    load_folder(path, state)
    model.load_state_dict(state["state_dict"])
    for name, param in model.named_parameters():
        assert torch.equal(param.full_tensor(), expected[name])


def test_a_model_that_is_fully_sharded(tmp_path):
    run_processes(3, shard_fully, tmp_path / "last.ckpt")
