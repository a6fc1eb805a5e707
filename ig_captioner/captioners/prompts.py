"""Prompts: how a captioner is asked, and which tokens a text has after that.

A text must be scored as the model would have written it: after the same image tokens and instruction, with the same
space before its first word, and with the token that ends a turn. All of that is taken from the processor: the chat
template is rendered with and without an answer, and prompt and text are tokenised as one string.

`Prompt` uses the chat template where the processor has one. The classes below it are for older families.

Legend: N texts, L tokens of a text.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compiled_labels import digest_of_tokens


ANSWER = "ANSWER"  # stands for a text when a template is rendered
# Fields that hold one entry per token of the prompt.
TOKEN_FIELDS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "cross_attention_mask",
    "image_embeds_position_mask",
)
NOT_FOR_FORWARD = ("labels", "width", "height", "num_crops", "rows", "cols")


@dataclass(frozen=True)
class Processors:
    """Processors of images and of texts; `processor`, which does both, is missing in some old checkpoints."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    processor: Any = None

    @property
    def both(self) -> Any:
        if self.processor is None:
            raise ValueError("this family needs the checkpoint's processor (processor_config.json), which is missing")
        return self.processor


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as the model writes them: `input_ids` and `attention_mask` [N, L], padded on the right.

    `dropped` last tokens of the prompt are part of the texts instead, where both were merged to other tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dropped: int

    @classmethod
    def padded(cls, texts: list[list[int]], dropped: int) -> "EncodedTexts":
        """Texts of several lengths."""
        longest = max(map(len, texts))
        input_ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        attention_mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        return cls(input_ids, attention_mask, dropped)

    def as_lists(self) -> list[list[int]]:
        """The tokens of each text, without padding."""
        rows = zip(self.input_ids, self.attention_mask, strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows]

    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return digest_of_tokens(self.input_ids, self.attention_mask)


class PreparedImage(dict[str, Tensor]):
    """An image as its captioner reads it: the tensors of one prompt, [1, ...], which need no weights."""


