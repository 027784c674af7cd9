"""The mixture-of-experts layer and its balancing."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from examples.moe_lm.balancing import balance, sequence_loss, take_sequence_losses
from examples.moe_lm.config import ModelConfig
from examples.moe_lm.model import MoELM
from examples.moe_lm.moe import MixtureOfExperts
from tests.example.moe_lm_reference import moe_reference, sequence_loss_reference
from tests.example.test_model import TINY

# Lightning 2.6's own use of torch, once a Trainer loads batches.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec:FutureWarning")

CONFIG = ModelConfig(routed_scaling_factor=1.7, **TINY)


def make_layer(config: ModelConfig = CONFIG) -> MixtureOfExperts:
    layer = MixtureOfExperts(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("inner", [16, 17], ids=["grouped", "looped"])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (3, 2)], ids=str)
def test_layer_equals_token_by_token_reference_in_values_and_gradients(inner: int, groups: tuple[int, int]) -> None:
    experts = 2 * max(2, groups[0])
    shape = {**TINY, "moe_intermediate_size": inner, "n_routed_experts": experts}
    layer = make_layer(
        ModelConfig(routed_scaling_factor=1.7, n_group=groups[0], topk_group=groups[1], **shape)  # type: ignore[arg-type]
    )
    layer.gate.e_score_correction_bias.normal_(std=0.2)
    x = torch.randn(2, 10, 32, requires_grad=True)
    weight = torch.randn(2, 10, 32)
    ours = layer(x)
    reference = moe_reference(layer, x.flatten(0, 1), top_k=2, scaling=1.7).view_as(x)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    inputs = [x, *layer.parameters()]
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def test_bias_affects_selection_only() -> None:
    layer = make_layer()
    x = torch.randn(6, 32)
    scores = torch.sigmoid(x @ layer.gate.weight.T)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]))
    experts, weights, _ = layer.gate(x)
    assert set(experts.flatten().tolist()) == {1, 3}
    chosen = scores.gather(-1, experts)
    torch.testing.assert_close(weights, 1.7 * chosen / chosen.sum(-1, keepdim=True))
    layer.gate.e_score_correction_bias.add_(0.25)  # the same for all experts: nothing may change
    torch.testing.assert_close(layer.gate(x).weights.sum(-1), weights.sum(-1))


def test_expert_without_tokens_has_a_zero_gradient() -> None:
    layer = make_layer()
    layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    layer(torch.randn(1, 5, 32)).sum().backward()
    for stack in layer.experts.parameters():
        assert stack.grad is not None
        assert stack.grad[2:].abs().max() == 0
        assert stack.grad[:2].abs().amax(dim=(1, 2)).min() > 0


def test_all_experts_have_a_gradient_even_without_any_token() -> None:
    layer = make_layer()
    layer(torch.randn(0, 5, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in layer.experts.parameters())


def test_router_scores_stay_in_fp32_under_autocast_and_bf16_keeps_the_bias() -> None:
    layer = make_layer()
    x = torch.randn(6, 32)
    expected = layer.gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        experts, weights, _ = layer.gate(x)
    assert torch.equal(experts, expected.experts)
    assert torch.equal(weights, expected.weights)
    layer.gate.e_score_correction_bias.fill_(1.001)  # 1.0 in bf16
    layer.to(torch.bfloat16)
    assert layer.gate.weight.dtype == torch.bfloat16
    assert torch.equal(layer.gate.e_score_correction_bias, torch.full((4,), 1.001))


def test_balance_moves_the_bias_towards_equal_load_with_mean_zero() -> None:
    layer = make_layer()
    layer.tokens_per_expert = torch.tensor([10, 2, 1, 3])  # mean 4: signs -, +, +, +, their mean 1/2
    max_vio = balance({"layer": layer})
    expected = 1e-3 * torch.tensor([-1.5, 0.5, 0.5, 0.5])
    torch.testing.assert_close(layer.gate.e_score_correction_bias, expected)
    assert layer.gate.e_score_correction_bias.sum().abs() < 1e-9
    assert max_vio["layer"].item() == pytest.approx(1.5)
    assert layer.tokens_per_expert is None
    assert balance({"layer": layer}) == {}


def test_balance_evens_out_a_lopsided_router() -> None:
    layer = make_layer().train()
    layer.bias_update_rate = 0.02
    x = torch.randn(1, 400, 32) + 0.5
    max_vio = []
    for _ in range(100):
        layer(x)
        max_vio.append(float(balance({"layer": layer})["layer"]))
    assert max_vio[0] > 0.25
    assert max(max_vio[-10:]) < 0.5 * max_vio[0]


def test_counts_tokens_of_training_forwards_only() -> None:
    layer = make_layer()
    x = torch.randn(2, 7, 32)
    layer.eval()
    layer(x)
    assert layer.tokens_per_expert is None
    layer.train()
    layer(x)
    layer(x)
    assert layer.tokens_per_expert is not None
    assert int(layer.tokens_per_expert.sum()) == 2 * 14 * CONFIG.num_experts_per_tok


def test_sequence_loss_equals_its_formula_and_is_one_where_scores_are_even() -> None:
    scores = torch.rand(3, 7, 6, requires_grad=True)
    gradient = torch.autograd.grad(sequence_loss(scores, 2), scores)[0]
    expected = torch.autograd.grad(sequence_loss_reference(scores, 2), scores)[0]
    torch.testing.assert_close(sequence_loss(scores, 2), sequence_loss_reference(scores, 2))
    torch.testing.assert_close(gradient, expected)
    assert sequence_loss(torch.full((2, 5, 4), 0.3), 1).item() == pytest.approx(1)


def test_sequence_loss_is_left_by_training_forwards_once_and_per_sequence() -> None:
    layers = {str(i): make_layer(ModelConfig(aux_loss_alpha=0.5, **TINY)) for i in range(2)}
    x = torch.randn(3, 6, 32)
    for layer in layers.values():
        layer.gate.e_score_correction_bias.normal_()  # has no say in it
        layer.eval()(x)
    assert take_sequence_losses(layers) is None
    expected = []
    for layer in layers.values():
        layer.train()(x)
        scores = layer.gate(x.flatten(0, 1)).scores
        expected.append(0.5 * sequence_loss_reference(scores.view(3, 6, 4), 2))
    loss = take_sequence_losses(layers)
    assert loss is not None
    torch.testing.assert_close(loss, sum(expected))
    loss.backward()
    assert all(layer.gate.weight.grad is not None and layer.gate.weight.grad.norm() > 0 for layer in layers.values())
    assert take_sequence_losses(layers) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step_adds_the_auxiliary_loss_once_and_counts_once(checkpointing: bool) -> None:
    windows, losses = torch.randint(257, (3, 9)), {}
    for alpha in (0.0, 0.7):
        torch.manual_seed(0)
        config = ModelConfig(aux_loss_alpha=alpha, initializer_range=0.2, **TINY)
        model = MoELM(config, activation_checkpointing=checkpointing).train()
        model.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", log_every_n_steps=0)
        losses[alpha] = model.training_step(windows, 0)
        losses[alpha].backward()
        for layer in model.moe_layers.values():
            assert layer.sequence_loss is None  # a recomputed forward leaves none behind
            assert layer.tokens_per_expert is not None
            assert int(layer.tokens_per_expert.sum()) == 3 * 8 * config.num_experts_per_tok
    seen: list[torch.Tensor] = []
    for layer in model.moe_layers.values():
        layer.gate.register_forward_hook(lambda _, __, routing: seen.append(routing.scores))
    model(windows[:, :-1])
    expected = 0.7 * sum(sequence_loss_reference(scores.view(3, 8, 4), 2) for scores in seen)
    torch.testing.assert_close(losses[0.7] - losses[0.0], expected)


def test_weights_that_are_not_normalised() -> None:
    layer = make_layer(ModelConfig(norm_topk_prob=False, routed_scaling_factor=1.7, **TINY))
    x = torch.randn(6, 32)
    routing = layer.gate(x)
    torch.testing.assert_close(routing.weights, 1.7 * routing.scores.gather(-1, routing.experts))


def test_without_an_auxiliary_loss_there_is_none() -> None:
    layer = make_layer().train()
    layer(torch.randn(2, 5, 32))
    assert take_sequence_losses({"layer": layer}) is None


class CountBalances(L.Callback):
    """Notes the tokens that each balancing saw."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        assert isinstance(pl_module, MoELM)
        layer = next(iter(pl_module.moe_layers.values()))
        assert layer.tokens_per_expert is not None
        self.tokens.append(int(layer.tokens_per_expert.sum()))


def test_trainer_balances_once_per_optimizer_step(tmp_path: object) -> None:
    model, counter = MoELM(CONFIG), CountBalances()
    windows = torch.randint(257, (16, 9))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[counter],
        max_steps=2,
        accumulate_grad_batches=3,
        val_check_interval=1,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(model, DataLoader(windows, batch_size=2), DataLoader(windows, batch_size=4))
    assert counter.tokens == [3 * 2 * 8 * CONFIG.num_experts_per_tok] * 2  # validation's tokens are not in it
    for layer in model.moe_layers.values():
        bias = layer.gate.e_score_correction_bias
        assert 0 < bias.abs().max() <= 2 * 2 * CONFIG.bias_update_rate
        assert bias.sum().abs() < 1e-8
