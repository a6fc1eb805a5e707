"""Shards and configurations of training runs of a few steps; their fixtures are in `conftest.py`."""

import io
import itertools
import json
import tarfile

from PIL import Image

from training.augmentation import ImageSettings
from training.config import load_config
from training.data import Share, load_training_data
from training.train_tokenizer import train_tokenizer


COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
CAPTIONS = ["a red square.", "a green square.", "A blue square on white .", "two small red squares side by side"]
SETTINGS = ImageSettings((16, 16))


def options(values):
    return [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]


def run_config(workspace, output_dir, **overrides):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    values = {
        "output_dir": str(output_dir),
        "tokenizer": str(workspace / "tokenizer"),
        "data_root": str(workspace),
        "model.vision_config": {**small, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        "model.text_config": {
            **small,
            "num_hidden_layers": 2,
            "num_text_only_layers": 1,
            "max_position_embeddings": 16,
        },
        "data.max_length": 16,
        "data.sources.colors.shards": "colors.tar",
        "data.sources.colors.augmentation.shift": 0.1,
        "batch_size": 8,
        "max_steps": 4,
        "mixed_precision": "no",
        "log_every_steps": 2,
        "checkpoint_minutes": 0,
        "optimizer.lr": 0.01,
        "optimizer.ema_decay": 0.9,
        **overrides,
    }
    return load_config(None, options(values))


def image_bytes(color=(255, 0, 0), size=(12, 10), image_format="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, image_format)
    return buffer.getvalue()


def write_shard(path, members):
    """`members`: (name, bytes) pairs; gzipped if the path ends in .gz."""
    with tarfile.open(path, "w:gz" if str(path).endswith(".gz") else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def good_members(start, count, captions=CAPTIONS):
    for index in range(start, start + count):
        yield f"{index:04d}.png", image_bytes((index % 256, 0, 0))
        yield f"{index:04d}.txt", captions[index % len(captions)].encode()


def load(config, tokenizer, root, batch_size=4, process=0, processes=1, position=None):
    share = Share(batch_size, process, processes)
    return load_training_data(config, tokenizer, SETTINGS, share, data_root=str(root), seed=0, position=position)


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def make_workspace(root) -> None:
    """Fills a folder with a shard of coloured squares, and a tokenizer."""
    with tarfile.open(root / "colors.tar", "w") as archive:
        for index in range(24):
            name = list(COLORS)[index % 4]
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), COLORS[name]).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("txt", f"a {name} square.".encode())):
                info = tarfile.TarInfo(f"{index:04d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    train_tokenizer([f"a {name} square." for name in COLORS], 300).save_pretrained(root / "tokenizer")