class Prompt:
    """An image and an instruction in the chat template; after a placeholder where there is no template.

    Args:
        instruction: what the user says to the model; with the image placeholder in it, the whole prompt as it stands.
    """

    token_fields: tuple[str, ...] = TOKEN_FIELDS

    def __init__(self, model: PreTrainedModel, processors: Processors, instruction: str):
        self.model = model
        self.processors = processors
        self.instruction = instruction
        self.tokenizer = processors.tokenizer
        before, self.lead, self.end_token_id = self._continuation()
        if before.rstrip().endswith("<think>"):
            raise ValueError(
                "the chat template opens a thinking block before every answer, after which no text can be scored: "
                "use a checkpoint that answers directly"
            )

    # What the model is given

    def inputs(self, image: Image.Image | PreparedImage | None = None, dropped: int = 0) -> dict[str, Tensor]:
        """The tensors of one prompt, [1, ...], with an image or without.

        Args:
            dropped: last tokens of the prompt that are left out, see `EncodedTexts`.
        """
        inputs = dict(image if isinstance(image, PreparedImage) else self.prepare(image))
        if dropped:
            inputs |= {name: inputs[name][:, :-dropped] for name in self.token_fields if name in inputs}
        return inputs

    def prepare(self, image: Image.Image | None) -> PreparedImage:
        """The tensors of the whole prompt."""
        made = self._inputs(image)
        kept = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        return PreparedImage({name: value for name, value in kept.items() if name not in NOT_FOR_FORWARD})

    def without_weights(self) -> "Prompt":
        """This prompt with what it asks of its model, but not the model: to be sent to other processes."""
        light = copy.copy(self)
        known = ("config", "generation_config", "name_or_path")
        light.model = SimpleNamespace(**{name: getattr(self.model, name) for name in known})
        return light

    def _inputs(self, image: Image.Image | None) -> dict[str, Any]:
        processor = self.processors.both
        if self._has_template:
            template_options = {"add_generation_prompt": True, **self._template_options}
            tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            return processor.apply_chat_template(self._messages(image), **template_options, **tensors)
        given = {} if image is None else {"images": [image]}
        return processor(text=[self._rendered(image is not None)], **given, return_tensors="pt")

    def _rendered(self, with_image: bool, answer: str | None = None) -> str:
        """The prompt as a string, before image tokens are repeated; with an answer, if one is given."""
        if self._has_template:
            messages = self._messages(True if with_image else None, answer)
            options = {"add_generation_prompt": answer is None, **self._template_options}
            return self.processors.both.apply_chat_template(messages, tokenize=False, **options)
        placeholder = str(getattr(self.processors.both, "image_token", "<image>"))
        if placeholder in self.instruction:
            return self.instruction if with_image else self.instruction.replace(placeholder, "").lstrip()
        return f"{placeholder}{self.instruction}" if with_image else self.instruction

    @property
    def _has_template(self) -> bool:
        placeholder = str(getattr(self.processors.processor, "image_token", None) or "<image>")
        has_template = getattr(self.processors.processor, "chat_template", None) is not None
        return has_template and placeholder not in self.instruction

    @property
    def _template_options(self) -> dict[str, bool]:
        template = self.processors.both.chat_template
        return {"enable_thinking": False} if "enable_thinking" in str(template) else {}

    def _messages(self, image: Any, answer: str | None = None) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.instruction}]
        if image is not None:
            content.insert(0, {"type": "image", **({} if image is True else {"image": image})})
        messages = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages

    # From texts to tokens that continue the prompt

    @property
    def context(self) -> str:
        """The string that texts go on from."""
        return self._rendered(with_image=True)

    def _continuation(self) -> tuple[str, str, int]:
        """The prompt, what stands between it and a text, and the token that ends the text."""
        if not self._has_template:
            context = self.context
            return context, "" if not context or context[-1].isspace() else " ", self.default_end_token_id
        context = self.context
        answered = self._rendered(with_image=True, answer=ANSWER)
        before, _, after = answered.rpartition(ANSWER)
        lead = before[len(context) :] if before.startswith(context) else ""
        return context, lead, self._end_of_turn(after)

    def _end_of_turn(self, after: str) -> int:
        """The first token after an answer if it is a special one; some templates end answers with nothing."""
        ids = self._tokens([after.lstrip()])[0]
        if ids and ids[0] in self.tokenizer.added_tokens_decoder:
            return ids[0]
        return self.default_end_token_id

    @property
    def default_end_token_id(self) -> int:
        """The token at which the model's own `generate()` stops."""
        end = self.model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None:
            raise ValueError(
                f"neither generation_config nor tokenizer of {self.model.name_or_path!r} names an end token"
            )
        return end[0] if isinstance(end, list) else end

    def encode(self, texts: list[str]) -> EncodedTexts:
        """Tokens of texts after the prompt, the token that ends a turn included."""
        context = self._tokens([self.context])[0]
        joint = self._tokens([self.context + self.lead + text for text in texts])
        kept = min(common_beginning(context, ids) for ids in joint)
        return EncodedTexts.padded([[*ids[kept:], self.end_token_id] for ids in joint], len(context) - kept)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


