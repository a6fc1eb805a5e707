"""Special tokens in token ids: what may be scored, labelled or given as a prompt, and what cannot be meant.

A text in *scored form* is what the processor makes: its tokens and the end-of-sequence token, without a start token,
which the model puts in front itself. `generate` returns the start token as well, collators pad, and tokenizers of
other models add tokens of their own. What can be meant in one way only is brought into scored form. What cannot be
meant is an error where all texts of a call show it, and otherwise a warning.

Legend: N or C texts, L tokens of a text.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_ig_captioner import IGCaptionerTextConfig
from .information_gain import IGNORE_INDEX, shift_right
from .input_rules import IGCaptionerWarning


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the start token, of the end-of-sequence tokens and of padding."""

    start: int
    ends: tuple[int, ...]
    padding: int | None

    @classmethod
    def of(cls, config: IGCaptionerTextConfig) -> "SpecialTokens":
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        known_ends = tuple(token for token in ends if token is not None)
        return cls(config.decoder_start_token_id, known_ends, config.pad_token_id)

    def is_end(self, input_ids: Tensor) -> Tensor:
        """Marks the tokens that end a text, bool [N, L]."""
        return torch.isin(input_ids, torch.tensor(self.ends, device=input_ids.device, dtype=input_ids.dtype))

    def is_padding(self, input_ids: Tensor) -> Tensor:
        """Marks padding, bool [N, L]; none where there is no padding id."""
        if self.padding is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.padding


# ---------------------------------------------------------------------------------------------------------------------
# Where texts begin and end


def text_mask(input_ids: Tensor, tokens: SpecialTokens) -> Tensor:
    """Finds the real tokens of texts that came without a mask, int64 [N, L] of 0 and 1.

    Where padding and end-of-sequence share an id, those before a text are padding, and so are those after its end;
    others are real, since it is not known which of them are padding. Where padding and the start token share an id and
    all texts begin with it, the last of the ids that a text begins with is its start token, and real.
    """
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_padding = tokens.is_padding(input_ids)
    first = is_padding.cumprod(dim=-1).sum(dim=-1, keepdim=True)  # token after the padding that a row begins with
    has_start = tokens.start == tokens.padding and bool((first > 0).all())
    # nothing but padding ids: an end-of-sequence token, after a start token where there is one
    first = first.where(first < input_ids.shape[1], int(has_start))
    is_start = (position == first - 1) & has_start
    is_after_start = position >= first
    if tokens.padding in tokens.ends:
        is_text = ~_after_an_end(is_padding & is_after_start, tokens.is_end(input_ids) & is_after_start)
    else:
        is_text = ~is_padding
    return (is_start | (is_after_start & is_text)).long()


def _after_an_end(is_padding: Tensor, is_end: Tensor) -> Tensor:
    """Marks padding that nothing but padding follows and that is not itself the end of its text, bool [N, L]."""
    after = is_padding.flip(-1).cumprod(dim=-1).flip(-1).bool()
    return after & F.pad(is_end[:, :-1], (1, 0))


def outer_padding(input_ids: Tensor, tokens: SpecialTokens) -> Tensor:
    """Marks padding ids before and after each text, bool [N, L]; in a row of nothing but padding ids, none.

    Where padding and end-of-sequence share an id, the first one after a text is its end, and a row of nothing else is
    an empty text with its end.
    """
    is_padding = tokens.is_padding(input_ids)
    before = is_padding.cumprod(dim=-1).bool()
    has_text = ~is_padding.all(dim=-1, keepdim=True)
    if tokens.padding in tokens.ends:
        return (before & has_text) | _after_an_end(is_padding, tokens.is_end(input_ids))
    after = is_padding.flip(-1).cumprod(dim=-1).flip(-1).bool()
    return (before | after) & has_text


# ---------------------------------------------------------------------------------------------------------------------
# Texts to be scored


def scored_form(
    input_ids: Tensor, attention_mask: Tensor | None, config: IGCaptionerTextConfig
) -> tuple[Tensor, Tensor]:
    """Brings texts [C, L] into scored form: padding last, as short as they can be, without start tokens.

    Args:
        attention_mask: [C, L] of 0 and 1, or None. Padding may be on either side, and is left out where the mask holds
            it for text.

    Returns:
        `input_ids` and `attention_mask`, int64 [C, longest text].

    Raises:
        ValueError: for shapes that do not fit, a text without tokens, or a token outside the vocabulary.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [C, L] with at least one text, got shape {tuple(input_ids.shape)}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} differs from input_ids {tuple(input_ids.shape)}"
        )
    tokens = SpecialTokens.of(config)
    input_ids = input_ids.long()
    if attention_mask is None:
        mask = text_mask(input_ids, tokens)
    else:
        mask = (attention_mask.bool() & ~outer_padding(input_ids, tokens)).long()
    input_ids, mask = _without_start(*_padding_last(input_ids, mask), tokens)
    _check_tokens(input_ids, mask, config.vocab_size)
    _tell_of_special_tokens(input_ids, mask, tokens)
    return input_ids, mask


def _padding_last(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Texts and their mask [C, longest text], with the padding moved to the right."""
    longest = max(1, int(mask.sum(dim=-1).max()))
    order = mask.argsort(dim=-1, descending=True, stable=True)[:, :longest]
    return input_ids.gather(-1, order), mask.gather(-1, order)


