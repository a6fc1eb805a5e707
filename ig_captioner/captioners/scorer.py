"""Any captioner of the Hub as a scorer of texts: log P(T|I), log P(T) and information gain, exactly and cheaply.

    scorer = CaptionScorer.from_pretrained("llava-hf/llava-1.5-7b-hf")
    labels = scorer.compile_labels(["cat", "dog", "horse"], ["a photo of a {}."])
    print(scorer.score(["photo.jpg"], labels).information_gain, scorer.verification)

What happens, file by file: `loading` finds the model's class, or says why it cannot be scored with; `prompts` makes
the tensors of image and instruction, and the tokens of texts after them; `families` reads those into a cache (the
`prefix`), from which `readers` read all texts at once; `verification` chooses how, and measures that it is right.

Legend: B images, C labels, N texts (labels in templates), E edges of the trie of texts, R reference images.
Log-likelihoods are in nats.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import MAX_CAPTION_TOKENS, folder_or_repository, is_own
from ..compiled_labels import CompiledLabels, CompiledTexts, checksum, is_compiled, refuse_prior
from ..information_gain import (
    information_gain,
    label_log_prior,
    mean_over_references,
    mean_over_templates,
    token_means_over_references,
)
from ..input_rules import default_templates, format_labels
from ..label_trie import TextTrie, build_trie
from ..processing_ig_captioner import load_rgb_image
from ..scoring_ig_captioner import IGCaptionerScoreOutput
from .families import family_of
from .loading import hub_options, load_captioner
from .prompts import EncodedTexts, PreparedImage, Processors
from .readers import read_generated
from .verification import READING_MODES, Verification, check_length, reader_for, texts_to_compare, verify


PLAIN_LEVELS = (0, 128, 255)
TEST_IMAGE_SIZE = (64, 48)
BRANCHING_TEXTS = ("a dog in the grass", "a dog on the sofa")


@dataclass(frozen=True)
class TokenGain:
    """A token of a text, and what it adds to the text's scores, in nats."""

    token: str
    caption_log_likelihood: float
    prior_log_likelihood: float
    information_gain: float


class TextTokens(NamedTuple):
    """Tokens of a text, [L]: ids, log P(token | image, before), log P(token | before)."""

    ids: list[int]
    conditional: list[float]
    unconditional: list[float]