def common_beginning(first: list[int], second: list[int]) -> int:
    """Counts the tokens that two lists begin with in common."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


class ProcessorPrompt(Prompt):
    """The processor puts the image before the instruction by itself: BLIP-2, InstructBLIP, Kosmos-2 and 2.5."""

    @property
    def _has_template(self):
        return False

    def _inputs(self, image):
        if image is None:
            return self.tokenizer([self.instruction], return_tensors="pt")
        return self.processors.both(images=image, text=self.instruction, return_tensors="pt")

    @property
    def context(self):
        return self.instruction


class PaliGemmaPrompt(ProcessorPrompt):
    """The prompt ends with a line break; its tokens are of type 0, which all of them attend to."""

    def _inputs(self, image):
        if image is not None:
            text = f"{self.processors.both.image_token}{self.instruction}"
            return self.processors.both(images=image, text=text, return_tensors="pt")
        inputs = self.tokenizer([f"{self.tokenizer.bos_token}{self.context}"], add_special_tokens=False)
        ids = torch.tensor(inputs["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    @property
    def context(self):
        return f"{self.instruction}\n"


class FuyuPrompt(ProcessorPrompt):
    """A token of its own stands between prompt and answer."""

    def _inputs(self, image):
        if image is None:
            return self.tokenizer([self.context], return_tensors="pt")
        return super()._inputs(image)

    @property
    def context(self):
        return f"{self.instruction}<0x04>"


class Phi4Prompt(Prompt):
    """The chat format that the checkpoint documents; its template is the tokenizer's, for text alone."""

    @property
    def _has_template(self):
        return False

    def _rendered(self, with_image, answer=None):
        image = self.processors.both.image_token if with_image else ""
        return f"<|user|>{image}{self.instruction}<|end|><|assistant|>"

    def _continuation(self):
        return self.context, "", self.tokenizer.convert_tokens_to_ids("<|end|>")


class StartTokenPrompt(Prompt):
    """No placeholders: a start token and the instruction, while the pixels are read apart: BLIP and GIT."""

    @property
    def _has_template(self):
        return False

    @property
    def context(self):
        return self.instruction

    @property
    def start_token_id(self) -> int:
        return self.tokenizer.cls_token_id

    @property
    def default_end_token_id(self):
        return self.tokenizer.sep_token_id

    def _inputs(self, image):
        ids = torch.tensor([[self.start_token_id, *self._tokens([self.context])[0]]])
        pixels = {} if image is None else self.processors.image_processor(images=image, return_tensors="pt")
        return {"input_ids": ids, **pixels}


class BlipPrompt(StartTokenPrompt):
    """Texts begin with [DEC], the config's start token, not with the tokenizer's [CLS]."""

    @property
    def start_token_id(self):
        return self.model.config.text_config.bos_token_id

    @property
    def default_end_token_id(self):
        return self.model.config.text_config.sep_token_id


class DecoderPrompt(Prompt):
    """An encoder for the image; the decoder's text begins with its start token and the instruction: ViT-GPT2, TrOCR."""

    token_fields = ("decoder_input_ids",)

    @property
    def _has_template(self):
        return False

    @property
    def context(self):
        return self.instruction

    def _inputs(self, image):
        return {**self._image_inputs(image), "decoder_input_ids": self._start(self.context)}

    def _image_inputs(self, image: Image.Image | None) -> dict[str, Any]:
        return self.processors.image_processor(images=image, return_tensors="pt")

    def _start(self, context: str) -> Tensor:
        generation = self.model.generation_config
        start = generation.decoder_start_token_id
        if start is None:
            start = self.model.config.get_text_config(decoder=True).decoder_start_token_id
        forced = generation.forced_bos_token_id  # BART writes it first in any case
        beginning = [start] if forced is None else [start, forced]
        return torch.tensor([[*beginning, *self._tokens([context])[0]]])


class EncoderPrompt(DecoderPrompt):
    """The encoder reads image and instruction, the decoder only texts: Florence-2, BLIP-2 with T5."""

    @property
    def context(self):
        return ""

    def _image_inputs(self, image):
        if image is None:
            return self.tokenizer([self.instruction], return_tensors="pt")
        return self.processors.both(images=image, text=self.instruction, return_tensors="pt")


class Pix2StructPrompt(DecoderPrompt):
    """Question-answering checkpoints draw the instruction above the image; the others begin their text with it."""

    @property
    def _draws_instruction(self) -> bool:
        return bool(getattr(self.processors.image_processor, "is_vqa", False))

    @property
    def context(self):
        return "" if self._draws_instruction else self.instruction

    def _image_inputs(self, image):
        header = {"header_text": self.instruction} if self._draws_instruction else {}
        return self.processors.image_processor(images=image, return_tensors="pt", **header)
