"""Loading of training data to be timed: this package's streamed mixture, and a plain `webdataset` pipeline.

Both read tar shards, decode JPEG with PIL, take a random crop resized to 224 pixels, flip, tokenise the first caption
and collate, in the calling process. Shards are generated unless real ones are given.
"""

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer

from training.augmentation import ImageSettings, random_box
from training.config import AugmentationConfig, DataConfig, EvaluationConfig, SourceConfig, load_config
from training.data import Share, load_training_data, pad_labels
from training.metrics import read_rows
from training.train import train
from training.train_tokenizer import train_tokenizer


IMAGE_SIZE, BATCH, MAX_LENGTH, BUFFER = 224, 32, 32, 500
AUGMENTATION = AugmentationConfig(flip_probability=0.5, scale=(0.5, 1.0), ratio=(0.75, 1.33))
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "dog",
    "cat",
    "man",
    "woman",
    "child",
    "red",
    "blue",
    "small",
    "large",
    "runs",
    "sits",
    "on",
    "grass",
    "water",
    "street",
    "with",
    "two",
]


def write_shards(folder: Path, shards: int = 2, samples: int = 250, side: int = 400) -> list[str]:
    """JPEG images of smooth noise, about as large in bytes as photos of that size, with captions of 6 to 20 words."""
    rng = np.random.default_rng(0)
    paths = []
    for shard in range(shards):
        paths.append(str(folder / f"{shard:04d}.tar"))
        with tarfile.open(paths[-1], "w") as archive:
            for index in range(samples):
                coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
                jpeg = io.BytesIO()
                coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=85)
                caption = " ".join(rng.choice(WORDS, rng.integers(6, 21)))
                files = {"jpg": jpeg.getvalue(), "txt": caption.encode()}
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"{shard:02d}{index:06d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return paths


def write_tokenizer(folder: Path) -> None:
    train_tokenizer([" ".join(WORDS)], 300).save_pretrained(folder)


def our_batches(paths: list[str], tokenizer_folder: Path) -> Iterator[dict[str, Any]]:
    config = DataConfig(
        sources={"shards": SourceConfig(shards=paths, augmentation=AUGMENTATION)},
        max_length=MAX_LENGTH,
        cache_in_memory=False,
        shuffle_buffer=BUFFER,
    )
    settings = ImageSettings((IMAGE_SIZE, IMAGE_SIZE))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return iter(load_training_data(config, tokenizer, settings, Share(BATCH), data_root="", seed=0).loader)


def webdataset_batches(paths: list[str], tokenizer_folder: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `webdataset`'s documentation shows, with our crop (without it, the boxes would differ in size)."""
    import webdataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rng = np.random.default_rng(0)

    def view(image: Image.Image) -> torch.Tensor:
        box = random_box((0, 0, *image.size), AUGMENTATION, rng)
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)
        if rng.random() < AUGMENTATION.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)

    def tokens(caption: str) -> list[int]:
        return tokenizer(caption, truncation=True, max_length=MAX_LENGTH)["input_ids"]

    def collate(samples: list[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions = zip(*samples, strict=True)
        return torch.stack(images), pad_labels(list(captions))

    data = webdataset.WebDataset(paths, shardshuffle=len(paths), empty_check=False).repeat().shuffle(BUFFER)
    data = data.decode("pil").to_tuple("jpg", "txt").map_tuple(view, tokens)
    return iter(data.batched(BATCH, collation_fn=collate))


def data_wait(recipe: Path, paths: list[str], folder: Path, steps: int) -> tuple[float, float]:
    """Share of a run's time that its loop waits for data, and images/s.

    One loader process prefetches. The first row of the log, in which it starts, does not count.
    """
    source = SourceConfig(shards=paths, augmentation=AUGMENTATION)
    config = dataclasses.replace(
        load_config(recipe),
        output_dir=str(folder / "run"),
        tokenizer=str(folder / "tokenizer"),
        data=DataConfig({"shards": source}, cache_in_memory=False, shuffle_buffer=BUFFER, num_workers=1),
        evaluation=EvaluationConfig(),
        max_minutes=None,
        max_steps=steps,
        log_every_steps=2,
        checkpoint_minutes=0,
    )
    train(config)
    rows = read_rows(Path(config.output_dir) / "log.jsonl")[1:]
    wait, speed = (float(np.mean([row[name] for row in rows])) for name in ("data_wait", "images_per_second"))
    return wait, speed
