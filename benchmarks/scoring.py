"""Zero-shot scoring next to CLIP: time, memory and nodes of all ways to score K labels, as ratios inside one run.

    python -m benchmarks.scoring [--quick] [--corpus FILE ...] --output FILE.json

1.0 is what a user of CLIP pays per call: the same images through `CLIPVisionModelWithProjection` (ViT-B/16, 224
pixels). The class embeddings are computed beforehand there, and here what `compile_texts` does. Labels are K of
ImageNet's names, evenly spread, in "a photo of a {}.". Both designs have a B/16 encoder and random weights:

    wide   decoder 6 x 768, cross-attention, no text-only layers, vocabulary of 32,000
    fast   decoder 6 x 384, prefix fusion, 3 text-only layers, vocabulary of 8,192

The tokenizers are byte-level BPE trained on `--corpus`: text files, by default WordNet where Debian's `wordnet-base`
has put it, else the docstrings of Python's standard library. The better it knows the names, the fewer nodes they have.

Modes: `trie`, this package; `pairwise`, each label in a decoder pass of its own over the image encoded once, with all
logits; `pairwise, image again`, the whole model per label. The last two are measured on a few labels and scaled to K by
their tokens. On a busy machine take OMP_NUM_THREADS=1: then CPU time is measured.
"""

import argparse
import ast
import dataclasses
import itertools
import json
import statistics
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration
from ig_captioner.information_gain import shift_right
from ig_captioner.label_trie import CompiledTexts
from ig_captioner.prompts import load_prompts
from training.train_tokenizer import train_tokenizer

from .measure import DEVICE, circumstances, median_ratio, peak_memory, seconds, take_turns


DESIGNS = {
    "wide": {"vocab_size": 32_000, "fusion": "cross_attention"},
    "fast": {
        "vocab_size": 8_192,
        "fusion": "prefix",
        "num_text_only_layers": 3,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
    },
}
WORDNET = Path("/usr/share/wordnet")
TEMPLATE = "a photo of a {}."
PAIRS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}


# What is scored


def read_corpus(files: list[Path]) -> Iterator[str]:
    """Lines of the files, or of WordNet's glosses, or docstrings."""
    if files or WORDNET.is_dir():
        for path in files or sorted(WORDNET.glob("data.*")):
            yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
        return
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
            nodes = ast.walk(ast.parse(path.read_bytes()))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            yield from filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented)))


def name_of_corpus(files: list[Path]) -> str:
    if files:
        return ", ".join(map(str, files))
    return "WordNet (Debian's wordnet-base)" if WORDNET.is_dir() else "docstrings of Python's standard library"


def train_tokenizers(folder: Path, files: list[Path]) -> None:
    for name, design in DESIGNS.items():
        train_tokenizer(read_corpus(files), design["vocab_size"]).save_pretrained(folder / name)


