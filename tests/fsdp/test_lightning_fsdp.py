"""``muon_fsdp`` through the Trainer and Fabric equals one process, for modules that have no code for it."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_muon as lm
from lightning_muon.fabric import MuonFSDPStrategy as FabricFSDP
from tests.fsdp.test_training_shards import pair
from tests.integration.test_lightning import assert_close, reference
from tests.lightning_runs import AwkwardLightningModule, PoolEnvironment, fabric_fit, fit, trainer, weights
from tests.models import awkward_model, token_batches
from tests.processes import run_processes
from tests.versions import EMAWeightAveraging

BLOCKS = (nn.Linear, nn.Conv1d)


def through_trainer(strategy_options=None, **options):
    return fit(strategy=lm.MuonFSDPStrategy(wrap=BLOCKS, **(strategy_options or {})), **options)


def through_fabric(strategy_options=None, **options):
    return fabric_fit(strategy=FabricFSDP(wrap=BLOCKS, **(strategy_options or {})), **options)


def run(how, strategy_options=None, options=None):
    return how(strategy_options, **(options or {}))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_training_equals_one_process(how, world_size):
    expected, _, state_bytes = reference()
    results = run_processes(world_size, run, how)
    assert_close(results[0][0], expected)
    assert sum(result[2] for result in results) == state_bytes


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_replicas(how):
    expected, *_ = reference()
    results = run_processes(4, run, how, {"num_replicas": 2})
    assert_close(results[0][0], expected)


@pytest.mark.parametrize("how", [fit, fabric_fit])
def test_by_name(how):
    expected, *_ = reference()
    for result in run_processes(2, _by_name, how):
        assert_close(result[0], expected)


def _by_name(how):
    return how(strategy="muon_fsdp")


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_clipping_uses_the_norm_of_the_whole_gradient(how):
    expected, norms, _ = reference(steps=10, max_norm=0.05)
    options = {"max_steps": 10, **({"gradient_clip_val": 0.05} if how is through_trainer else {"max_norm": 0.05})}
    for weight, found, _ in run_processes(3, run, how, {}, options):
        assert_close(weight, expected)
        assert found == pytest.approx(norms, rel=1e-5)


def test_clipping_by_value():
    expected, *_ = reference(steps=10, clip_value=1e-3)
    options = {"max_steps": 10, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    for result in run_processes(2, run, through_trainer, {}, options):
        assert_close(result[0], expected)


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
def test_accumulation_equals_the_big_batch(how):
    expected, *_ = reference(steps=10)
    options = {"max_steps": 10, **({"accumulate_grad_batches": 4} if how is through_trainer else {"accumulate": 4})}
    for result in run_processes(3, run, how, {}, options):
        assert_close(result[0], expected)


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"reshard_after_forward": False}])
def test_memory_options_change_nothing(how, options):
    expected, *_ = reference(steps=10)
    for result in run_processes(2, run, how, options, {"max_steps": 10}):
        assert_close(result[0], expected)


@pytest.mark.parametrize("how", [through_trainer, through_fabric])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_moves_as_one_process_does(how, precision):
    """Two roundings of 16-bit numbers differ; what must not differ is where it goes."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    start = weights(torch.nn.ModuleDict({"model": awkward_model()}))
    expected, *_ = reference(steps=5, dtype=dtype)
    found = run_processes(2, run, how, {}, {"max_steps": 5, "precision": precision})[0][0]
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected])
    wrong = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert wrong.norm() <= 0.3 * moved.norm()


def evaluates_and_goes_on():
    module = AwkwardLightningModule()
    run = trainer(20, strategy=lm.MuonFSDPStrategy(wrap=BLOCKS), limit_val_batches=1, val_check_interval=5)
    run.fit(module)
    after = weights(module)
    validated = run.validate(module)[0]["val_loss"]
    tested = run.test(module)[0]["val_loss"]
    run.predict(module)
    more = trainer(3, strategy=lm.MuonFSDPStrategy(wrap=BLOCKS))
    module.batches = token_batches(20, 12)
    more.fit(module)
    return after, validated, tested


def test_validation_in_between_changes_nothing():
    expected, *_ = reference()
    for after, validated, tested in run_processes(2, evaluates_and_goes_on):
        assert_close(after, expected)
        assert validated == pytest.approx(tested)


class ShardsItself(AwkwardLightningModule):
    def configure_model(self):
        if not any(isinstance(param, DTensor) for param in self.parameters()):
            fully_shard(self.model.square, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


class ForgetsAPart(ShardsItself):
    def configure_model(self):
        fully_shard(self.model.square, mesh=self.device_mesh["data_parallel"])


class BuildsLate(AwkwardLightningModule):
    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3)
            self.late.requires_grad_(False)


def fit_module(module_class):
    module = module_class()
    trainer(20, strategy="muon_fsdp").fit(module)
    return weights(module)


@pytest.mark.parametrize("module_class", [ShardsItself, BuildsLate])
def test_configure_model_keeps_control(module_class):
    expected, *_ = reference()
    for found in run_processes(2, fit_module, module_class):
        assert_close({name: found[name] for name in expected}, expected)


