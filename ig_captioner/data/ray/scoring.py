"""Rows of photos to rows of scores: tasks decode and resize, actors score, each with a model of its own.

The labels are compiled once, in a task with the resources of an actor, and wait in the object store with what makes
tensors of images (the image processor, no weights). An actor loads the model once and takes the labels from there.

Every photo comes out once: a photo without scores has an `error`. An actor that dies is started again by Ray, which
gives it what it was given before; so is a task.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load, save
from transformers.utils import logging

from ...captioners.own import OwnCaptionScorer
from ...captioners.pipelines import zero_shot_pipeline
from ...captioners.prompts import PreparedImage
from ...captioners.scorer import CaptionScorer, plain_images
from ...checkpoint import choose_device, dtype_on
from ...compiled_labels import CompiledLabels, is_compiled
from ...input_rules import IMAGE_EXTENSIONS
from ..shards import BrokenSampleError, image_of
from .output import ParquetFolder
from .photos import NO_IMAGE, WORDS, describe, value_of
from .resources import Shares, share_cpus


PREPARED = pa.schema([("key", WORDS), ("source", WORDS), ("photo", pa.large_binary()), ("error", WORDS)])
NUMBERS = pa.list_(pa.float64())
FIGURES = ("caption_log_likelihood", "prior_log_likelihood", "information_gain")
SCORES = pa.schema([("key", WORDS), *((name, NUMBERS) for name in FIGURES), ("error", WORDS)])
PREDICTIONS = pa.schema(
    [
        ("key", WORDS),
        ("labels", pa.list_(WORDS)),
        ("scores", NUMBERS),
        *((name, NUMBERS) for name in FIGURES),
        ("error", WORDS),
    ]
)
WRITTEN = pa.schema([("file", WORDS), ("photos", pa.int64()), ("reasons", pa.list_(WORDS))])
UNSCORABLE = "unscorable image"
LARGEST_BLOCK = 2**27  # bytes


@dataclass(frozen=True)
class Captioner:
    """Which captioner is loaded, and how: arguments of `CaptionScorer.from_pretrained`."""

    model: str
    options: dict[str, Any]
    device: str

    @classmethod
    def named(cls, model: str | Path, options: dict[str, Any] | None, num_gpus: float) -> "Captioner":
        """The captioner of a folder or repository, on a GPU where the actors have one."""
        return cls(_absolute(str(model)), options or {}, "cuda" if num_gpus else "cpu")

    def load(self, threads: int) -> CaptionScorer | OwnCaptionScorer:
        """Loads it on this worker, whose share of CPUs is `threads`."""
        torch.set_num_threads(threads)
        logging.disable_progress_bar()  # of a few seconds, in as many processes as there are actors
        device = choose_device(self.device)
        options = {**self.options, "dtype": dtype_on(device, self.options.get("dtype") or "auto")}
        return CaptionScorer.from_pretrained(self.model, device=device, **options)


@dataclass(frozen=True)
class Prepared:
    """What the model's first loading gave: references to objects in the object store, and facts about them."""

    labels: Any
    preparer: Any
    fingerprint: str
    tokens_sha256: str
    photo_bytes: int
    """Of a prepared photo."""


@dataclass(frozen=True)
class Ranking:
    """What becomes of the scores of a photo: the best labels, as the pipeline ranks them.

    Args:
        options: `top_k`, `multi_label`, `temperature` and `abstain_threshold` of the pipeline.
    """

    options: dict[str, Any]
    schema = PREDICTIONS

    def rows(self, scorer: CaptionScorer, labels: CompiledLabels, scores: Any) -> Iterator[dict[str, Any]]:
        """The columns of each photo, from its scores [B, C]."""
        classifier = zero_shot_pipeline(scorer)
        prior = scores.prior_log_likelihood.expand_as(scores.caption_log_likelihood)
        values = {**scores, "prior_log_likelihood": prior}
        for number in range(len(prior)):
            of_photo = {name: each[number : number + 1] for name, each in values.items()}
            entries = classifier.postprocess(
                of_photo, candidate_labels=list(labels.labels), return_log_likelihoods=True, **self.options
            )
            columns = {name: [entry[name] for entry in entries] for name in FIGURES}
            names = {"labels": [entry["label"] for entry in entries], "scores": [entry["score"] for entry in entries]}
            yield names | columns


@dataclass(frozen=True)
class AllScores:
    """What becomes of the scores of a photo: all of them, in the order of the texts."""

    schema = SCORES

    def rows(self, scorer: CaptionScorer, labels: CompiledLabels, scores: Any) -> Iterator[dict[str, Any]]:
        """The columns of each photo, from its scores [B, C]."""
        prior = scores.prior_log_likelihood.tolist()
        for caption, gain in zip(scores.caption_log_likelihood.tolist(), scores.information_gain.tolist(), strict=True):
            yield dict(zip(FIGURES, (caption, prior, gain), strict=True))


