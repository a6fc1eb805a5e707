"""`ig-captioner evaluate` on generated data of every form, against slow, obvious references."""

import json
import math
import re
import statistics
import sys
from collections import Counter

import pytest
import torch
import transformers
from evaluation_room import (
    CAPTIONS,
    HELD_OUT,
    KEYS,
    LABELS,
    NAMES,
    PHOTOS,
    TEMPLATES,
    by_name,
    make_images,
    pair_by_pair,
    values,
)
from PIL import Image
from test_evaluation import real_data, slow_accuracy, slow_rank
from transformers import CLIPImageProcessor, CLIPProcessor

from ig_captioner.data.samples import Samples, read_source, split_by_hash
from ig_captioner.data.shards import image_of, is_held_out, read_captions
from ig_captioner.evaluation.contrastive import ContrastiveModel
from ig_captioner.evaluation.ranking import PRIOR_WEIGHTS
from ig_captioner.evaluation.report import git_commit
from ig_captioner.evaluation.retrieval import text_to_image_rows
from ig_captioner.evaluation.rows import bootstrap
from ig_captioner.evaluation.scores import ScoreMatrix
from tiny import assert_clear_order


# Data


def test_all_forms_of_data_give_the_same_samples(room):
    def decode(key, files):
        return image_of(files).tobytes(), json.loads(files["json"])["class_name"]

    expected = [(image.tobytes(), NAMES[label]) for image, label in zip(make_images(PHOTOS), LABELS, strict=True)]
    shards = Samples(str(room / "shards"), decode)
    assert list(shards) == expected and shards.keys == KEYS and shards.skipped == {"empty image file": 1}
    assert list(Samples(str(room / "shards" / "{a.tar,b.tar.gz}"), decode)) == expected
    folder = Samples(str(room / "folder"), decode)
    assert Counter(folder) == Counter(expected)
    folders = [NAMES[label].replace(" ", "_") for label in LABELS]
    assert folder.keys == sorted(f"{name}/{key}" for name, key in zip(folders, KEYS, strict=True))
    few = Samples(str(room / "shards"), decode, limit=5)
    assert len(list(few)) + few.skipped.total() == 5 and few.keys == sorted(few.keys)
    assert set(few) < set(expected) and set(few.keys) < set(KEYS)


def test_a_data_set_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = make_images(4)
    columns = {
        "image": images,
        "label": [1, 0, 1, -1],
        "caption": ["a cat", "", "two cats", "x"],
        "id": ["p", "q", "r", "s"],
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["dog", "cat"]),
        caption=datasets.Value("string"),
        id=datasets.Value("string"),
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "splits")
    data.remove_columns("image").save_to_disk(tmp_path / "blind")
    items = list(read_source(str(tmp_path / "one")))
    assert [key for key, _ in items] == ["p", "q", "r", "s"]
    assert [image_of(files).tobytes() for _, files in items] == [image.tobytes() for image in images]
    labels = [json.loads(files["json"]) for _, files in items]
    assert [(entry["label"], entry.get("class_name")) for entry in labels] == [
        (1, "cat"),
        (0, "dog"),
        (1, "cat"),
        (-1, None),
    ]
    assert read_captions(items[2][1]) == ["two cats"]
    assert list(read_source(str(tmp_path / "splits" / "test"))) == items
    with pytest.raises(ValueError, match="splits/test"):
        read_source(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="no column of images, but label, caption, id"):
        list(read_source(str(tmp_path / "blind")))


def test_folders_have_sidecars_and_places_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    make_images(1)[0].save(tmp_path / "b" / "1.PNG", format="PNG")
    make_images(1)[0].save(tmp_path / "2.png")
    (tmp_path / "2.txt").write_text("a cat")
    (tmp_path / "notes.txt").write_text("no photo")
    (key, plain), (deep, labelled) = read_source(str(tmp_path))
    assert (key, deep) == ("2", "b/1") and plain["txt"] == b"a cat" and "json" not in plain
    assert json.loads(labelled["json"]) == {"class_name": "b", "class_id": 1, "class_folders": 2}


def test_split_by_hash_is_that_of_training():
    held_out, others = split_by_hash(KEYS, HELD_OUT)
    assert sorted(held_out + others) == list(range(PHOTOS))
    assert held_out == [index for index, key in enumerate(KEYS) if is_held_out(key, HELD_OUT)]
    with pytest.raises(ValueError, match="0 samples to tune on and 24 to test on"):
        split_by_hash(KEYS, 1e-9)


# Intervals


