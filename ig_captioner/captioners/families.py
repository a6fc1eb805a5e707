"""Families of captioners, with what is particular to each: how it reads image and prompt, and how texts go on.

Most vision-language models need no line of their own: `Family` reads the image as tokens of the prompt and goes on in
the same decoder. The classes below it say what else some models want. `FAMILIES` maps `config.model_type` to them; a
model that is not in it is read as `Family` and, like every other, checked against its own `generate()` at first use.

To add one: an entry in `FAMILIES`, a build in `tests/captioner_builds.py`.

Legend: B images, R rows, Q positions of a row, P cached tokens, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from .prefix import Prefix
from .prompts import (
    BlipPrompt,
    DecoderPrompt,
    EncoderPrompt,
    FuyuPrompt,
    PaliGemmaPrompt,
    Phi4Prompt,
    Pix2StructPrompt,
    ProcessorPrompt,
    Prompt,
    StartTokenPrompt,
)


CHAT_PROMPT = "Describe the image in one short sentence."


class Family:
    """A decoder whose prompt holds the image as tokens: LLaVA, Gemma 3, Idefics, SmolVLM, InternVL and most others.

    Attributes:
        prompt: the default instruction; put into the chat template where the processor has one.
        prior_source: "unconditional" where the model was trained on text without images too, or its language model
            was frozen, so that log P(T) without an image is honest; else "reference_images".
        without_image: whether the model can be asked without an image at all.
        no_tree: why texts must not be read as a tree although their decoder takes positions; None where they may.
        prompt_class: how the instruction becomes tensors.
    """

    prompt = CHAT_PROMPT
    prompt_class: type[Prompt] = Prompt
    prior_source = "unconditional"
    without_image = True
    no_tree: str | None = None

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def decoder(self) -> nn.Module:
        """The module that goes on from the cache."""
        return self.model

    def prefill(self, inputs: dict[str, Tensor]) -> Prefix:
        """Reads image and prompt of B images of equal length; `inputs` are what the model's forward takes."""
        outputs = self.model(**inputs, use_cache=True, **only_last_logits(self.model))
        return self._prefix(outputs, inputs)

    def _prefix(self, outputs: Any, inputs: dict[str, Tensor], **constants: Tensor) -> Prefix:
        cache = outputs.get("cache", outputs.get("past_key_values"))
        if not isinstance(cache, Cache):
            raise UnreadableCacheError(f"{type(self.model).__name__} returns no cache, but {type(cache).__name__}")
        log_probs = outputs.logits[:, -1].float().log_softmax(dim=-1)
        positions = torch.full((len(log_probs),), int(cache.get_seq_length()), device=log_probs.device)
        return Prefix(cache, log_probs, self.first_positions(positions, inputs), constants)

    def first_positions(self, lengths: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Positions of the first token of a text, [B], from the lengths of the cache, [B]."""
        return lengths

    def read(self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [R, Q, V] of R rows that go on from as many rows of a prefix.

        Args:
            tokens, positions: [R, Q].
            mask: additive [R, 1, Q, P + Q]; causal if not given.
        """
        arguments = {"position_ids": positions, "attention_mask": mask}
        taken = {name: value for name, value in arguments.items() if value is not None and self._takes(name)}
        cache = {self._cache_name: prefix.cache, "use_cache": True}
        return self.decoder(input_ids=tokens, **cache, **taken, **prefix.constants).logits

    def _takes(self, name: str) -> bool:
        """Unknown arguments vanish in `**kwargs`, and what they ask for with them: only named ones count."""
        return name in inspect.signature(self.decoder.forward).parameters

    @property
    def _cache_name(self) -> str:
        """Transformers renamed the argument in 5.24; code of others may not have followed."""
        return "cache" if self._takes("cache") else "past_key_values"

    @property
    def takes_positions(self) -> bool:
        """Tells whether texts can be given positions, without which siblings in a tree would follow one another."""
        return self._takes("position_ids")

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The model's own `generate()` from image and prompt; `options` are its settings."""
        return self.model.generate(**inputs, **options)

    @property
    def windows(self) -> Iterator[int]:
        """Lengths beyond which some layer forgets the beginning (sliding or chunked attention)."""
        text = self.model.config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None)
        if kinds and not any("sliding" in kind or "chunked" in kind for kind in kinds):
            return
        for name in ("sliding_window", "attention_chunk_size"):
            if window := getattr(text, name, None):
                yield int(window)


