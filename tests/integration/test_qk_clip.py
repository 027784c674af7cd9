"""The callback in a Trainer: what it logs and when, what it clips, and what it leaves as it is."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

import lightning_muon as lm
from lightning_muon.attention import observe
from tests.attention_models import build, describe, inputs, logits_of, plant
from tests.lightning_runs import trainer
from tests.processes import run_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*the largest attention logit")

DOCUMENT = Path(__file__).parents[2] / "docs" / "qk-clip.md"


class Recorder(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.steps = {}
        self.calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        self.steps.setdefault(step, {}).update(metrics)

    def of(self, key):
        return {step: values[key] for step, values in self.steps.items() if key in values}


class AttentionModule(L.LightningModule):
    """The batch of a step depends on the step alone."""

    def __init__(self, kind="mha", planted=None, dtype=torch.float32, optimizer=None, scale=1.0):
        super().__init__()
        self.model = build(kind).to(dtype)
        self.make_optimizer = optimizer or (lambda module: lm.Muon(module, lr=1e-2))
        self.scale = scale
        if planted is not None:
            plant(self.model, kind, self.batch(0), largest=planted)

    def batch(self, number):
        return inputs(number).to(next(self.parameters()).dtype) * self.scale

    def training_step(self, batch, batch_idx):
        return self.model(self.batch(batch_idx)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.model(self.batch(0) * 50)

    def configure_optimizers(self):
        return self.make_optimizer(self)

    def train_dataloader(self):
        return DataLoader(range(100), batch_size=None)

    val_dataloader = train_dataloader


def standing_still(module):
    return torch.optim.SGD(module.parameters(), lr=0.0)


def fit(module, *callbacks, steps=4, logger=None, **options):
    logger = logger or Recorder()
    options = {"strategy": "auto", "log_every_n_steps": 2, **options}
    trainer(steps, logger=logger, callbacks=list(callbacks), **options).fit(module)
    return logger


def weights(module):
    return {name: param.detach().clone() for name, param in module.named_parameters()}


NAME = "model.self_attn"


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla"])
def test_a_planted_head_is_clipped_after_the_first_step(kind):
    module = AttentionModule(kind, planted=300.0, optimizer=standing_still)
    with pytest.warns(UserWarning, match=rf"{NAME}: the largest attention logit of head 2 is 300, more than twice τ"):
        logger = fit(module, lm.QKClip(), steps=1, log_every_n_steps=1)
    assert logger.of(f"attention/max_logit/{NAME}")[1] == pytest.approx(300, rel=1e-5)
    assert logger.of(f"attention/clipped_heads/{NAME}") == {1: 1}
    assert logger.of("muon/alarms/attention_logits") == {1: 1}
    assert logits_of(module.model, module.batch(0))[2] == pytest.approx(100, rel=1e-3)


def test_it_clips_after_every_step_and_logs_at_its_cadence():
    module = AttentionModule("mla", planted=9.0)
    logger = fit(module, lm.QKClip(tau=0.5, every_n_steps=3), steps=7)
    assert sorted(logger.of(f"attention/max_logit/{NAME}")) == [3, 6]
    assert all(1 <= count <= 4 for count in logger.of(f"attention/clipped_heads/{NAME}").values())
    assert logger.calls == len(logger.steps)
    by_hand = AttentionModule("mla", planted=9.0)
    optimizer, clipper = lm.Muon(by_hand, lr=1e-2), lm.QKClipper(by_hand, tau=0.5)
    for number in range(7):
        by_hand.training_step(None, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        clipper.clip(optimizer)
        if number in (2, 5):
            figures = clipper.figures()
            assert figures.items() <= logger.steps[number + 1].items()
    assert all(torch.equal(weight, weights(module)[name]) for name, weight in weights(by_hand).items())


def documented_keys(text):
    return set(re.findall(r"^\| `((?:attention|muon)/[^`]+)`", text, flags=re.MULTILINE))


def test_keys_are_the_documented_ones():
    module = AttentionModule()
    logger = fit(module, lm.QKClip(mode="detailed"), steps=2)
    found = {re.sub(rf"{NAME}\.\d", "<module>.<head>", key).replace(NAME, "<module>") for key in logger.steps[2]}
    written = {
        "attention/max_logit/_max",
        "attention/max_logit/_mean",
        "attention/max_logit/_min",
        "attention/max_logit/<module>",
        "attention/max_logit/<module>.<head>",
        "attention/clipped_heads/<module>",
        "muon/alarms/attention_logits",
    }
    assert found - {"epoch"} == written
    assert documented_keys(DOCUMENT.read_text()) == {key for key in written if not key.endswith(("_mean", "_min"))}, (
        "which are in one line of the table"
    )
    brief = fit(AttentionModule(), lm.QKClip(), steps=2).steps[2]
    assert not any(re.search(r"\.\d$", key) for key in brief)


@pytest.mark.parametrize("callback", [{"tau": float("inf")}, {"log_only": True}, {"log_only": True, "tau": 1e-3}])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_training_is_bitwise_the_same(callback, options):
    results = []
    for callbacks in ((), (lm.QKClip(**callback),)):
        module = AttentionModule("mla")
        fit(module, *callbacks, steps=6, **options)
        results.append(weights(module))
    assert all(torch.equal(results[1][name], weight) for name, weight in results[0].items())


def count_looks(monkeypatch):
    looks, original = [], observe.max_logits
    monkeypatch.setattr(observe, "max_logits", lambda *args, **kwargs: looks.append(1) or original(*args, **kwargs))
    return looks


def test_log_only_looks_at_logged_steps_alone(monkeypatch):
    looks = count_looks(monkeypatch)
    module = AttentionModule("mha", planted=300.0, optimizer=standing_still)
    with pytest.warns(UserWarning, match="above τ = 100, and QKClip only watches"):
        logger = fit(module, lm.QKClip(log_only=True), steps=9, log_every_n_steps=4, accumulate_grad_batches=3)
    assert len(looks) == 3 * 3  # the first step, too: what cannot be seen is said at once
    found = logger.of(f"attention/max_logit/{NAME}")
    each = [max(logits_of(module.model, module.batch(number))) for number in range(27)]
    assert found == pytest.approx({4: max(each[9:12]), 8: max(each[21:24])}, rel=1e-5)
    assert not logger.of(f"attention/clipped_heads/{NAME}")


def test_validation_is_not_counted():
    module = AttentionModule("mha", optimizer=standing_still)
    logger = fit(module, lm.QKClip(), steps=4, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=1)
    each = [max(logits_of(module.model, module.batch(number))) for number in range(4)]
    assert logger.of(f"attention/max_logit/{NAME}") == pytest.approx({2: each[1], 4: each[3]}, rel=1e-5)


def test_an_alarm_is_said_once():
    module = AttentionModule("mha", planted=300.0, optimizer=standing_still)
    with pytest.warns(UserWarning, match="attention logit") as said:
        fit(module, lm.QKClip(log_only=True, every_n_steps=1), steps=15)
    assert len([one for one in said if "attention logit" in str(one.message)]) == 1


class OverflowsAtFirst(AttentionModule):
    """The same batch twice, and a loss that is infinite at first."""

    def __init__(self):
        super().__init__("mha", planted=300.0, optimizer=standing_still)
        self.after = []

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, 0) * (float("inf") if batch_idx == 0 else 1.0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.after.append(self.model.self_attn.q_proj.weight.detach().clone())


def test_a_step_that_the_scaler_skips_is_not_clipped_after():
    module = OverflowsAtFirst()
    before = module.model.self_attn.q_proj.weight.detach().clone()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    logger = fit(module, lm.QKClip(), steps=2, log_every_n_steps=1, plugins=[plugin])
    assert torch.equal(module.after[0], before)
    torch.testing.assert_close(module.after[1][12:18], before[12:18] * 3**-0.5, rtol=1e-2, atol=0)
    assert logger.of(f"attention/clipped_heads/{NAME}") == {1: 0, 2: 1}
    assert logger.of(f"attention/max_logit/{NAME}") == pytest.approx({1: 300, 2: 300}, rel=1e-2)


class TwoOptimizers(AttentionModule):
    """Manual optimization: the first steps twice in a batch, the second once, the third trains no attention."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = torch.nn.ModuleDict({"first": build("mha", 0), "second": build("gqa", 1)})
        self.rest = torch.nn.Linear(2, 2)
        self.seen = []
        for part, kind in (("first", "mha"), ("second", "gqa")):
            plant(self.model[part], kind, self.batch(0))

    def training_step(self, batch, batch_idx):
        first, second, rest = self.optimizers()
        for part, optimizer in ((self.model["first"], first), (self.model["second"], second)):
            for _ in range(2 if optimizer is first else 1):
                self.manual_backward(part(self.batch(0)).square().mean())
                optimizer.step()
                self.seen.append(logits_of(part, self.batch(0))[2])
        rest.step()

    def configure_optimizers(self):
        return [standing_still(part) for part in (self.model["first"], self.model["second"], self.rest)]


