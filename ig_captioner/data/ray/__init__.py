"""Photos by the million on Ray Data: a cluster reads and decodes them in tasks and scores them in actors.

    from ig_captioner.data.ray import classify_dataset, read_photos

    photos = read_photos("s3://bucket/shards")
    predictions = classify_dataset(photos, "me/my-captioner", ["cat", "dog"], concurrency=8, num_gpus=1)
    predictions.write_parquet("s3://bucket/labels")

`classify_dataset` and `score_dataset` are for programs; `classify_photos` is what `ig-captioner batch` does, whose
output can be resumed. Reading order: `places` (file systems), `photos` (inputs to rows), `resources` (who gets which
CPUs), `scoring` (rows to scores), `output` (files that appear whole), `batch`.
"""

try:
    import ray.data  # noqa: F401
except ImportError as error:
    raise ImportError("scoring on a cluster needs Ray: pip install 'ig_captioner[cluster]'", name="ray") from error

from .batch import Summary, classify_photos
from .photos import read_photos
from .scoring import classify_dataset, score_dataset


__all__ = ["Summary", "classify_dataset", "classify_photos", "read_photos", "score_dataset"]
