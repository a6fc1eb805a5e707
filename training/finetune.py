"""Fine-tunes a captioner with transformers' Trainer, all of it or with LoRA.

    python -m training.finetune --data PHOTOS --output_dir runs/finetuned [--lora_rank 8] [--resume]

PHOTOS is a folder of images with a `metadata.jsonl` (lines `{"file_name": "a.jpg", "text": "..."}`) or with a folder
per class, a folder written by `datasets`' `save_to_disk`, or the Hub name of a data set. Needs `accelerate`,
`datasets`, `evaluate` and, for `--lora_rank`, `peft`.

`output_dir/final` loads with `from_pretrained` and in `pipeline(...)`. With LoRA it holds the merged weights, and
`output_dir/adapter` only the adapter.
"""

import argparse
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import evaluate
import PIL.Image
import torch
from torch import Tensor
from transformers import AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForConditionalGeneration, IGCaptionerProcessor
from ig_captioner.information_gain import IGNORE_INDEX
from ig_captioner.input_rules import read_image_file
from ig_captioner.processing_ig_captioner import cut_texts

from .checkpoint import write_text_atomically
from .config import UsageError


SETTINGS = "finetune.json"  # in output_dir
HARMLESS = ("output_dir", "resume", "cpu", "eval_steps", "save_steps")  # where, how often; not what is learnt
LORA_TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj|gate_proj)"


# Data


def load_data(source: str, eval_fraction: float, seed: int) -> datasets.DatasetDict:
    """Splits `train` and `test`; a data set that has but one split is divided."""
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(source)
    elif path.is_dir():
        data = datasets.load_dataset("imagefolder", data_dir=source)
    else:
        data = datasets.load_dataset(source)
    if isinstance(data, datasets.Dataset):
        data = datasets.DatasetDict({"train": data})
    if "image" in data["train"].features:  # decoded by `read_photo`: `datasets` tries formats that start programs
        data = data.cast_column("image", datasets.Image(decode=False))
    held_out = next((name for name in ("test", "validation", "val") if name in data), None)
    if held_out:
        return datasets.DatasetDict({"train": data["train"], "test": data[held_out]})
    return data["train"].train_test_split(eval_fraction, seed=seed)


def add_captions(data: datasets.DatasetDict, column: str | None, template: str) -> datasets.DatasetDict:
    """A column `captions`, a list of texts per image; class labels go into the template.

    Raises:
        UsageError: there is no such column.
    """
    features = data["train"].features
    names = [column] if column else ["captions", "caption", "text", "label"]
    found = next((name for name in names if name in features), None)
    if found is None:
        raise UsageError(f"no column {' or '.join(names)} in the data, which has {', '.join(features)}")

    def captions(value: Any) -> list[str]:
        if isinstance(features[found], datasets.ClassLabel):
            value = template.replace("{}", features[found].int2str(value).replace("_", " "))
        return [value] if isinstance(value, str) else list(value)

    # Over the one column, so that no image is decoded.
    return datasets.DatasetDict(
        {
            name: split.remove_columns([other for other in ("captions",) if other in features]).add_column(
                "captions", [captions(value) for value in split[found]]
            )
            for name, split in data.items()
        }
    )


def tell_of_cut_captions(data: datasets.DatasetDict, processor: IGCaptionerProcessor, max_length: int) -> None:
    """Prints how many captions are longer than `max_length` tokens, beyond which they are cut."""
    captions = [text for split in data.values() for texts in split["captions"] for text in texts]
    cut = cut_texts(processor.tokenizer, captions, max_length)
    if cut:
        share = f"{len(cut)} of {len(captions)} captions"
        print(f"{share} are cut at {max_length} tokens (--max_length), the first is {cut[0]!r}")


