"""Texts read behind one image as a tree and as rows, against one pass per text: ratios of time and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.any_captioner --output benchmarks/results/any_captioner

Two captioners with random weights, 6 layers of width 256: like LLaVA, with 576 image tokens in the prompt of a decoder,
and like BLIP, whose decoder cross-attends to the image. The texts are ImageNet's names in a template. One pass per text
is timed on a few texts and scaled. Memory is the peak of a process of its own, above what it holds before.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from benchmarks.measure import Measurement, circumstances, median_ratio, peak_memory, row, take_turns, write_report
from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerProcessor
from ig_captioner.captioners.families import Family, family_of
from ig_captioner.captioners.readers import read_rows, read_tree, tokens_of
from ig_captioner.data.prompts import load_prompts
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


@torch.no_grad()
def time_readers(name: str, number: int) -> list[Measurement]:
    """One image and all texts, prefill included; medians over rounds in which all ways take turns."""
    family, inputs, trie = load(name, number)
    texts = [text[:length] for text, length in zip(tokens_of(trie), trie.lengths.tolist(), strict=True)]
    step = max(1, number // TIMED_TEXTS)
    few = texts[::step]
    ways = {
        "pairwise": lambda: read_pairwise(family, inputs, few),
        "tree": lambda: read_tree(family, family.prefill(inputs), trie),
        "rows": lambda: read_rows(family, family.prefill(inputs), trie),
    }
    times = take_turns(ways, ROUNDS)
    times["pairwise"] = [seconds * number / len(few) for seconds in times["pairwise"]]
    truth = ways["pairwise"]()
    rows = []
    for way, of_way in times.items():
        ratio = median_ratio(times["pairwise"], of_way)  # how many times faster
        rows.append(row(f"{name}, {number} texts: {way}", sorted(of_way)[len(of_way) // 2], "s", "pairwise", ratio))
    for way in ("tree", "rows"):
        error = (trie.sum_over_texts(ways[way]())[0, ::step] - truth).abs().max()
        rows.append(row(f"{name}, {number} texts: {way}, largest difference from pairwise", float(error), "nats"))
    return rows


def prepare(name: str, number: int, way: str) -> Callable[[], Any]:
    """What `peak_memory` measures: one image and, unless `way` is "prefill", all texts behind it."""
    family, inputs, trie = load(name, number)

    @torch.no_grad()
    def run() -> Any:
        prefix = family.prefill(inputs)
        return prefix if way == "prefill" else {"tree": read_tree, "rows": read_rows}[way](family, prefix, trie)

    return run


def memory_of_readers(name: str, number: int) -> list[Measurement]:
    peaks = {way: peak_memory(prepare, name, number, way) for way in ("prefill", "tree", "rows")}
    return [
        row(f"{name}, {number} texts: peak of {way}", peak, "MB", "prefill", peak / peaks["prefill"])
        for way, peak in peaks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[100, 1000], metavar="N")
    parser.add_argument("--output", type=Path, default=Path("any_captioner.json"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    rows = [each for name in MODELS for each in memory_of_readers(name, max(arguments.texts))]
    rows += [each for name in MODELS for number in arguments.texts for each in time_readers(name, number)]
    texts = " ".join(map(str, arguments.texts))
    run = circumstances(f"python -m benchmarks.any_captioner --texts {texts}", threads=torch.get_num_threads())
    print(write_report(arguments.output, rows, run))


if __name__ == "__main__":
    main()
