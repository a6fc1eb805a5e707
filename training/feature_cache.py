"""Features of a frozen encoder: computed once for several views of every image, then read from disk by every run.

    python -m training.feature_cache --config FILE.yaml [--key value]

computes those that a run of `training.train` would, and ends; the run itself does so too, where they are missing.

A source's features lie in `FOLDER/NAME-FINGERPRINT/`:

- `features.bin`: N x V x P x D numbers, one block per usable sample, the first view as the image processor sees it;
- `samples.jsonl`: a line per sample of the shards, its key, captions and JSON, or why it was skipped;
- `settings.json`: all that the features depend on, of which the fingerprint is a hash. It is written last: a folder
  without it is unfinished, and the next run goes on after its last complete line.

View v of a sample is a function of its key, v and the seed. Other weights, shards or settings make another folder;
what is no longer used may be deleted. Processes that want the same features wait for the first to compute them.

Legend: N samples, V views, P image tokens, D their width; B images of H x W pixels.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ig_captioner.data.remote import is_url
from ig_captioner.data.shards import (
    BrokenSampleError,
    EmptySourceError,
    RawSample,
    Skipped,
    describe_empty,
    find_shards,
    image_of,
    read_shard,
)

from .augmentation import ImageSettings, augment, normalise, resize
from .build import build_model, build_processor, image_settings, load_tokenizer
from .captions import read_texts
from .config import AugmentationConfig, SourceConfig, TrainConfig, UsageError, load_config


logger = logging.getLogger(__name__)

FORMAT = 1  # raised when the same settings would give other features
FEATURES, SAMPLES, SETTINGS = "features.bin", "samples.jsonl", "settings.json"

EncodeViews = Callable[[Tensor], np.ndarray]
"""From views uint8 [B, H, W, 3] to features [B, P, D] in the cache's number format."""


class Record(NamedTuple):
    """A usable sample without its features, as the cache knows it."""

    key: str
    captions: list[str]
    metadata: dict[str, Any]


class FeatureStore:
    """The finished features of one source; those of a sample are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        self.folder = folder
        self.dtype = settings["dtype"]
        self.views = settings["views"]
        self.records = list[Record]()
        self.skipped = list[Skipped]()
        with open(folder / SAMPLES, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if "skipped" in row:
                    self.skipped.append(Skipped(row["key"], row["skipped"]))
                else:
                    self.records.append(Record(row["key"], row["captions"], row["metadata"]))
        self.shape = (len(self.records), self.views, *settings["shape"])

    @cached_property
    def features(self) -> np.ndarray:
        """[N, V, P, D], mapped from the disk."""
        return np.memmap(self.folder / FEATURES, dtype=self.dtype, mode="r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "features"}  # a worker maps them itself


def ensure_features(
    config: TrainConfig, model: Any, settings: ImageSettings, device: torch.device
) -> dict[str, FeatureStore]:
    """The features of every source: those on the disk where they fit, else computed now.

    Args:
        model: has `encode_features`; its encoder must be frozen.

    Raises:
        ValueError: the encoder is trained.
    """
    encoder = model.base_model.vision_model
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UsageError("data.feature_cache needs a frozen encoder: add 'model.vision_model.*' to freeze")
    digest = encoder_digest(model)
    stores = {}
    for name, source in config.data.sources.items():
        paths = find_shards(source.shards, config.data_root)
        wanted = cache_settings(config, source, paths, settings, digest)
        fingerprint = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        folder = Path(config.data.feature_cache.folder) / f"{name}-{fingerprint[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not (folder / SETTINGS).exists():
                encode = make_encode(model, settings, device, wanted["dtype"], config.mixed_precision == "bf16")
                compute(name, folder, paths, config, source, settings, encode, wanted)
        stores[name] = FeatureStore(folder)
    return stores


class FeaturesOfRun(NamedTuple):
    """Reads what a run is trained on, to measure beside it: the model as it starts, the features of all sources."""

    model: Any
    tokenizer: Any
    settings: ImageSettings
    stores: dict[str, FeatureStore]
    device: torch.device


def open_features(config: TrainConfig) -> FeaturesOfRun:
    """Builds the model that a run starts from, and gives its features, computed if they are missing."""
    set_seed(config.seed)  # as in a run: an encoder may have random weights
    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer)
    settings = image_settings(build_processor(config, model.config, tokenizer).image_processor)
    # A CUDA build of torch on a machine without a GPU has an accelerator that is not available.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    stores = ensure_features(config, model, settings, device)
    return FeaturesOfRun(model, tokenizer, settings, stores, device)


def cache_settings(
    config: TrainConfig, source: SourceConfig, paths: list[str], settings: ImageSettings, encoder: str
) -> dict[str, Any]:
    """All that a source's features depend on."""
    cache = config.data.feature_cache
    return {
        "format": FORMAT,
        "encoder": encoder,
        "mixed_precision": config.mixed_precision,
        "image": dataclasses.asdict(settings),
        "augmentation": dataclasses.asdict(source.augmentation),
        "views": source.views or cache.views,
        "dtype": cache.dtype,
        "seed": cache.seed,
        "max_image_pixels": config.data.max_image_pixels,
        "shards": [path if is_url(path) else file_digest(path) for path in paths],
    }


