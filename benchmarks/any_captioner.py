"""Texts read behind one image as a tree and as rows, against one pass per text: ratios of time and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.any_captioner --output benchmarks/results/any_captioner

Two captioners with random weights, 6 layers of width 256: like LLaVA, with 576 image tokens in the prompt of a decoder,
and like BLIP, whose decoder cross-attends to the image. The texts are ImageNet's names in a template. One pass per text
is timed on a few texts and scaled. Memory is the peak of a process of its own, above what it holds before.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from benchmarks.measure import row
from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerProcessor
from ig_captioner.captioners.families import Family, family_of
from ig_captioner.captioners.readers import read_rows, read_tree, tokens_of
from ig_captioner.data.prompts import load_prompts
from ig_captioner.evaluation.report import cpu_model, git_commit
from ig_captioner.label_trie import TextTrie, build_trie


WIDTH = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
ROUNDS, TIMED_TEXTS = 3, 20
TEMPLATE = "a photo of a {}."


def like_llava(vocabulary: int) -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    vision = {
        **WIDTH,
        "model_type": "clip_vision_model",
        "intermediate_size": 1024,
        "image_size": 336,
        "patch_size": 14,
    }
    text = {
        **WIDTH,
        "model_type": "llama",
        "intermediate_size": 688,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
    }
    image = vocabulary - 1
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-2)
    ids = torch.tensor([[1, *[image] * 576, *range(10, 22)]])
    return hf.LlavaForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 336, 336),
    }


def like_blip(vocabulary: int) -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    vision = {**WIDTH, "intermediate_size": 1024, "image_size": 384, "patch_size": 16}
    text = {**WIDTH, "intermediate_size": 1024, "vocab_size": vocabulary, "encoder_hidden_size": 256, "bos_token_id": 1}
    config = hf.BlipConfig(vision_config=vision, text_config={**text, "is_decoder": True})
    inputs = {"input_ids": torch.tensor([[1]]), "pixel_values": torch.randn(1, 3, 384, 384)}
    return hf.BlipForConditionalGeneration(config).eval(), inputs


MODELS = {"LLaVA-like": like_llava, "BLIP-like": like_blip}


def load(name: str, number: int) -> tuple[Family, dict[str, Tensor], TextTrie]:
    torch.manual_seed(0)
    tokenizer = IGCaptionerProcessor.from_pretrained(DEFAULT_CHECKPOINT).tokenizer
    labels = load_prompts("imagenet").class_names[:number]
    encoded = tokenizer([TEMPLATE.replace("{}", label) for label in labels], padding=True, return_tensors="pt")
    model, inputs = MODELS[name](len(tokenizer))
    return family_of(model), inputs, build_trie(encoded["input_ids"], encoded["attention_mask"], 0)


def read_pairwise(family: Family, inputs: dict[str, Tensor], texts: list[Tensor]) -> Tensor:
    """log P of each text by the model's public forward pass on image, prompt and text, [N]."""
    found = []
    for text in texts:
        ids = torch.cat([inputs["input_ids"], text[None]], dim=1)
        logits = family.model(**{**inputs, "input_ids": ids}).logits[0, -len(text) - 1 : -1]
        found.append(logits.log_softmax(dim=-1).gather(-1, text[:, None]).sum())
    return torch.stack(found)


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def time_readers(name: str, number: int) -> list[dict[str, Any]]:
    """CPU time of one image and all texts, prefill included, medians over rounds in which all take turns."""
    family, inputs, trie = load(name, number)
    texts = [text[:length] for text, length in zip(tokens_of(trie), trie.lengths.tolist(), strict=True)]
    few = texts[:: max(1, number // TIMED_TEXTS)][:TIMED_TEXTS]
    ways = {
        "one pass per text": lambda: read_pairwise(family, inputs, few),
        "tree": lambda: read_tree(family, family.prefill(inputs), trie),
        "rows": lambda: read_rows(family, family.prefill(inputs), trie),
    }
    scale = {"one pass per text": number / len(few)}
    rounds = [{way: seconds(run) * scale.get(way, 1) for way, run in ways.items()} for _ in range(ROUNDS)]
    truth = read_pairwise(family, inputs, few)
    rows = []
    for way in ways:
        times = [each[way] for each in rounds]
        ratio = statistics.median(each["one pass per text"] / each[way] for each in rounds)
        rows.append(row(f"{name}, {number} texts, {way}", statistics.median(times), "s", "one pass per text", ratio))
    for way, reader in (("tree", read_tree), ("rows", read_rows)):
        read = trie.sum_over_texts(reader(family, family.prefill(inputs), trie))[0]
        error = (read[:: max(1, number // TIMED_TEXTS)][:TIMED_TEXTS] - truth).abs().max()
        rows.append(row(f"{name}, {number} texts, {way}: largest difference", float(error), "nats"))
    return rows


def peak_memory(name: str, number: int) -> list[dict[str, Any]]:
    """Peak resident memory above that of the loaded model: prefill alone, and prefill with the tree."""
    peaks = {}
    for what in ("prefill", "tree", "rows"):
        command = [sys.executable, "-m", "benchmarks.any_captioner", "--measure", name, str(number), what]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[what] = float(output.split()[-1])
    return [
        row(f"{name}, {number} texts, {what}", peaks[what], "MiB", "prefill", peaks[what] / peaks["prefill"])
        for what in peaks
    ]


@torch.no_grad()
def measure(name: str, number: int, what: str) -> None:
    """Prints the peak in MiB; in a process of its own, as a peak never falls."""
    family, inputs, trie = load(name, number)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prefix = family.prefill(inputs)
    if what != "prefill":
        {"tree": read_tree, "rows": read_rows}[what](family, prefix, trie)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | value | ratio |", "|---|---|---|"]
    for each in rows:
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.3g} x ({each['ratio_to']})"
        lines.append(f"| {each['name']} | {each['value']:.3g} {each['unit']} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[100, 1000], metavar="N")
    parser.add_argument("--output", type=Path, help="a folder for results.md")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, number, what = arguments.measure
        measure(name, int(number), what)
        return
    timed = [each for name in MODELS for number in arguments.texts for each in time_readers(name, number)]
    held = [each for name in MODELS for each in peak_memory(name, max(arguments.texts))]
    run = f"Commit {git_commit()}, {cpu_model()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}."
    result = f"Time of one image:\n\n{table(timed)}\n\nPeak memory of one image:\n\n{table(held)}\n\n{run}"
    print(result)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "results.md").write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