def imagenet_labels(number: int) -> list[str]:
    names = load_prompts("imagenet").class_names
    return [names[i * len(names) // number] for i in range(number)]


def tokens_of(design: str, number: int, tokenizers: Path) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [K, L] on the device."""
    texts = [TEMPLATE.format(label) for label in imagenet_labels(number)]
    return AutoTokenizer.from_pretrained(tokenizers / design)(texts, padding=True, return_tensors="pt").to(DEVICE).data


def random_images(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@cache
def captioner(design: str, dtype: torch.dtype) -> IGCaptionerForConditionalGeneration:
    torch.manual_seed(0)
    model = IGCaptionerForConditionalGeneration._from_config(IGCaptionerConfig(text_config=DESIGNS[design]))
    return model.to(DEVICE, dtype).eval()


@cache
def clip_tower(dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    return CLIPVisionModelWithProjection._from_config(config).to(DEVICE, dtype).eval()


# Ways to score


def clip_call(batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    tower, images = clip_tower(dtype), random_images(batch, dtype)
    return lambda: tower(pixel_values=images).image_embeds


def trie_call(design: str, texts: CompiledTexts, batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    model, images = captioner(design, dtype), random_images(batch, dtype)
    return lambda: model.score(images, texts).caption_log_likelihood


def pairwise(design: str, tokens: dict[str, Tensor], image: Tensor, again: bool = False) -> Tensor:
    """log P(T|I) [K] of one image, label by label, with the logits of every position."""
    model, result = captioner(design, image.dtype), []
    start = model.config.decoder_start_token_id
    known = {} if again else {"image_key_values": model.read_image(image)}
    for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True):
        text = ids[None, : int(mask.sum())]
        given = known or {"pixel_values": image}
        logits = model(input_ids=shift_right(text, start), use_cache=False, **given).logits
        result.append(logits.float().log_softmax(dim=-1).gather(-1, text[..., None]).sum())
    return torch.stack(result)


# Rows


def measure(design: str, number: int, batch: int, options: argparse.Namespace, tokenizers: Path) -> list[dict]:
    """Rows of one design: CLIP's tower and the trie by turns, then the slow ways."""
    dtype = options.dtype
    tokens = tokens_of(design, number, tokenizers)
    texts = captioner(design, dtype).compile_texts(**tokens)
    score = trie_call(design, texts, batch, dtype)
    times = take_turns({"clip": clip_call(batch, dtype), "trie": score}, options.rounds)
    clip, trie = statistics.median(times["clip"]), statistics.median(times["trie"])
    common = {"design": design, "labels": number, "batch": batch, "device": DEVICE.type, "dtype": str(dtype)[6:]}
    unknown = {"ratio_to_pairwise": None, "peak_mb": None, "nodes": None}
    tower = {**common, **unknown, "mode": "clip image tower", "ratio_to_clip": 1.0, "seconds": clip}
    fast = {**common, **unknown, "mode": "trie", "ratio_to_clip": median_ratio(times["trie"], times["clip"])}
    fast |= {"seconds": trie, "nodes": len(texts.trie.nodes), "compiled_mb": size_in_mb(texts)}
    rows = [tower, fast]
    if batch == 1:
        slow = slow_ways(design, tokens, dtype, score()[0])
        rows += [{**common, **unknown, **row, "ratio_to_clip": row["seconds"] / clip} for row in slow]
        for row in rows[1:]:
            row["ratio_to_pairwise"] = row["seconds"] / slow[0]["seconds"]
    if number == 1000:
        tower["peak_mb"] = peak_memory(clip_call, batch, dtype)
        fast["peak_mb"] = peak_memory(trie_in_its_own_process, design, number, batch, dtype, tokenizers)
    return rows


def slow_ways(design: str, tokens: dict[str, Tensor], dtype: torch.dtype, expected: Tensor) -> list[dict]:
    """Seconds to score one image label by label: some labels, evenly spread, scaled to all by their tokens.

    Raises:
        AssertionError: if the scores are not those of the trie.
    """
    image, number = random_images(1, dtype), len(tokens["input_ids"])
    some = torch.arange(0, number, max(1, number // PAIRS), device=DEVICE)
    few = {name: values[some] for name, values in tokens.items()}
    share = float(few["attention_mask"].sum() / tokens["attention_mask"].sum())
    pairwise(design, {name: values[:1] for name, values in few.items()}, image)  # warms up
    rows = []
    for mode, again in (("pairwise", False), ("pairwise, image again", True)):
        found: list[Tensor] = []
        took = seconds(lambda again=again, found=found: found.append(pairwise(design, few, image, again)))
        difference = (found[0] - expected[some]).abs().max().item()
        if not difference < TOLERANCE[dtype]:
            raise AssertionError(f"{design}, {mode}: scores differ from the trie's by {difference} nats")
        row = {"mode": mode, "seconds": took / share, "labels_measured": len(some), "nats_from_trie": difference}
        rows.append(row)
    return rows


def trie_in_its_own_process(
    design: str, number: int, batch: int, dtype: torch.dtype, tokenizers: Path
) -> Callable[[], Any]:
    with torch.no_grad():
        texts = captioner(design, dtype).compile_texts(**tokens_of(design, number, tokenizers))
    return torch.no_grad()(trie_call(design, texts, batch, dtype))


def size_in_mb(texts: CompiledTexts) -> float:
    tensors = [*(getattr(texts.trie, item.name) for item in dataclasses.fields(texts.trie)), texts.text_states]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) / 1e6


def markdown(rows: list[dict], run: dict[str, Any]) -> str:
    names = ("design", "mode", "labels", "batch", "device", "dtype", "ratio_to_clip", "ratio_to_pairwise")
    names += ("peak_mb", "nodes", "seconds")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = ("" if row[name] is None else row[name] for name in names)
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in run.items())]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and batch sizes: under 3 minutes on 2 cores")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], metavar="FILE", help="text for the tokenizers")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.quick else 7
    options.dtype, batches = torch.float32, [1] if options.quick else [1, 8]
    if DEVICE.type == "cuda":
        options.dtype, batches = torch.bfloat16, [1, 32] if options.quick else [1, 8, 32, 128, 256]
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        train_tokenizers(Path(folder), options.corpus)
        for design, number, batch in itertools.product(DESIGNS, (10, 100, 1000), batches):
            rows += measure(design, number, batch, options, Path(folder))
            print(f"{design}, {number} labels, batch {batch}: done", flush=True)
    run = circumstances("python -m benchmarks.scoring", corpus=name_of_corpus(options.corpus))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    text = markdown(rows, run)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