class CaptionScorer:
    """Scores texts under images with a captioner that transformers loads, whatever its family.

    Args:
        model: a captioner, in evaluation mode.
        processors: its tokenizer, image processor and processor.
        prompt: the instruction; the family's own if not given.
        reading_mode: "tree", "rows" or "generate" instead of the one that `verification` chooses.
        batch_size: how many images are read at once, if their prompts have the same length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processors: Processors,
        *,
        prompt: str | None = None,
        reading_mode: str | None = None,
        batch_size: int = 8,
    ):
        if reading_mode is not None and reading_mode not in READING_MODES:
            raise ValueError(f"reading_mode must be one of {READING_MODES}, got {reading_mode!r}")
        if model.training:
            raise ValueError(f"{type(model).__name__} is in training mode, where dropout changes scores: call eval()")
        self.model = model
        self.processors = processors
        self.batch_size = batch_size
        self.family = family_of(model)
        instruction = self.family.prompt if prompt is None else prompt
        self.prompt = self.family.prompt_class(model, processors, instruction)
        self.default_prior_source = self.family.prior_source
        self.default_prior_weight = 1.0
        self.default_templates = default_templates(model.config)
        self.verification = None if reading_mode is None else Verification(reading_mode)
        self._last_checked: tuple[CompiledLabels, TextTrie, int] | None = None

    own_class: Any = None
    """The class for captioners of this package; `own`, which builds on this file, sets it."""
    verification: Verification | None
    """The way texts are read, and how exact that was found to be; None until texts are first scored or compiled."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        prompt: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        reading_mode: str | None = None,
        batch_size: int = 8,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "CaptionScorer":
        """Loads a captioner from a folder or the Hub, one of this package's own included.

        Args:
            name: a folder, or the name of a repository on the Hub.
            prompt: the instruction after which texts are scored; the family's own if not given.
            device: where the model goes.
            dtype: of the weights; the stored one if not given.
            reading_mode, batch_size: see the class.
            trust_remote_code: lets code from the repository run, for models that transformers does not know.
            kwargs: for the model's `from_pretrained`, such as `device_map`, `quantization_config` or `revision`.

        Raises:
            ValueError: saying why this model cannot be scored with.
            OSError: no such folder or repository.
        """
        if dtype is not None:
            kwargs["dtype"] = dtype
        name = folder_or_repository(name)
        if is_own(name, **hub_options(kwargs)):
            if prompt is not None:
                raise ValueError(f"the captioners of this package have no prompt, got {prompt!r}")
            return cls.own_class.load(name, device=device, **kwargs)
        model, processors = load_captioner(name, device=device, trust_remote_code=trust_remote_code, **kwargs)
        return cls(model, processors, prompt=prompt, reading_mode=reading_mode, batch_size=batch_size)

    # Scores

    @torch.no_grad()
    def score(
        self,
        images: Any,
        texts: Sequence[str] | CompiledLabels,
        *,
        prior_weight: float | None = None,
        prior_source: str | None = None,
        reference_images: Sequence[Any] | None = None,
        reference_mean: str = "arithmetic",
        label_prior: Sequence[float] | Tensor | None = None,
        reduction: str = "sum",
    ) -> IGCaptionerScoreOutput:
        """Scores every text under every image.

        Args:
            images: one or a list of PIL images, paths, URLs, arrays, or uint8 or [0, 1] tensors.
            texts: N strings, or what `compile_labels` returned.
            prior_weight: weight of log P(T); 0 ranks by likelihood.
            prior_source: "unconditional", log P(T) after the same prompt without the image, or "reference_images",
                the mean of P(T|I) over some images; by default the one that is honest for the family.
            reference_images: those images; plain ones, black, grey and white, if not given.
            reference_mean: "arithmetic", the mean of P(T|I), or "geometric", the mean of log P(T|I).
            label_prior: a weight or a log-probability of each label, see `label_log_prior`.
            reduction: "sum" for nats per text, "mean" for nats per token.

        Returns:
            [`IGCaptionerScoreOutput`], float32, on the CPU. Of labels in several templates it has means over templates.

        Raises:
            ValueError: naming the value, for wrong arguments and images, and for labels compiled for something else.
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        num_templates = 1
        labels = as_compiled(texts)
        if labels is not None:
            refuse_prior(prior_source=prior_source, reference_images=reference_images)
            trie, dropped = self._checked(labels)
            prior_log_likelihood = labels.texts.prior_log_likelihood.cpu()
            num_templates = len(labels.templates)
        else:
            trie, dropped = self._trie_of(list(texts))  # type: ignore[arg-type]
            prior_log_likelihood = self._prior(trie, dropped, prior_source, reference_images, reference_mean)
        caption = trie.to("cpu").sum_over_texts(self._edges(trie, as_images(images), dropped))
        if reduction == "mean":
            lengths = trie.lengths.cpu()
            caption = caption / lengths
            prior_log_likelihood = prior_log_likelihood / lengths
        caption, prior_log_likelihood = (
            mean_over_templates(values, num_templates) for values in (caption, prior_log_likelihood)
        )
        weight = self.default_prior_weight if prior_weight is None else prior_weight
        gain = information_gain(caption, prior_log_likelihood, weight)
        if label_prior is not None:
            gain = gain + label_log_prior(label_prior, len(prior_log_likelihood))
        return IGCaptionerScoreOutput(caption, prior_log_likelihood, gain)

    @torch.no_grad()
    def log_likelihoods(self, images: Any, texts: Sequence[str]) -> Tensor:
        """log P(T|I) alone, [B, N], float32, on the CPU."""
        trie, dropped = self._trie_of(list(texts))
        return trie.to("cpu").sum_over_texts(self._edges(trie, as_images(images), dropped))

    @torch.no_grad()
    def compile_labels(
        self,
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        prior_source: str | None = None,
        reference_images: Sequence[Any] | None = None,
        reference_mean: str = "arithmetic",
    ) -> CompiledLabels:
        """Does all of the scoring of labels that needs no image: their trie, and log P(T).

        The result is bound to this model, prompt and reading mode. Arguments are as for `score`.

        Raises:
            ValueError: naming the value, for labels, templates or a prior that are none.
        """
        templates = self.default_templates if templates is None else templates
        listed = (templates,) if isinstance(templates, str) else tuple(templates)
        texts = format_labels(list(labels), listed)
        trie, dropped = self._trie_of(texts)
        prior = self._prior(trie, dropped, prior_source, reference_images, reference_mean)
        compiled = CompiledTexts(trie, prior, fingerprint=self.fingerprint())
        return CompiledLabels(tuple(labels), listed, compiled, self.prompt.encode(texts).digest())

    def _checked(self, labels: CompiledLabels) -> tuple[TextTrie, int]:
        """The trie of labels on the model's device, and how many tokens of the prompt are part of the texts.

        Labels that are scored again, for the next images, are not tokenised again.

        Raises:
            ValueError: if they were compiled with another model, prompt, reading mode or tokenizer.
        """
        if self._last_checked is not None and self._last_checked[0] is labels:
            return self._last_checked[1:]
        texts = format_labels(labels.labels, labels.templates)
        self._verify(texts)
        encoded = self.prompt.encode(texts)
        own = json.loads(self.fingerprint())
        theirs = _fingerprint_of(labels)
        different = [f"{name} {theirs.get(name)!r}, not {own[name]!r}" for name in own if own[name] != theirs.get(name)]
        if different:
            raise ValueError(f"these labels were compiled for {'; '.join(different)}: compile them again")
        if encoded.digest() != labels.tokens_sha256:
            raise ValueError(f"these labels ({labels.labels[0]!r}, ...) were compiled with another tokenizer")
        self._last_checked = labels, labels.texts.to(self.device).trie, encoded.dropped
        return self._last_checked[1:]

    def _verify(self, texts: list[str]) -> None:
        """Chooses the reading mode at first use, on some of the user's texts and two that branch."""
        if self.verification is not None:
            return
        encoded = self.prompt.encode([*texts, *BRANCHING_TEXTS])
        tokens = [
            ids[mask.bool()].tolist() for ids, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True)
        ]
        own = tokens[: len(texts)]
        branching = tokens[len(texts) :]
        chosen = EncodedTexts.padded([*texts_to_compare(own), *branching], encoded.dropped)
        self.verification = verify(self.family, self._test_prompts(encoded.dropped), self._trie(chosen))

    def _trie_of(self, texts: list[str]) -> tuple[TextTrie, int]:
        """The trie of texts, and how many tokens of the prompt are part of them."""
        if not texts:
            raise ValueError("there must be at least one text, got an empty list")
        self._verify(texts)
        encoded = self.prompt.encode(texts)
        return self._trie(encoded), encoded.dropped

    def _trie(self, encoded: EncodedTexts) -> TextTrie:
        return build_trie(encoded.input_ids, encoded.attention_mask, start_token_id=0).to(self.device)

    @torch.no_grad()
    def tokens_of_texts(self, image: Any, texts: Sequence[str]) -> list[TextTokens]:
        """Both log-probabilities of every token of texts under one image, read together; see `TextTokens`."""
        trie, dropped = self._trie_of(list(texts))
        caption = self._edges(trie, as_images(image), dropped)[0]
        without = self._prior_edges(trie, dropped, None, None)
        return text_tokens(trie, caption, without)

    @torch.no_grad()
    def token_gains(self, image: Any, text: str, **prior: Any) -> list[TokenGain]:
        """Splits the scores of a text under an image into what each token adds, the end of the text last.

        Args:
            prior: `prior_weight`, `prior_source`, `reference_images` and `reference_mean`, as for `score`.
        """
        weight = prior.pop("prior_weight", None)
        weight = self.default_prior_weight if weight is None else weight
        trie, dropped = self._trie_of([text])
        path = trie.text_edges[0].cpu()
        caption = self._edges(trie, as_images(image), dropped)[0, path]
        without = self._prior_edges(trie, dropped, prior.pop("prior_source", None), prior.pop("reference_images", None))
        of_tokens = token_means_over_references(without[:, path], prior.pop("reference_mean", "arithmetic"))
        if prior:
            raise ValueError(f"unknown arguments {sorted(prior)} with values {list(prior.values())}")
        gains = information_gain(caption, of_tokens, weight)
        words = [self.processors.tokenizer.decode([token]) for token in trie.edge_tokens.cpu()[path].tolist()]
        columns = (caption.tolist(), of_tokens.tolist(), gains.tolist())
        return [TokenGain(*row) for row in zip(words, *columns, strict=True)]

    @torch.no_grad()
    def caption(self, images: Any, max_new_tokens: int | None = None, **options: Any) -> list[str]:
        """Writes a caption for each image with the model's own `generate()`; `options` are its settings."""
        captions = []
        max_new_tokens = max_new_tokens or MAX_CAPTION_TOKENS
        for image in as_images(images):
            inputs = self._to_device(self.prompt.inputs(image))
            written = self.family.generate(inputs, max_new_tokens=max_new_tokens, **options)[0].tolist()
            start = inputs.get("decoder_input_ids", inputs.get("input_ids"))[0].tolist()
            written = written[len(start) :] if written[: len(start)] == start else written
            captions.append(self.processors.tokenizer.decode(written, skip_special_tokens=True).strip())
        return captions

    def prepare(self, image: Image.Image) -> Any:
        """Turns an RGB image into what is kept of it until it is scored."""
        return image

    def preparer(self) -> Callable[[Image.Image], PreparedImage]:
        """What decodes no files and needs no weights, but does all else to an RGB image: to be sent to other processes.

        `score` takes its results in place of images.
        """
        return self.prompt.without_weights().prepare

    # From images to edges

    def _edges(self, trie: TextTrie, images: Iterable[Any], dropped: int) -> Tensor:
        """log P of every edge of a trie, [B, E], on the CPU."""
        singles = (self._to_device(self.prompt.inputs(image, dropped)) for image in images)
        parts = [self._read(inputs, trie) for inputs in _batches(singles, self.batch_size)]
        if not parts:
            raise ValueError("no image was given, got an empty list")
        return torch.cat(parts).cpu()

    def _read(self, inputs: list[dict[str, Tensor]], trie: TextTrie) -> Tensor:
        """log P of every edge, [b, E], after prompts of equal length."""
        assert self.verification is not None
        if self.verification.mode == "generate":
            return torch.cat([read_generated(self.family, single, trie) for single in inputs])
        prefix = self.family.prefill({name: torch.cat([each[name] for each in inputs]) for name in inputs[0]})
        longest = int(trie.lengths.max())
        check_length(self.family, prefix, longest)
        return reader_for(self.verification.mode, self.family, prefix, longest)(self.family, prefix, trie)

    def _prior(
        self,
        trie: TextTrie,
        dropped: int,
        source: str | None,
        references: Sequence[Any] | None,
        mean: str,
    ) -> Tensor:
        """log P(T), [N]."""
        edges = self._prior_edges(trie, dropped, source, references)
        return mean_over_references(trie.to("cpu").sum_over_texts(edges), mean)

    def _prior_edges(
        self, trie: TextTrie, dropped: int, source: str | None, references: Sequence[Any] | None
    ) -> Tensor:
        """log P of every edge without the image, [1, E], or under each of R reference images, [R, E]."""
        if source is None:
            source = self.default_prior_source if references is None else "reference_images"
        if source == "reference_images":
            return self._edges(trie, plain_images() if references is None else as_images(references), dropped)
        if source != "unconditional":
            raise ValueError(f"prior_source must be 'unconditional' or 'reference_images', got {source!r}")
        if references is not None:
            raise ValueError("prior_source 'unconditional' uses no reference_images, but they were given")
        if not self.family.without_image:
            raise ValueError(
                f"prior_source 'unconditional': {self.model.config.model_type} models read no text without an image; "
                "use 'reference_images'"
            )
        return self._read([self._to_device(self.prompt.inputs(None, dropped))], trie).cpu()

    def _test_prompts(self, dropped: int) -> list[dict[str, Tensor]]:
        """Prompts for verification: with an image of noise, and without one where that is an honest prior."""
        noise = torch.randint(256, (3, *TEST_IMAGE_SIZE), generator=torch.Generator().manual_seed(0))
        images = [load_rgb_image(noise.to(torch.uint8))]
        if self.default_prior_source == "unconditional":
            images.append(None)
        return [self._to_device(self.prompt.inputs(image, dropped)) for image in images]

    def _to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.model.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }

    # What it is

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Device on which the model takes its inputs."""
        return self.model.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Makes tokens of texts, and texts of tokens."""
        return self.processors.tokenizer

    @cached_property
    def name(self) -> str:
        """The name of the repository; of a folder, which may be moved, its model type."""
        name = self.model.name_or_path
        return self.model.config.model_type if not name or os.path.isdir(name) else name

    def fingerprint(self) -> str:
        """All that scores depend on, as JSON: model, weights, prompt and reading mode."""
        mode = None if self.verification is None else self.verification.mode
        described = {"model": self.name, "prompt": self.prompt.context, "reading_mode": mode}
        return json.dumps({**described, "weights": self._weights})

    @cached_property
    def _weights(self) -> str:
        """SHA-256 of checksums of all weights that are in memory; of weights offloaded to disk their shapes count."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            for part in () if weight.is_meta else checksum(weight.detach()):
                digest.update(part)
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        """Family, prompt, reading mode and prior, in words."""
        names = type(self.model).__name__, type(self.family).__name__
        return {
            "family": f"{self.model.config.model_type} ({names[0]}), read as {names[1]}",
            "prompt": repr(self.prompt.context),
            "reading mode": "chosen at first use" if self.verification is None else str(self.verification),
            "prior": self.default_prior_source,
        }


def text_tokens(trie: TextTrie, caption: Tensor, without: Tensor) -> list[TextTokens]:
    """The tokens of each text of a trie, from log P of its edges [E], and under R references [R, E]."""
    tokens = trie.edge_tokens.cpu()
    found = []
    for edges, length in zip(trie.text_edges.cpu(), trie.lengths.tolist(), strict=True):
        own = edges[:length]
        prior = token_means_over_references(without[:, own])
        found.append(TextTokens(tokens[own].tolist(), caption[own].tolist(), prior.tolist()))
    return found


def as_compiled(texts: Any) -> CompiledLabels | None:
    """Compiled labels as they are; None for anything else."""
    return texts if is_compiled(texts) else None


def as_images(images: Any) -> Iterator[Any]:
    """RGB images, one after the other, from one or many; a tensor or array of four dimensions holds many.

    Prepared images stay as they are.
    """
    is_many = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4 or isinstance(images, Iterator)
    given = images if is_many else [images]
    return (image if isinstance(image, PreparedImage) else load_rgb_image(image) for image in given)


def plain_images() -> list[Image.Image]:
    """Images that show nothing, black, grey and white: docs/prior_weight.md says how they compare with others."""
    return [Image.new("RGB", TEST_IMAGE_SIZE[::-1], (level,) * 3) for level in PLAIN_LEVELS]


def _batches(singles: Iterable[dict[str, Tensor]], batch_size: int) -> Iterator[list[dict[str, Tensor]]]:
    """Neighbours whose tensors have the same shapes, up to `batch_size` together."""

    def shapes(inputs: dict[str, Tensor]) -> list:
        return [(name, value.shape) for name, value in inputs.items()]

    for _, group in groupby(singles, key=shapes):
        while batch := list(islice(group, batch_size)):
            yield batch


def _fingerprint_of(labels: CompiledLabels) -> dict[str, Any]:
    try:
        return json.loads(labels.texts.fingerprint)
    except ValueError:  # a digest, as this package's own models have
        return {}
