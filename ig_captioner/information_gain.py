"""The maths of information gain: log-likelihoods of texts, the label shift, and their difference. Torch only.

A captioner gives log P(T|I), the log-likelihood of a text T under an image I, and, without the image, log P(T). Their
difference is the pointwise mutual information of text and image, the *information gain* of arXiv 2311.17072:

    IG(I, T) = log P(T | I) - log P(T)

All log-likelihoods are in nats and computed in float32. Legend: N texts, L tokens of a text, V vocabulary, B images,
C candidate texts.

A text is always given as exactly the tokens that are scored: its end-of-sequence token is in, the start token is not.
`shift_right` puts the start token in front, so that `logits[:, i]` predicts `labels[:, i]` everywhere.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F


Figures = TypeVar("Figures", Tensor, float)  # many log-likelihoods, or one


IGNORE_INDEX = -100
# How many logits `linear_loss` holds at a time; on a CPU few enough to stay near the caches (32 MiB in float32).
LOGITS_PER_CHUNK = {"cpu": 2**23, "other": 2**26}


def shift_right(input_ids: Tensor, start_token_id: int, attention_mask: Tensor | None = None) -> Tensor:
    """Decoder inputs [N, L] whose position i predicts token i of `input_ids` [N, L].

    The start token stands at the first real position, so texts may be padded on either side; `attention_mask` [N, L]
    applies to the result as it stands. The last token of each text, which predicts nothing, is dropped.
    """
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = start_token_id
    if attention_mask is not None:
        before = F.pad(attention_mask[:, :-1], (1, 0))
        shifted = shifted.where(before.bool(), torch.full_like(shifted, start_token_id))
    return shifted


def token_log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """log P(token) in nats, [N, L] float32, of `labels` [N, L] under `logits` [N, L, V]; 0 where a label is -100."""
    nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -nll.view(labels.shape)


def information_gain(
    caption_log_likelihood: Figures, prior_log_likelihood: Figures, prior_weight: float = 1.0
) -> Figures:
    """log P(T|I) - prior_weight * log P(T) in nats, [B, C] or one figure (pointwise mutual information at weight 1).

    Args:
        caption_log_likelihood: log P(T|I), [B, C].
        prior_log_likelihood: log P(T), [C] or [B, C].
        prior_weight: alpha of arXiv 2306.01879; 0 ranks by likelihood, 1 is equation (IG) of arXiv 2311.17072.
    """
    return caption_log_likelihood - prior_weight * prior_log_likelihood


REFERENCE_MEANS = ("arithmetic", "geometric")


def mean_over_references(log_likelihoods: Tensor, mean: str = "arithmetic") -> Tensor:
    """log P(T) in nats, [C], from log P(T|I) under R reference images, [R, C].

    Args:
        mean: "arithmetic", the log of the mean of P(T|I), which few images decide, namely those that fit a text best;
            "geometric", the mean of log P(T|I).
    """
    if mean not in REFERENCE_MEANS:
        raise ValueError(f"reference_mean must be one of {REFERENCE_MEANS}, got {mean!r}")
    if mean == "geometric":
        return log_likelihoods.mean(dim=0)
    return log_likelihoods.logsumexp(dim=0) - math.log(len(log_likelihoods))


def token_means_over_references(log_likelihoods: Tensor, mean: str = "arithmetic") -> Tensor:
    """log P(token | the tokens before it) in nats, [L], from those under R reference images, [R, L].

    The tokens' figures add up to `mean_over_references` of the whole text.
    """
    beginnings = mean_over_references(log_likelihoods.cumsum(dim=-1), mean)
    return beginnings.diff(prepend=beginnings.new_zeros(1))


def label_log_prior(label_prior: Sequence[float] | Tensor, num_labels: int) -> Tensor:
    """Log-probabilities of labels, [C] float32, to be added to their scores.

    Args:
        label_prior: C weights, all above zero, which are divided by their sum, or C log-probabilities in nats, none
            above zero.

    Raises:
        ValueError: naming the value, for another number of them, or numbers of both kinds.
    """
    values = torch.as_tensor(label_prior, dtype=torch.float32)
    if values.shape != (num_labels,):
        raise ValueError(f"label_prior must have one number for each of {num_labels} labels, got {tuple(values.shape)}")
    if not values.isfinite().all():
        raise ValueError(f"label_prior must hold finite numbers, got {float(values[~values.isfinite()][0])}")
    if (values <= 0).all():
        return values
    if (values > 0).all():
        return (values / values.sum()).log()
    zero_or_less = float(values[values <= 0][0])
    raise ValueError(
        "label_prior must hold weights, all above 0, or log-probabilities, all at most 0; got "
        f"{float(values.max())} and {zero_or_less}"
    )


def mean_over_templates(values: Tensor, num_templates: int) -> Tensor:
    """Means [*, C] over T templates of scores [*, T * C]: of all labels in the first template, then in the second."""
    return values.unflatten(-1, (num_templates, -1)).mean(dim=-2)


def loss_weights(labels: Tensor, reduction: str = "token", num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Weights of each token's -log P in the loss of texts, [N, L] float32; nan if nothing is labelled.

    Args:
        labels: [N, L]; -100 marks what is not scored.
        reduction: "token", the mean over all labelled tokens, or "sequence", the mean over texts of the mean over each
            text's tokens (as big_vision trains CapPa); texts without a label do not count.
        num_items_in_batch: divides the sum instead of the number of tokens, as Trainer does under gradient
            accumulation. Only for "token".
    """
    labelled = labels != IGNORE_INDEX
    if reduction == "token":
        return labelled.float() / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)
    tokens = labelled.sum(dim=-1, keepdim=True)
    return labelled.float() / tokens.clamp(min=1) / (tokens > 0).sum()


