"""The maths of information gain: log-likelihoods of texts, the label shift, and their difference. Torch only.

A captioner gives log P(T|I), the log-likelihood of a text T under an image I, and, without the image, log P(T). Their
difference is the pointwise mutual information of text and image, the *information gain* of arXiv 2311.17072:

    IG(I, T) = log P(T | I) - log P(T)

All log-likelihoods are in nats and computed in float32. Legend: N texts, L tokens of a text, V vocabulary, B images,
C candidate texts.

A text is always given as exactly the tokens that are scored: its end-of-sequence token is in, the start token is not.
`shift_right` puts the start token in front, so that `logits[:, i]` predicts `labels[:, i]` everywhere.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


IGNORE_INDEX = -100


def text_mask(input_ids: Tensor, pad_token_id: int | None, eos_token_id: int | list[int] | None) -> Tensor:
    """Which of `input_ids` [N, L] are real tokens, [N, L] of 0 and 1.

    Where padding and end-of-sequence share an id, a text reaches up to its first end-of-sequence token.
    """
    if pad_token_id is None:
        return torch.ones_like(input_ids)
    eos_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    is_pad = input_ids == pad_token_id
    if pad_token_id in eos_ids:
        return (is_pad.cumsum(dim=-1) - is_pad.long() == 0).long()
    return (~is_pad).long()


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


def information_gain(caption_log_likelihood: Tensor, prior_log_likelihood: Tensor, prior_weight: float = 1.0) -> Tensor:
    """log P(T|I) - prior_weight * log P(T) in nats, [B, C] (pointwise mutual information at weight 1).

    Args:
        caption_log_likelihood: log P(T|I), [B, C].
        prior_log_likelihood: log P(T), [C] or [B, C].
        prior_weight: alpha of arXiv 2306.01879; 0 ranks by likelihood, 1 is equation (IG) of arXiv 2311.17072.
    """
    return caption_log_likelihood - prior_weight * prior_log_likelihood


def mean_negative_log_likelihood(
    token_log_likelihoods: Tensor,
    labels: Tensor,
    reduction: str = "token",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of texts in nats per token, a scalar; nan if nothing is labelled.

    Args:
        token_log_likelihoods: [N, L], 0 where a label is -100.
        labels: [N, L]; -100 marks what is not scored.
        reduction: "token", the mean over all labelled tokens, or "sequence", the mean over texts of the mean over each
            text's tokens (as big_vision trains CapPa); texts without a label do not count.
        num_items_in_batch: divides the sum instead of the number of tokens, as Trainer does under gradient
            accumulation. Only for "token".
    """
    labelled = labels != IGNORE_INDEX
    if reduction == "token":
        return -token_log_likelihoods.sum() / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)
    tokens = labelled.sum(dim=-1)
    return -(token_log_likelihoods.sum(dim=-1) / tokens.clamp(min=1)).sum() / (tokens > 0).sum()
