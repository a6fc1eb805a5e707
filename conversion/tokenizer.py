"""Tokenizers by big_vision's conventions: text lower-cased, punctuation kept, EOS always last, padding 0, no BOS.

Upstream: `pp/ops_text.py`, `tokenize(max_len, eos="sticky", model="c4_en", pad_value="<pad>")`. A SentencePiece
unigram `.model` becomes a fast tokenizer here; reading it needs neither sentencepiece nor protobuf, as the few fields
that matter are parsed below (schema: google/sentencepiece, `src/sentencepiece_model.proto`). Upstream's
`tf.strings.lower` lowers ASCII letters only, and so does the normaliser.
"""

import json
import string
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ig_captioner.processing_ig_captioner import gives_scored_form

from .reading import ConversionError


SPACE = "\u2581"  # how SentencePiece writes a space
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of pieces; a normal one is 1
UNIGRAM = 1


@dataclass
class SentencePieceModel:
    """pieces: (text, score, type), by id; and what its normaliser does."""

    pieces: list[tuple[str, float, int]]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at = at + 1
        shift = shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """`(number, value)` of each field of a protobuf message: an integer, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field ends at byte {at + size} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises ConversionError if the file is no SentencePiece model."""
    model = SentencePieceModel([])
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                model.pieces.append((piece[1].decode(), score, piece.get(3, 1)))
            elif number == 2:
                trainer = dict(_fields(value))
                model.model_type = trainer.get(3, UNIGRAM)
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(value))
                model.charsmap = normalizer.get(2, b"")
                model.dummy_prefix = bool(normalizer.get(3, 1))
                model.remove_extra_spaces = bool(normalizer.get(4, 1))
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ConversionError(f"{path} is no SentencePiece model: {error!r}") from error
    if model.model_type != UNIGRAM or not any(kind == UNKNOWN for _, _, kind in model.pieces):
        raise ConversionError(f"{path} is no SentencePiece unigram model with an unknown token")
    return model


def from_sentencepiece(model: SentencePieceModel) -> Tokenizer:
    """The same segmentation as SentencePiece's, of text with its ASCII letters lowered."""
    unknown = next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    vocabulary = [(piece, score) for piece, score, _ in model.pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback))
    steps: list[Any] = [normalizers.Replace(upper, upper.lower()) for upper in string.ascii_uppercase]
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    metaspace = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if model.byte_fallback else metaspace
    added = [(piece, kind) for piece, _, kind in model.pieces if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=kind == CONTROL) for piece, kind in added])
    return tokenizer


def load_tokenizer(
    path: str | Path,
    max_length: int,
    *,
    pad_token_id: int = 0,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer in scored form (EOS after every text, nothing in front) for texts of `max_length` tokens.

    Args:
        path: a SentencePiece `.model`, a `tokenizer.json`, or a folder with either.
        pad_token_id: what the model pads with.
        eos_token_id: what ends a text if the folder does not name it; left out, `</s>`.
        bos_token_id: what the model starts with, if that is a token of its own.

    Raises:
        ConversionError: no such file, another format, no EOS token, or other padding.
    """
    file = _find_file(Path(path).expanduser())
    tokenizer, names = _open_tokenizer(file)
    expected_eos = "</s>" if eos_token_id is None else tokenizer.id_to_token(eos_token_id)
    eos = names.get("eos_token", expected_eos)
    unknown = names.get("unk_token", "<unk>")
    pad = tokenizer.id_to_token(pad_token_id)
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    if eos_id is None:
        raise ConversionError(f"{file} has no token {eos!r} for the end of a text")
    stated = names.get("pad_token", "<pad>" if tokenizer.token_to_id("<pad>") is not None else pad)
    if stated != pad or pad is None or eos_id == pad_token_id:
        raise ConversionError(
            f"{file} pads with {stated!r}, but token {pad_token_id} is {pad!r}, which the model pads with"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = _eos_last(eos, eos_id)
    known = {} if tokenizer.token_to_id(unknown) is None else {"unk_token": unknown}
    if bos_token_id is not None:
        known["bos_token"] = tokenizer.id_to_token(bos_token_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, model_max_length=max_length, **known
    )


def _eos_last(eos: str, eos_id: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, eos_id)])


def load_for_decoder(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model in scored form; where none is named, padding is the EOS token (GPT-2).

    Raises:
        ConversionError: no EOS token, or no way to put it after every text.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ConversionError(f"the tokenizer of {path} names no EOS token, which has to end every text")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not gives_scored_form(tokenizer):
        if not tokenizer.is_fast:
            raise ConversionError(f"the tokenizer of {path} adds no EOS token, and only a fast one can be taught to")
        tokenizer.backend_tokenizer.post_processor = _eos_last(tokenizer.eos_token, tokenizer.eos_token_id)
    return tokenizer


def _open_tokenizer(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer, and its special tokens as far as they are named."""
    if file.suffix != ".json":
        return from_sentencepiece(read_sentencepiece(file)), {}
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ConversionError(f"{file} is no tokenizer: {error}") from error
    return tokenizer, _special_tokens(file.with_name("tokenizer_config.json"))


def _find_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        path = next((file for file in found if file.is_file()), path)
    if not path.is_file() or path.suffix not in (".json", ".model"):
        raise ConversionError(f"no tokenizer in {path}: expected a SentencePiece .model or a tokenizer.json")
    return path


def _special_tokens(config_file: Path) -> dict[str, str]:
    """`eos_token`, `pad_token` and `unk_token` of a tokenizer_config.json, if there is one."""
    if not config_file.is_file():
        return {}
    config = json.loads(config_file.read_text(encoding="utf-8"))
    entries = {key: config.get(key) for key in ("eos_token", "pad_token", "unk_token")}
    contents = {key: entry["content"] if isinstance(entry, dict) else entry for key, entry in entries.items()}
    return {key: content for key, content in contents.items() if content}
