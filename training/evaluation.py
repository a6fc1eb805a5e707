"""Zero-shot evaluation during training: each held-out image ranks all distinct held-out captions.

For a classification set the distinct captions are its classes, for a captioning set this is image-to-text retrieval.
Scores are log P(T|I) - w * log P(T) in nats, higher is better; ties count against, as in `ig-captioner evaluate`.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import one_hot

from ig_captioner.data.shards import Sample
from ig_captioner.evaluation.ranking import ranks, recall_metrics, tune_prior_weight
from ig_captioner.information_gain import IGNORE_INDEX, information_gain

from .augmentation import ImageSettings
from .data import image_inputs, pad_labels
from .optim import MovingAverage


IMAGES_PER_CALL = 16


@torch.no_grad()
def evaluate_held_out(
    model: Any, samples: list[Sample], settings: ImageSettings, pad_token_id: int, device: torch.device
) -> dict[str, float]:
    """Ranks with the first caption of each sample.

    Returns:
        `top1` and `top10` (shares) at prior weights 0 and 1, and at `best_prior_weight`, the weight with the lowest
        geometric mean rank; `captions`, the number of distinct captions.
    """
    captions = sorted({tuple(sample.captions[0]) for sample in samples})
    target = torch.tensor([captions.index(tuple(sample.captions[0])) for sample in samples])
    input_ids = pad_labels([list(caption) for caption in captions])
    attention_mask = (input_ids != IGNORE_INDEX).long().to(device)
    input_ids = input_ids.masked_fill(input_ids == IGNORE_INDEX, pad_token_id).to(device)
    texts = model.compile_texts(input_ids, attention_mask, with_fingerprint=False)
    parts = []
    for start in range(0, len(samples), IMAGES_PER_CALL):
        images = image_inputs(samples[start : start + IMAGES_PER_CALL], settings)
        images = {name: tensor.to(device) for name, tensor in images.items()}
        output = model.score(images.pop("pixel_values", None), texts, **images)
        parts.append(output.caption_log_likelihood.float().cpu())
    conditional = torch.cat(parts)
    prior = output.prior_log_likelihood.float().cpu()
    is_true = one_hot(target, len(captions)).bool()

    def ranks_at(weight: float) -> Tensor:
        return ranks(information_gain(conditional, prior, weight), is_true)

    best = tune_prior_weight(ranks_at)
    metrics = {"captions": float(len(captions)), "best_prior_weight": best}
    for name, weight in (("prior_weight_0", 0.0), ("prior_weight_1", 1.0), ("best", best)):
        recalls = recall_metrics(ranks_at(weight))
        metrics[f"top1_{name}"] = recalls["recall_at_1"]
        metrics[f"top10_{name}"] = recalls["recall_at_10"]
    return metrics


def evaluate(
    model: Any,
    average: MovingAverage | None,
    held_out: dict[str, list[Sample]],
    settings: ImageSettings,
    accelerator: Accelerator,
) -> dict[str, dict[str, float]]:
    """Held-out ranking per source, with the moving average where there is one; all processes do the same."""
    model.eval()
    pad_token_id = model.config.text_config.pad_token_id or 0
    with average.applied(model) if average else nullcontext(), accelerator.autocast():
        result = {
            name: evaluate_held_out(model, samples, settings, pad_token_id, accelerator.device)
            for name, samples in held_out.items()
            if samples
        }
    model.train()
    return result