def _without_start(input_ids: Tensor, mask: Tensor, tokens: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Texts that all begin with the start token, as `generate` returns them, without it; others as they are."""
    all_begin = bool((input_ids[:, 0] == tokens.start).all())
    # an end-of-sequence token alone is the empty text, even where texts start with that token, too
    if all_begin and (tokens.start not in tokens.ends or bool((mask.sum(dim=-1) > 1).all())):
        return input_ids[:, 1:], mask[:, 1:]
    return input_ids, mask


def _check_tokens(input_ids: Tensor, mask: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a text without tokens, or a token outside the vocabulary."""
    if not bool(mask.any(dim=-1).all()):
        raise ValueError(f"text {int(mask.any(dim=-1).long().argmin())} of input_ids has no tokens")
    is_unknown = ((input_ids < 0) | (input_ids >= vocab_size)) & mask.bool()
    if bool(is_unknown.any()):
        row = int(is_unknown.any(dim=-1).long().argmax())
        token = int(input_ids[row][is_unknown[row]][0])
        raise ValueError(f"text {row} of input_ids has token {token}, outside the vocabulary of {vocab_size}")


def _tell_of_special_tokens(input_ids: Tensor, mask: Tensor, tokens: SpecialTokens) -> None:
    """Warns of texts [C, L], padded on the right, that have no end, or special tokens where words should be."""
    last = mask.sum(dim=-1, keepdim=True) - 1
    is_last = torch.arange(input_ids.shape[1], device=last.device) == last
    is_end = tokens.is_end(input_ids)
    has_end = (is_end & is_last).any(dim=-1)
    is_special = is_end | (input_ids == tokens.start) | tokens.is_padding(input_ids)
    has_special = (is_special & mask.bool() & ~(is_end & is_last)).any(dim=-1)
    for rows, what in (
        (~has_end, f"do not end with an end-of-sequence token ({list(tokens.ends)}): they are scored as beginnings"),
        (has_special, "have start, end-of-sequence or padding tokens inside, which are scored like words"),
    ):
        _tell_of_rows("text", rows, what, input_ids, mask)


def _tell_of_rows(name: str, rows: Tensor, what: str, input_ids: Tensor, mask: Tensor) -> None:
    """Warns of the marked `rows`, bool [N], with their number and the tokens of the first; silent if there are none."""
    if not bool(rows.any()):
        return
    row = int(rows.long().argmax())
    tokens = input_ids[row][mask[row].bool()].tolist()
    message = f"{int(rows.sum())} of {len(rows)} {name}s {what}; {name} {row} has the tokens {tokens}"
    warnings.warn(message, IGCaptionerWarning, stacklevel=4)


# ---------------------------------------------------------------------------------------------------------------------
# Texts to be learned


def labelled_texts(
    labels: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, config: IGCaptionerTextConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives a training batch as `input_ids`, `attention_mask` and `labels` [N, L], with no padding among the labels.

    Args:
        labels: [N, L], -100 where nothing is predicted.
        input_ids: the texts, if `labels` does not hold all of them; without a start token.
        attention_mask: of `input_ids`.

    Raises:
        ValueError: for shapes that differ.
    """
    tokens = SpecialTokens.of(config)
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if value is not None and value.shape != labels.shape:
            raise ValueError(f"labels {tuple(labels.shape)} differ in shape from {name} {tuple(value.shape)}")
    if input_ids is None:
        attention_mask = labels != IGNORE_INDEX
        input_ids = labels.masked_fill(~attention_mask, tokens.padding or 0)
    is_padding = outer_padding(input_ids, tokens)
    if attention_mask is not None:
        is_padding = is_padding | (attention_mask == 0)
    return input_ids, (~is_padding).long(), labels.masked_fill(is_padding, IGNORE_INDEX)


def check_labels(given: Tensor, used: Tensor, num_items: Tensor | int | None, config: IGCaptionerTextConfig) -> None:
    """Refuses labels [N, L] that cannot be meant.

    Args:
        given, used: the labels as they came, and without padding.
        num_items: how many tokens Trainer has counted, if it has.

    Raises:
        ValueError: all texts begin with the start token, or Trainer has counted padding as tokens.
    """
    start = config.decoder_start_token_id
    goes_on = given.shape[1] > 1 and bool((given[:, 1] != IGNORE_INDEX).all())  # else it may be the end of no text
    if goes_on and bool((given[:, 0] == start).all()):
        raise ValueError(
            f"all labels begin with the start token {start}, which the model puts in front itself: leave it out"
        )
    if num_items is not None and not torch.equal(given, used):
        raise ValueError(
            f"{int((given != used).sum())} labels are padding, and Trainer has counted them as tokens: labels must be "
            f"{IGNORE_INDEX} where the text is padded"
        )


def check_decoder_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    num_items: Tensor | int | None,
    config: IGCaptionerTextConfig,
) -> None:
    """Refuses a training batch whose labels are gone: without them the model would learn to copy its input.

    Warns of decoder inputs in scored form, which a batch without its labels has, and hardly anything else.

    Args:
        input_ids: decoder inputs [N, L], start token first, or None.
        num_items: how many labels Trainer has counted, if it has.

    Raises:
        ValueError: there is nothing to read, or Trainer has labels and the model has none.
    """
    advice = (
        "To train, pass the texts as labels: the model makes its inputs of them. Trainer takes labels away for "
        "label_smoothing_factor and compute_loss_func; set label_smoothing in the model's configuration instead"
    )
    if input_ids is None:
        raise ValueError(f"the model was given neither labels nor input_ids. {advice}")
    if num_items is not None:
        raise ValueError(f"Trainer has counted labels, but the model was given none. {advice}")
    tokens = SpecialTokens.of(config)
    mask = text_mask(input_ids, tokens) if attention_mask is None else attention_mask.long()
    texts, mask = _padding_last(input_ids, mask)
    last = texts.gather(-1, (mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
    if bool(tokens.is_end(last).all()) and not bool((texts[:, 0] == tokens.start).any()):
        message = (
            "input_ids end with end-of-sequence and lack the start token, so that logits are not those of the texts."
        )
        warnings.warn(f"{message} {advice}", IGCaptionerWarning, stacklevel=2)


# ---------------------------------------------------------------------------------------------------------------------
# Texts to go on from


def as_prompt(input_ids: Tensor, attention_mask: Tensor | None, config: IGCaptionerTextConfig) -> tuple[Tensor, Tensor]:
    """Turns texts that all end with end-of-sequence [N, L] into prompts: start token, then text, padded on the left.

    Others stay as they are; of those that have no start token, or of which only some have an end, it warns.

    Returns:
        `input_ids` and `attention_mask`, [N, L], or one shorter where the texts had a start token, too.
    """
    tokens = SpecialTokens.of(config)
    mask = text_mask(input_ids, tokens) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:  # a cache was passed: the mask covers what it holds as well
        return input_ids, mask
    padding_first = mask.argsort(dim=-1, stable=True)
    moved = input_ids.gather(-1, padding_first)
    moved_mask = mask.gather(-1, padding_first)
    lengths = moved_mask.sum(dim=-1, keepdim=True)
    first = moved.gather(-1, (moved.shape[1] - lengths).clamp(max=moved.shape[1] - 1))
    has_start = first == tokens.start
    has_end = tokens.is_end(moved[:, -1:])
    if bool(has_end.all()):
        if bool(has_start.all()) and (tokens.start not in tokens.ends or bool((lengths > 1).all())):
            return moved[:, :-1], moved_mask[:, :-1]
        return shift_right(moved, tokens.start, moved_mask), moved_mask
    for rows, what in (
        (~has_start, f"do not begin with the start token {tokens.start}, as all texts of the training do"),
        (has_end, "end with an end-of-sequence token, after which no text went on in the training; others do not"),
    ):
        _tell_of_rows("prompt", rows[:, 0], what, input_ids, mask)
    return input_ids, mask


def prompt_before_labels(
    labels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, config: IGCaptionerTextConfig
) -> tuple[Tensor, Tensor]:
    """Makes prompts of a training batch: the start token and what is before the labels, which are to be generated.

    Args: as for [`labelled_texts`].

    Returns:
        `input_ids` and `attention_mask`, [N, 1 + longest], padded on the left.
    """
    input_ids, mask, labels = labelled_texts(labels, input_ids, attention_mask, config)
    mask = mask * ((labels != IGNORE_INDEX).cumsum(dim=-1) == 0)
    longest = int(mask.sum(dim=-1).max())
    padding_first = mask.argsort(dim=-1, stable=True)[:, mask.shape[1] - longest :]
    # one position more, whose token `shift_right` drops
    texts = F.pad(input_ids.gather(-1, padding_first), (0, 1))
    mask = F.pad(mask.gather(-1, padding_first), (0, 1), value=1)
    return shift_right(texts, SpecialTokens.of(config).start, mask), mask
