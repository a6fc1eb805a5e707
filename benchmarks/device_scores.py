"""Checks scores on this device against float32 on the CPU: attention, batches, compilation, bfloat16, captions.

    python -m benchmarks.device_scores [--model FOLDER] [--quick] --output FILE.json

The images are noise and gradients, made here; the texts are ImageNet's names. Each row gives the largest and the mean
difference of log P(T|I) over all pairs, in nats, and the share of images that keep their first label. Fails if a
float32 row is off by more than 1e-3 nats anywhere, or a bfloat16 row by more than 0.5 nats in the mean: there a text of
ten tokens that the model finds unlikely, at -40 nats, may be off by 3. PyTorch lets cuDNN round the operands of float32
convolutions to TF32; one row shows what that costs, all others are without.

Legend: B images, C texts.
"""

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForConditionalGeneration
from ig_captioner.data.prompts import load_prompts
from ig_captioner.input_rules import DEFAULT_TEMPLATE, format_labels

from .measure import DEVICE, circumstances


TOLERANCE = {torch.float32: ("largest_nats", 1e-3), torch.bfloat16: ("mean_nats", 0.5)}
Score = Callable[[Tensor], Tensor]


def make_images(number: int, size: int) -> Tensor:
    """Noise of several strengths over gradients of several colours, float32 [B, 3, size, size] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, size)
    colors = torch.rand(number, 3, 1, 1, generator=generator) * 2 - 1
    noise = torch.randn(number, 3, size, size, generator=generator)
    strength = torch.linspace(0, 0.5, number)[:, None, None, None]
    return (colors * ramp[:, None] + strength * noise).clamp(-1, 1)


def compile_parts(model: IGCaptionerForConditionalGeneration) -> None:
    """Compiles what scoring calls: the encoder, and the decoder's pass over the blocks of a trie."""
    model.model.vision_model.compile()
    model.model.decoder.fuse = torch.compile(model.model.decoder.fuse)


def scorers(folder: str, texts: dict[str, Tensor]) -> Iterator[tuple[str, torch.dtype, Score]]:
    """Name, precision that sets the tolerance, and `images [B, ...] -> log P(T|I) [B, C]` of every way to score."""

    def load(dtype: torch.dtype, attention: str = "sdpa") -> IGCaptionerForConditionalGeneration:
        model = IGCaptionerForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        return model.to(DEVICE).eval()

    def whole_batch(model: IGCaptionerForConditionalGeneration) -> Score:
        compiled = model.compile_texts(**texts)
        return lambda images: model.score(images.to(model.dtype), compiled).caption_log_likelihood

    def one_by_one(model: IGCaptionerForConditionalGeneration) -> Score:
        score = whole_batch(model)
        return lambda images: torch.cat([score(image[None]) for image in images])

    def compiled(model: IGCaptionerForConditionalGeneration) -> Score:
        compile_parts(model)
        return whole_batch(model)

    def pairwise(model: IGCaptionerForConditionalGeneration) -> Score:
        labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)

        def score(images: Tensor) -> Tensor:
            rows = [
                model(pixel_values=image.expand(len(labels), -1, -1, -1), labels=labels).caption_log_likelihood
                for image in images
            ]
            return torch.stack(rows)

        return score

    single = torch.float32
    half = torch.bfloat16
    torch.backends.cudnn.allow_tf32 = False
    yield "float32", single, whole_batch(load(single))
    yield "float32, pair by pair", single, pairwise(load(single))
    yield "float32, one image at a time", single, one_by_one(load(single))
    yield "float32, eager attention", single, whole_batch(load(single, "eager"))
    yield "float32, compiled", single, compiled(load(single))
    if DEVICE.type == "cuda":
        torch.backends.cudnn.allow_tf32 = True
        yield "float32, convolutions in TF32", half, whole_batch(load(single))
    yield "bfloat16", half, whole_batch(load(half))
    yield "bfloat16, eager attention", half, whole_batch(load(half, "eager"))
    yield "bfloat16, compiled", half, compiled(load(half))


def compare(name: str, dtype: torch.dtype, found: Tensor, expected: Tensor) -> dict[str, Any]:
    """One row; `found` and `expected` are [B, C]."""
    difference = (found.float().cpu() - expected).abs()
    same_first = found.argmax(dim=1).cpu() == expected.argmax(dim=1)
    row = {"name": name, "largest_nats": difference.max().item(), "mean_nats": difference.mean().item()}
    row |= {"same_first_label": same_first.float().mean().item()}
    which, tolerance = TOLERANCE[dtype]
    return row | {"within_tolerance": row[which] <= tolerance}


def check_captions(folder: str, images: Tensor) -> dict[str, Any]:
    """Greedy captions on the device and on the CPU, float32; ties in rounding may part them."""
    model = IGCaptionerForConditionalGeneration.from_pretrained(folder).float().eval()
    on_device = copy.deepcopy(model).to(DEVICE)
    options = {"do_sample": False, "max_new_tokens": 16}
    expected = model.generate(pixel_values=images, **options)
    found = on_device.generate(pixel_values=images.to(DEVICE), **options).cpu()
    width = max(expected.shape[1], found.shape[1])
    pad = model.config.pad_token_id
    pair = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad) for ids in (expected, found)]
    return {"name": "greedy captions, float32", "same_captions": (pair[0] == pair[1]).all(dim=1).float().mean().item()}


@torch.no_grad()
def check(folder: str, images: int, labels: int) -> list[dict[str, Any]]:
    processor = AutoProcessor.from_pretrained(folder)
    size = processor.image_processor.size["height"]
    pixels = make_images(images, size)
    names = load_prompts("imagenet").class_names[:labels]
    tokens = processor.tokenizer(format_labels(names, DEFAULT_TEMPLATE), padding=True, return_tensors="pt")
    texts = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    reference = IGCaptionerForConditionalGeneration.from_pretrained(folder).float().eval()
    expected = reference.score(pixels, **texts).caption_log_likelihood
    rows = []
    for name, dtype, score in scorers(folder, {key: value.to(DEVICE) for key, value in texts.items()}):
        rows.append(compare(name, dtype, score(pixels.to(DEVICE)), expected))
        print(json.dumps(rows[-1]), flush=True)
    rows.append(check_captions(folder, pixels))
    print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT), help="default: the shipped checkpoint")
    parser.add_argument("--quick", action="store_true", help="4 images and 20 texts in place of 32 and 200")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    rows = check(options.model, *((4, 20) if options.quick else (32, 200)))
    run = circumstances(shlex.join(["python", "-m", "benchmarks.device_scores", *arguments]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if failed := [row["name"] for row in rows if not row.get("within_tolerance", True)]:
        raise SystemExit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
