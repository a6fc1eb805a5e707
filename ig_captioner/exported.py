"""What `export.py` wrote, run by onnxruntime: a zero-shot classifier that needs neither torch nor transformers.

`ig-captioner classify` uses it where `--model` is such a folder, and then starts in half a second. Every text is read
by itself, so that for hundreds of labels a checkpoint, which reads them as a trie, is faster. Scores are those of the
model to 1e-3 nats.

Legend: C labels, T templates, L text tokens. Log-likelihoods are in nats.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image

from .input_rules import centre_box, default_templates, format_labels, tell, to_rgb


SETTINGS_FILE, TOKENIZER_FILE = "settings.json", "tokenizer.json"
TEXTS_PER_RUN = 64  # a run holds the logits of all tokens of its texts
GRAPHS = ("image_encoder", "text_scorer", "text_prior")
SETTINGS = ("prior_weight", "score_temperature", "abstain_threshold", "image_processor")


def is_exported(model: str | Path | None) -> bool:
    """Tells whether this is a folder of exported graphs, and not a checkpoint that they were written into."""
    if model is None or Path(model, "config.json").exists():
        return False
    return Path(model, SETTINGS_FILE).is_file() and any(Path(model, f"{name}.onnx").is_file() for name in GRAPHS)


class ExportedClassifier:
    """The graphs of a folder, and labels to choose among.

    Args:
        folder: what `python -m ig_captioner.export` wrote.
        labels: C labels, which may repeat.
        templates: one or more with `{}` where the label goes; by default those of the folder.

    Attributes:
        settings: of the folder: `prior_weight`, `score_temperature`, `abstain_threshold`, `image_processor` and
            `prompt_templates`.
        prior_log_likelihood: log P(T), means over templates, float32 [C].

    Raises:
        ImportError: without onnxruntime.
        ValueError: naming the value, for labels or templates that are none; naming the file, for one that is missing or
            damaged.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str], templates: str | Sequence[str] | None = None):
        folder = Path(folder)
        self.settings = _read(folder / SETTINGS_FILE, _settings)
        templates = default_templates(self.settings) if templates is None else templates
        texts = format_labels(labels, templates)
        self.labels = list(labels)
        self.templates = [templates] if isinstance(templates, str) else list(templates)
        self._encoder, self._scorer, prior = (_read(folder / f"{name}.onnx", _session) for name in GRAPHS)
        tokenizer = _read(folder / TOKENIZER_FILE, _tokenizer)
        self._texts = list(_encode(tokenizer, texts))
        self.prior_log_likelihood = self._mean_over_templates([prior.run(None, texts)[0] for texts in self._texts])

    def __call__(
        self,
        photo: PIL.Image.Image,
        *,
        prior_weight: float | None = None,
        abstain_threshold: float | None = None,
        multi_label: bool = False,
        top_k: int | None = None,
    ) -> list[dict[str, Any]]:
        """Ranks the labels for one photo, as the pipeline of the model does, with log-likelihoods.

        Args: as for [`IGZeroShotImageClassificationPipeline`]; what is None is in `settings`.

        Returns:
            `label`, `score`, `caption_log_likelihood`, `prior_log_likelihood` and `information_gain` of each label, the
            best first; "none of these", label None, has no log-likelihoods.
        """
        (image_key_values,) = self._encoder.run(None, {"pixel_values": self._pixels(to_rgb(photo))[None]})
        runs = [self._scorer.run(None, {"image_key_values": image_key_values, **texts})[0][0] for texts in self._texts]
        caption = self._mean_over_templates(runs)
        weight = self.settings.prior_weight if prior_weight is None else prior_weight
        gains = caption - np.float32(weight) * self.prior_log_likelihood
        fields = zip(self.labels, caption.tolist(), self.prior_log_likelihood.tolist(), gains.tolist(), strict=True)
        candidates: list[tuple] = list(fields)
        threshold = self.settings.abstain_threshold if abstain_threshold is None else abstain_threshold
        if threshold is not None and threshold > -math.inf:
            candidates.append((None, None, None, float(threshold)))
        scores = _scores([gain for *_, gain in candidates], self.settings.score_temperature, multi_label)
        names = ("label", "caption_log_likelihood", "prior_log_likelihood", "information_gain")
        entries = [
            {**dict(zip(names, candidate, strict=True)), "score": score}
            for candidate, score in zip(candidates, scores, strict=True)
        ]
        return sorted(entries, key=lambda entry: -entry["information_gain"])[:top_k]

    def _pixels(self, photo: PIL.Image.Image) -> np.ndarray:
        """`pixel_values` [channels, height, width] of an RGB photo."""
        rules = self.settings.image_processor
        height, width = rules["size"]["height"], rules["size"]["width"]
        box = centre_box(photo.height, photo.width, (height, width), rules.get("crop_pct"))
        resized = photo.crop(box).resize((width, height), rules["resample"])  # box= would let in what is around it
        pixels = np.asarray(resized, dtype=np.float32)
        mean, std = (np.array(rules[name], dtype=np.float32) for name in ("image_mean", "image_std"))
        return ((pixels * np.float32(rules["rescale_factor"]) - mean) / std).transpose(2, 0, 1)

    def _mean_over_templates(self, runs: list[np.ndarray]) -> np.ndarray:
        """Scores of T * C texts, run by run, to [C]."""
        return np.concatenate(runs).reshape(len(self.templates), -1).mean(axis=0)


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file of the folder. Raises ValueError naming the file if it is missing or damaged."""
    try:
        return read(file)
    except ImportError:
        raise
    except Exception as error:  # onnxruntime and tokenizers raise kinds of their own
        raise ValueError(f"cannot read the exported graphs: {str(file)!r}: {error}") from error


def _settings(file: Path) -> SimpleNamespace:
    settings = json.loads(file.read_text(encoding="utf-8"))
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    return SimpleNamespace(**settings)


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is fatal; of errors it raises exceptions, too
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True  # words like "[PAD]" in a label are words
    return tokenizer


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields `input_ids` and `attention_mask` [N, L] of N texts at a time; says which texts were cut."""
    cut = []
    for start in range(0, len(texts), TEXTS_PER_RUN):
        some = texts[start : start + TEXTS_PER_RUN]
        encoded = tokenizer.encode_batch(some)
        cut += [text for text, encoding in zip(some, encoded, strict=True) if encoding.overflowing]
        yield {
            "input_ids": np.array([encoding.ids for encoding in encoded]),
            "attention_mask": np.array([encoding.attention_mask for encoding in encoded]),
        }
    if cut:
        limit = tokenizer.truncation["max_length"]
        tell(f"texts are longer than the {limit} tokens that the model reads, and were cut", cut)


def _scores(gains: list[float], temperature: float, multi_label: bool) -> list[float]:
    """The softmax of information gain over all candidates, or the sigmoid of each, in float64."""
    values = np.array(gains, dtype=np.float64)
    if multi_label:
        return np.exp(-np.logaddexp(0, -values / temperature)).tolist()
    weights = np.exp((values - values.max()) / temperature)
    return (weights / weights.sum()).tolist()