def classify_dataset(
    dataset: ray.data.Dataset,
    model: str | Path,
    labels: Sequence[str] | CompiledLabels,
    templates: str | Sequence[str] | None = None,
    *,
    top_k: int | None = None,
    multi_label: bool = False,
    temperature: float | None = None,
    abstain_threshold: float | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """Ranks labels for photos, as the pipeline does.

    Args:
        dataset: rows of `key` and `image`, the content of an image file; see `read_photos`.
        model: folder or repository on the Hub of any captioner, which all nodes can read.
        labels, templates: strings, or compiled labels.
        top_k, multi_label, temperature, abstain_threshold: as for the pipeline.
        options: see `score_dataset`.

    Returns:
        Rows of `key`, `labels` (the best first), `scores`, `caption_log_likelihood`, `prior_log_likelihood`,
        `information_gain` (lists of nats in the order of the labels) and `error`, which is null for photos with scores.

    Raises:
        ValueError: naming the value, for labels or a model that cannot be used, or if too few CPUs would be left.
    """
    kept = {"top_k": top_k, "multi_label": multi_label, "temperature": temperature}
    ranking = Ranking({**kept, "abstain_threshold": abstain_threshold})
    return _score(dataset, model, labels, templates, ranking, **options)


def score_dataset(
    dataset: ray.data.Dataset, model: str | Path, texts: Sequence[str] | CompiledLabels, **options: Any
) -> ray.data.Dataset:
    """Scores every photo with every text.

    Args:
        dataset, model: as for `classify_dataset`.
        texts: strings, or compiled labels.
        options: `concurrency`, the number of actors (1), `num_gpus` and `num_cpus` of each, `batch_size`, photos that
            an actor scores at once (64); `prior_weight` and `label_prior`; `prior`, a dict of `prior_source`,
            `reference_images` and `reference_mean`; `model_options`, a dict of arguments of
            `CaptionScorer.from_pretrained`, such as `prompt` or `dtype`; and `output`, see `ParquetFolder`.

    Returns:
        Rows of `key`, `caption_log_likelihood`, `prior_log_likelihood`, `information_gain` (lists of nats in the order
        of the texts) and `error`.

    Raises:
        ValueError: as `classify_dataset`.
    """
    return _score(dataset, model, texts, None if is_compiled(texts) else "{}", AllScores(), **options)


def _score(
    dataset: ray.data.Dataset,
    model: str | Path,
    labels: Sequence[str] | CompiledLabels,
    templates: str | Sequence[str] | None,
    form: Ranking | AllScores,
    *,
    concurrency: int = 1,
    num_gpus: float = 0.0,
    num_cpus: float | None = None,
    batch_size: int = 64,
    prior_weight: float | None = None,
    label_prior: Sequence[float] | None = None,
    prior: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    output: ParquetFolder | None = None,
    prepared: Prepared | None = None,
) -> ray.data.Dataset:
    shares = shares_of_cluster(concurrency, num_cpus, num_gpus)
    captioner = Captioner.named(model, model_options, num_gpus)
    prepared = prepared or prepare(captioner, labels, templates, prior or {}, shares, num_gpus)
    # Actors share out blocks, so that these should be no more than a batch.
    batch_bytes = batch_size * prepared.photo_bytes
    dataset.context.target_max_block_size = min(batch_bytes, dataset.context.target_max_block_size or LARGEST_BLOCK)
    decoded = dataset.map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"preparer": prepared.preparer},
        num_cpus=shares.reader,
    )
    actor = {"captioner": captioner, "labels": prepared.labels, "threads": threads_of(shares), "form": form}
    weights = {"prior_weight": prior_weight, "label_prior": label_prior}
    return decoded.map_batches(
        BatchScorer,
        batch_size=batch_size,
        batch_format="pyarrow",
        fn_constructor_kwargs={**actor, "weights": weights, "output": output},
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=shares.actor,
        num_gpus=num_gpus,
    )


def shares_of_cluster(concurrency: int, num_cpus: float | None, num_gpus: float) -> Shares:
    """`share_cpus` for the nodes that are there now."""
    if not ray.is_initialized():
        ray.init()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return share_cpus(nodes, concurrency, num_cpus, num_gpus)