def test_each_step_of_each_optimizer():
    module = TwoOptimizers()
    logger = fit(module, lm.QKClip(), steps=4, log_every_n_steps=4)
    assert module.seen[:3] == pytest.approx([100, 100, 100], rel=1e-3)
    (figures,) = logger.steps.values()
    assert figures["attention/clipped_heads/model.first.self_attn"] == 1
    assert figures["attention/max_logit/model.first.self_attn"] == pytest.approx(100, rel=1e-3)
    assert figures["attention/max_logit/model.second.self_attn"] == pytest.approx(300, rel=1e-3)


def test_log_only_with_several_optimizers():
    logger = fit(TwoOptimizers(), lm.QKClip(log_only=True), steps=4, log_every_n_steps=4)
    (figures,) = logger.steps.values()
    assert figures["attention/max_logit/_max"] == pytest.approx(300, rel=1e-3)
    assert figures["attention/max_logit/_min"] == pytest.approx(300, rel=1e-3)


def test_frozen_attention_can_be_watched():
    module = AttentionModule()
    module.model.self_attn.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        fit(module, lm.QKClip())
    assert fit(module, lm.QKClip(log_only=True)).of("attention/max_logit/_max").keys() == {2, 4}


def test_some_frozen_attention_can_be_watched():
    class HalfFrozen(TwoOptimizers):
        def configure_optimizers(self):
            self.model["second"].self_attn.requires_grad_(False)
            return [
                standing_still(self.model["first"]),
                standing_still(self.model["second"].head),
                standing_still(self.rest),
            ]

    figures = fit(HalfFrozen(), lm.QKClip(log_only=True), steps=4, log_every_n_steps=4).steps[4]
    assert "attention/max_logit/model.first.self_attn" in figures


