"""Fine-tunes the shipped checkpoint with transformers' Trainer on a folder per class; `training/finetune.py` does more.

    python examples/finetune_trainer.py PHOTOS OUTPUT_DIR --epochs 3

PHOTOS holds `cat/1.jpg`, `sports_car/2.jpg`, ...; captions are "a photo of a cat.", "a photo of a sports car.".
OUTPUT_DIR is then a checkpoint. Needs `pip install '.[finetune]'`.
"""

import argparse

import torch
from datasets import Image, load_dataset
from transformers import AutoProcessor, Trainer, TrainingArguments

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForConditionalGeneration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos")
    parser.add_argument("output_dir")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    model = IGCaptionerForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT, dtype=torch.float32)
    data = load_dataset("imagefolder", data_dir=options.photos, split="train")
    data = data.cast_column("image", Image(decode=False))  # the processor reads files by the rules of the scores
    names = [name.replace("_", " ") for name in data.features["label"].names]

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [f"a photo of a {names[row['label']]}." for row in rows]
        batch = processor(images=[row["image"]["path"] for row in rows], text=texts, return_tensors="pt")
        # the model makes its inputs of the labels, and adds CE(T) to CE(T|I) by itself
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"pixel_values": batch["pixel_values"], "labels": labels}

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        remove_unused_columns=False,  # `collate` reads the images
        save_strategy="no",
        logging_steps=10,
        report_to="none",
    )
    Trainer(model, arguments, data_collator=collate, train_dataset=data).train()
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    print(f"{options.output_dir}: captions of {', '.join(names)}")


if __name__ == "__main__":
    main()