class UnreadableCacheError(ValueError):
    """The model's cache is none of transformers' classes, so that only `generate()` can go on from it."""


def only_last_logits(module: nn.Module) -> dict[str, int]:
    """Spares the logits of the whole prompt where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}


class PaliGemma(Family):
    """Counts positions from 1. The prompt is attended to in both directions, so it is always read as a whole."""

    prompt_class = PaliGemmaPrompt
    prompt = "caption en"

    def first_positions(self, lengths, inputs):
        return lengths + 1


class RotaryImage(Family):
    """Qwen-VL, GLM-4V and their kin: an image takes fewer positions than tokens; the model keeps the difference."""

    def first_positions(self, lengths, inputs):
        if "image_grid_thw" not in inputs:
            return lengths  # what the model keeps is of an earlier call
        return lengths + self.model.model.rope_deltas.flatten().to(lengths.device)


class Janus(Family):
    """Its own `generate()` passes no logits processor on when it writes text."""

    def generate(self, inputs, **options):
        return GenerationMixin.generate(self.model, **inputs, **options)


class Fuyu(Family):
    """Its processor puts image and answer token around the prompt."""

    prompt_class = FuyuPrompt
    prompt = "Generate a coco-style caption.\n"


class Phi4Multimodal(Family):
    """A causal language model whose chat format for images is not in its template."""

    prompt_class = Phi4Prompt


class Git(Family):
    """Reads the image before the text without placeholders; positions count text alone."""

    prompt_class = StartTokenPrompt
    prompt = ""
    prior_source = "reference_images"  # it runs without an image but was never trained to

    def first_positions(self, lengths, inputs):
        return torch.full_like(lengths, inputs["input_ids"].shape[1])


class Blip(Family):
    """Cross-attends to the image in a text decoder of its own, which begins with [DEC] and ends with [SEP]."""

    prompt_class = BlipPrompt
    prompt = ""
    prior_source = "reference_images"  # it runs without an image but was never trained to

    @property
    def decoder(self):
        return self.model.text_decoder

    def prefill(self, inputs):
        image = self._image_states(inputs)
        outputs = self.decoder(input_ids=inputs["input_ids"], use_cache=True, logits_to_keep=1, **image)
        return self._prefix(outputs, inputs, **image)

    def _image_states(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" not in inputs:
            return {}
        states = self.model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
        return {"encoder_hidden_states": states}

    def generate(self, inputs, **options):
        # the model's generate() wants pixels, puts [DEC] over the first token and drops the last: do as it does
        end = self.model.config.text_config.sep_token_id
        settings = {"eos_token_id": end, "pad_token_id": self.model.config.text_config.pad_token_id}
        return self.decoder.generate(
            input_ids=inputs["input_ids"], **self._image_states(inputs), **{**settings, **options}
        )


class Blip2(Family):
    """BLIP-2 and InstructBLIP with a decoder-only language model, which alone goes on; it was frozen in training."""

    prompt_class = ProcessorPrompt
    prompt = ""

    @property
    def decoder(self):
        return self.model.language_model

    def prefill(self, inputs):
        if "pixel_values" not in inputs:
            outputs = self.decoder(**inputs, use_cache=True, **only_last_logits(self.decoder))
        else:
            outputs = self.model(**inputs, use_cache=True).language_model_outputs
        return self._prefix(outputs, inputs)

    def generate(self, inputs, **options):
        model = self.model if "pixel_values" in inputs else self.decoder
        return model.generate(**inputs, **options)


class InstructBlip(Blip2):
    """As BLIP-2; its query tokens read the instruction, too."""

    prompt = "Write a short description of the image."


class Kosmos2(Family):
    """Goes on in `text_model`, which counts positions from its padding id on, and builds its own mask."""

    prompt_class = ProcessorPrompt
    prompt = "An image of"
    prior_source = "reference_images"
    without_image = False
    no_tree = "its text model takes no mask but one of padding"

    @property
    def decoder(self):
        return self.model.text_model

    def first_positions(self, lengths, inputs):
        return lengths + self.model.config.text_config.pad_token_id + 1


class Kosmos25(Kosmos2):
    """As Kosmos-2, with patches in place of pixels, and a mask that may be given. Trained to read documents."""

    prompt = "<md>"
    no_tree = None


class Mllama(Family):
    """Cross-attends to the tiles that `cross_attention_mask` names; a text sees what the prompt's last token sees."""

    def prefill(self, inputs):
        outputs = self.model(**inputs, use_cache=True, logits_to_keep=1)
        mask = inputs.get("cross_attention_mask")
        return self._prefix(outputs, inputs, **({} if mask is None else {"cross_attention_mask": mask[:, -1:]}))

    def read(self, prefix, tokens, positions, mask=None):
        seen = prefix.constants.get("cross_attention_mask")
        if seen is not None:
            repeated = {"cross_attention_mask": seen.expand(-1, tokens.shape[1], -1, -1)}
            prefix = Prefix(prefix.cache, prefix.next_log_probs, prefix.positions, repeated)
        return super().read(prefix, tokens, positions, mask)


