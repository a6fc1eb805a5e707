"""What smaller weights and onnxruntime cost and bring: file sizes, speed and shift of scores against eager float32.

    python -m benchmarks.export [--data_root DATA] [--images N] --output FILE.json

Contenders: bfloat16, and torchao's int8 (weights alone, or activations too), all loaded by `from_pretrained`; ONNX
graphs of `ig_captioner.export` in onnxruntime, in float32 and after its own `quantize_dynamic`. Two models:

    tiny    the shipped checkpoint, 64 pixels
    B/16    the design "fast" of `benchmarks.scoring`, ViT-B/16 at 224 pixels, random weights: size and speed only

Speed is one call with one image and 100 labels compiled beforehand. Shift is |difference| of information gain in nats:
over the demo's photos and labels, and with `--data_root` over N photos of CIFAR-10 test and its classes,
where accuracy is compared, too.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, TorchAoConfig

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerImageProcessor
from ig_captioner.compiled_labels import encode_for
from ig_captioner.data.prompts import load_prompts
from ig_captioner.data.samples import Samples, label_from_field, labelled_decoder
from ig_captioner.demo.examples import LABEL_OF, example_photos
from ig_captioner.export import TRIE_FIELDS, export_onnx
from ig_captioner.input_rules import DEFAULT_TEMPLATE, format_labels
from ig_captioner.label_trie import build_trie

from .measure import Measurement, circumstances, row, take_turns, time_rows, write_report
from .scoring import captioner, imagenet_labels


REFERENCE = "eager float32"
OPTIONS = {
    REFERENCE: {"dtype": torch.float32},
    "eager bfloat16": {"dtype": torch.bfloat16},
    "torchao int8 weights": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    "torchao int8 weights and activations": {
        "quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    },
}
LABELS = list(LABEL_OF.values())

Call = Callable[[Tensor], Tensor]
"""Information gain [B, C] of `pixel_values`."""


# Contenders


def eager_call(model: Any, tokens: dict[str, Tensor]) -> Call:
    texts = model.compile_texts(**tokens, with_fingerprint=False)
    return lambda pixel_values: model.score(pixel_values, texts).information_gain


def onnx_call(folder: Path, model: Any, tokens: dict[str, Tensor]) -> Call:
    """As `eager_call`; of the model only its configuration is used."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    prior, encoder, scorer = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", options)
        for name in ("text_prior", "image_encoder", "label_scorer")
    )
    trie = build_trie(**tokens, start_token_id=model.config.decoder_start_token_id)
    arrays = {name: getattr(trie, name).numpy() for name in TRIE_FIELDS}
    (log_p,) = prior.run(None, {name: values.numpy() for name, values in tokens.items()})

    def call(pixel_values: Tensor) -> Tensor:
        (read,) = encoder.run(None, {"pixel_values": pixel_values.numpy()})
        (scores,) = scorer.run(None, {"image_key_values": read, **arrays})
        return torch.from_numpy(scores - model.config.prior_weight * log_p)

    return call


