"""SentencePiece models and tokenizer.json files as tokenizers in big_vision's conventions."""

import io
import struct

import pytest
from test_conversion_reference import random_leaves, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conversion.convert_big_vision import convert
from conversion.reading import ConversionError
from conversion.tokenizer import load_tokenizer, read_sentencepiece
from ig_captioner.checkpoint import load_processor


SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
PIECES = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
PIECES += [(piece, -float(i), NORMAL) for i, piece in enumerate([SPACE + "a", SPACE + "photo", SPACE, "!", ",", "cat"])]
PIECES += [(letter, -20.0, NORMAL) for letter in "acot"]


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message of integers and bytes."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def write_model(path, pieces=PIECES, model_type=1):
    def piece(text: str, score: float, kind: int) -> bytes:
        return message((1, text.encode())) + varint(2 << 3 | 5) + struct.pack("<f", score) + message((3, kind))

    content = [(1, piece(*entry)) for entry in pieces]
    path.write_bytes(message(*content, (2, message((3, model_type), (40, 2))), (3, message((3, 1), (4, 1)))))
    return path


def test_text_is_lowered_punctuation_kept_and_eos_last(tmp_path):
    tokenizer = load_tokenizer(write_model(tmp_path / "c4.model"), max_length=5)
    ids = {piece: i for i, (piece, _, _) in enumerate(PIECES)}
    expected = [ids[SPACE + "a"], ids[SPACE + "photo"], ids[","], ids[SPACE], ids["cat"], ids["!"], 1]
    assert tokenizer("  A   PHOTO, Cat! ")["input_ids"] == expected
    assert tokenizer("a photo, cat!", truncation=True)["input_ids"] == [*expected[:4], 1]  # EOS stays
    batch = tokenizer(["a", "a photo"], padding=True)
    assert batch["input_ids"] == [[3, 1, 0], [3, 4, 1]] and batch["attention_mask"] == [[1, 1, 0], [1, 1, 1]]
    assert tokenizer("")["input_ids"] == [1]
    assert tokenizer("a\u00e9")["input_ids"] == [3, 2, 1]
    assert tokenizer.decode([3, 4, 6, 1, 0], skip_special_tokens=True) == "a photo!"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)


def test_it_survives_saving(tmp_path):
    tokenizer = load_tokenizer(write_model(tmp_path / "c4.model"), max_length=5)
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved", 5)):
        assert again("A photo of a cat!")["input_ids"] == tokenizer("a photo of a cat!")["input_ids"]
        assert again.get_vocab() == tokenizer.get_vocab() and again.model_max_length == 5
        assert (again.pad_token_id, again.eos_token_id) == (0, 1)


def test_it_agrees_with_sentencepiece(tmp_path):
    """On a model trained by sentencepiece itself, with its usual normaliser, on text with everything in it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["A photo of a CAT, dog & bird.", " two  spaces ", "ﬁve\u00a0№ \uff11\uff12\t½ tabs", "naïve Éclair"]
    texts += ["a \u2581 b", "emoji \U0001f600!", "", " ", "don't; re-do (it) 3.14", "e\u0301 combining"]
    lowered = ["".join(c.lower() if c.isascii() else c for c in text) for text in texts]
    for name, extra in {"usual": {}, "bytes": {"byte_fallback": True, "character_coverage": 0.98}}.items():
        writer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lowered * 20), model_writer=writer, vocab_size=330 if extra else 75,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **extra,
        )  # fmt: skip
        path = tmp_path / f"{name}.model"
        path.write_bytes(writer.getvalue())
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ours = load_tokenizer(path, 64)
        assert len(ours) == theirs.get_piece_size()
        for text, low in zip(texts, lowered, strict=True):
            assert ours(text)["input_ids"] == [*theirs.encode(low), 1], (name, text)


def json_tokenizer(path, words=("<pad>", "</s>", "<unk>", "a", "cat")):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(path))
    return path


def test_tokenizer_json_is_brought_to_scored_form(tmp_path):
    tokenizer = load_tokenizer(json_tokenizer(tmp_path / "tokenizer.json"), 64)
    assert tokenizer("a cat a cat")["input_ids"] == [3, 4, 3, 4, 1]
    named = json_tokenizer(tmp_path / "named.json", words=("[P]", "[E]", "<unk>", "a", "cat"))
    with pytest.raises(ConversionError, match="has no token '</s>'"):
        load_tokenizer(named, 64)
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(named), pad_token="[P]", eos_token="[E]", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path / "folder")
    assert load_tokenizer(tmp_path / "folder", 64)("a cat")["input_ids"] == [3, 4, 1]


def test_what_is_no_such_tokenizer(tmp_path):
    with pytest.raises(ConversionError, match="pads with '<pad>', but token 0 is '<unk>'"):
        words = ("<unk>", "</s>", "<pad>", "a")
        load_tokenizer(json_tokenizer(tmp_path / "tokenizer.json", words), 64)
    with pytest.raises(ConversionError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "absent.model", 64)
    for name, content in {"text.model": b"nonsense", "cut.model": b"\x0a\xff", "empty.model": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match="no SentencePiece"):
            read_sentencepiece(tmp_path / name)
    with pytest.raises(ConversionError, match="no SentencePiece unigram model"):
        read_sentencepiece(write_model(tmp_path / "bpe.model", model_type=2))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConversionError, match="is no tokenizer"):
        load_tokenizer(tmp_path / "broken.json", 64)


def test_a_conversion_with_tokenizer_is_complete(tmp_path):
    """Eos ids land in the config, and the folder's processor makes what the model scores."""
    source, model = save(tmp_path / "c.npz", random_leaves()), write_model(tmp_path / "c4.model")
    convert(source, tmp_path / "out", tokenizer=model)
    processor = load_processor(tmp_path / "out")
    assert dict(processor.image_processor.size) == {"height": 8, "width": 8}
    assert processor(text=["A cat!"])["input_ids"][0][-1] == 1 and processor.tokenizer.model_max_length == 9
    (tmp_path / "config.json").write_text('{"model": {}, "eos_id": 4}')
    with pytest.raises(ConversionError, match="eos_id is 4 in the config, but 1 in"):
        convert(source, tmp_path / "other", tokenizer=model, config=tmp_path / "config.json")
    small = save(tmp_path / "small.npz", random_leaves(vocab=8))
    with pytest.raises(ConversionError, match="has 13 tokens, but the checkpoint 8"):
        convert(small, tmp_path / "other", tokenizer=model)
