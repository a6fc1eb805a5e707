"""Tries against the obvious: sets of beginnings of texts, and `score` one text at a time."""

import copy
import dataclasses
import json
import random
import sys

import PIL.Image
import pytest
import torch
from small_checkpoint import make_config, make_pipeline, make_tokenizer
from test_pipeline import LABELS
from transformers import dynamic_module_utils

from ig_captioner import (
    CompiledLabels,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerProcessor,
    compile_labels,
    scoring_ig_captioner,
)
from ig_captioner.compiled_labels import checksum
from ig_captioner.evaluation.scores import classify_images, score_pairs
from ig_captioner.label_trie import build_trie
from tiny import BOS, EOS, VARIANTS, naive_scores, padded, random_images, random_texts, tiny_model


def texts_with_shared_beginnings(seed: int, number: int = 30) -> list[list[int]]:
    """Few distinct tokens, so that texts share beginnings, repeat, and are beginnings of one another."""
    generator = random.Random(seed)
    tokens = generator.choice([range(4, 6), range(4, 12), range(4, 40)])
    texts = [[*generator.choices(tokens, k=generator.randint(0, 7)), EOS] for _ in range(number)]
    return [text[:-1] if len(text) > 1 and generator.random() < 0.3 else text for text in texts]


def what_a_position_sees(trie, position: int) -> list[int]:
    """The tokens that a position of the trie's blocks attends to, in order."""
    block, query = divmod(position, trie.tokens.shape[1])
    return [int(trie.tokens[block, key]) for key in range(query + 1) if query < trie.ends[block, key]]


@pytest.mark.parametrize("block_size", [1, 8, 24, 256])
@pytest.mark.parametrize("seed", range(6))
def test_every_node_has_read_the_beginning_it_stands_for(seed, block_size):
    texts = texts_with_shared_beginnings(seed)
    trie = build_trie(*padded(texts), BOS, block_size)
    assert len(trie.nodes) == len({tuple(text[:i]) for text in texts for i in range(len(text))})
    assert len(trie.edge_nodes) == len({tuple(text[:i]) for text in texts for i in range(1, len(text) + 1)})
    for text, edges in zip(texts, trie.text_edges.tolist(), strict=True):
        for i, token in enumerate(text):
            assert trie.edge_tokens[edges[i]] == token
            position = int(trie.nodes[trie.edge_nodes[edges[i]]])
            assert what_a_position_sees(trie, position) == [BOS, *text[:i]]
            assert trie.depths.flatten()[position] == i
        assert set(edges[len(text) :]) <= {len(trie.edge_nodes)}
    assert trie.lengths.tolist() == [len(text) for text in texts]
    assert trie.tokens.shape[1] <= max(block_size, 2 * max(map(len, texts)))


def test_texts_without_tokens_are_named():
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        build_trie(torch.tensor([[5], [0]]), torch.tensor([[1], [0]]), BOS)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_do_not_depend_on_the_company_of_a_text(variant, attn, monkeypatch):
    """Many texts in small blocks, in small passes, several images at once: each pair as if it were alone."""
    model, images = tiny_model(variant, attn=attn), random_images(2)
    texts = texts_with_shared_beginnings(1, number=12) + random_texts()
    with torch.no_grad():
        likelihood, prior = naive_scores(model, images, texts), naive_scores(model, None, texts)
    monkeypatch.setattr(scoring_ig_captioner, "build_trie", lambda *args: build_trie(*args, 16))
    for numbers in (1, 500, 10**7):
        monkeypatch.setitem(scoring_ig_captioner.MAX_NUMBERS_PER_CHUNK, "cpu", numbers)
        with torch.no_grad():
            scores = model.score(images, *padded(texts))
        torch.testing.assert_close(scores.caption_log_likelihood, likelihood, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.prior_log_likelihood, prior, atol=1e-4, rtol=0)


def test_equal_texts_have_exactly_equal_scores():
    texts = texts_with_shared_beginnings(2, number=60)
    scores = tiny_model().score(random_images(), *padded(texts)).information_gain
    first = [texts.index(text) for text in texts]
    assert len(set(first)) < len(texts)
    assert torch.equal(scores, scores[:, first])


def test_no_pass_holds_more_than_it_may(monkeypatch):
    """What grows with texts and images is cut to the limit, or to one block and one node if the limit is smaller."""
    model, limit = tiny_model(), 4000
    monkeypatch.setitem(scoring_ig_captioner.MAX_NUMBERS_PER_CHUNK, "cpu", limit)
    monkeypatch.setattr(scoring_ig_captioner, "build_trie", lambda *args: build_trie(*args, 16))
    logits, inner = [], []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.numel()))
    for layer in model.model.decoder.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: inner.append(output.numel()))
    texts = padded(texts_with_shared_beginnings(3, number=200))
    with torch.no_grad():
        model.score(random_images(5), *texts)
    assert max(logits) <= limit and max(inner) <= limit
    assert len(logits) > 5 and len(inner) > 15