class EncoderDecoder(Family):
    """An encoder for the image (and prompt, in Florence-2), whose states a decoder of texts cross-attends to.

    `inputs` hold the beginning of the text as `decoder_input_ids`.
    """

    prompt_class = DecoderPrompt
    prompt = ""
    prior_source = "reference_images"
    without_image = False

    def prefill(self, inputs):
        outputs = self.model(**inputs, use_cache=True)
        return self._prefix(outputs, inputs, **self._constants(outputs, inputs))

    def _constants(self, outputs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"encoder_states": outputs.encoder_last_hidden_state}

    def read(self, prefix, tokens, positions, mask=None):
        constants = dict(prefix.constants)
        states = BaseModelOutput(last_hidden_state=constants.pop("encoder_states"))
        outputs = self.decoder(
            decoder_input_ids=tokens,
            encoder_outputs=states,
            **{self._cache_name: prefix.cache, "use_cache": True},
            **constants,
            **self._positions_and_mask(positions, mask),
        )
        return outputs.logits

    def _positions_and_mask(self, positions: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {}

    @property
    def takes_positions(self):
        return False


class VisionEncoderDecoder(EncoderDecoder):
    """ViT-GPT2 and TrOCR: the arguments of the inner decoder are given with `decoder_` before their names."""

    def _positions_and_mask(self, positions, mask):
        taken = {"decoder_position_ids": positions} if self.takes_positions else {}
        return taken if mask is None else {**taken, "decoder_attention_mask": mask}

    @property
    def takes_positions(self):
        return "position_ids" in inspect.signature(self.model.decoder.forward).parameters


class Florence2(EncoderDecoder):
    """The encoder reads the image and a task, the decoder texts alone."""

    prompt_class = EncoderPrompt
    prompt = "<CAPTION>"


class Pix2Struct(EncoderDecoder):
    """The decoder cross-attends to those patches only that `attention_mask` names."""

    prompt_class = Pix2StructPrompt

    def _constants(self, outputs, inputs):
        constants = super()._constants(outputs, inputs)
        mask = inputs.get("attention_mask")
        return constants if mask is None else {**constants, "attention_mask": mask}


class Blip2Seq2Seq(EncoderDecoder):
    """BLIP-2 and InstructBLIP with T5, whose encoder reads the image tokens and the prompt; it was frozen."""

    prompt_class = EncoderPrompt
    prior_source = "unconditional"
    without_image = True

    @property
    def decoder(self):
        return self.model.language_model

    def prefill(self, inputs):
        if "pixel_values" not in inputs:
            outputs = self.decoder(**inputs, use_cache=True)
        else:
            outputs = self.model(**inputs, use_cache=True).language_model_outputs
        return self._prefix(outputs, inputs, **self._constants(outputs, inputs))

    def generate(self, inputs, **options):
        model = self.model if "pixel_values" in inputs else self.decoder
        return model.generate(**inputs, **options)


FAMILIES: dict[str, type[Family]] = {
    "blip": Blip,
    "blip-2": Blip2,
    "florence2": Florence2,
    "fuyu": Fuyu,
    "git": Git,
    "instructblip": InstructBlip,
    "janus": Janus,
    "kosmos-2": Kosmos2,
    "kosmos-2.5": Kosmos25,
    "mllama": Mllama,
    "paligemma": PaliGemma,
    "phi4_multimodal": Phi4Multimodal,
    "pix2struct": Pix2Struct,
    "vision-encoder-decoder": VisionEncoderDecoder,
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded model: by `model_type`, by what the model keeps, or the one of most models."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        family = RotaryImage if hasattr(getattr(model, "model", None), "rope_deltas") else Family
    if issubclass(family, Blip2) and not model.config.use_decoder_only_language_model:
        family = Blip2Seq2Seq
    return family(model)
