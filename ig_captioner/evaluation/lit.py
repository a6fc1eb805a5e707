"""LiT tuning (Zhai et al., arXiv 2111.07991): a text tower learns to find the captions of a frozen image encoder.

CapPa is evaluated this way, too. The image encoder is never run in training: its features, the mean over patches as for
the linear probe, are computed once. A small CLIP text model and a linear projection on each side are trained from
scratch with the symmetric softmax loss; equal captions in a batch are one answer. The learning rate is the best of
several on held-out pairs of the training data. The result is a dual encoder like CLIP, with cosines as scores.

Legend: B images or pairs, N texts, L text tokens, F width of the features, E width of the embeddings.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from ..data.prompts import read_class_names
from ..data.samples import Samples, captioned, describe_skipped, separate, split_by_hash
from ..information_gain import mean_over_templates
from ..input_rules import format_labels
from ..processing_ig_captioner import encode_texts
from .linear_probe import mean_pooled_features
from .processes import map_batches
from .ranking import mean_log_rank, ranks, recall_metrics, true_pairs
from .retrieval import image_to_text_row, text_to_image_row
from .rows import Contender, Row, make_row
from .scores import to_pixels
from .task import choose_templates, finish, labelled_samples, load_models
from .zero_shot import class_row


IMAGES_PER_PASS = 64  # fixed: float error in a feature would grow in training
MAX_TOKENS = 64
FIRST_TEMPERATURE = 0.07
HIGHEST_SCALE = 100.0  # of the cosines, as in CLIP
WARM_UP = 0.05  # share of the steps
WEIGHT_DECAY = 1e-4
POOLINGS = ("mean", "tokens")
NOTES = [
    "The image encoder is frozen; the text tower and a linear projection on each side are trained from scratch, "
    "with the learning rate that has the lowest geometric mean rank on the held-out training pairs. Tested on the "
    "samples that the tasks zero-shot and retrieval test on.",
]


# From arguments to results


def run(arguments: argparse.Namespace) -> int:
    """Recall and accuracy of a text tower that is trained for the frozen image encoder."""
    if arguments.data is None and arguments.labelled is None:
        raise ValueError("nothing to test on: give --data for retrieval, --labelled for classification, or both")
    if arguments.labelled is not None and arguments.class_names is None:
        raise ValueError("--labelled needs --class-names")
    if (arguments.train is None) == (arguments.tower is None):
        raise ValueError("give either --train, to train a tower, or --tower, one that is trained")
    model, processor, _ = load_models(arguments)
    tables: dict[str, list] = {}
    selection: dict[str, list] = {}
    data: dict[str, Any] = {}
    if arguments.tower is None:
        tower, selection = train_on_shards(arguments, model, processor, data)
    else:
        tower = load_tower(arguments.tower, processor.tokenizer, model.device)
        data |= {"tower": arguments.tower, "recipe": ", ".join(f"{k} {v}" for k, v in tower.recipe._asdict().items())}
    if arguments.data is not None:
        tables |= measure_retrieval(arguments, model, processor, tower, data)
    if arguments.labelled is not None:
        tables |= measure_classification(arguments, model, processor, tower, data)
    finish(arguments, model, "LiT tuning", tables | selection, NOTES, data)
    return 0


def train_on_shards(
    arguments: argparse.Namespace, model, processor, data: dict
) -> tuple["DualEncoder", dict[str, list]]:
    """The tower of the best learning rate, and a table of all of them."""
    samples = Samples(arguments.train, captioned)
    pairs = read_pairs(model, processor, samples)
    held_out, rest = split_by_hash(samples.keys, arguments.held_out_fraction)
    recipe = Recipe(**{name: getattr(arguments, name) for name in ("steps", "batch_size", "width", "layers", "seed")})
    recipes = [recipe._replace(learning_rate=rate) for rate in arguments.learning_rates]
    parts = pairs.select(rest), pairs.select(held_out)
    tower, selection = choose_tower(*parts, processor.tokenizer, recipes, model.device)
    data |= {
        "train": arguments.train,
        "skipped in training": describe_skipped(samples.skipped) or "none",
        "training samples": len(rest),
        "held-out training samples": len(held_out),
    }
    return tower, {"Learning rates on held-out training pairs, image to text": selection}


def measure_retrieval(
    arguments: argparse.Namespace, model, processor, tower: "DualEncoder", data: dict
) -> dict[str, list]:
    samples = Samples(arguments.data, captioned, arguments.limit)
    pairs = read_pairs(model, processor, samples, tower.recipe.pooling)
    test = split_by_hash(samples.keys, arguments.held_out_fraction)[1]
    features, captions = pairs.select(test)
    captions = [own[: arguments.captions] for own in captions]
    texts = [caption for own in captions for caption in own]
    owners = torch.tensor([image for image, own in enumerate(captions) for _ in own])
    contender = Contender("LiT", tower.score(features, texts), baseline=False)
    is_true = true_pairs(captions, texts)
    data |= {"data": arguments.data, "skipped": describe_skipped(samples.skipped) or "none"}
    data |= {"test samples": len(test), "texts": len(texts)}
    return {
        "Image to text": [image_to_text_row(contender, is_true)],
        "Text to image": [text_to_image_row(contender, is_true, owners)],
    }


def measure_classification(
    arguments: argparse.Namespace, model, processor, tower: "DualEncoder", data: dict
) -> dict[str, list]:
    class_names = read_class_names(arguments.class_names)
    templates = choose_templates(arguments, model.config)
    samples = labelled_samples(arguments, arguments.labelled, class_names, arguments.limit)
    images, labels = separate(samples)
    features = pooled_features(model, processor, images, tower.recipe.pooling)
    test = split_by_hash(samples.keys, arguments.held_out_fraction)[1]
    contender = Contender("LiT", tower.score_classes(features[test], class_names, templates), baseline=False)
    row = class_row(contender, torch.tensor(labels)[test], class_names)
    data |= {"labelled": arguments.labelled, "skipped of labelled": describe_skipped(samples.skipped) or "none"}
    data |= {"labelled test samples": len(test), "classes": len(class_names), "templates": len(templates)}
    return {f"{len(class_names)} classes": [row]}


# The tower


class Recipe(NamedTuple):
    """Settings for training a text tower. Its features are the mean over patches, or all image tokens in a row."""

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    width: int = 128
    layers: int = 4
    seed: int = 0
    pooling: str = "mean"


class Pairs(NamedTuple):
    """B images with their captions."""

    features: Tensor
    """[B, F], float32."""
    captions: list[list[str]]

    def select(self, indices: Sequence[int]) -> "Pairs":
        return Pairs(self.features[list(indices)], [self.captions[index] for index in indices])


class DualEncoder(nn.Module):
    """Unit vectors of image features [B, F] and of texts [N, L]."""

    mean: Tensor
    scale: Tensor

    def __init__(self, tokenizer: Any, features: Tensor, recipe: Recipe):
        """`features`: of the training images; they are scaled to mean 0 and variance 1 over these."""
        super().__init__()
        self.tokenizer = tokenizer
        self.recipe = recipe
        width = recipe.width
        self.register_buffer("mean", features.mean(dim=0))
        self.register_buffer("scale", features.std(dim=0, correction=0).clamp(min=1e-6))
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image_projection = nn.Linear(features.shape[1], width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def embed_features(self, features: Tensor) -> Tensor:
        """[B, E] from [B, F]."""
        return F.normalize(self.image_projection((features - self.mean) / self.scale), dim=-1)

    def embed_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, E]: what the last token, end-of-sequence, has seen of each text."""
        states = self.text_model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(dim=-1) - 1
        return F.normalize(self.text_projection(states[torch.arange(len(states), device=last.device), last]), dim=-1)

    def logits(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scaled cosines of images and texts, [B, N]."""
        scale = self.log_scale.exp().clamp(max=HIGHEST_SCALE)
        return scale * self.embed_features(features) @ self.embed_tokens(input_ids, attention_mask).T

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask [N, L], cut to what the tower can read."""
        encoded = encode_texts(self.tokenizer, list(texts), MAX_TOKENS)
        return encoded["input_ids"].to(self.mean.device), encoded["attention_mask"].to(self.mean.device)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[N, E] on the CPU."""
        return torch.cat([self.embed_tokens(*self.encode(texts[i : i + 256])).cpu() for i in range(0, len(texts), 256)])

    @torch.no_grad()
    def score(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines [B, N] on the CPU."""
        return self.embed_features(features.to(self.mean.device)).cpu() @ self.embed_texts(texts).T

    @torch.no_grad()
    def score_classes(self, features: Tensor, class_names: Sequence[str], templates: str | Sequence[str]) -> Tensor:
        """Cosines [B, C] with the mean over templates of each class."""
        texts = self.embed_texts(format_labels(list(class_names), templates))
        classes = F.normalize(mean_over_templates(texts.T, len(texts) // len(class_names)).T, dim=-1)
        return self.embed_features(features.to(self.mean.device)).cpu() @ classes.T


def pooled_features(model: Any, processor: Any, images: Iterable[Image.Image], pooling: str = "mean") -> Tensor:
    """Features of images that a tower reads, [B, F], float32 on the CPU; F is E, or with "tokens" P * E."""
    if pooling == "mean":
        return mean_pooled_features(model, processor, images, IMAGES_PER_PASS)

    def features(batch: list[Image.Image]) -> Tensor:
        with torch.no_grad():
            return model.model.encode_features(to_pixels(model, processor, batch)).flatten(1).float().cpu()

    return torch.cat(map_batches(features, images, IMAGES_PER_PASS))


def read_pairs(
    model: Any, processor: Any, samples: Iterable[tuple[Image.Image, list[str]]], pooling: str = "mean"
) -> Pairs:
    """Features of the frozen encoder, computed once, and captions of (image, captions) samples."""
    images, captions = separate(samples)
    return Pairs(pooled_features(model, processor, images, pooling), captions)


def train(pairs: Pairs, tokenizer: Any, recipe: Recipe, device: torch.device | str = "cpu") -> DualEncoder:
    """A text tower for the features of `pairs`; the same recipe gives the same tower on the same machine.

    Raises:
        ValueError: for fewer than two pairs: nothing is to be told apart.
    """
    if len(pairs.captions) < 2:
        raise ValueError(f"contrastive training needs at least two pairs, got {len(pairs.captions)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = DualEncoder(tokenizer, pairs.features, recipe).to(device)
    generator = torch.Generator().manual_seed(recipe.seed)
    return fit(model, _batches(model, pairs, recipe, generator))


def fit(model: DualEncoder, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> DualEncoder:
    """Trains by as many batches as the recipe has steps: features [B, F], tokens and their mask [B, L]."""
    recipe = model.recipe
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    for features, tokens, mask in islice(batches, recipe.steps):
        loss = contrastive_loss(model.logits(features, tokens, mask), tokens.masked_fill(mask == 0, -1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _batches(
    model: DualEncoder, pairs: Pairs, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of pairs, for each image one of its captions, drawn."""
    input_ids, mask = model.encode([caption for own in pairs.captions for caption in own])
    counts = torch.tensor([len(own) for own in pairs.captions])
    firsts = counts.cumsum(dim=0) - counts
    features = pairs.features.to(model.mean.device)
    for rows in _draw(len(features), recipe.batch_size, generator):
        texts = firsts[rows] + (torch.rand(len(rows), generator=generator) * counts[rows]).long()
        length = int(mask[texts].sum(dim=-1).max())
        yield features[rows], input_ids[texts, :length], mask[texts, :length]


def save_tower(model: DualEncoder, folder: str | Path) -> None:
    """Weights and recipe; the tokenizer is that of the captioner whose encoder it was trained for."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    metadata = {"recipe": json.dumps(model.recipe._asdict())}
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, _weights(folder), metadata)


def load_tower(folder: str | Path, tokenizer: Any, device: torch.device | str = "cpu") -> DualEncoder:
    """Reads what `save_tower` wrote. Raises RuntimeError if it does not fit the tokenizer."""
    with safe_open(_weights(folder), "pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
        width = file.get_slice("mean").get_shape()[0]
    model = DualEncoder(tokenizer, torch.zeros(2, width), recipe)
    model.load_state_dict(load_file(_weights(folder)))
    return model.to(device).eval()


def _weights(folder: str | Path) -> str:
    return str(Path(folder) / "tower.safetensors")


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: linear up, then along a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def _draw(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices below `count`, epoch after epoch in a new order; what fills no batch is left out."""
    size = min(batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].split(size)


def contrastive_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of texts given images and images given texts; equal texts share the probability.

    Args:
        logits: [B, B], images down, texts across.
        tokens: of the text of each pair, [B, L], padded alike.
    """
    is_true = (tokens[:, None] == tokens).all(dim=-1).float()
    wanted = is_true / is_true.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def choose_tower(
    pairs: Pairs, held_out: Pairs, tokenizer: Any, recipes: Sequence[Recipe], device: torch.device | str = "cpu"
) -> tuple[DualEncoder, list[Row]]:
    """Of towers trained by several recipes the one with the lowest geometric mean rank on held-out pairs.

    Also a row for each on these pairs, image to text.
    """
    rows = []
    best = None
    for recipe in recipes:
        model = train(pairs, tokenizer, recipe, device)
        found = rank_captions(model, held_out)

        def metrics(drawn: Tensor, found: Tensor = found) -> dict[str, float]:
            return recall_metrics(found[drawn])

        rows.append(make_row(Contender(f"learning rate {recipe.learning_rate:g}", found), metrics, len(found)))
        if best is None or mean_log_rank(found) < mean_log_rank(best[0]):
            best = found, model, rows[-1]
    if best is None:
        raise ValueError("there is no recipe to train by")
    best[2].name += ", taken"
    return best[1], rows


def rank_captions(model: DualEncoder, pairs: Pairs) -> Tensor:
    """Counts the wrong captions before the best true one of each image, int [B]."""
    texts = [caption for own in pairs.captions for caption in own]
    return ranks(model.score(pairs.features, texts), true_pairs(pairs.captions, texts))
