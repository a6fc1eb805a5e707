"""The loss that never holds all logits, against the same loss with them: values, gradients, and who gets which."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ig_captioner.information_gain import IGNORE_INDEX, linear_loss, loss_weights
from tiny import VARIANTS, padded, random_images, random_texts, tiny_model


MATHS = importlib.import_module("ig_captioner.information_gain")  # the package has a function of that name
ROWS, LENGTH, WIDTH, VOCAB = 5, 7, 12, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three tokens at a time, so that several chunks and a last, smaller one occur."""
    monkeypatch.setattr(MATHS, "LOGITS_PER_CHUNK", {"cpu": 3 * VOCAB, "other": 3 * VOCAB})


def example(bias: bool = True, dtype: torch.dtype = torch.float32):
    """A head, states [N, L, D], labels with holes and an empty text, and uneven weights."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias).to(dtype)
    states = torch.randn(ROWS, LENGTH, WIDTH).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (ROWS, LENGTH)).masked_fill(torch.rand(ROWS, LENGTH) < 0.3, IGNORE_INDEX)
    labels[2] = IGNORE_INDEX
    return head, states, labels, torch.rand(ROWS, LENGTH) / 100


def gradients(loss: torch.Tensor, head: nn.Linear, states: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(3.0 * loss, [states, *head.parameters()]))


def full_loss(head: nn.Linear, states: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = head(states).float().flatten(0, 1)
    each = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return (each.view(labels.shape) * weights).sum()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, None, 1e-6), (torch.float32, torch.bfloat16, 1e-2), (torch.bfloat16, None, 1e-2)],
)
def test_loss_and_gradients_are_those_of_full_logits(bias, dtype, autocast, tolerance):
    head, states, labels, weights = example(bias, dtype)
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        expected = full_loss(head, states, labels, weights)
        loss, log_likelihoods = linear_loss(states, head.weight, head.bias, labels, weights)
        logits = head(states).float()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)  # the same logits, whatever their precision
    token_log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(log_likelihoods, token_log_p.masked_fill(labels == IGNORE_INDEX, 0.0).detach())
    assert not log_likelihoods.requires_grad
    for actual, reference in zip(gradients(loss, head, states), gradients(expected, head, states), strict=True):
        assert relative_error(actual, reference) < tolerance


def test_bfloat16_gradients_are_summed_over_chunks_in_float32(monkeypatch):
    """Thousands of chunks lose no more precision than one: bfloat16 sums would stop growing."""
    monkeypatch.setattr(MATHS, "LOGITS_PER_CHUNK", {"cpu": VOCAB, "other": VOCAB})
    head = nn.Linear(WIDTH, VOCAB)
    states, labels = torch.ones(1, 4000, WIDTH), torch.ones(1, 4000, dtype=torch.long)
    weights = torch.ones(1, 4000)
    expected = torch.autograd.grad(full_loss(head, states, labels, weights), head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_loss(states, head.weight, head.bias, labels, weights)
    assert relative_error(torch.autograd.grad(loss, head.weight)[0], expected) < 1e-2


def test_small_weights_do_not_vanish_in_float16():
    """A mean over a large batch has weights that float16 rounds to 0; GradScaler comes too late for what is gone."""
    head, states, labels, weights = example()
    tiny = weights * 1e-7
    expected = gradients(full_loss(head, states, labels, tiny), head, states)
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_loss(states, head.weight, head.bias, labels, tiny)
    for actual, reference in zip(gradients(loss, head, states), expected, strict=True):
        assert relative_error(actual, reference) < 1e-2


def test_frozen_parts_get_no_gradient_and_no_grad_computes_none():
    head, states, labels, weights = example()
    head.weight.requires_grad_(False)
    expected = full_loss(head, states, labels, weights)
    loss, _ = linear_loss(states, head.weight, head.bias, labels, weights)
    wanted = [states, head.bias]
    for actual, reference in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(actual, reference)
    with torch.no_grad():
        assert not linear_loss(states, head.weight, head.bias, labels, weights)[0].requires_grad


def test_backward_twice():
    head, states, labels, weights = example()
    loss, _ = linear_loss(states, head.weight, head.bias, labels, weights)
    once = torch.autograd.grad(loss, states, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, states)[0], once)


def test_a_second_derivative_is_refused():
    head, states, labels, weights = example()
    loss, _ = linear_loss(states, head.weight, head.bias, labels, weights)
    for function in (loss, loss**2):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(function, states, create_graph=True)


def test_loss_weights_are_the_means_by_hand():
    labels = torch.tensor([[5, 6, 7], [5, -100, -100], [-100, -100, -100]])
    by_token = [[0.25, 0.25, 0.25], [0.25, 0, 0], [0, 0, 0]]
    by_text = [[1 / 6, 1 / 6, 1 / 6], [0.5, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(loss_weights(labels), torch.tensor(by_token))
    torch.testing.assert_close(loss_weights(labels, "sequence"), torch.tensor(by_text))
    torch.testing.assert_close(loss_weights(labels, "token", 8), torch.tensor(by_token) / 2)
    torch.testing.assert_close(loss_weights(labels, "token", torch.tensor(8)), torch.tensor(by_token) / 2)
    for reduction in ("token", "sequence"):
        assert loss_weights(torch.full((2, 3), -100), reduction).isnan().all()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_nothing_labelled_is_nan_without_gradients(reduction):
    """One empty batch among those accumulated must not destroy the weights."""
    head, states, labels, _ = example()
    nothing = torch.full_like(labels, IGNORE_INDEX)
    loss, _ = linear_loss(states, head.weight, head.bias, nothing, loss_weights(nothing, reduction))
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients(loss, head, states))


# In the model


def batch(images: bool = True) -> dict[str, torch.Tensor | None]:
    ids, mask = padded(random_texts())
    return {"labels": ids.masked_fill(mask == 0, -100), "pixel_values": random_images(len(ids)) if images else None}


def model_gradients(model, seed: int = 0, **inputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The scalars of the output, and the gradients of the loss."""
    model.zero_grad()
    torch.manual_seed(seed)  # which texts are predicted in parallel, dropout
    outputs = model(**inputs)
    outputs.loss.backward()
    scalars = {name: value.detach() for name, value in outputs.items() if name.endswith(("loss", "likelihood"))}
    return scalars, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("parallel", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_with_and_without_logits(variant, reduction, parallel, images):
    model = tiny_model(variant, parallel_prediction_prob=parallel, loss_reduction=reduction).train()
    for extra in ({}, {"num_items_in_batch": torch.tensor(37)}):
        full = model_gradients(model, **batch(images), **extra, skip_logits=False)
        chunked = model_gradients(model, **batch(images), **extra, skip_logits=True)
        assert_same(chunked[0], full[0])
        assert_same(chunked[1], full[1])


@pytest.mark.parametrize("skip_logits", [True, False])
def test_an_empty_batch_leaves_the_weights_alone(skip_logits):
    model = tiny_model().train()
    empty = batch() | {"labels": torch.full_like(batch()["labels"], IGNORE_INDEX)}
    scalars, found = model_gradients(model, **empty, skip_logits=skip_logits)
    assert scalars["loss"].isnan() and found
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("variant", ["prefix", "cross"])
def test_training_under_autocast(variant):
    model = tiny_model(variant).train()
    with torch.autocast("cpu", torch.bfloat16):
        full = model_gradients(model, **batch(), skip_logits=False)
        chunked = model_gradients(model, **batch(), skip_logits=True)
    assert_same(chunked[0], full[0])
    # of all at once: the gradient of a key's bias is nothing but rounding
    together = [torch.cat([gradient.flatten() for gradient in each.values()]) for each in (chunked[1], full[1])]
    assert relative_error(*together) < 2e-2


def test_logits_are_there_in_evaluation_and_on_request():
    model = tiny_model()
    assert model(**batch()).logits.shape == (*batch()["labels"].shape, model.config.text_config.vocab_size)
    assert model(**batch(), skip_logits=True).logits is None
    assert model.train()(**batch()).logits is None
    assert model(**batch(), skip_logits=False).logits is not None
    assert model(input_ids=batch()["labels"].clamp(min=0)).logits is not None


def test_log_likelihoods_of_the_labels_are_reported():
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**batch())
        scores = model.score(batch()["pixel_values"], *padded(random_texts()))
    torch.testing.assert_close(outputs.caption_log_likelihood, scores.caption_log_likelihood.diagonal())
    torch.testing.assert_close(outputs.prior_log_likelihood, scores.prior_log_likelihood)
    model.config.unconditional_weight = 0.0
    assert model.train()(**batch()).prior_log_likelihood is None