def forgets_a_part():
    with pytest.raises(ValueError, match=r"model\.tall\.weight"):
        fit_module(ForgetsAPart)


class Pair(L.LightningModule):
    """Tensor parallelism, which the model has to say itself."""

    def __init__(self, steps=10):
        super().__init__()
        self.model = pair()
        self.batches = token_batches(steps, 12)

    def configure_model(self):
        if not any(isinstance(param, DTensor) for param in self.parameters()):
            plan = {"model.tall": ColwiseParallel(), "model.wide": RowwiseParallel()}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch, batch_idx):
        data = self.trainer.world_size // 2
        return self.model.loss(self.batches[self.global_step].chunk(data)[self.global_rank // 2])

    def configure_optimizers(self):
        return lm.Muon(self, lr=1e-2, adamw_lr=5e-3, orthogonalization_dtype=torch.float32)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(len(self.batches)), batch_size=None)


def fit_tensor_parallel(steps=10, save_to=None, resume_from=None, folder=False):
    module = Pair()
    run = trainer(steps, strategy=lm.MuonFSDPStrategy(tensor_parallel_size=2, save_distributed_checkpoint=folder))
    run.fit(module, ckpt_path=resume_from)
    if save_to:
        run.save_checkpoint(save_to)
    return weights(module)


def reference_pair(steps=10):
    model = nn.ModuleDict({"model": pair()})
    optimizer = lm.Muon(model, lr=1e-2, adamw_lr=5e-3, orthogonalization_dtype=torch.float32)
    for tokens in token_batches(steps, 12):
        optimizer.zero_grad()
        model["model"].loss(tokens).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallelism_through_the_trainer(world_size):
    expected = reference_pair()
    for found in run_processes(world_size, fit_tensor_parallel):
        assert_close(found, expected)


def a_wrong_mesh():
    with pytest.raises(ValueError, match="num_replicas=2"):
        trainer(1, strategy=lm.MuonFSDPStrategy(num_replicas=2)).fit(AwkwardLightningModule())


@pytest.mark.parametrize("folder", [False, True])
def test_checkpoints_of_tensor_parallelism(tmp_path, folder):
    expected = reference_pair()
    path = str(tmp_path / "tensor.ckpt")
    run_processes(4, fit_tensor_parallel, 5, path, None, folder)
    for found in run_processes(2, fit_tensor_parallel, 10, None, path):
        assert_close(found, expected)


class OnMeta(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(6, 7), nn.Tanh()), nn.Sequential(nn.Linear(7, 6), nn.Tanh())
        )
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return self.head(self.layers(batch)).square().mean()

    def configure_optimizers(self):
        return lm.Muon(self, lr=1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(4, 2, 6), batch_size=None)


def from_the_meta_device(module_class):
    run = trainer(2, strategy="muon_fsdp")
    with run.init_module(empty_init=True):
        module = module_class()
    assert all(param.is_meta for param in module.parameters())
    run.fit(module)
    return weights(module)


def test_modules_on_the_meta_device_get_their_values():
    first, second = run_processes(2, from_the_meta_device, OnMeta)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert weight.isfinite().all()
        assert weight.abs().max() > 0


def a_parameter_that_nobody_can_initialise():
    with pytest.raises(TypeError, match="reset_parameters"):
        from_the_meta_device(AwkwardLightningModule)


def averages():
    moving = [] if EMAWeightAveraging is None else [EMAWeightAveraging()]
    for average in (StochasticWeightAveraging(swa_lrs=1e-2), *moving):
        with pytest.raises(TypeError, match=type(average).__name__):
            trainer(1, strategy="muon_fsdp", callbacks=[average]).fit(AwkwardLightningModule())


def another_optimizer():
    module = AwkwardLightningModule(optimizer=torch.optim.AdamW)
    with pytest.raises(TypeError, match=r"MuonFSDPStrategy needs lightning_muon\.Muon"):
        trainer(1, strategy="muon_fsdp").fit(module)


def an_optimizer_of_nobody():
    fabric = L.Fabric(
        accelerator="cpu", devices=dist.get_world_size(), strategy="muon_fsdp", plugins=[PoolEnvironment()]
    )
    fabric.launch()
    bare = awkward_model()
    optimizer = lm.Muon(bare)
    fabric.setup_module(bare)
    with pytest.raises(RuntimeError, match=r"fabric\.setup"):
        fabric.setup_optimizers(optimizer)


@pytest.mark.parametrize(
    "check",
    [forgets_a_part, a_parameter_that_nobody_can_initialise, averages, another_optimizer, an_optimizer_of_nobody],
)
def test_errors(check):
    run_processes(2, check)


def test_processes_that_replicas_do_not_divide():
    run_processes(3, a_wrong_mesh)


@pytest.mark.parametrize(
    "options",
    [
        {"exchange_mb": 0},
        {"exchange_dtype": torch.float16},
        {"missing_gradients": "ignore"},
        {"clip_scope": "muon"},
        {"save_in_background": True},
    ],
)
@pytest.mark.parametrize("strategy", [lm.MuonFSDPStrategy, FabricFSDP])
def test_options_out_of_range(strategy, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        strategy(**options)
