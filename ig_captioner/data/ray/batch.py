"""A whole run: photos in, a folder of Parquet files out, which the next run completes if this one is stopped."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.data

from ...compiled_labels import CompiledLabels, is_compiled
from .output import ParquetFolder
from .photos import read_photos
from .scoring import Captioner, Prepared, classify_dataset, prepare, shares_of_cluster


@dataclass
class Summary:
    """What a folder of results holds after a run.

    Attributes:
        photos: that this run has done, broken ones included.
        before: photos whose results were there before.
        reasons: how many of all have an error, by reason.
        files: that this run has written.
    """

    photos: int = 0
    before: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    files: int = 0

    @property
    def errors(self) -> int:
        """Photos without scores."""
        return sum(self.reasons.values())


def classify_photos(
    location: str,
    output: str,
    model: str | Path,
    labels: Sequence[str] | CompiledLabels,
    templates: str | Sequence[str] | None = None,
    *,
    resume: bool = False,
    input_filesystem: Any = None,
    output_filesystem: Any = None,
    key_column: str = "key",
    image_column: str = "image",
    concurrency: int = 1,
    num_gpus: float = 0.0,
    num_cpus: float | None = None,
    prior: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    on_progress: Callable[[Summary], None] = lambda summary: None,
    **options: Any,
) -> Summary:
    """Ranks labels for all photos at a place, and writes the results as Parquet files with a batch each.

    Args:
        location, input_filesystem, key_column, image_column: see `read_photos`.
        output, output_filesystem: a folder on any file system, which all nodes reach.
        resume: goes on where an earlier run into `output` was stopped: photos whose keys are there are left out.
        on_progress: is told whenever results have been written.
        options: see `classify_dataset`.

    Raises:
        FileExistsError: there are results in `output`, and this is no `resume`.
        ValueError: as `classify_dataset`, and where results in `output` were made with other settings.
        OSError: files that workers have written are not in `output` as the driver sees it.
    """
    shares = shares_of_cluster(concurrency, num_cpus, num_gpus)
    captioner = Captioner.named(model, model_options, num_gpus)
    prepared = prepare(captioner, labels, templates, prior or {}, shares, num_gpus)
    folder = ParquetFolder.find(output, output_filesystem)
    number = len(labels.labels if is_compiled(labels) else labels)
    finished = folder.begin(_settings(prepared, number, prior or {}, options), resume)
    columns = {"key_column": key_column, "image_column": image_column}
    done = ray.put(finished.keys) if finished.photos else None
    photos = read_photos(location, filesystem=input_filesystem, **columns, num_cpus=shares.reader, done=done)
    resources: dict[str, Any] = {"concurrency": concurrency, "num_gpus": num_gpus, "num_cpus": num_cpus}
    written = classify_dataset(
        photos,
        model,
        labels,
        templates,
        **options,
        **resources,
        model_options=model_options,
        output=folder,
        prepared=prepared,
    )
    summary = Summary(before=finished.photos, reasons=Counter(finished.reasons))
    folder.end(set(_follow(written, summary, on_progress)))
    return summary


def _settings(prepared: Prepared, number: int, prior: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What the results depend on: the model, labels and their prior, and what becomes of scores.

    Args:
        number: of labels.
    """
    without_effect = ("batch_size",)
    given = {name: value for name, value in options.items() if name not in without_effect}
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    return {
        "labels": number,
        "fingerprint": prepared.fingerprint,
        "tokens_sha256": prepared.tokens_sha256,
        "prior": {name: str(value) for name, value in prior.items()},
        **{name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()},
    }


def _follow(written: ray.data.Dataset, summary: Summary, on_progress: Callable[[Summary], None]) -> Iterator[str]:
    """Names of files as they are written, which the summary counts."""
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            summary.photos += row["photos"]
            summary.files += 1
            summary.reasons.update(row["reasons"])
            yield row["file"]
        on_progress(summary)
