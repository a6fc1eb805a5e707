"""The CLIP baseline: transformers' CLIPModel with towers of the captioner's sizes, on the captioner's batches.

Data, augmentation, optimiser, schedule and precision are those of `training.train`. Many texts of a batch are equal
(ten classes of CIFAR-10): equal texts are no negatives of one another, as they would be in plain CLIP.

Shapes: B pairs, L text tokens.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPConfig

from ig_captioner.configuration_ig_captioner import IGCaptionerConfig
from ig_captioner.evaluation.contrastive import ContrastiveModel
from ig_captioner.evaluation.lit import contrastive_loss
from ig_captioner.information_gain import IGNORE_INDEX
from ig_captioner.processing_ig_captioner import IGCaptionerProcessor
from training.build import build_model_config, build_processor, image_settings
from training.config import TrainConfig
from training.data import Share, load_training_data
from training.optim import learning_rate_factor, make_optimizers, set_learning_rate


MAX_LOGIT_SCALE = 4.6052  # ln 100, as in CLIP


def clip_config(config: IGCaptionerConfig) -> CLIPConfig:
    """Towers as wide and deep as encoder and decoder. The end-of-sequence id is a new one behind the vocabulary.

    CLIPTextModel pools at the end-of-sequence token, but with id 2, which is ours, at the largest id; this suits both.
    """
    vision = config.vision_config
    text = config.text_config
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return CLIPConfig(
        vision_config={
            **{name: getattr(vision, name) for name in (*shared, "image_size", "patch_size")},
            "projection_dim": text.hidden_size,
        },
        text_config={
            **{name: getattr(text, name) for name in (*shared, "max_position_embeddings")},
            "vocab_size": text.vocab_size + 1,
            "eos_token_id": text.vocab_size,
            "pad_token_id": text.pad_token_id,
            "bos_token_id": text.bos_token_id,
            "projection_dim": text.hidden_size,
        },
        projection_dim=text.hidden_size,
    )


class ClipInputs:
    """A captioner's processor, with the end-of-sequence id that `clip_config` gives."""

    def __init__(self, processor: IGCaptionerProcessor, config: CLIPConfig):
        self.processor = processor
        self.old = processor.tokenizer.eos_token_id
        self.new = config.text_config.eos_token_id

    def __call__(self, **inputs: Any) -> Any:
        batch = self.processor(**inputs)
        if "input_ids" in batch:
            batch["input_ids"] = self.ids(batch["input_ids"])
        return batch

    def ids(self, input_ids: Tensor) -> Tensor:
        return input_ids.masked_fill(input_ids == self.old, self.new)


def train_contrastive(config: TrainConfig) -> tuple[ContrastiveModel, list[float]]:
    """The trained baseline, and its loss at every step."""
    set_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    captioner = build_model_config(config.model, tokenizer)
    processor = build_processor(config, captioner, tokenizer)
    model = AutoModel.from_config(clip_config(captioner), attn_implementation=config.attn_implementation).to(device)
    inputs = ClipInputs(processor, model.config)
    data = load_training_data(
        config.data,
        tokenizer,
        image_settings(processor.image_processor),
        Share(config.batch_size),
        data_root=config.data_root,
        seed=config.seed,
    )
    optimizers = make_optimizers(model, config.optimizer)
    losses = []
    batches = iter(data.loader)
    model.train()
    for step in range(config.steps):
        set_learning_rate(optimizers, learning_rate_factor((step + 0.5) / config.steps, config.optimizer))
        batch = next(batches)
        labels = batch["labels"]
        texts = {
            "input_ids": inputs.ids(labels.masked_fill(labels == IGNORE_INDEX, tokenizer.pad_token_id)).to(device),
            "attention_mask": (labels != IGNORE_INDEX).long().to(device),
        }
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            logits = model(pixel_values=batch["pixel_values"].to(device), **texts).logits_per_image
        loss = contrastive_loss(logits.float(), texts["input_ids"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        losses.append(loss.item())
    model.save_pretrained(Path(config.output_dir) / "final")
    return ContrastiveModel(model, inputs), losses
