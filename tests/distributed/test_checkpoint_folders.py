"""Sharded checkpoints between numbers of processes, and one verdict for all of them."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_muon.checkpoint import folders
from lightning_muon.checkpoint.errors import CheckpointError
from lightning_muon.checkpoint.files import load_file_together, save_file
from lightning_muon.checkpoint.folders import load_folder, load_whole, save_folder
from tests.processes import run_processes

# by processes and mesh: one dimension of data, or replicas of shards
LAYOUTS = {"2": (2,), "3": (3,), "4": (4,), "2x2": (2, 2)}
SHAPES = {"tall": (7, 3), "one row": (1, 5), "empty on some": (2, 4), "experts": (3, 2, 5), "vector": (9,)}


def whole_state(offset):
    values = {name: torch.arange(float(torch.Size(shape).numel())).view(shape) for name, shape in SHAPES.items()}
    return {"model": {name: value + offset for name, value in values.items()}, "steps": {"a": torch.tensor(offset)}}


def sharded_state(layout, offset):
    mesh = init_device_mesh("cpu", layout)
    placements = [Shard(0)] if len(layout) == 1 else [Replicate(), Shard(0)]
    state = whole_state(offset)
    state["model"] = {name: distribute_tensor(value, mesh, placements) for name, value in state["model"].items()}
    if len(layout) == 1:  # columns, as tensor parallelism has them
        state["columns"] = {"tall": distribute_tensor(whole_state(offset)["model"]["tall"], mesh, [Shard(1)])}
    else:
        state["columns"] = {"tall": whole_state(offset)["model"]["tall"]}
    return state


def full(state):
    return {
        outer: {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in inner.items()}
        for outer, inner in state.items()
    }


def assert_whole(state, offset):
    expected = whole_state(offset)
    expected["columns"] = {"tall": expected["model"]["tall"]}
    for outer, inner in expected.items():
        for name, value in inner.items():
            assert torch.equal(state[outer][name], value), (outer, name)


def save(path, layout, offset):
    save_folder(path, sharded_state(layout, offset), {"saved_by": layout, "epoch": offset})


def load(path, layout, offset):
    state = sharded_state(layout, 0)
    meta = load_folder(path, state)
    assert_whole(full(state), offset)
    return meta


def processes_of(layout):
    return torch.Size(layout).numel()


@pytest.mark.parametrize("saver", LAYOUTS)
def test_any_number_of_processes_reads_it(tmp_path, saver):
    path, layout = tmp_path / "last.ckpt", LAYOUTS[saver]
    run_processes(processes_of(layout), save, path, layout, 3)
    for reader in LAYOUTS.values():
        metas = run_processes(processes_of(reader), load, path, reader, 3)
        assert all(meta == {"saved_by": layout, "epoch": 3} for meta in metas)
    state, meta = load_whole(path)
    assert meta["epoch"] == 3
    assert_whole(state, 3)
    target = {**whole_state(0), "columns": {"tall": torch.zeros(7, 3)}}
    load_folder(path, target)
    assert_whole(target, 3)


def test_many_processes_read_what_one_saved(tmp_path):
    path = tmp_path / "last.ckpt"
    save_folder(path, {**whole_state(4), "columns": {"tall": whole_state(4)["model"]["tall"]}}, {"epoch": 4})
    run_processes(3, load, path, (3,), 4)


def load_fails(path, layout):
    state = sharded_state(layout, 0)
    with pytest.raises(CheckpointError) as raised:
        load_folder(path, state)
    assert_whole(full(state), 0)
    return str(raised.value)


def test_what_one_process_finds_all_raise(tmp_path):
    path = tmp_path / "last.ckpt"
    run_processes(3, save, path, (3,), 1)
    file = path / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    texts = run_processes(2, load_fails, path, (2,))
    assert all("__1_0.distcp is not as it was written" in text for text in texts)
    assert sum("(found by process" in text for text in texts) == 1  # one of the two has read it
    file.unlink()
    assert all("__1_0.distcp is missing" in text for text in run_processes(2, load_fails, path, (2,)))


def save_fails(path, where):
    state = sharded_state((3,), 2)
    rank = dist.get_rank()
    originals = folders._Writer.write_data, folders.checksums

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if rank == 1 and where == "data":
        folders._Writer.write_data = fail
    if rank == 2 and where == "checksums":
        folders.checksums = fail
    meta = {"hook": lambda: None} if where == "meta" and rank == 0 else {}
    try:
        with pytest.raises((OSError, RuntimeError, AttributeError)) as raised:
            save_folder(path, state, meta)
    finally:
        folders._Writer.write_data, folders.checksums = originals
    return str(raised.value)


@pytest.mark.parametrize("where", ["data", "checksums", "meta"])
def test_where_one_process_fails_to_save_all_raise_and_the_old_one_stays(tmp_path, where):
    path = tmp_path / "last.ckpt"
    run_processes(3, save, path, (3,), 1)
    texts = run_processes(3, save_fails, path, where)
    if where == "meta":
        assert all("lambda" in text for text in texts)
    else:
        assert all("No space left on device" in text and "before is intact" in text for text in texts)
    assert_whole(load_whole(path)[0], 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def load_a_file(path):
    try:
        return load_file_together(path)["weight"].sum().item()
    except CheckpointError as error:
        return str(error)


def test_one_file_is_verified_by_all(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file({"weight": torch.ones(5000), "other": torch.zeros(5000)}, path)
    assert run_processes(3, load_a_file, path) == [5000.0] * 3
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(5000).numpy().tobytes()) + 777] ^= 1
    path.write_bytes(data)
    texts = run_processes(3, load_a_file, path)
    assert all("is cut off, altered, or no checkpoint" in text for text in texts)
    assert sum("(found by process" in text for text in texts) == 2