def mean_negative_log_likelihood(
    token_log_likelihoods: Tensor,
    labels: Tensor,
    reduction: str = "token",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of texts in nats per token, a scalar, from [N, L]; the other arguments are `loss_weights`'."""
    return -(token_log_likelihoods * loss_weights(labels, reduction, num_items_in_batch)).sum()


def smoothed_log_likelihoods(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Expected log P(token) in nats, [N, L] float32, where a share of each target is any token of the vocabulary.

    Args:
        logits: [N, L, V].
        labels: [N, L]; the result is 0 where a label is -100.
        smoothing: that share, from 0 to 1, [N, L] or what broadcasts to it.
    """
    uniform = logits.float().log_softmax(dim=-1).mean(dim=-1).masked_fill(labels == IGNORE_INDEX, 0.0)
    return torch.lerp(token_log_likelihoods(logits, labels), uniform, smoothing.expand_as(uniform))


@torch.compiler.disable  # how many chunks there are depends on the labels
def linear_loss(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    smoothing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of a linear head, whose logits never exist as a whole: neither [N, L, V] nor for unlabelled tokens.

    The gradient is computed chunk by chunk together with the loss, so nothing is computed twice. Precision is that of
    the head's own forward pass, under autocast as well; the sums over chunks are float32.

    Args:
        hidden_states: [N, L, D], before the head.
        weight, bias: of the head, [V, D] and [V] or None.
        labels: [N, L]; -100 marks what is not scored.
        token_weights: [N, L], such as `loss_weights`.
        smoothing: see [`smoothed_log_likelihoods`]; [N, L].

    Returns:
        The sum of -log P(token) * token_weights, or of the smoothed ones, a scalar; and log P(token) in nats without a
        gradient, [N, L].

    Raises:
        RuntimeError: in the backward pass, if it is to be differentiated again.
    """
    if not torch.is_grad_enabled():
        # An autograd function is not told so: it would compute the gradient of the parameters all the same.
        hidden_states = hidden_states.detach()
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearLoss.apply(hidden_states, weight, bias, labels, token_weights, smoothing, dtype)


class _LinearLoss(torch.autograd.Function):
    """Computes `linear_loss` together with its gradients, which it keeps for the backward pass.

    They are gradients of the loss divided by `scale`, the largest of the token weights, by which the backward pass
    multiplies again. Token weights are about 1 / tokens: with that factor, gradients would vanish in float16.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, token_weights, smoothing, dtype):
        states = hidden_states.flatten(0, 1)
        tokens = labels.flatten()
        shares = None if smoothing is None else smoothing.flatten()
        log_likelihoods = token_weights.new_zeros(len(tokens))
        uniform = token_weights.new_zeros(len(tokens))  # means of log P over the vocabulary, for smoothing
        is_labelled = labels != IGNORE_INDEX
        # where nothing is labelled, the weights are nan; but then there is no chunk, and no gradient
        largest = token_weights.where(is_labelled, 0.0).max()
        scale = largest.clamp(min=torch.finfo(token_weights.dtype).tiny)
        relative_weights = token_weights.flatten() / scale

        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        states_grad = torch.zeros_like(states) if needs_states else None
        weight_grad = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None

        cast_weight = weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        chunk_size = LOGITS_PER_CHUNK.get(labels.device.type, LOGITS_PER_CHUNK["other"]) // len(weight)
        for rows in is_labelled.flatten().nonzero()[:, 0].split(max(1, chunk_size)):
            chunk = states[rows].to(dtype)
            token = tokens[rows, None]
            log_p = F.linear(chunk, cast_weight, cast_bias).log_softmax(dim=-1, dtype=torch.float32)
            log_likelihoods[rows] = log_p.gather(1, token)[:, 0]
            if shares is not None:
                uniform[rows] = log_p.mean(dim=-1)
            if not any(ctx.needs_input_grad):
                continue
            grad = _logits_gradient(log_p, token, None if shares is None else shares[rows, None])
            grad *= relative_weights[rows, None]
            if bias_grad is not None:
                bias_grad += grad.sum(dim=0)
            grad = grad.to(dtype)
            if states_grad is not None:
                states_grad[rows] = (grad @ cast_weight).to(states.dtype)
            if weight_grad is not None and dtype == sum_dtype:
                weight_grad.addmm_(grad.T, chunk)
            elif weight_grad is not None:
                weight_grad += grad.T @ chunk

        ctx.save_for_backward(scale, states_grad, weight_grad, bias_grad)
        ctx.shape = hidden_states.shape
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        log_likelihoods = log_likelihoods.view(labels.shape)
        ctx.mark_non_differentiable(log_likelihoods)
        learned = log_likelihoods
        if smoothing is not None:
            learned = torch.lerp(log_likelihoods, uniform.view(labels.shape), smoothing)
        return -(learned * token_weights).sum(), log_likelihoods

    @staticmethod
    def backward(ctx, loss_grad, _):
        if torch.is_grad_enabled():  # once_differentiable would notice only losses that are differentiated further
            raise RuntimeError("linear_loss has no second derivative (create_graph=True): compute all logits for it")
        scale, states_grad, weight_grad, bias_grad = ctx.saved_tensors
        factor = loss_grad * scale
        return (
            None if states_grad is None else (states_grad * factor).view(ctx.shape),
            None if weight_grad is None else (weight_grad * factor).to(ctx.dtypes[0]),
            None if bias_grad is None else (bias_grad * factor).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def _logits_gradient(log_p: Tensor, token: Tensor, share: Tensor | None) -> Tensor:
    """Gradient of -log P(token) by the logits, in place of `log_p` [M, V]: P minus the target.

    Args:
        token: [M, 1]. The target is 1 at the token, and 0 elsewhere.
        share: [M, 1], of the target that is spread evenly over the vocabulary; None for none.
    """
    at_token = log_p.new_full(token.shape, -1.0) if share is None else share - 1
    grad = log_p.exp_().scatter_add_(1, token, at_token)
    if share is not None:
        grad -= share / grad.shape[1]
    return grad