def _absolute(name: str) -> str:
    """A path that other processes understand; names of what is not here stay as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def threads_of(shares: Shares) -> int:
    """One thread of torch for each CPU that an actor reserves."""
    return max(1, int(shares.actor))


# ---------------------------------------------------------------------------------------------------------------------
# Once


def prepare(
    captioner: Captioner,
    labels: Sequence[str] | CompiledLabels,
    templates: str | Sequence[str] | None,
    prior: dict[str, Any],
    shares: Shares,
    num_gpus: float,
) -> Prepared:
    """Compiles labels in a task with the resources of an actor; the results stay in the object store.

    Args:
        prior: `prior_source`, `reference_images` and `reference_mean` of `compile_labels`.

    Raises:
        ValueError, OSError: of the model or the labels, as they were raised there.
    """
    if paths := prior.get("reference_images"):
        prior = {**prior, "reference_images": [_absolute(path) if isinstance(path, str) else path for path in paths]}
    task = ray.remote(_compile).options(num_returns=3, num_cpus=shares.actor, num_gpus=num_gpus, max_retries=3)
    compiled, preparer, facts = task.remote(captioner, labels, templates, prior, threads_of(shares))
    try:
        return Prepared(compiled, preparer, *ray.get(facts))
    except RayTaskError as error:
        raise error.cause from None


def _compile(
    captioner: Captioner,
    labels: Sequence[str] | CompiledLabels,
    templates: str | Sequence[str] | None,
    prior: dict[str, Any],
    threads: int,
) -> tuple[CompiledLabels, Any, tuple[str, str, int]]:
    scorer = captioner.load(threads)
    compiled: Any = labels
    if not is_compiled(labels):
        compiled = scorer.compile_labels(list(labels), templates, **prior)  # type: ignore[arg-type]
    scorer.score(plain_images()[:1], compiled)  # refuses labels of another model here, not in every actor
    preparer = scorer.preparer()
    photo_bytes = len(_as_bytes(preparer(plain_images()[0])))
    return compiled, preparer, (compiled.texts.fingerprint, compiled.tokens_sha256, photo_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# In tasks


def decode(batch: pa.Table, preparer: Any) -> pa.Table:
    """Image files as the model takes them, in safetensors, or why they are none."""
    torch.set_num_threads(1)
    read = value_of(preparer)
    keys = batch.column("key").to_pylist()
    nothing = [None] * len(keys)
    columns = [batch.column(name).to_pylist() if name in batch.column_names else nothing for name in ("image", "error")]
    photos, errors = [], []
    for content, error in zip(*columns, strict=True):
        photo, error = (None, error) if error is not None else _decode_one(content, read)
        photos.append(photo)
        errors.append(error)
    sources = batch.column("source").to_pylist() if "source" in batch.column_names else nothing
    prepared = (list(map(str, keys)), sources, photos, errors)
    return pa.table([pa.array(values, each.type) for values, each in zip(prepared, PREPARED, strict=True)], PREPARED)


def _decode_one(content: bytes | None, read: Any) -> tuple[bytes | None, str | None]:
    if content is None:
        return None, NO_IMAGE
    try:
        image = image_of({IMAGE_EXTENSIONS[0]: content})
    except BrokenSampleError as error:
        return None, str(error)
    try:
        return _as_bytes(read(image)), None
    except ValueError as error:  # image processors refuse some shapes
        return None, describe(UNSCORABLE, error)


def _as_bytes(photo: PreparedImage) -> bytes:
    return save({name: value.contiguous() for name, value in photo.items()})


# ---------------------------------------------------------------------------------------------------------------------
# In actors


class BatchScorer:
    """An actor: loads the model once, and scores batches of prepared photos.

    Args:
        labels: compiled, or a reference to them in the object store.
        threads: of torch.
        form: what becomes of scores.
        weights: `prior_weight` and `label_prior` of `score`.
        output: where each batch is written before the next is begun; what comes out is then a row of `WRITTEN`.
    """

    def __init__(
        self,
        captioner: Captioner,
        labels: Any,
        threads: int,
        form: Ranking | AllScores,
        weights: dict[str, Any],
        output: ParquetFolder | None,
    ) -> None:
        self.scorer, self.labels = captioner.load(threads), value_of(labels)
        self.form, self.weights, self.output = form, weights, output

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Scores, or what was written, of a batch of `PREPARED`."""
        rows = batch.to_pylist()
        if not rows:  # also asked for the schema
            return (self.form.schema if self.output is None else WRITTEN).empty_table()
        usable = [row for row in rows if row["error"] is None]
        found = iter(self._score([PreparedImage(load(row["photo"])) for row in usable]))
        results = [{"error": row["error"]} if row["error"] is not None else next(found) for row in rows]
        columns = {name: [row.get(name) for row in results] for name in self.form.schema.names}
        columns["key"] = [row["key"] for row in rows]
        table = pa.table(columns, self.form.schema)
        if self.output is None:
            return table
        name = self.output.write(table, [row["source"] for row in rows])
        reasons = [error.partition(":")[0] for error in columns["error"] if error is not None]
        return pa.table({"file": [name], "photos": [len(rows)], "reasons": [reasons]}, WRITTEN)

    def _score(self, photos: Sequence[PreparedImage]) -> list[dict[str, Any]]:
        """The columns of each photo. One that the model refuses costs only itself."""
        if not photos:
            return []
        try:
            scores = self.scorer.score(list(photos), self.labels, **self.weights)
            return list(self.form.rows(self.scorer, self.labels, scores))
        except ValueError as error:
            if len(photos) == 1:
                return [{"error": describe(UNSCORABLE, error)}]
            return [columns for photo in photos for columns in self._score([photo])]