def test_bootstrap_covers_a_mean_as_theory_says():
    sample = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    estimate = bootstrap(lambda drawn: {"mean": sample[drawn].mean().item()}, 400)["mean"]
    error = sample.std().item() / math.sqrt(400)
    assert estimate["value"] == sample.mean().item()
    assert estimate["low"] == pytest.approx(sample.mean().item() - 1.96 * error, abs=0.15 * error)
    assert estimate["high"] == pytest.approx(sample.mean().item() + 1.96 * error, abs=0.15 * error)
    assert bootstrap(lambda drawn: {"mean": sample[drawn].mean().item()}, 400)["mean"] == estimate
    assert bootstrap(lambda drawn: {"one": 1.0}, 3)["one"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_text_to_image_draws_images_with_all_their_texts():
    """Three images; the texts of the first are always found, the others never: a draw's recall follows from counts."""
    owners = torch.tensor([0, 0, 0, 1, 2])
    caption = torch.full((3, 5), -1.0)
    caption[0] = 0.0
    matrix = ScoreMatrix(caption, torch.zeros(5), torch.ones(5))
    is_true = torch.arange(3)[:, None] == owners
    (row,) = text_to_image_rows(matrix, is_true, owners)
    assert values(row)["recall_at_1"] == 3 / 5
    generator, recalls = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        drawn = torch.randint(3, (3,), generator=generator).tolist()
        found, all_texts = 3 * drawn.count(0), 3 * drawn.count(0) + drawn.count(1) + drawn.count(2)
        recalls.append(found / all_texts)
    low, high = torch.tensor(recalls, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert (row.metrics["recall_at_1"]["low"], row.metrics["recall_at_1"]["high"]) == pytest.approx((low, high))


# Zero-shot classification


def test_zero_shot_equals_a_slow_loop(evaluate, room, class_scores, processor):
    caption, prior = class_scores
    arguments = ["--data", room / "shards", "--class-names", room / "prompts.json"]
    results = evaluate("zero-shot", *arguments)
    labels = torch.tensor(LABELS)
    test = [index for index, key in enumerate(KEYS) if not is_held_out(key, HELD_OUT)]
    held_out = [index for index in range(PHOTOS) if index not in test]
    rows = by_name(results["tables"]["3 classes"])
    assert list(rows) == ["likelihood", "information gain", "tuned", "blind"]
    assert [rows[name]["prior_weight"] for name in ("likelihood", "information gain", "blind")] == [0, 1, None]
    for name in ("likelihood", "information gain", "tuned"):
        gain = caption - rows[name]["prior_weight"] * prior
        assert values(rows[name]) == slow_accuracy(gain[test], labels[test], NAMES)
        assert rows[name]["predicted"] == [gain[test].argmax(dim=1).tolist().count(index) for index in range(3)]
    likeliest = sum(LABELS[index] == prior.argmax() for index in test)
    assert values(rows["blind"])["top1"] == pytest.approx(likeliest / len(test))
    top1 = {w: slow_accuracy((caption - w * prior)[held_out], labels[held_out], NAMES)["top1"] for w in PRIOR_WEIGHTS}
    assert top1[rows["tuned"]["prior_weight"]] == max(top1.values(), key=lambda share: share.expected)
    of_template = [torch.tensor([len(processor.tokenizer(t.format(n))["input_ids"]) for n in NAMES]) for t in TEMPLATES]
    tokens = sum(of_template)[labels] / len(TEMPLATES)
    nats = (caption - prior)[torch.arange(PHOTOS), labels][test].sum() / tokens[test].sum()
    (gain,) = results["tables"]["True classes"]
    assert values(gain)["nats_per_token"] == pytest.approx(nats.item(), abs=1e-4)
    data = results["data"]
    assert (data["test samples"], data["skipped"]) == (len(test), "1 x empty image file")
    assert data["held-out samples"] == len(held_out)
    assert results["run"]["command"].startswith("ig-captioner evaluate zero-shot ")
    assert (
        f"--held-out-fraction {HELD_OUT}" in results["run"]["command"] and results["run"]["git_commit"] == git_commit()
    )


def test_zero_shot_of_all_forms_of_data_and_batch_sizes(evaluate, room):
    arguments = ["--class-names", room / "prompts.json", "--limit", "20"]
    first = evaluate("zero-shot", "--data", room / "shards", *arguments)
    same = evaluate(
        "zero-shot", "--data", room / "shards", "--batch-size", "1", *arguments, "--templates", room / "templates.txt"
    )
    assert first["tables"] == same["tables"] and first["data"]["limit"] == 20
    folder = evaluate("zero-shot", "--data", room / "folder", *arguments)
    assert folder["data"]["skipped"] == "none" and folder["tables"]["3 classes"][0]["prior_weight"] == 0


def test_labels_by_the_order_of_folders(evaluate, room, tmp_path):
    """Folders cat and hot_dog are 0 and 1: with these names cats count as dogs, and hot dogs as cats."""
    (tmp_path / "names.txt").write_text("hot dog\ncat")
    data = ["--data", room / "folder", "--templates", room / "templates.txt", "--class-names", tmp_path / "names.txt"]
    named = evaluate("zero-shot", *data, output="named")["tables"]["2 classes"]
    placed = evaluate("zero-shot", *data, "--label-field", "class_id", output="placed")["tables"]["2 classes"]
    for right, wrong in zip(named[:2], placed[:2], strict=True):
        assert right["predicted"] == wrong["predicted"]
        assert values(right)["top1"] == pytest.approx(1 - values(wrong)["top1"])


def test_a_picture_of_the_confusions(evaluate, room, tmp_path, monkeypatch):
    arguments = ["--data", room / "shards", "--class-names", room / "prompts.json"]
    pytest.importorskip("matplotlib")
    evaluate("zero-shot", *arguments)
    assert min(Image.open(tmp_path / "out" / "confusion.png").size) > 100
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate("zero-shot", *arguments, output="without")
    assert not (tmp_path / "without" / "confusion.png").exists()


def test_clip_goes_through_the_same_harness(evaluate, room):
    arguments = ["--data", room / "shards", "--class-names", room / "prompts.json", "--clip", room / "clip"]
    rows = evaluate("zero-shot", *arguments)["tables"]["3 classes"]
    assert rows[-1]["name"] == str(room / "clip") and rows[-1]["baseline"]
    clip = transformers.CLIPModel.from_pretrained(room / "clip").eval()
    clip_processor = CLIPProcessor.from_pretrained(room / "clip")
    scores = torch.zeros(PHOTOS, len(NAMES))
    for row, image in enumerate(make_images(PHOTOS)):
        for column, name in enumerate(NAMES):
            texts = []
            for template in TEMPLATES:
                inputs = clip_processor(text=template.format(name), images=image, return_tensors="pt")
                with torch.no_grad():
                    output = clip(**inputs)
                texts.append(output.text_embeds[0])
            mean = torch.stack(texts).mean(dim=0)
            scores[row, column] = output.image_embeds[0] @ mean / mean.norm()
    assert_clear_order(scores)
    test = [index for index, key in enumerate(KEYS) if not is_held_out(key, HELD_OUT)]
    assert values(rows[-1]) == slow_accuracy(scores[test], torch.tensor(LABELS)[test], NAMES)


def test_siglip_reads_padded_texts(processor):
    torch.manual_seed(2)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 12, "projection_size": 16}
    vision = {**size, "image_size": 16, "patch_size": 8}
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    siglip_processor = CLIPProcessor(images, processor.tokenizer)
    texts, contrastive = (
        ["a cat", "a photo of a small hot dog and a bird " * 3],
        ContrastiveModel(siglip, siglip_processor),
    )
    inputs = siglip_processor(
        text=texts, images=make_images(3), padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        expected = siglip(**inputs)
        cosines = (
            contrastive.embed_images(make_images(3), batch_size=2) @ contrastive.embed_texts(texts, batch_size=1).T
        )
        logits = cosines * siglip.logit_scale.exp() + siglip.logit_bias
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-5, rtol=0)


def test_only_dual_encoders_are_contrastive(model):
    with pytest.raises(ValueError, match="IGCaptionerForZeroShotImageClassification is no dual encoder"):
        ContrastiveModel(model, None)


# Retrieval


def test_retrieval_equals_a_slow_loop(evaluate, room, model, processor):
    arguments = ["--data", room / "shards", "--clip", room / "clip"]
    results = evaluate("retrieval", *arguments, "--batch-size", "3")
    assert results["tables"] == evaluate("retrieval", *arguments, "--batch-size", "50")["tables"]
    test = [index for index, key in enumerate(KEYS) if not is_held_out(key, HELD_OUT)]
    texts = [caption for index in test for caption in CAPTIONS[index]]
    images = [make_images(PHOTOS)[index] for index in test]
    caption, prior = pair_by_pair(model, processor, images, texts)
    is_true = torch.tensor([[text in CAPTIONS[index] for text in texts] for index in test])
    assert results["data"]["texts"] == len(texts)
    rows = by_name(results["tables"]["Image to text"])
    assert list(rows) == ["likelihood", "information gain", "tuned", "blind", str(room / "clip")]
    scores = {
        name: caption - rows[name]["prior_weight"] * prior for name in ("likelihood", "information gain", "tuned")
    }
    different = [texts.index(text) for text in dict.fromkeys(texts)]
    for name, matrix in {**scores, "blind": prior.expand_as(caption)}.items():
        assert_clear_order(matrix[:, different])
        check_recall(values(rows[name]), [slow_rank(*row) for row in zip(matrix, is_true, strict=True)])
        first_texts = {texts[max(range(len(texts)), key=row.__getitem__)] for row in matrix.tolist()}
        assert values(rows[name])["distinct_top1"] == len(first_texts)
    first, clip = results["tables"]["Text to image"]
    assert first["name"] == "any prior weight" and clip["name"] == str(room / "clip")
    assert_clear_order(caption[:, different].T)
    check_recall(values(first), [slow_rank(*row) for row in zip(caption.T, is_true.T, strict=True)])
    (gain,) = results["tables"]["True pairs"]
    tokens = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    nats = ((caption - prior) * is_true).sum().item() / (torch.tensor(tokens) * is_true).sum().item()
    assert values(gain)["nats_per_token"] == pytest.approx(nats, abs=1e-4)
    alone = evaluate("retrieval", "--data", room / "shards", "--captions", "1")
    assert alone["data"]["texts"] == len(test)


def check_recall(metrics, found):
    for k in (1, 5, 10):
        assert metrics[f"recall_at_{k}"] == pytest.approx(sum(rank < k for rank in found) / len(found))
    assert metrics["median_rank"] == statistics.median(found) + 1


# Usage


def test_help(run):
    assert run("evaluate", "--help")[::2] == (0, [])
    for task in ("zero-shot", "retrieval", "compositional", "captioning", "linear-probe", "lit"):
        code, lines, errors = run("evaluate", task, "--help")
        assert (code, errors) == (0, [])
        assert "examples:" in lines and any(line.startswith(f"  ig-captioner evaluate {task} ") for line in lines)


WRONG = [
    (["zero-shot", "--data", "x", "--output", "o"], 2, "--class-names"),
    (["zero-shot", "--data", "x", "--output", "o", "--class-names", "cifar11"], 1, "'cifar11'.*cifar10"),
    (["zero-shot", "--data", "nowhere.tar", "--output", "o", "--class-names", "cifar10"], 1, "nowhere.tar"),
    (["retrieval", "--output", "o"], 2, "--data"),
    (["retrieval", "--data", "x", "--output", "o", "--held-out-fraction", "1"], 2, "between 0 and 1, got '1'"),
    (["retrieval", "--data", ".", "--output", "o"], 1, "no usable sample in '.': it is empty"),
    (["lit", "--train", "x", "--output", "o", "--learning-rates", "0"], 2, "positive number, got '0'"),
    (["lit", "--train", "x", "--labelled", "y", "--output", "o"], 1, "--labelled needs --class-names"),
    (["frobnicate"], 2, "frobnicate"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_wrong_usage(run, room, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(room / "model")] if len(arguments) > 1 else []
    result, lines, errors = run("evaluate", *arguments, *model)
    assert (result, lines, len(errors)) == (code, [], 1) and re.search(message, errors[0])


# The shipped checkpoint on real data


@pytest.mark.slow
def test_every_task_with_the_shipped_checkpoint(run, tmp_path):
    root = real_data()
    cifar, flickr = ["--data", f"{root}/cifar10-test-*.tar.gz"], ["--data", f"{root}/flickr8k-val-*.tar"]
    classes, limit = ["--class-names", "cifar10"], ["--limit", "100"]
    pairs = ["--format", "sugarcrepe", "--pairs", f"{root}/json/sugarcrepe", "--data", f"{root}/smoke-coco-ccby.tar"]
    tasks = {
        "zero-shot": [*cifar, *classes, *limit],
        "retrieval": [*flickr, *limit],
        "compositional": pairs,
        "captioning": [*flickr, *limit],
        "linear-probe": ["--train", f"{root}/cifar10-train-0000.tar.gz", *cifar, *classes, *limit],
    }
    results = {}
    for task, arguments in tasks.items():
        code, _, errors = run("evaluate", task, *arguments, "--output", str(tmp_path / task))
        assert (code, errors) == (0, []), task
        results[task] = json.loads((tmp_path / task / "results.json").read_text())["tables"]
    top1 = {task: values(results[task]["10 classes"][0])["top1"] for task in ("zero-shot", "linear-probe")}
    assert top1["zero-shot"] > 0.3 and top1["linear-probe"] > 0.2  # chance: 0.1
    likelihood, _, tuned, _ = results["retrieval"]["Image to text"]
    assert values(tuned)["recall_at_10"] > values(likelihood)["recall_at_10"]
    alone = values(results["compositional"]["All items, text alone"][0])
    assert len(alone) == 8 and alone["all"] > 0.6  # chance: 0.5
    assert values(results["captioning"]["Captions"][0])["cider_d"] > 0.05
