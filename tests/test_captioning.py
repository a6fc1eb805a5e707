"""CIDEr-D, BLEU and METEOR against slow, obvious references or by hand, and the captioning task."""

import json
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from evaluation_room import CAPTIONS, KEYS, PHOTOS, make_images, values

from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.evaluation import captioning
from ig_captioner.evaluation.captioning import captioning_row, cider_d, words
from tiny import assert_clear_order


GENERATED = ["A dog runs on the grass.", "a cat on a mat", "dogs", "two men on a boat in the sea at night", "a cat"]
REFERENCES = [
    ["A dog runs over the grass .", "the dog is running on the grass"],
    ["a cat sits on a mat", "a cat on the mat", "cat on a mat !"],
    ["two cats on a mat"],
    ["two men in a boat", "men on a boat at night", "a boat in the sea", "two men on a boat at sea"],
    ["a cat"],
]


def test_words():
    expected = ["a", "man's", "dog", "it", "doesn't", "bark", "twice", "é"]
    assert words("A man's dog -- it DOESN'T bark, twice!  (é)") == expected


def slow_cider_d(captions, references):
    """By dense vectors over all n-grams of all texts, one n at a time."""

    def ngrams(text, n):
        listed = words(text)
        return [" ".join(listed[i : i + n]) for i in range(len(listed) - n + 1)]

    totals, texts = [0.0] * len(captions), [*captions, *(text for own in references for text in own)]
    for n in (1, 2, 3, 4):
        everything = sorted({g for text in texts for g in ngrams(text, n)})
        found_in = [sum(any(g in ngrams(text, n) for text in own) for own in references) for g in everything]
        rarity = [math.log(len(captions) / max(1, count)) for count in found_in]

        def vector(text, n=n, everything=everything, rarity=rarity):
            weighted = [ngrams(text, n).count(g) * r for g, r in zip(everything, rarity, strict=True)]
            return torch.tensor(weighted, dtype=torch.float64)

        for index, (caption, own) in enumerate(zip(captions, references, strict=True)):
            for text in own:
                ours, theirs = vector(caption), vector(text)
                norm = ours.norm() * theirs.norm()
                cosine = (torch.minimum(ours, theirs) @ theirs / norm).item() if norm else 0.0
                difference = len(words(caption)) - len(words(text))
                totals[index] += 10 / 4 * cosine * math.exp(-(difference**2) / 72) / len(own)
    return totals


def test_cider_equals_dense_vectors():
    scores = cider_d(GENERATED, REFERENCES)
    assert scores.tolist() == pytest.approx(slow_cider_d(GENERATED, REFERENCES), abs=1e-6)
    assert scores[2] == 0 < scores[1] < 10


def test_cider_of_the_reference_itself():
    texts = ["a dog runs on grass", "two cats sleep on mats", "men in some boat far away"]
    assert cider_d(texts, [[text] for text in texts]).tolist() == pytest.approx([10, 10, 10])
    with pytest.raises(ValueError, match="2 captions, 2 images, 1 of them without references"):
        cider_d(["a", "b"], [["a"], []])


def slow_bleu(captions, references):
    """Corpus BLEU-4: clipped counts, geometric mean, brevity penalty by the closest reference."""
    matched, total, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for caption, own in zip(captions, references, strict=True):
        listed, others = words(caption), [words(text) for text in own]
        length += len(listed)
        reference_length += min((abs(len(other) - len(listed)), len(other)) for other in others)[1]
        for n in range(1, 5):
            ours = Counter(tuple(listed[i : i + n]) for i in range(len(listed) - n + 1))
            theirs = [Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1)) for other in others]
            matched[n - 1] += sum(min(c, max(other[g] for other in theirs)) for g, c in ours.items())
            total[n - 1] += sum(ours.values())
    if not all(matched):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / 4)
    return precision * min(1.0, math.exp(1 - reference_length / length))


def test_bleu_equals_a_slow_loop():
    pytest.importorskip("sacrebleu")
    row = captioning_row("greedy", GENERATED, REFERENCES)
    assert values(row)["bleu4"] == pytest.approx(slow_bleu(GENERATED, REFERENCES)) != 0
    assert values(row)["cider_d"] == pytest.approx(sum(slow_cider_d(GENERATED, REFERENCES)) / 5, abs=1e-6)


class TinyWordNet:
    """Of two synonyms."""

    def synsets(self, word):
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in ("boy", "lad")]
        return [SimpleNamespace(lemmas=lambda: lemmas)] if word in ("boy", "lad") else []