# Compiled texts and labels


def compiled_equal(first: CompiledLabels, second: CompiledLabels) -> bool:
    tries = first.texts.trie, second.texts.trie
    fields = [[getattr(trie, item.name) for item in dataclasses.fields(trie)] for trie in tries]
    tensors = first.texts.tensors(), second.texts.tensors()
    same = all(map(torch.equal, *fields)) and tensors[0].keys() == tensors[1].keys()
    same = same and all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    return same and (first.labels, first.templates) == (second.labels, second.templates)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return make_pipeline(IGCaptionerForZeroShotImageClassification(make_config()).eval())


@pytest.fixture
def compiled(classifier) -> CompiledLabels:
    return compile_labels(classifier.model, classifier.tokenizer, LABELS, ["a photo of a {}.", "{}"])


@pytest.fixture
def photos() -> list[PIL.Image.Image]:
    return [PIL.Image.new("RGB", (9, 7), color) for color in ("red", "green", "white")]


def test_compiled_labels_are_accepted_where_labels_are(classifier, compiled, photos):
    templates = list(compiled.templates)
    plain = classifier(photos, LABELS, hypothesis_template=templates, return_log_likelihoods=True)
    assert classifier(photos, compiled, return_log_likelihoods=True) == plain
    for given in (templates, tuple(templates)):
        assert classifier(photos, compiled, hypothesis_template=given, return_log_likelihoods=True) == plain
    assert (
        classifier(photos, compiled, tokenizer_kwargs={"padding": "max_length"}, return_log_likelihoods=True) == plain
    )
    processor = IGCaptionerProcessor(classifier.image_processor, classifier.tokenizer)
    samples = [(photo, index) for index, photo in enumerate(photos)]
    expected, _ = classify_images(classifier.model, processor, samples, LABELS, templates)
    actual, _ = classify_images(classifier.model, processor, samples, compiled)
    assert all(map(torch.equal, actual, expected))
    with pytest.raises(ValueError, match="have their templates already, got '{}'"):
        classify_images(classifier.model, processor, samples, compiled, "{}")
    pairs = score_pairs(classifier.model, processor, photos, compiled)
    assert pairs.caption_log_likelihood.shape == (3, 6)


def test_compiled_labels_survive_a_folder(classifier, compiled, photos, tmp_path):
    compiled.save(tmp_path / "labels")
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["labels.json", "labels.safetensors"]
    loaded = CompiledLabels.load(tmp_path / "labels")
    assert compiled_equal(loaded, compiled) and len(loaded) == 6
    assert classifier(photos, loaded) == classifier(photos, compiled)


def test_stale_labels_are_refused(classifier, compiled, photos):
    with pytest.raises(ValueError, match=r"hypothesis_template '\{\}', but the labels were compiled with"):
        classifier(photos[0], compiled, hypothesis_template="{}")
    other_tokens = make_pipeline(classifier.model, tokenizer=make_tokenizer("$A </s> </s>"))
    with pytest.raises(ValueError, match="'cat', ...\\) were compiled with another tokenizer"):
        other_tokens(photos[0], compiled)
    weight = classifier.model.model.decoder.norm.weight
    with torch.no_grad():
        weight.add_(0.1)
        with pytest.raises(ValueError, match="compiled with other weights"):
            classifier(photos[0], compiled)
        weight.sub_(0.1)


def test_compiling_needs_evaluation_mode(classifier):
    with pytest.raises(ValueError, match="training mode"):
        compile_labels(classifier.model.train(), classifier.tokenizer, LABELS)


def test_whatever_changes_scores_makes_compiled_labels_stale(classifier, compiled, photos):
    model, fingerprint = classifier.model, compiled.texts.fingerprint
    assert model.fingerprint() == fingerprint == copy.deepcopy(model).fingerprint()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.fingerprint() != fingerprint
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert model.fingerprint() != fingerprint
    hook.remove()
    model.config.text_config.rope_theta = 7.0
    assert model.fingerprint() != fingerprint
    model.config.text_config.rope_theta = 10000.0
    model.config.prior_weight = 0.5  # decides nothing that was compiled
    assert model.fingerprint() == fingerprint


def test_adapters_make_compiled_labels_stale(classifier):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        classifier.model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    model = adapted.get_base_model()
    active = model.fingerprint()
    with adapted.disable_adapter():
        assert model.fingerprint() != active
    assert model.fingerprint() == active