def double(module, inputs, output):
    return 2 * output


def record(module, grad_input, grad_output):
    module.seen = grad_output[0].shape


def replace_forward(head):
    plain = head.forward
    head.forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize(
    "intercept",
    [
        lambda head: head.register_forward_hook(double),
        lambda head: head.register_full_backward_hook(record),
        replace_forward,
    ],
)
def test_a_head_with_hooks_is_called(intercept):
    """They see every use of the head, as with full logits."""
    model = tiny_model("cross").train()
    intercept(model.lm_head)
    full = model_gradients(model, **batch(), skip_logits=False)
    seen, model.lm_head.seen = getattr(model.lm_head, "seen", None), None
    assert_same(model_gradients(model, **batch())[1], full[1])
    assert model.lm_head.seen == seen
    assert model(**batch()).logits is None


def test_adapters_on_the_head_are_trained():
    peft = pytest.importorskip("peft")
    model = tiny_model("cross").train()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    full = model_gradients(adapted, **batch(), skip_logits=False)
    assert_same(model_gradients(adapted, **batch())[1], full[1])
    assert any("lora_A" in name for name in full[1])


def test_gradient_checkpointing():
    model = tiny_model().train()
    expected = model_gradients(model, **batch(), skip_logits=False)
    model.gradient_checkpointing_enable()
    assert_same(model_gradients(model, **batch())[1], expected[1])


def test_compile():
    model = tiny_model().train()
    expected = model_gradients(model, **batch(), skip_logits=False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled_gradients = model_gradients(compiled, **batch())[1]
    assert_same({name.removeprefix("_orig_mod."): value for name, value in compiled_gradients.items()}, expected[1])


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    model = tiny_model().train()
    expected = model_gradients(model, **batch(), skip_logits=False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    actual = model_gradients(wrapped, **batch())[1]
    assert_same({name.removeprefix("module."): value for name, value in actual.items()}, expected[1])


@pytest.mark.parametrize("own_unit", [False, True])
def test_fully_sharded(one_process, own_unit):
    """The head's weight is whole while the root's forward runs; as a unit of its own, it is whole only when called."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("cross").train()
    expected = model_gradients(model, **batch(), skip_logits=False)
    mesh = init_device_mesh("cpu", (1,))
    for part in [*model.model.decoder.layers, *([model.lm_head] if own_unit else []), model]:
        fully_shard(part, mesh=mesh)
    actual = model_gradients(model, **batch())[1]
    assert_same({name: value.full_tensor() for name, value in actual.items()}, expected[1])