def test_meteor_by_hand():
    """Matches: boy and lad, running and runs, quickly; one run of 3 words, of 5 in the caption and 4 in the reference.

    P = 3/5, R = 3/4, F = PR / (0.9 P + 0.1 R), times 1 - 0.5 * (1 run / 3 matches)^3.
    """
    pytest.importorskip("nltk")
    expected = (3 / 5 * 3 / 4) / (0.9 * 3 / 5 + 0.1 * 3 / 4) * (1 - 0.5 / 27)
    captions, references = ["The boy running, quickly now!", "dogs"], [["A lad runs quickly"], ["a cat"]]
    scores = captioning.meteor(captions, [["nothing", *references[0]], references[1]], TinyWordNet())
    assert scores.tolist() == pytest.approx([expected, 0.0])


def test_meteor_is_in_the_row_where_wordnet_is(monkeypatch):
    pytest.importorskip("nltk")
    monkeypatch.setattr(captioning, "load_wordnet", TinyWordNet)
    row = captioning_row("greedy", GENERATED, REFERENCES)
    expected = captioning.meteor(GENERATED, REFERENCES, TinyWordNet()).mean().item()
    assert values(row)["meteor"] == pytest.approx(expected) and 0 < expected < 1
    monkeypatch.setattr(captioning, "load_wordnet", lambda: None)
    assert "meteor" not in captioning_row("greedy", GENERATED, REFERENCES).metrics


def test_no_wordnet_without_nltk_or_its_files(monkeypatch, tmp_path):
    corpus = pytest.importorskip("nltk.corpus")
    with monkeypatch.context() as patch:
        patch.setattr("nltk.data.path", [str(tmp_path)])
        patch.setattr(corpus, "wordnet", corpus.LazyCorpusLoader("wordnet", corpus.reader.WordNetCorpusReader))
        assert captioning.load_wordnet() is None
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    assert captioning.load_wordnet() is None


def test_captioning_on_the_command_line(run, room, processor, tmp_path):
    data = ["--data", str(room / "shards"), "--model", str(room / "model"), "--max-new-tokens", "6", "--output"]
    for size in ("1", "7"):
        code, _, notes = run("evaluate", "captioning", *data, str(tmp_path / size), "--batch-size", size)
        assert code == 0 and len(notes) == 1 and "1 x empty image file (1: 'broken')" in notes[0]
    lines = [(tmp_path / size / "captions.jsonl").read_text().splitlines() for size in ("1", "7")]
    assert lines[0] == lines[1] and len(lines[0]) == PHOTOS
    writer = IGCaptionerForConditionalGeneration.from_pretrained(room / "model").eval()
    pixels = processor(images=make_images(PHOTOS), return_tensors="pt")["pixel_values"]
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    written = writer.generate(pixel_values=pixels, **options)
    assert_clear_order(torch.stack(written.logits).topk(2).values)
    text = processor.batch_decode(written.sequences, skip_special_tokens=True)[3]
    assert json.loads(lines[0][3]) == {"key": KEYS[3], "caption": text.strip(), "references": CAPTIONS[3]}
    results = json.loads((tmp_path / "7" / "results.json").read_text())
    captions = [json.loads(line)["caption"] for line in lines[0]]
    (row,) = results["tables"]["Captions"]
    assert values(row)["cider_d"] == pytest.approx(sum(slow_cider_d(captions, CAPTIONS)) / PHOTOS, abs=1e-6)
    assert results["data"]["different captions"] == len(set(captions))
    assert "bleu4" in row["metrics"] or any("sacrebleu is not installed" in note for note in results["notes"])
    assert "meteor" in row["metrics"] or any("No METEOR: nltk" in note for note in results["notes"])


def test_length_penalties_are_those_of_transformers(run, room, processor, tmp_path):
    data = ["--data", str(room / "shards"), "--model", str(room / "model"), "--max-new-tokens", "6"]
    written = {}
    for penalty in ("-3", "3"):
        output = tmp_path / penalty
        beams = ["--num-beams", "3", f"--length-penalty={penalty}", "--output", str(output)]
        assert run("evaluate", "captioning", *data, *beams)[0] == 0
        written[penalty] = [json.loads(line)["caption"] for line in (output / "captions.jsonl").open()]
        (row,) = json.loads((output / "results.json").read_text())["tables"]["Captions"]
        assert row["name"] == f"3 beams, length penalty {penalty}"
        writer = IGCaptionerForConditionalGeneration.from_pretrained(room / "model").eval()
        pixels = processor(images=make_images(PHOTOS), return_tensors="pt")["pixel_values"]
        options = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": float(penalty)}
        expected = processor.batch_decode(writer.generate(pixel_values=pixels, **options), skip_special_tokens=True)
        assert written[penalty] == [text.strip() for text in expected]
    code, _, errors = run("evaluate", "captioning", *data, "--length-penalty", "2", "--output", str(tmp_path / "no"))
    assert code == 1 and "--length-penalty 2 chooses among beams, but there is one" in errors[-1]