def file_digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def encoder_digest(model: Any) -> str:
    """SHA-256 of what makes features: the encoder's configuration and weights, and how its tokens are pooled."""
    config = model.config
    digest = hashlib.sha256(json.dumps(config.vision_config.to_diff_dict(), sort_keys=True, default=str).encode())
    digest.update(repr(config.image_token_grids).encode())
    for name, tensor in model.base_model.vision_model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time in the `with` block; the lock of a process that dies is free."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Computing


def make_encode(model: Any, settings: ImageSettings, device: torch.device, dtype: str, bf16: bool) -> EncodeViews:
    """The encoder in evaluation mode on `device`; channels last, which convolutions are faster in."""
    model.to(device)
    encoder = model.base_model.vision_model

    def encode(views: Tensor) -> np.ndarray:
        pixels = normalise(views.to(device, non_blocking=True), settings, torch.channels_last)
        autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with evaluation_mode(encoder), torch.no_grad(), autocast:
            features = model.base_model.encode_features(pixels)
        return features.to(getattr(torch, dtype)).cpu().numpy()

    return encode


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module` is in evaluation mode inside the `with` block, and afterwards as it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class ViewsDataset(Dataset):
    """Samples of a shard to a line for `samples.jsonl` and all views, uint8 [V, H, W, 3]; None if it is skipped."""

    def __init__(
        self,
        samples: list[RawSample | Skipped],
        views: int,
        augmentation: AugmentationConfig,
        settings: ImageSettings,
        max_pixels: int,
        seed: int,
    ) -> None:
        self.samples = samples
        self.views = views
        self.augmentation = augmentation
        self.settings = settings
        self.max_pixels = max_pixels
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], np.ndarray | None]:
        item = self.samples[index]
        if isinstance(item, Skipped):
            return {"key": item.key, "skipped": item.reason}, None
        key, files = item
        try:
            captions, metadata = read_texts(files)
            image = image_of(files, self.max_pixels)
        except BrokenSampleError as error:
            return {"key": key, "skipped": str(error)}, None
        return {"key": key, "captions": captions, "metadata": metadata}, self.make_views(key, image)

    def make_views(self, key: str, image: Any) -> np.ndarray:
        result = [np.asarray(resize(image, self.settings))]
        for view in range(1, self.views):
            rng = np.random.default_rng((self.seed, number_of(key), view))
            result.append(augment(image, self.augmentation, self.settings, rng))
        return np.stack(result)


def number_of(key: str) -> int:
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big")


def collate_views(items: list[tuple[dict[str, Any], np.ndarray | None]]) -> tuple[list[dict[str, Any]], Tensor | None]:
    """The lines of samples, and the views of the usable ones, uint8 [B, V, H, W, 3]."""
    views = [view for _, view in items if view is not None]
    return [line for line, _ in items], torch.from_numpy(np.stack(views)) if views else None


def compute(
    name: str,
    folder: Path,
    paths: list[str],
    config: TrainConfig,
    source: SourceConfig,
    settings: ImageSettings,
    encode: EncodeViews,
    wanted: dict[str, Any],
) -> None:
    """Writes the features of a source, from where an earlier run was interrupted.

    Raises:
        EmptySourceError: there is no usable sample.
    """
    cache = config.data.feature_cache
    views = wanted["views"]
    shape = example_shape(encode, settings)
    lines, usable = cut_to_complete(folder, views * int(np.prod(shape)) * np.dtype(wanted["dtype"]).itemsize)
    with (
        open(folder / SAMPLES, "a", encoding="utf-8") as texts,
        open(folder / FEATURES, "ab") as features,
        tqdm(desc=f"features of {name}", initial=lines, unit="sample", mininterval=5) as bar,
    ):
        for path in paths:
            samples = list(read_shard(path))
            done = min(lines, len(samples))
            lines = max(0, lines - len(samples))
            dataset = ViewsDataset(
                samples[done:], views, source.augmentation, settings, config.data.max_image_pixels, wanted["seed"]
            )
            for rows, pixels in views_loader(dataset, max(1, cache.batch_size // views), cache.num_workers):
                if pixels is not None:
                    features.write(encode(pixels.flatten(0, 1)).tobytes())
                    features.flush()
                    usable += len(pixels)
                texts.writelines(json.dumps(row) + "\n" for row in rows)
                texts.flush()
                bar.update(len(rows))
    if not usable:
        raise EmptySourceError(describe_empty(name, paths, count_reasons(folder)))
    unfinished = folder / f".{SETTINGS}"
    unfinished.write_text(json.dumps({**wanted, "shape": list(shape)}, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / SETTINGS)


def count_reasons(folder: Path) -> Counter[str]:
    with open(folder / SAMPLES, encoding="utf-8") as file:
        return Counter(json.loads(line)["skipped"] for line in file)


def views_loader(dataset: ViewsDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Batches in the order of the samples."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(num_workers, len(dataset) // batch_size),
        collate_fn=collate_views,
        pin_memory=torch.cuda.is_available(),
    )


def example_shape(encode: EncodeViews, settings: ImageSettings) -> tuple[int, int]:
    """(P, D) of one image."""
    _, tokens, width = encode(torch.zeros(1, *settings.size, 3, dtype=torch.uint8)).shape
    return tokens, width


def cut_to_complete(folder: Path, bytes_per_sample: int) -> tuple[int, int]:
    """Cuts the files of an unfinished cache to what is whole in both; returns how many lines and usable samples."""
    texts = folder / SAMPLES
    features = folder / FEATURES
    for path in (texts, features):
        path.touch()
    available = features.stat().st_size // bytes_per_sample
    kept = list[bytes]()
    usable = 0
    with open(texts, "rb") as file:
        for line in file:
            is_usable = line.endswith(b"\n") and "skipped" not in json.loads(line)
            if not line.endswith(b"\n") or usable + is_usable > available:
                break
            kept.append(line)
            usable += is_usable
    texts.write_bytes(b"".join(kept))
    with open(features, "r+b") as file:
        file.truncate(usable * bytes_per_sample)
    return len(kept), usable


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) < 2 or arguments[0] != "--config":
        raise SystemExit("usage: python -m training.feature_cache --config FILE.yaml [--key value]")
    config = load_config(arguments[1], arguments[2:])
    if config.data.feature_cache is None:
        raise SystemExit(f"{arguments[1]} has no data.feature_cache")
    for name, store in open_features(config).stores.items():
        print(f"{name}: {len(store.records)} samples, features {store.shape} in {store.folder}")


if __name__ == "__main__":
    main()
