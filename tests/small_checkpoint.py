"""A random checkpoint with a tokenizer of ten words, and its parts: everything made here, nothing downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    IGZeroShotImageClassificationPipeline,
)


TASK = "zero-shot-image-classification"
PAD, START, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
WORDS = [PAD, START, EOS, UNKNOWN, "a", "photo", "of", "cat", "dog", "."]


def make_config(**kwargs) -> IGCaptionerConfig:
    """Two small layers a side; weights wide enough for scores to differ."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    small["initializer_range"] = 0.5
    vision = {**small, "image_size": [16, 24], "patch_size": 8}
    text = {**small, "vocab_size": len(WORDS), "max_position_embeddings": 12, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
    return IGCaptionerConfig(vision_config=vision, text_config=text, **kwargs)


def make_image_processor() -> IGCaptionerImageProcessor:
    return IGCaptionerImageProcessor(size={"height": 16, "width": 24})


def make_pipeline(model, **kwargs) -> IGZeroShotImageClassificationPipeline:
    parts = {"tokenizer": make_tokenizer(model_max_length=12), "image_processor": make_image_processor()}
    return IGZeroShotImageClassificationPipeline(model=model, task=TASK, device="cpu", **{**parts, **kwargs})


def make_tokenizer(template: str = f"$A {EOS}", **kwargs) -> PreTrainedTokenizerFast:
    """A word-level tokenizer in memory: lower-cases, and adds EOS by its template."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    specials = [(START, WORDS.index(START)), (EOS, WORDS.index(EOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    names = {"pad_token": PAD, "bos_token": START, "eos_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "model_max_length": 8, **kwargs})


def save_checkpoint(
    folder: Path, head=IGCaptionerForZeroShotImageClassification, dtype=torch.float32, **config
) -> Path:
    """A random checkpoint like the one in the package: no code, and here no card."""
    torch.manual_seed(0)
    head(make_config(prior_weight=0.75, **config)).to(dtype).save_pretrained(folder)
    IGCaptionerProcessor(make_image_processor(), make_tokenizer(model_max_length=12)).save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    return folder
