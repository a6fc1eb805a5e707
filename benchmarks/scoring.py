"""Zero-shot scoring next to CLIP: time, memory and nodes of all ways to score K labels, as ratios inside one run.

    python -m benchmarks.scoring [--quick] [--design NAME ...] [--texts FILE] --output FILE.json

1.0 is what a user of CLIP pays per call: the same images through `CLIPVisionModelWithProjection` (ViT-B/16, 224
pixels). The class embeddings are computed beforehand there, and here what `compile_texts` does. Labels are K of
ImageNet's names, evenly spread, in "a photo of a {}.". All designs have a B/16 encoder and random weights:

    wide      decoder 6 x 768, cross-attention, no text-only layers, vocabulary of 32,000
    fast      decoder 6 x 384, prefix fusion, 3 text-only layers, vocabulary of 8,192
    fastest   as fast, with 5 text-only layers, and an embedding and a head of width 128

The tokenizers are byte-level BPE trained on English words as frequent as `wordfreq` (a dependency, pinned) has them, so
that the labels have the same number of nodes on every machine.

Modes: `trie`, this package; `pairwise`, each label in a decoder pass of its own over the image encoded once, with all
logits; `pairwise, image again`, the whole model per label. The last two are measured on a few labels and scaled to K by
their tokens; the image that `pairwise` encodes once is timed apart. On a busy machine take OMP_NUM_THREADS=1: then CPU
time is measured.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration
from ig_captioner.compiled_labels import CompiledTexts
from ig_captioner.data.prompts import load_prompts
from ig_captioner.information_gain import shift_right
from ig_captioner.input_rules import DEFAULT_TEMPLATE, format_labels
from training.train_tokenizer import train_tokenizer

from .measure import DEVICE, circumstances, median_ratio, peak_memory, seconds, take_turns


FAST = {
    "vocab_size": 8_192,
    "fusion": "prefix",
    "num_text_only_layers": 3,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
}
DESIGNS = {
    "wide": {"vocab_size": 32_000, "fusion": "cross_attention"},
    "fast": FAST,
    "fastest": {**FAST, "num_text_only_layers": 5, "embedding_size": 128},
}
CORPUS_WORDS = 100_000
PAIRS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}


# What is scored


def read_corpus() -> Iterator[str]:
    """One line per English word, which repeats it as often as a million words of running text have it."""
    import wordfreq  # of the extra `benchmark`: 57 MB that tests do without

    for word in wordfreq.top_n_list("en", CORPUS_WORDS):
        yield " ".join([word] * max(1, round(1e6 * wordfreq.word_frequency(word, "en"))))


@cache
def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerBase:
    return train_tokenizer(read_corpus(), vocab_size)


def train_tokenizers(folder: Path, designs: list[str]) -> None:
    for name in designs:
        tokenizer_of(DESIGNS[name]["vocab_size"]).save_pretrained(folder / name)


def imagenet_labels(number: int) -> list[str]:
    names = load_prompts("imagenet").class_names
    return [names[i * len(names) // number] for i in range(number)]


def tokens_of(design: str, number: int, tokenizers: Path) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [K, L] on the device."""
    texts = format_labels(imagenet_labels(number), DEFAULT_TEMPLATE)
    return AutoTokenizer.from_pretrained(tokenizers / design)(texts, padding=True, return_tensors="pt").to(DEVICE).data


