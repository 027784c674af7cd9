"""Global batches are the same on any number of processes, and go on where a run stopped."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DistributedSampler

import lightning_muon as lm

NUM_SAMPLES, BATCH_SIZE = 100, 16  # 6 batches and 4 samples that are left over
PER_EPOCH = 6


def loaders(count, **options):
    return [
        lm.GlobalBatchLoader(range(NUM_SAMPLES), BATCH_SIZE, num_replicas=count, rank=r, **options)
        for r in range(count)
    ]


def global_batches(parts):
    return [torch.cat(shares).tolist() for shares in zip(*parts, strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_any_number_of_processes_sees_the_same_batches(count, shuffle):
    (one,), many = loaders(1, shuffle=shuffle), loaders(count, shuffle=shuffle)
    for epoch in range(3):
        for loader in [one, *many]:
            loader.set_epoch(epoch)
        expected = [batch.tolist() for batch in one]
        assert len(expected) == len(one) == PER_EPOCH
        assert len({sample for batch in expected for sample in batch}) == PER_EPOCH * BATCH_SIZE
        assert global_batches(many) == expected
        assert {len(loader) for loader in many} == {PER_EPOCH}


def test_an_epochs_order_is_torchs():
    sampler = DistributedSampler(range(NUM_SAMPLES), 1, 0, seed=7)
    (loader,) = loaders(1, seed=7)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert torch.cat(list(loader)).tolist() == list(sampler)[: PER_EPOCH * BATCH_SIZE]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_weights_make_the_mean_of_means_the_mean(count):
    parts = loaders(count)
    values = torch.arange(NUM_SAMPLES, dtype=torch.float64).square()
    for shares in zip(*parts, strict=True):
        means = [part.weight * values[share].mean() for part, share in zip(parts, shares, strict=True)]
        assert torch.stack(means).mean() == pytest.approx(values[torch.cat(shares)].mean())
    assert all(part.weight == 1 for part in parts) == (BATCH_SIZE % count == 0)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stopped_after", [1, 4, PER_EPOCH])
def test_another_number_of_processes_goes_on(stopped_after, num_workers):
    (one,), (first,) = loaders(1), loaders(1, num_workers=num_workers)
    for loader in (one, first):
        loader.set_epoch(3)
    expected = [batch.tolist() for batch in one]
    for _, batch in zip(range(stopped_after), first, strict=False):
        del batch
    state = first.state_dict()
    assert state["batches"] == stopped_after  # and not what workers have fetched ahead
    resumed = loaders(3)
    for loader in resumed:
        loader.load_state_dict(state)
    rest = global_batches(resumed)
    assert rest == (expected[stopped_after:] or expected)
    for loader in [one, *resumed]:
        loader.set_epoch(4)
    assert global_batches(resumed) == [batch.tolist() for batch in one]


class Noting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.layer(batch[:, None].float()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self):
        return lm.GlobalBatchLoader(range(NUM_SAMPLES), BATCH_SIZE)


def fit(max_steps, folder, accumulate=1, resume=None):
    module = Noting()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[saving],
        logger=False,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=resume)
    return module.seen


def test_the_trainer_goes_on_from_any_step(tmp_path):
    expected = fit(14, tmp_path)
    assert expected == [batch.tolist() for epoch in range(3) for batch in of_epoch(epoch)][:14]
    for step in (1, 5, 6, 7, 11, 12, 13):  # epochs end at 6 and 12
        assert fit(14, tmp_path / "resumed", resume=tmp_path / f"step={step}.ckpt") == expected[step:], step


def test_the_trainer_goes_on_with_accumulation(tmp_path):
    expected = fit(6, tmp_path, accumulate=2)
    assert len(expected) == 12
    for step in (1, 3, 4):
        resumed = fit(6, tmp_path / "resumed", accumulate=2, resume=tmp_path / f"step={step}.ckpt")
        assert resumed == expected[2 * step :], step


def of_epoch(epoch):
    (loader,) = loaders(1)
    loader.set_epoch(epoch)
    return loader


def test_the_trainer_goes_on_from_the_end_of_an_epoch(tmp_path):
    def run(resume=None):
        module = Noting()
        module.train_dataloader = lambda: lm.GlobalBatchLoader(range(NUM_SAMPLES), BATCH_SIZE, num_workers=1)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        L.Trainer(accelerator="cpu", max_epochs=3, callbacks=[saving], **options).fit(module, ckpt_path=resume)
        return module.seen

    expected = run()
    assert expected == [batch.tolist() for epoch in range(3) for batch in of_epoch(epoch)]
    assert run(tmp_path / "epoch=0.ckpt") == expected[PER_EPOCH:]


def test_fabric_keeps_the_position(tmp_path):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    (loader,) = loaders(1)
    expected = [batch.tolist() for epoch in range(3) for batch in of_epoch(epoch)]
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            seen.append(fabric.to_device(batch).tolist())
            if len(seen) == PER_EPOCH + 3:
                fabric.save(tmp_path / "state.ckpt", {"loader": loader})
    assert seen == expected[: 2 * PER_EPOCH]
    (resumed,) = loaders(1)
    fabric.load(tmp_path / "state.ckpt", {"loader": resumed})
    assert resumed.epoch == 1
    seen = []
    for epoch in range(resumed.epoch, 3):
        resumed.set_epoch(epoch)
        seen += [batch.tolist() for batch in resumed]
    assert seen == expected[PER_EPOCH + 3 :]


def test_fabrics_own_count_of_epochs_is_an_error():
    (loader,) = loaders(1)
    loader.set_epoch(2)
    next(iter(loader))
    (resumed,) = loaders(1)
    resumed.load_state_dict(loader.state_dict())
    wrapped = L.Fabric(accelerator="cpu", devices=1).setup_dataloaders(resumed)
    with pytest.raises(ValueError, match="setup_dataloaders counts epochs from 0"):
        next(iter(wrapped))


@pytest.mark.parametrize(("samples", "batch_size", "count"), [(100, 2, 3), (10, 16, 1)])
def test_shares_that_cannot_be(samples, batch_size, count):
    with pytest.raises(ValueError, match=f"global batch of {batch_size} samples"):
        lm.GlobalBatchLoader(range(samples), batch_size, num_replicas=count, rank=0)


def test_a_look_at_the_first_batch_takes_nothing_from_the_epoch():
    (loader,), (other,) = loaders(1), loaders(1)
    next(iter(loader))
    expected = [batch.tolist() for batch in other]
    assert [batch.tolist() for batch in loader] == expected
    assert [batch.tolist() for batch in loader] == expected  # nor does an epoch from the next


def test_a_look_after_loading_takes_nothing_from_the_rest():
    (loader,), (resumed,) = loaders(1), loaders(1)
    batches = [batch.tolist() for batch in loader]
    resumed.load_state_dict({**loader.state_dict(), "batches": 2})
    assert next(iter(resumed)).tolist() == batches[2]
    assert [batch.tolist() for batch in resumed] == batches[2:]
    resumed.set_epoch(0)
    assert [batch.tolist() for batch in resumed] == batches


def test_positions_of_before_go_on():
    """Those that say nothing of shuffling and of the dataset."""
    (loader,), (resumed,) = loaders(1), loaders(1)
    batches = [batch.tolist() for batch in loader]
    resumed.load_state_dict({"epoch": 0, "batches": 2, "batch_size": BATCH_SIZE, "seed": 0})
    assert [batch.tolist() for batch in resumed] == batches[2:]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"dataset": range(NUM_SAMPLES + 1)}, "num_samples"),
    ],
)
def test_another_order_is_an_error(options, name):
    (loader,) = loaders(1)
    other = lm.GlobalBatchLoader(**{"dataset": range(NUM_SAMPLES), "batch_size": BATCH_SIZE, **options})
    with pytest.raises(ValueError, match=f"{name}=") as raised:
        other.load_state_dict(loader.state_dict())
    assert "use the same" in str(raised.value)
