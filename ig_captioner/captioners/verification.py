"""The choice of a way to read texts: made by rules, then measured against the model's own `generate()`.

The rules know when a tree must go wrong, but not every model: transformers swallows arguments that a model does not
know. So the first texts that are scored are also read by `generate()`, forced along them, and what differs too much is
not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import logging

from ..compat_ig_captioner import attention_implementation
from ..label_trie import TextTrie
from .families import Family
from .prefix import Prefix, is_recurrent
from .prompts import common_beginning
from .readers import Reader, read_generated, read_rows, read_tree


logger = logging.get_logger(__name__)

READING_MODES = ("tree", "rows", "generate")
READERS: dict[str, Reader] = {"tree": read_tree, "rows": read_rows}
# A tree may be off by this factor times what rows are off by, in nats, which is what the floating-point type costs;
# rows that are exact by chance count as off by a step of that type for every token, or by a thousandth of a nat.
TREE_FACTOR, SMALLEST_ERROR = 3.0, 1e-3
# Rows may be off by the rounding of logits of this size for every token, or by a hundredth of a nat.
LOGIT_SIZE, ROWS_ERROR = 8.0, 1e-2


@dataclass(frozen=True)
class Verification:
    """The reading mode of a model, and how far each mode was from `generate()`.

    Args:
        mode: one of `READING_MODES`.
        errors: largest difference of log P(T) in nats, by mode.
        reasons: why a faster mode was not taken, by mode.
        num_texts: how many texts were compared.
        dtype: in which the model computes.
    """

    mode: str
    errors: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    num_texts: int = 0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        measured = ", ".join(f"{mode} {error:.1e}" for mode, error in self.errors.items())
        of = f"{self.num_texts} texts, {str(self.dtype).removeprefix('torch.')}"
        line = f"reading mode {self.mode}; nats from generate(): {measured or 'not measured'} ({of})"
        return "; ".join([line, *(f"no {mode}: {reason}" for mode, reason in self.reasons.items())])


def why_no_tree(family: Family, prefix: Prefix, longest: int) -> str | None:
    """The rule that forbids reading texts of up to `longest` tokens as a tree, or None."""
    if family.no_tree is not None:
        return family.no_tree
    if not family.takes_positions:
        return "the decoder takes no position_ids"
    if is_recurrent(prefix.cache):
        return "some layers sum up the past in a state"
    length = prefix.length + longest
    if (window := min(family.windows, default=length)) < length:
        return f"prompt and longest text have {length} tokens, more than the attention window of {window}"
    attention = attention_implementation(family.model.config.get_text_config(decoder=True))
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of ancestors"
    return None


class TextTooLongError(ValueError):
    """A text needs more positions than the model has."""


def check_length(family: Family, prefix: Prefix, longest: int) -> None:
    """Raises TextTooLongError if the model has no positions for texts of up to `longest` tokens after a prefix."""
    limit = getattr(family.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = int(prefix.positions.max()) + longest - 1
    if limit is not None and needed > limit:
        raise TextTooLongError(f"prompt and longest text need {needed} positions, but the model has {limit}")


def texts_to_compare(texts: Sequence[list[int]]) -> list[list[int]]:
    """The shortest of some texts, the longest, and the one that shares most of its beginning with that."""
    longest = max(texts, key=len)

    def shared(text: list[int]) -> int:
        """Tokens in common; fewer than none where the text branches off with nothing but its end."""
        number = common_beginning(text, longest)
        return number if number < len(text) - 1 else -1

    chosen = [min(texts, key=len), longest, max(texts, key=shared)]
    return [text for index, text in enumerate(chosen) if text not in chosen[:index]]


def verify(family: Family, prompts: Sequence[dict[str, Tensor]], texts: TextTrie) -> Verification:
    """Reads texts in every mode, after each prompt, and chooses the fastest mode that is right.

    Args:
        texts: a few, some of which share a beginning and then differ: without a branch a tree is a row.
        prompts: inputs of one image each, and those without an image where the prior will be read so.
    """
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    longest = int(texts.lengths.max())
    dtype = torch.float32
    for inputs in prompts:
        read: dict[str, Tensor] = {}
        try:
            prefix = family.prefill(inputs)
            dtype = prefix.dtype
            check_length(family, prefix, longest)
            if reason := why_no_tree(family, prefix, longest):
                reasons["tree"] = reason
            read = {mode: READERS[mode](family, prefix, texts) for mode in READERS if mode not in reasons}
        except TextTooLongError:
            raise
        except Exception as error:  # whatever a foreign model raises: its generate() may work
            reasons["rows"] = reasons["tree"] = f"{type(error).__name__}: {error}"
        truth = texts.sum_over_texts(read_generated(family, inputs, texts))
        for mode, edges in read.items():
            difference = float((texts.sum_over_texts(edges) - truth).abs().max())
            errors[mode] = max(errors.get(mode, 0.0), difference)
    mode = _choose(errors, reasons, longest, dtype)
    verification = Verification(mode, errors, reasons, len(texts.text_edges), dtype)
    if mode == "generate":
        logger.warning(
            f"{type(family.model).__name__} is read by generate(), text by text, which is slow: {verification}"
        )
    return verification


def _choose(errors: dict[str, float], reasons: dict[str, str], longest: int, dtype: torch.dtype) -> str:
    """The fastest mode that is right; adds to `reasons` why others are not."""
    rounding = longest * torch.finfo(dtype).eps
    allowed = max(ROWS_ERROR, LOGIT_SIZE * rounding)
    if "rows" not in reasons and not errors["rows"] <= allowed:
        reasons["rows"] = f"{errors['rows']:.1e} nats from generate(), allowed {allowed:.1e}"
    if "rows" in reasons:
        reasons.setdefault("tree", "not used where rows are wrong")
        return "generate"
    if "tree" in reasons:
        return "rows"
    allowed = TREE_FACTOR * max(errors["rows"], SMALLEST_ERROR, rounding)
    if not errors["tree"] <= allowed:
        reasons["tree"] = f"{errors['tree']:.1e} nats from generate(), allowed {allowed:.1e}"
        return "rows"
    return "tree"


def reader_for(mode: str, family: Family, prefix: Prefix, longest: int) -> Reader:
    """The reader of a verified mode; rows where this prompt and these texts are too long for a tree."""
    if mode == "tree" and why_no_tree(family, prefix, longest) is not None:
        return read_rows
    return READERS[mode]