def test_attention_that_no_optimizer_trains():
    module = AttentionModule(optimizer=lambda module: standing_still(module.model.head))
    with pytest.raises(MisconfigurationException, match=r"no optimizer trains model\.self_attn"):
        fit(module, lm.QKClip())


def test_without_a_logger():
    module = AttentionModule(planted=300.0, optimizer=standing_still)
    trainer(1, "auto", callbacks=[lm.QKClip()]).fit(module)
    assert logits_of(module.model, module.batch(0))[2] == pytest.approx(100, rel=1e-3)
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        trainer(1, "auto", callbacks=[lm.QKClip(log_only=True)]).fit(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tau": 0.0}, "tau=0.0"), ({"every_n_steps": 0}, "every_n_steps=0"), ({"mode": "all"}, "mode='all'")],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.QKClip(**arguments)


def test_nothing_is_left_behind():
    class Fails(AttentionModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    for module, callback in ((AttentionModule(), lm.QKClip()), (Fails(), lm.QKClip())):
        for _ in range(2):
            if isinstance(module, Fails):
                with pytest.raises(KeyError):
                    fit(module, callback)
            else:
                fit(module, callback)
        attention = module.model.self_attn
        assert not attention._forward_hooks
        assert not attention._forward_pre_hooks
        assert torch._C._len_torch_function_stack() == 0


def test_described_heads_and_filters():
    module = AttentionModule("fused", planted=None)
    heads = {"model": module.model.description}
    assert "attention/max_logit/model" in fit(module, lm.QKClip(heads=heads)).steps[2]
    assert "attention/max_logit/model" in fit(AttentionModule("fused"), lm.QKClip(heads=describe)).steps[2]
    with pytest.raises(ValueError, match="No attention found"):
        fit(AttentionModule(), lm.QKClip(exclude="self_attn"))


class Shares(AttentionModule):
    """Every process takes its part of the batch."""

    def training_step(self, batch, batch_idx):
        x = torch.cat([self.batch(10 * batch_idx + part) for part in range(4)])
        return self.model(x.chunk(self.trainer.world_size)[self.global_rank]).square().mean()


def exact_muon(module):
    return lm.Muon(module, lr=3e-2, orthogonalization_dtype=torch.float64)


def train_under(strategy, folder):
    module = Shares("mla", planted=9.0, dtype=torch.float64, optimizer=exact_muon)
    logger = Recorder()
    options = {"logger": [logger, CSVLogger(folder)], "log_every_n_steps": 2}
    strategy = lm.MuonFSDPStrategy(wrap=(torch.nn.Linear,)) if strategy == "muon_fsdp" else strategy
    trainer(6, strategy, callbacks=[lm.QKClip(tau=0.5, mode="detailed")], **options).fit(module)
    return logger.steps


@pytest.mark.parametrize(("strategy", "world_size"), [("muon_zero1", 2), ("muon_zero1", 3), ("muon_fsdp", 2)])
def test_logged_values_are_those_of_one_process(strategy, world_size, tmp_path):
    expected = run_processes(1, train_under, "auto", tmp_path)[0]
    assert sorted(expected) == [2, 4, 6]
    assert any(expected[4][f"attention/clipped_heads/{NAME}"] for _ in range(1))
    for steps in run_processes(world_size, train_under, strategy, tmp_path):
        assert steps.keys() == expected.keys()
        for step, values in expected.items():
            assert steps[step] == pytest.approx(values, rel=1e-5)
    assert f"attention/max_logit/{NAME}.3" in expected[2]
