"""Scores: log P(T|I), log P(T) and information gain of many texts under many images.

Three things make a thousand texts cheap: images are
encoded once; texts are a trie (`label_trie.py`), whose shared beginnings the decoder reads once; and all that does not
depend on the image (log P(T), the states of the text-only layers) is computed once per set of texts and kept.

Legend: B images, C candidate texts, E edges of a trie, L text tokens, D decoder width. Log-likelihoods are in nats.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .compat_ig_captioner import attention_implementation
from .compiled_labels import CompiledLabels, CompiledTexts, contents, is_compiled, is_intercepted
from .configuration_ig_captioner import (
    PRIOR_SOURCES,
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
    as_height_width,
)
from .decoder_ig_captioner import TextStates
from .encoder_ig_captioner import IGCaptionerPreTrainedModel, KeyValues
from .information_gain import information_gain
from .label_trie import TextTrie, build_trie
from .text_rules import scored_form


# How many numbers are held at once of what grows with texts and images: logits, and the inner states of an MLP.
# 2**28 is 1 GiB in float32; on a CPU less, so that it stays in the caches.
MAX_NUMBERS_PER_CHUNK = {"cpu": 2**23, "other": 2**28}
MAX_KEPT_TEXTS = 4


@dataclass
class IGCaptionerScoreOutput(ModelOutput):
    """caption_log_likelihood log P(T|I) [B, C], prior_log_likelihood log P(T) [C], information_gain [B, C]; in nats."""

    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None
    information_gain: Tensor | None = None


class IGCaptionerScorer(IGCaptionerPreTrainedModel):
    """A model that scores texts; a subclass has a `model` (image encoder and text decoder) and an `lm_head`."""

    config: IGCaptionerConfig
    model: Any
    lm_head: Any

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        self.forget_texts()

    def forget_texts(self) -> None:
        """Drops what `score` keeps of texts.

        Needed only after writes to `parameter.data`, which it cannot see; PEFT merges adapters that way.
        """
        self._kept_texts: dict[tuple, CompiledTexts] = {}  # of the sets of texts scored last
        self._kept_digest: tuple[tuple | None, str] = (None, "")  # of the weights, and which versions of them

    def train(self, mode: bool = True):
        """As in torch; weights may change between calls, so what `score` has kept is dropped."""
        self.forget_texts()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        """As in torch (`to`, `half`, ...); what `score` has kept does not stay behind on another device."""
        self.forget_texts()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept_texts": {}}

    def score(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | CompiledTexts | CompiledLabels,
        attention_mask: Tensor | None = None,
        *,
        prior_weight: float | None = None,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        reduction: str = "sum",
        chunk_size: int | None = None,
    ) -> IGCaptionerScoreOutput:
        """Scores every candidate text under every image.

        Images are encoded once. Texts are compiled to a trie, which reads what they have in common once; all that does
        not depend on the image (the trie, log P(T), the states of the text-only layers) is kept for later calls with
        the same texts and weights, see `forget_texts`. It is not kept where gradients are asked for, or where hooks or
        adapters stand between the weights and the result.

        Args:
            pixel_values: [B, channels, height, width].
            input_ids: [C, L], exactly the tokens that are scored: end-of-sequence included, start token excluded; or
                what `compile_texts` or `compile_labels` returned.
            attention_mask: [C, L] of 0 and 1, padding on either side; found from the padding id if not given, on the
                right where that is an end-of-sequence id, too.
            prior_weight: weight of log P(T); `config.prior_weight` if not given. 0 ranks by likelihood.
            prior_source: "unconditional" or "reference_images"; `config.prior_source` if not given.
            reference_pixel_values: [R, channels, height, width], the images over which P(T|I) is averaged to P(T);
                implies "reference_images". Noise if not given.
            reduction: "sum" for nats per text, "mean" for nats per token.
            chunk_size: how many nodes of the trie, times images, the decoder reads at once, but at least one block of
                about `label_trie.BLOCK_SIZE`; by default what `MAX_NUMBERS_PER_CHUNK` allows. It changes memory and
                speed, not scores. Where gradients are asked for, autograd keeps every pass.

        Returns:
            [`IGCaptionerScoreOutput`], float32.

        Raises:
            ValueError: for an empty text, a token outside the vocabulary, a shape or a chunk size that does not fit, an
                unknown reduction or prior, or texts that were compiled with other weights.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        if not len(pixel_values):
            raise ValueError(f"pixel_values holds no image, got shape {tuple(pixel_values.shape)}")
        if isinstance(input_ids, Tensor):
            references = self._references(prior_source, reference_pixel_values, input_ids.device)
            texts = self._compile_or_recall(input_ids, attention_mask, references, chunk_size)
        else:
            if prior_source is not None or reference_pixel_values is not None:
                given = "reference_pixel_values" if prior_source is None else f"prior_source {prior_source!r}"
                raise ValueError(f"compiled texts have their prior already, but {given} came with them")
            compiled: Any = input_ids
            texts = self._check_compiled(compiled.texts if is_compiled(compiled) else compiled, pixel_values.device)
        caption_log_likelihood = self._log_likelihoods(texts, pixel_values, chunk_size)
        prior_log_likelihood = texts.prior_log_likelihood.clone()
        if reduction == "mean":
            caption_log_likelihood = caption_log_likelihood / texts.trie.lengths
            prior_log_likelihood = prior_log_likelihood / texts.trie.lengths
        prior_weight = self.config.prior_weight if prior_weight is None else prior_weight
        return IGCaptionerScoreOutput(
            caption_log_likelihood=caption_log_likelihood,
            prior_log_likelihood=prior_log_likelihood,
            information_gain=information_gain(caption_log_likelihood, prior_log_likelihood, prior_weight),
        )

    def compile_texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> CompiledTexts:
        """All of `score` that needs no image and no gradient, to be passed to it in place of `input_ids`.

        Args: as for `score`.

        Raises:
            ValueError: as `score`, and in training mode, where dropout would become part of the result.
        """
        if self.training:
            raise ValueError("texts are compiled in evaluation mode, but the model is in training mode: call eval()")
        with torch.inference_mode(False), torch.no_grad():
            references = self._references(prior_source, reference_pixel_values, input_ids.device)
            compiled = self._compile(
                *scored_form(input_ids, attention_mask, self.config.text_config), references, chunk_size
            )
        return dataclasses.replace(compiled, fingerprint=self.fingerprint())

    def edge_log_likelihoods(
        self, texts: CompiledTexts, pixel_values: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """What scores are sums of: log P of the next token on every edge of the trie, [B, E], or [1, E] without images.

        `texts.trie.text_edges` [C, L] says which edges a text consists of.
        """
        device = texts.prior_log_likelihood.device if pixel_values is None else pixel_values.device
        texts = self._check_compiled(texts, device)
        if pixel_values is None:
            return self._edges(texts, None, chunk_size)
        return torch.cat([*self._edges_of(texts, pixel_values, chunk_size)])

    @torch.compiler.disable
    def fingerprint(self) -> str:
        """SHA-256 of all that scores depend on: weights and `_circumstances`.

        Weights are read once, and again when they have changed (each time if they were made in inference mode).
        Offloaded ones cannot be read: then the fingerprint is that of this very object.
        """
        parameters = self.state_dict()
        version = None
        if not any(parameter.is_inference() for parameter in parameters.values()):
            version = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters.values())
        if version is None or self._kept_digest[0] != version:
            digest = hashlib.sha256()
            for name, parameter in parameters.items():
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                if parameter.is_meta:
                    digest.update(str(id(self)).encode())
                else:
                    for part in contents(parameter.detach()):
                        digest.update(part)
            self._kept_digest = version, digest.hexdigest()
        return hashlib.sha256(repr((self._kept_digest[1], self._circumstances())).encode()).hexdigest()

    def _circumstances(self) -> tuple:
        """What scores depend on beside weights: the architecture, autocast, hooks and the state of adapters."""
        sections = (self.config.vision_config, self.config.text_config)
        own = (IGCaptionerVisionConfig, IGCaptionerTextConfig)
        fields = [
            [getattr(section, name) for name in of.__annotations__] for section, of in zip(sections, own, strict=True)
        ]
        states = ("disable_adapters", "active_adapters", "merged")  # of peft's layers
        between = [
            (name, *module._forward_hooks, *module._forward_pre_hooks, *(str(getattr(module, s, None)) for s in states))
            for name, module in self.named_modules()
            if is_intercepted(module)
        ]
        return (
            fields,
            self.config.decoder_start_token_id,
            [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)],
            between,
        )

    def _references(
        self, prior_source: str | None, reference_pixel_values: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """The images over which the prior is averaged, [R, channels, height, width]; None for the unconditional one."""
        if prior_source is None:
            prior_source = self.config.prior_source if reference_pixel_values is None else "reference_images"
        if prior_source not in PRIOR_SOURCES:
            raise ValueError(f"prior_source must be one of {PRIOR_SOURCES}, got {prior_source!r}")
        if prior_source == "unconditional":
            if reference_pixel_values is not None:
                raise ValueError("prior_source 'unconditional' uses no reference_pixel_values, but they were given")
            return None
        if reference_pixel_values is not None:
            if not len(reference_pixel_values):
                shape = tuple(reference_pixel_values.shape)
                raise ValueError(f"reference_pixel_values holds no image, got shape {shape}")
            return reference_pixel_values
        vision, generator = self.config.vision_config, torch.Generator().manual_seed(0)
        shape = (vision.num_channels, *as_height_width(vision.image_size, "image_size"))
        return torch.randn(self.config.num_reference_images, *shape, generator=generator).to(device, self.dtype)

    @torch.compiler.disable
    def _compile_or_recall(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        references: Tensor | None,
        chunk_size: int | None,
    ) -> CompiledTexts:
        input_ids, attention_mask = scored_form(input_ids, attention_mask, self.config.text_config)
        key = self._key_of_texts(input_ids, attention_mask, references)
        texts = self._kept_texts.pop(key, None) or self._compile(input_ids, attention_mask, references, chunk_size)
        if key is not None:
            self._kept_texts[key] = texts
            while len(self._kept_texts) > MAX_KEPT_TEXTS:
                self._kept_texts.pop(next(iter(self._kept_texts)), None)
        return texts

    def _compile(
        self, input_ids: Tensor, attention_mask: Tensor, references: Tensor | None, chunk_size: int | None
    ) -> CompiledTexts:
        self.model.decoder.check_length(input_ids.shape[1])
        trie = build_trie(input_ids, attention_mask, self.config.decoder_start_token_id).to(input_ids.device)
        states = None
        if self.config.text_config.num_text_only_layers:
            passes = self._passes(trie, 1, chunk_size)
            states = torch.cat([self._read_blocks(trie, *blocks).hidden_states for blocks in passes])
        texts = CompiledTexts(trie, torch.zeros(0), states)
        if references is None:
            prior = trie.sum_over_texts(self._edges(texts, None, chunk_size))[0]
        else:
            prior = self._log_likelihoods(texts, references, chunk_size).logsumexp(dim=0) - math.log(len(references))
        return dataclasses.replace(texts, prior_log_likelihood=prior)

    def _log_likelihoods(self, texts: CompiledTexts, pixel_values: Tensor, chunk_size: int | None) -> Tensor:
        """log P(T|I), [B, C]."""
        return torch.cat([*map(texts.trie.sum_over_texts, self._edges_of(texts, pixel_values, chunk_size))])

    def _edges_of(self, texts: CompiledTexts, pixel_values: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
        """log P of every edge of a trie, [b, E] for b images at a time."""
        image_tokens = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        for tokens in image_tokens.split(self._images_per_pass(texts.trie, chunk_size)):
            yield self._edges(texts, self.model.decoder.read_image(tokens), chunk_size)

    def _check_compiled(self, texts: CompiledTexts, device: torch.device) -> CompiledTexts:
        if texts.fingerprint != self.fingerprint():
            raise ValueError(
                "these texts were compiled with other weights, another dtype, or other hooks or adapters: compile them "
                f"again (fingerprint {texts.fingerprint[:12]}..., the model's is {self.fingerprint()[:12]}...)"
            )
        return texts.to(device)

    def _edges(self, texts: CompiledTexts, image_key_values: list[KeyValues] | None, chunk_size: int | None) -> Tensor:
        """log P of every edge of a trie: [B, E] under B images, [1, E] without."""
        trie, parts = texts.trie, []
        images = 1 if image_key_values is None else len(image_key_values[0][0])
        for start, end in self._passes(trie, images, chunk_size):
            blocks = self._read_blocks(trie, start, end, texts.text_states)
            states = self.model.decoder.fuse(blocks.repeat(images), image_key_values)
            states = states.view(images, -1, states.shape[-1])
            first, last = trie.first_nodes[start], trie.first_nodes[end]
            while first < last:
                next_ = min(last, first + max(1, self._max_numbers() // (images * self.lm_head.out_features)))
                nodes = trie.nodes[first:next_] - start * trie.tokens.shape[1]
                edges = slice(trie.first_edges[first], trie.first_edges[next_])
                from_node = trie.edge_nodes[edges] - first
                log_p = self.lm_head(states[:, nodes]).float().log_softmax(dim=-1)
                parts.append(log_p[:, from_node, trie.edge_tokens[edges]])
                first = next_
        return torch.cat(parts, dim=1)

    def _read_blocks(self, trie: TextTrie, start: int, end: int, states: Tensor | None = None) -> TextStates:
        blocks = slice(start, end)
        states = None if states is None else states[blocks]
        return self.model.decoder.read_trie(trie.tokens[blocks], trie.depths[blocks], trie.ends[blocks], states)

    def _max_numbers(self) -> int:
        return MAX_NUMBERS_PER_CHUNK.get(self.lm_head.weight.device.type, MAX_NUMBERS_PER_CHUNK["other"])

    def _positions_per_pass(self, chunk_size: int | None) -> int:
        return chunk_size or self._max_numbers() // (2 * self.config.text_config.intermediate_size)

    def _images_per_pass(self, trie: TextTrie, chunk_size: int | None) -> int:
        return max(1, self._positions_per_pass(chunk_size) // trie.tokens.numel())

    def _passes(self, trie: TextTrie, images: int, chunk_size: int | None) -> Iterator[tuple[int, int]]:
        """First and last block of each pass over a trie."""
        blocks = max(1, self._positions_per_pass(chunk_size) // (images * trie.tokens.shape[1]))
        for start in range(0, len(trie.tokens), blocks):
            yield start, min(start + blocks, len(trie.tokens))

    def _key_of_texts(self, input_ids: Tensor, attention_mask: Tensor, references: Tensor | None) -> tuple | None:
        """Everything that log P(T) depends on, or None if that cannot be told or gradients are wanted."""
        parameters = list(self.parameters())
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return None
        if any(p.is_inference() for p in parameters) or any(map(is_intercepted, self.modules())):
            return None
        seen = None
        if references is not None:
            seen = tuple(references.shape), hashlib.sha256(references.float().cpu().numpy().tobytes()).digest()
        return (
            input_ids.cpu().numpy().tobytes(),
            attention_mask.cpu().numpy().tobytes(),
            tuple(input_ids.shape),
            seen,
            repr(self._circumstances()),
            attention_implementation(self.config.text_config),
            torch.is_inference_mode_enabled(),
            *((id(p), p.data_ptr(), p.dtype, p._version) for p in parameters),
        )