def test_compiled_labels_in_a_pipeline_from_remote_code(classifier, photos, tmp_path, monkeypatch):
    """Where every class is a copy with another identity."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    classifier.save_pretrained(tmp_path / "model")

    def remote_class(file: str, name: str):
        return dynamic_module_utils.get_class_from_dynamic_module(f"{file}.{name}", str(tmp_path / "model"))

    model_class = remote_class("modeling_ig_captioner", type(classifier.model).__name__)
    remote = remote_class("pipeline_ig_captioner", type(classifier).__name__)(
        model=model_class.from_pretrained(tmp_path / "model"),
        tokenizer=classifier.tokenizer,
        image_processor=classifier.image_processor,
        device="cpu",
    )
    assert not isinstance(remote.model, type(classifier.model))
    compiled = compile_labels(remote.model, remote.tokenizer, LABELS)
    assert remote(photos, compiled) == remote(photos, LABELS)
    compiled.save(tmp_path / "labels")
    assert remote(photos, CompiledLabels.load(tmp_path / "labels")) == remote(photos, LABELS)


def test_damaged_folders_are_named(compiled, tmp_path):
    with pytest.raises(ValueError, match="nothing here"):
        CompiledLabels.load(tmp_path / "nothing here")
    compiled.save(tmp_path)
    described = json.loads((tmp_path / "labels.json").read_text())
    changes = [({"format": 99}, "format 99"), ({"labels": ["a"]}, "damaged"), ({"tokens_sha256": ...}, "damaged")]
    for change, message in [*changes, ({"sha256": ...}, "no 'sha256'")]:
        kept = {name: value for name, value in {**described, **change}.items() if value is not ...}
        (tmp_path / "labels.json").write_text(json.dumps(kept))
        with pytest.raises(ValueError, match=message):
            CompiledLabels.load(tmp_path)
    short = dataclasses.replace(compiled.texts, prior_log_likelihood=compiled.texts.prior_log_likelihood[:1])
    dataclasses.replace(compiled, texts=short).save(tmp_path)
    with pytest.raises(ValueError, match=r"6 texts, but priors \(1,\)"):
        CompiledLabels.load(tmp_path)
    cut = dataclasses.replace(compiled.texts, projections=compiled.texts.projections[:, :, :, 1:])
    dataclasses.replace(compiled, texts=cut).save(tmp_path)
    with pytest.raises(ValueError, match=r"projections \(3, 1, 2, \d+, 8\) of blocks"):
        CompiledLabels.load(tmp_path)
    compiled.save(tmp_path)
    tensors = tmp_path / "labels.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot read compiled labels"):
        CompiledLabels.load(tmp_path)


def test_single_damaged_bits_are_named_or_without_effect(compiled, tmp_path):
    """Every 61st bit of both files (a prime: no field is passed over); `benchmarks.damage_labels` tries random ones."""
    compiled.save(tmp_path / "labels")
    for name in ("labels.json", "labels.safetensors"):
        path = tmp_path / "labels" / name
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 61):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(damaged)
            try:
                assert compiled_equal(CompiledLabels.load(tmp_path / "labels"), compiled)
            except ValueError as error:
                assert str(tmp_path / "labels") in str(error)
        path.write_bytes(content)


def test_compiled_labels_are_shown_in_a_line(compiled):
    assert repr(compiled).startswith("CompiledLabels(3 labels ('cat', ") and "in 2 templates" in repr(compiled)
    assert "tensor" not in repr(compiled) and "\n" not in repr(compiled)


def test_score_of_compiled_labels_has_one_number_per_label(classifier, compiled, photos):
    pixels = classifier.image_processor(photos, return_tensors="pt")["pixel_values"]
    for reduction in ("sum", "mean"):
        with torch.no_grad():
            scores = classifier.model.score(pixels, compiled, reduction=reduction)
            texts = classifier.model.score(pixels, compiled.texts, reduction=reduction)
        assert scores.information_gain.shape == (3, 3) and texts.information_gain.shape == (3, 6)
        for name in ("caption_log_likelihood", "prior_log_likelihood", "information_gain"):
            expected = (texts[name][..., :3] + texts[name][..., 3:]) / 2
            assert torch.allclose(scores[name], expected, atol=1e-6)


def test_rows_of_a_weight_that_change_places_are_other_weights():
    """A sum over both would be the same."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    parts = [b"".join(bytes(part) for part in checksum(rows)) for rows in (weight, weight.clone(), weight.flip(0))]
    assert parts[0] == parts[1] != parts[2]