def quantize_graphs(folder: Path, output: Path) -> None:
    """onnxruntime's dynamic int8, a complete file per graph. Convolutions stay: there is one, of the patches."""
    output.mkdir()
    for path in folder.glob("*.onnx"):
        quantize_dynamic(path, output / path.name, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def contenders(checkpoint: str, folder: Path) -> dict[str, tuple[Callable[[dict[str, Tensor]], Call], float]]:
    """How to make each one's `Call` of tokens, and the MB of its weights as saved."""
    made: dict[str, tuple[Callable[[dict[str, Tensor]], Call], float]] = {}
    for name, options in OPTIONS.items():
        model = AutoModelForZeroShotImageClassification.from_pretrained(checkpoint, **options).eval()
        model.save_pretrained(folder / name)
        made[name] = partial(eager_call, model), megabytes(folder / name, "*.safetensors")
    reference = made[REFERENCE][0].args[0]  # type: ignore[attr-defined]
    export_onnx(reference, AutoProcessor.from_pretrained(checkpoint), folder / "onnx")
    quantize_graphs(folder / "onnx", folder / "onnx int8")
    for name, files in (("onnxruntime float32", "onnx"), ("onnxruntime int8", "onnx int8")):
        size = megabytes(folder / files, "*.onnx") + megabytes(folder / files, "*.bin")
        made[name] = partial(onnx_call, folder / files, reference), size
    return made


def megabytes(folder: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6


# Rows


def size_and_speed(
    model: str, calls: dict[str, Call], sizes: dict[str, float], images: Tensor, rounds: int
) -> list[Measurement]:
    rows = []
    for name, size in sizes.items():
        ratio = size / sizes[REFERENCE]
        rows.append(row(f"{model}, {name}: files", size, "MB", f"{model}, {REFERENCE}: files", ratio))
    prefix = f"{model}, 1 image, 100 labels"
    times = take_turns({f"{prefix}, {name}": partial(call, images) for name, call in calls.items()}, rounds)
    return rows + time_rows(times, dict.fromkeys(times, f"{prefix}, {REFERENCE}"), "s")


def shifts(what: str, scores: dict[str, Tensor]) -> list[Measurement]:
    rows = []
    for name, score in scores.items():
        if name != REFERENCE:
            shift = (score - scores[REFERENCE]).abs()
            rows.append(row(f"{what}, {name}: largest shift", shift.max().item(), "nats"))
            rows.append(row(f"{what}, {name}: mean shift", shift.mean().item(), "nats"))
    return rows


def accuracies(scores: dict[str, Tensor], labels: Tensor) -> list[Measurement]:
    rows = []
    for name, score in scores.items():
        correct, same = (score.argmax(dim=-1) == other for other in (labels, scores[REFERENCE].argmax(dim=-1)))
        rows.append(row(f"CIFAR-10, {name}: top-1", 100 * correct.double().mean().item(), "%"))
        rows.append(row(f"CIFAR-10, {name}: same answer as {REFERENCE}", 100 * same.double().mean().item(), "%"))
    return rows


def scores_of(call: Call, pixel_values: Tensor, batch: int = 50) -> Tensor:
    return torch.cat([call(images) for images in pixel_values.split(batch)])


def tokens_of(checkpoint: str, model: Any, labels: list[str], template: str) -> dict[str, Tensor]:
    return encode_for(model, AutoProcessor.from_pretrained(checkpoint).tokenizer, format_labels(labels, template))


def tiny_rows(options: argparse.Namespace, folder: Path) -> list[Measurement]:
    """All rows of the shipped checkpoint."""
    made = contenders(DEFAULT_CHECKPOINT, folder)
    model = made[REFERENCE][0].args[0]  # type: ignore[attr-defined]
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)

    def calls(labels: list[str], template: str = DEFAULT_TEMPLATE) -> dict[str, Call]:
        tokens = tokens_of(DEFAULT_CHECKPOINT, model, labels, template)
        return {name: make(tokens) for name, (make, _) in made.items()}

    photos = processor(images=example_photos(), return_tensors="pt")
    photos = photos["pixel_values"]
    sizes = {name: size for name, (_, size) in made.items()}
    rows = size_and_speed("tiny", calls(imagenet_labels(100)), sizes, photos[:1], options.rounds)
    scores = {name: call(photos) for name, call in calls(LABELS, "a {}").items()}
    rows += shifts(f"tiny, {len(photos)} photos x {len(LABELS)} labels", scores)
    if options.data_root:
        class_names = list(load_prompts("cifar10").class_names)
        decode = labelled_decoder(label_from_field(class_names))
        shards = os.path.join(options.data_root, "cifar10-test-*.tar.gz")
        images, labels = zip(*Samples(shards, decode, options.images), strict=True)
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        scores = {name: scores_of(call, pixels) for name, call in calls(class_names).items()}
        rows += shifts(f"tiny, {len(images)} photos of CIFAR-10 x 10 labels", scores)
        rows += accuracies(scores, torch.tensor(labels))
    return rows


def large_rows(options: argparse.Namespace, folder: Path) -> list[Measurement]:
    """Size and speed at B/16; the tokenizer is that of the shipped checkpoint, whose ids the model has, too."""
    model = captioner("fast", torch.float32)
    model.save_pretrained(folder / "checkpoint")
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    processor.image_processor = IGCaptionerImageProcessor(size={"height": 224, "width": 224})
    processor.save_pretrained(folder / "checkpoint")
    made = contenders(str(folder / "checkpoint"), folder)
    tokens = tokens_of(DEFAULT_CHECKPOINT, model, imagenet_labels(100), DEFAULT_TEMPLATE)
    calls = {name: make(tokens) for name, (make, _) in made.items()}
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return size_and_speed("B/16", calls, {name: size for name, (_, size) in made.items()}, images, options.rounds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_root",
        default=os.environ.get("IG_CAPTIONER_DATA"),
        help="shards of CIFAR-10; default: $IG_CAPTIONER_DATA",
    )
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="of CIFAR-10 test; default: 2000")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=("tiny", "B/16"), default=["tiny", "B/16"])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    rows: list[Measurement] = []
    for name, measure in (("tiny", tiny_rows), ("B/16", large_rows)):
        if name in options.models:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                rows += measure(options, Path(folder))
            print(f"{name}: done", flush=True)
    more = {name: version(name) for name in ("torchao", "onnx", "onnxruntime")}
    command = shlex.join(["python", "-m", "benchmarks.export", *arguments])
    print(write_report(options.output, rows, circumstances(command, **more)))


if __name__ == "__main__":
    main()
