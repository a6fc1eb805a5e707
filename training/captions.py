"""Texts that a sample may be trained with: its own captions, and its class names in templates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ig_captioner.data.prompts import read_templates
from ig_captioner.data.shards import Encode, read_captions, read_metadata
from ig_captioner.input_rules import clean_text, format_labels

from .config import SourceConfig


class TemplatedCaptions(Sequence[list[int]]):
    """A sample's own captions as token ids, and beside them texts of its class names.

    As a sequence these are its own captions; `draw_caption` draws from all.
    """

    def __init__(self, own: Sequence[list[int]], of_names: list[list[list[int]]], share: float) -> None:
        self.own = own
        self.of_names = of_names
        self.share = share

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: Any) -> Any:
        return self.own[index]

    def draw(self, rng: np.random.Generator) -> list[int]:
        """One of its names, then one of the templates, with probability `share`; else one of its own captions."""
        if rng.random() >= self.share:
            return self.own[int(rng.integers(len(self.own)))]
        texts = self.of_names[int(rng.integers(len(self.of_names)))]
        return texts[int(rng.integers(len(texts)))]


def draw_caption(captions: Sequence[list[int]], rng: np.random.Generator) -> list[int]:
    """One text of a sample, as token ids."""
    if isinstance(captions, TemplatedCaptions):
        return captions.draw(rng)
    return captions[int(rng.integers(len(captions)))]


class CaptionReader:
    """The captions of a source's samples. Texts of a name are encoded once and shared by all samples that have it."""

    def __init__(self, source: SourceConfig, encode: Encode) -> None:
        self.encode = encode
        self.fields = source.template_fields
        self.share = source.template_share
        self.templates = [text for entry in source.templates for text in read_template_entry(entry)]
        self.encoded: dict[str, list[int]] = {}
        self.of_names: dict[str, list[list[int]]] = {}

    def __call__(self, captions: list[str], metadata: dict[str, Any]) -> Sequence[list[int]]:
        """Token ids of a sample's own captions, with those of its names in the templates where it has any."""
        own = self.encode_once(captions)
        names = names_in(metadata, self.fields) if self.templates else []
        return TemplatedCaptions(own, [self.texts_of(name) for name in names], self.share) if names else own

    def encode_once(self, texts: list[str]) -> list[list[int]]:
        new = [text for text in dict.fromkeys(texts) if text not in self.encoded]
        if new:
            self.encoded.update(zip(new, self.encode(new), strict=True))
        return [self.encoded[text] for text in texts]

    def texts_of(self, name: str) -> list[list[int]]:
        if name not in self.of_names:
            self.of_names[name] = self.encode(format_labels([name], self.templates))
        return self.of_names[name]


def read_template_entry(entry: str) -> list[str]:
    """A template as it stands, or all templates of the prompts that an entry names."""
    return [entry] if "{}" in entry else read_templates(entry)


def names_in(metadata: dict[str, Any], fields: Sequence[str]) -> list[str]:
    """The names that fields of a sample's JSON hold, each a text or a list of texts."""
    names: list[str] = []
    for field in fields:
        value = metadata.get(field, [])
        texts = [value] if isinstance(value, str) else value
        names += [name for name in (clean_text(text) for text in texts if isinstance(text, str)) if name]
    return names


def read_texts(files: dict[str, bytes]) -> tuple[list[str], dict[str, Any]]:
    """Captions and JSON of a sample. Raises BrokenSampleError as `read_captions`."""
    return read_captions(files), read_metadata(files)