def read_photo(image: Any) -> PIL.Image.Image:
    """Decodes an image of a data set by the rules for all images; others pass."""
    if not isinstance(image, dict):
        return image
    return read_image_file(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"])


class Collator:
    """Images with captions to `pixel_values` and `labels`, all the model needs: it makes its inputs of the labels."""

    def __init__(self, processor: IGCaptionerProcessor, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        # Of several captions a random one; torch's generator is part of Trainer's checkpoints.
        texts = [row["captions"][int(torch.randint(len(row["captions"]), ()))] for row in rows]
        photos = [read_photo(row["image"]) for row in rows]
        batch = self.processor(images=photos, text=texts, return_tensors="pt", max_length=self.max_length)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        return {"pixel_values": batch["pixel_values"], "labels": labels}


# Metrics


class CaptionMatch(evaluate.Metric):
    """Share of captions that are generated exactly, and mean F1 of their words; `evaluate.load` would need the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions and references: one text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        exact = []
        f1 = []
        for prediction, reference in zip(predictions, references, strict=True):
            words = Counter(prediction.lower().split()), Counter(reference.lower().split())
            common = (words[0] & words[1]).total()
            exact.append(words[0] == words[1] and prediction.lower().split() == reference.lower().split())
            f1.append(2 * common / max(1, words[0].total() + words[1].total()))
        return {"exact_match": sum(exact) / len(exact), "word_f1": sum(f1) / len(f1)}


def make_compute_metrics(processor: IGCaptionerProcessor) -> Any:
    metric = CaptionMatch(keep_in_memory=True)

    def decode(ids: Any) -> list[str]:
        ids = torch.as_tensor(ids)
        ids = ids.masked_fill(ids == IGNORE_INDEX, processor.tokenizer.pad_token_id)
        return [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return metric.compute(predictions=decode(prediction.predictions), references=decode(prediction.label_ids))

    return compute_metrics


# The run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder of images, folder of `save_to_disk`, or Hub name of a data set")
    add("--output_dir", required=True, help="folder of checkpoints and of the final model")
    add("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub name of the captioner to start from")
    add("--caption_column", help="texts, lists of texts or classes; found by its name if not given")
    add("--template", default="a photo of a {}.", help="caption of a class")
    add("--eval_fraction", type=float, default=0.1, help="share held out if the data have no test split")
    add("--epochs", type=float, default=3.0, help="passes over the data")
    add("--max_steps", type=int, default=-1, help="optimiser steps, instead of epochs; -1 disables")
    add("--batch_size", type=int, default=32, help="samples per process and forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimiser step")
    add("--learning_rate", type=float, default=1e-4, help="peak of AdamW's; with LoRA, take about ten times as much")
    add("--label_smoothing", type=float, default=0.0, help="of CE(T|I); 0 disables")
    add("--max_length", type=int, default=32, help="longest caption in tokens")
    add("--lora_rank", type=int, default=0, help="rank of the adapters; 0 trains all weights")
    add("--eval_steps", type=int, default=0, help="steps between evaluations; 0: once per epoch")
    add("--save_steps", type=int, default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the newest checkpoint in output_dir, with the same settings")
    add("--cpu", action="store_true", help="use no GPU")
    add("--seed", type=int, default=0, help="of the split, the order of the samples and dropout")
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and the default after the help of each option."""


def check_settings(options: argparse.Namespace) -> None:
    """Keeps the settings in `output_dir`; a resumed run must have those it began with.

    Trainer itself takes learning rate, decay and schedule from its checkpoint, whatever it is told.

    Raises:
        UsageError: naming the settings that differ.
    """
    path = Path(options.output_dir) / SETTINGS
    given = {name: value for name, value in vars(options).items() if name not in HARMLESS}
    if options.resume and path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in given if given[name] != saved.get(name)]
        if names:
            changes = "; ".join(f"{name}: {saved.get(name)!r} -> {given[name]!r}" for name in names)
            raise UsageError(f"--resume with other settings than the run's: {changes}")
    if int(os.environ.get("RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(given, indent=1))


def training_arguments(options: argparse.Namespace) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # below 1: a share of all steps
        eval_strategy="steps" if options.eval_steps else "epoch",
        eval_steps=options.eval_steps or None,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=10,
        predict_with_generate=True,
        generation_max_length=options.max_length,
        remove_unused_columns=False,  # the collator reads the images
        label_names=["labels"],
        report_to="none",
        use_cpu=options.cpu,
        seed=options.seed,
    )


def add_lora(model: Any, rank: int) -> Any:
    """Adapters on all linear maps inside the layers of encoder and decoder; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS))


def finetune(options: argparse.Namespace) -> dict[str, float]:
    """Trains and saves; returns the metrics on the held-out images."""
    check_settings(options)
    set_seed(options.seed)
    processor = AutoProcessor.from_pretrained(options.model)
    model = IGCaptionerForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    model.config.label_smoothing = options.label_smoothing
    if options.lora_rank:
        model = add_lora(model, options.lora_rank)
        model.print_trainable_parameters()
    data = add_captions(
        load_data(options.data, options.eval_fraction, options.seed), options.caption_column, options.template
    )
    tell_of_cut_captions(data, processor, options.max_length)
    trainer = Seq2SeqTrainer(
        model,
        training_arguments(options),
        data_collator=Collator(processor, options.max_length),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        compute_metrics=make_compute_metrics(processor),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        output_dir = Path(options.output_dir)
        if options.lora_rank:
            model.save_pretrained(output_dir / "adapter")
            model = model.merge_and_unload()
        model.save_pretrained(output_dir / "final")
        processor.save_pretrained(output_dir / "final")
        print({name: round(value, 4) for name, value in metrics.items()})
    return metrics


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        finetune(options)
    except UsageError as error:
        parser.exit(2, f"training.finetune: error: {error}\n")


if __name__ == "__main__":
    main()