def random_images(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@cache
def captioner(design: str, dtype: torch.dtype) -> IGCaptionerForConditionalGeneration:
    torch.manual_seed(0)
    model = IGCaptionerForConditionalGeneration.from_config(IGCaptionerConfig(text_config=DESIGNS[design]))
    return model.to(DEVICE, dtype).eval()


@cache
def clip_tower(dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    return CLIPVisionModelWithProjection(config).to(DEVICE, dtype).eval()


# Ways to score


def clip_call(batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    tower = clip_tower(dtype)
    images = random_images(batch, dtype)
    return torch.no_grad()(lambda: tower(pixel_values=images).image_embeds)


def trie_call(design: str, texts: CompiledTexts, batch: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    model = captioner(design, dtype)
    images = random_images(batch, dtype)
    return torch.no_grad()(lambda: model.score(images, texts).caption_log_likelihood)


@torch.no_grad()
def pairwise(design: str, tokens: dict[str, Tensor], dtype: torch.dtype, **image: Tensor) -> Tensor:
    """log P(T|I) [K] of one image, label by label, with the logits of every position.

    Args:
        image: `pixel_values`, which every label reads again, or `image_key_values`.
    """
    model = captioner(design, dtype)
    result = []
    start = model.config.decoder_start_token_id
    for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True):
        text = ids[None, : int(mask.sum())]
        logits = model(input_ids=shift_right(text, start), use_cache=False, **image).logits
        result.append(logits.float().log_softmax(dim=-1).gather(-1, text[..., None]).sum())
    return torch.stack(result)


# Rows


def measure(design: str, number: int, batch: int, options: argparse.Namespace, tokenizers: Path) -> list[dict]:
    """Rows of one design: CLIP's tower and the trie by turns, then the slow ways."""
    dtype = options.dtype
    tokens = tokens_of(design, number, tokenizers)
    texts = captioner(design, dtype).compile_texts(**tokens, with_fingerprint=False)
    score = trie_call(design, texts, batch, dtype)
    times = take_turns({"clip": clip_call(batch, dtype), "trie": score}, options.rounds)
    clip = statistics.median(times["clip"])
    trie = statistics.median(times["trie"])
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
    pixels = random_images(1, dtype)
    number = len(tokens["input_ids"])
    some = torch.arange(0, number, max(1, number // PAIRS), device=DEVICE)
    few = {name: values[some] for name, values in tokens.items()}
    share = float(few["attention_mask"].sum() / tokens["attention_mask"].sum())
    read_image = torch.no_grad()(lambda: captioner(design, dtype).read_image(pixels))
    once = {"image_key_values": read_image()}
    pairwise(design, {name: values[:1] for name, values in few.items()}, dtype, **once)  # both warm up
    reading = seconds(read_image)
    rows = []
    for mode, before, image in (("pairwise", reading, once), ("pairwise, image again", 0.0, {"pixel_values": pixels})):
        found: list[Tensor] = []
        took = seconds(lambda image=image, found=found: found.append(pairwise(design, few, dtype, **image)))
        difference = (found[0] - expected[some]).abs().max().item()
        if not difference < TOLERANCE[dtype]:
            raise AssertionError(f"{design}, {mode}: scores differ from the trie's by {difference} nats")
        row = {"mode": mode, "seconds": before + took / share, "labels_measured": len(some)}
        rows.append({**row, "nats_from_trie": difference})
    return rows


def trie_in_its_own_process(
    design: str, number: int, batch: int, dtype: torch.dtype, tokenizers: Path
) -> Callable[[], Any]:
    with torch.no_grad():
        texts = captioner(design, dtype).compile_texts(**tokens_of(design, number, tokenizers), with_fingerprint=False)
    return trie_call(design, texts, batch, dtype)


def many_texts(texts: list[str], options: argparse.Namespace, tokenizers: Path) -> list[dict]:
    """Rows of the fast design on any number of texts: compiling them, and scoring one image."""
    rows = []
    for mode, prepare in (("compile", compile_call), ("trie", compiled_trie_call)):
        call = prepare(texts, options.dtype, tokenizers)
        row = {"design": "fast", "mode": f"{mode}, texts of {options.texts.name}", "labels": len(texts), "batch": 1}
        row |= {
            "device": DEVICE.type,
            "dtype": str(options.dtype)[6:],
            "ratio_to_clip": None,
            "ratio_to_pairwise": None,
        }
        row |= {"seconds": seconds(call), "nodes": None}
        rows.append({**row, "peak_mb": peak_memory(prepare, texts, options.dtype, tokenizers)})
    return rows


def compile_call(texts: list[str], dtype: torch.dtype, tokenizers: Path) -> Callable[[], CompiledTexts]:
    model = captioner("fast", dtype)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers / "fast")
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    return lambda: model.compile_texts(**tokenizer(texts, **options).to(DEVICE), with_fingerprint=False)


def compiled_trie_call(texts: list[str], dtype: torch.dtype, tokenizers: Path) -> Callable[[], Tensor]:
    compiled = compile_call(texts, dtype, tokenizers)()
    return torch.no_grad()(trie_call("fast", compiled, 1, dtype))


def size_in_mb(texts: CompiledTexts) -> float:
    tensors = [getattr(texts.trie, item.name) for item in dataclasses.fields(texts.trie)]
    return sum(tensor.nbytes for tensor in [*tensors, *texts.tensors().values()]) / 1e6


def markdown(rows: list[dict], run: dict[str, Any]) -> str:
    names = ("design", "mode", "labels", "batch", "device", "dtype", "ratio_to_clip", "ratio_to_pairwise")
    names += ("peak_mb", "nodes", "seconds")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = ("" if row[name] is None else row[name] for name in names)
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in run.items())]) + "\n"


def write(output: Path, rows: list[dict], run: dict[str, Any]) -> None:
    """Writes what there is, so that a run which is stopped keeps it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(markdown(rows, run), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and batch sizes: under 3 minutes on 2 cores")
    parser.add_argument("--design", choices=DESIGNS, action="append", help="measure this one; may be repeated")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="compile and score its lines, too (fast design)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.quick else 5
    options.dtype = torch.float32
    batches = [1] if options.quick else [1, 8]
    if DEVICE.type == "cuda":
        options.dtype = torch.bfloat16
        batches = [1, 32] if options.quick else [1, 8, 32, 128, 256]
    command = shlex.join(["python", "-m", "benchmarks.scoring", *arguments])
    run = circumstances(command, words_of_the_tokenizers=f"wordfreq, the {CORPUS_WORDS:,} most frequent")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        designs = options.design or list(DESIGNS)
        train_tokenizers(Path(folder), designs)
        for design, number, batch in itertools.product(designs, (10, 100, 1000), batches):
            rows += measure(design, number, batch, options, Path(folder))
            write(options.output, rows, run)
            print(f"{design}, {number} labels, batch {batch}: done", flush=True)
        if options.texts:
            rows += many_texts(options.texts.read_text(encoding="utf-8").splitlines(), options, Path(folder))
    write(options.output, rows, run)
    print(markdown(rows, run))


if __name__ == "__main__":
    main()
