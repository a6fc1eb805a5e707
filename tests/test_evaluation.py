"""Zero-shot classification and retrieval against slow, obvious references, and the script that runs all tasks."""

import copy
import os
from pathlib import Path

import pytest
import torch
from evaluation_room import make_images, pair_by_pair, png, write_shard

from benchmarks import evaluate_checkpoint
from ig_captioner import (
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    IGZeroShotImageClassificationPipeline,
)
from ig_captioner.cli import build_parser
from ig_captioner.data.prompts import load_prompts
from ig_captioner.data.samples import Samples, label_from_field, labelled_decoder
from ig_captioner.data.shards import BrokenSampleError, first_by_hash, read_captions, read_shard
from ig_captioner.evaluation.compositional import score_own_texts
from ig_captioner.evaluation.ranking import (
    PRIOR_WEIGHTS,
    accuracies,
    ranks,
    recall_metrics,
    true_classes,
    true_pairs,
    tune_prior_weight,
)
from ig_captioner.evaluation.rows import gain_row
from ig_captioner.evaluation.scores import ScoreMatrix, classify_images, score_pairs
from ig_captioner.evaluation.zero_shot import tune_on
from tiny import VARIANTS, tiny_config
from training.train_tokenizer import train_tokenizer


TEXTS = [
    "a dog",
    "two dogs run over the grass .",
    "a red square on a white wall , seen from far away .",
    "a cat",
    "people",
]
CIFAR10_CLASSES = load_prompts("cifar10").class_names


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer([*TEXTS, *(f"a photo of a {name}." for name in CIFAR10_CLASSES)], vocab_size=500)
    return IGCaptionerProcessor(IGCaptionerImageProcessor(size={"height": 16, "width": 16}), tokenizer)


@pytest.fixture(scope="module", params=["prefix", "cross_rotary"])
def model(request, processor):
    torch.manual_seed(0)
    config = tiny_config(
        {**VARIANTS[request.param], "vocab_size": len(processor.tokenizer), "max_position_embeddings": 40}
    )
    return IGCaptionerForZeroShotImageClassification.from_config(config).eval()


def random_matrix(images, texts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ScoreMatrix(
        torch.randn(images, texts, generator=generator) - 9,
        torch.randn(texts, generator=generator) - 9,
        torch.full((texts,), 4.0),
    )


# Scores


def test_matrix_equals_score_pair_by_pair(model, processor):
    images = make_images(5)
    matrix = score_pairs(model, processor, iter(images), TEXTS, batch_size=2)
    caption, prior = pair_by_pair(model, processor, images, TEXTS)
    torch.testing.assert_close(matrix.caption_log_likelihood, caption, atol=1e-4, rtol=0)
    torch.testing.assert_close(matrix.prior_log_likelihood, prior, atol=1e-4, rtol=0)
    assert matrix.text_lengths.tolist() == [len(ids) for ids in processor.tokenizer(TEXTS)["input_ids"]]
    gain = caption - 0.3 * prior
    torch.testing.assert_close(matrix.information_gain(0.3), gain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3, "chunk_size": 1}, {"chunk_size": 7}])
def test_batch_and_chunk_size_change_nothing(model, processor, options):
    images = make_images(5)
    expected = score_pairs(model, processor, images, TEXTS)
    for values, reference in zip(score_pairs(model, processor, images, TEXTS, **options), expected, strict=True):
        torch.testing.assert_close(values, reference, atol=1e-4, rtol=0)


def test_texts_of_each_image_alone_are_scored_in_half_precision_too(model, processor):
    questions = [*zip(make_images(2), (TEXTS[:2], TEXTS[2:]), strict=True)]
    expected = score_own_texts(model, processor, questions)
    found = score_own_texts(copy.deepcopy(model).bfloat16(), processor, questions)
    for half, single in zip(found, expected, strict=True):
        assert half.dtype == torch.float32
        assert torch.allclose(half, single, rtol=0.05, atol=0.5)


def test_equal_texts_share_one_score(model, processor):
    matrix = score_pairs(model, processor, make_images(3), ["a dog", "people", "A dog", "a dog"])
    assert torch.equal(matrix.caption_log_likelihood[:, 0], matrix.caption_log_likelihood[:, 3])
    assert torch.equal(matrix.caption_log_likelihood[:, 0], matrix.caption_log_likelihood[:, 2])  # same tokens
    assert matrix.prior_log_likelihood[0] == matrix.prior_log_likelihood[3]


def test_long_texts_are_cut_to_what_the_model_can_read(model, processor):
    matrix = score_pairs(model, processor, make_images(1), ["dogs and " * 40, "a dog"])
    assert matrix.text_lengths[0] == model.config.text_config.max_position_embeddings


def test_driver_refuses_what_it_cannot_score(model, processor):
    with pytest.raises(ValueError, match="no images"):
        score_pairs(model, processor, [], TEXTS)
    with pytest.raises(ValueError, match="0 texts"):
        score_pairs(model, processor, make_images(1), [])
    with pytest.raises(ValueError, match="batch_size 0"):
        score_pairs(model, processor, make_images(1), TEXTS, batch_size=0)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        score_pairs(model, processor, make_images(1), TEXTS)
    model.eval()


# Ranks and retrieval


def slow_rank(scores, is_true):
    """Wrong answers before the first true one in a sorted list; at equal scores the wrong ones come first."""
    ordered = sorted(zip(scores.tolist(), is_true.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [true for _, true in ordered].index(True)


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "many ties"])
def test_ranks_equal_those_of_a_sorted_list(rounded):
    scores = random_matrix(30, 40).caption_log_likelihood
    scores = scores.round() if rounded else scores
    is_true = torch.rand(30, 40, generator=torch.Generator().manual_seed(3)) < 0.05
    is_true[:, 0] |= ~is_true.any(dim=1)
    expected = [slow_rank(*row) for row in zip(scores, is_true, strict=True)]
    assert ranks(scores, is_true).tolist() == expected


def test_ties_and_nan_count_against():
    is_true = torch.tensor([[True, False, False]])
    assert ranks(torch.tensor([[1.0, 1.0, 0.0]]), is_true).tolist() == [1]
    assert ranks(torch.tensor([[1.0, float("nan"), 2.0]]), is_true).tolist() == [2]
    assert ranks(torch.full((1, 3), float("nan")), is_true).tolist() == [2]
    with pytest.raises(ValueError, match="1 queries without one"):
        ranks(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))


def test_true_pairs_by_text():
    captions = [["a", "b"], ["c"], ["b"]]
    is_true = true_pairs(captions, ["a", "b", "c", "b"])
    assert is_true.int().tolist() == [[1, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]]


def test_recall_by_hand():
    metrics = recall_metrics(torch.tensor([0, 0, 3, 4, 5, 9, 10, 700]))
    assert metrics == {"recall_at_1": 2 / 8, "recall_at_5": 4 / 8, "recall_at_10": 6 / 8, "median_rank": 5.5}


def test_both_directions_of_retrieval():
    """Three images, four texts; the first image has two captions, of which the better one counts."""
    caption = torch.tensor([[-9.0, -1.0, -5.0, -3.0], [-4.0, -2.0, -3.0, -6.0], [-1.0, -5.0, -4.0, -3.0]])
    matrix = ScoreMatrix(caption, torch.tensor([-1.0, -1.0, -4.0, -1.0]), torch.ones(4))
    is_true = true_pairs([["x", "y"], ["z"], ["w"]], ["x", "y", "z", "w"])
    assert ranks(matrix.information_gain(0.0), is_true).tolist() == [0, 1, 1]
    assert recall_metrics(ranks(matrix.information_gain(0.0), is_true))["recall_at_1"] == pytest.approx(1 / 3)
    # at weight 1 "z" gains 3 nats on the others: right for image 1, wrong for image 2
    assert ranks(matrix.information_gain(1.0), is_true).tolist() == [0, 0, 2]
    assert ranks(caption.T, is_true.T).tolist() == [2, 0, 0, 1]
    assert recall_metrics(ranks(caption.T, is_true.T))["recall_at_1"] == pytest.approx(2 / 4)


def test_tuning_finds_the_weight_that_was_planted():
    signal = random_matrix(60, 60, seed=1).caption_log_likelihood + 5 * torch.eye(60)
    prior = 20 * random_matrix(1, 60, seed=2).prior_log_likelihood
    matrix = ScoreMatrix(signal + 0.7 * prior, prior, torch.ones(60))

    def ranks_at(weight):
        return ranks(matrix.information_gain(weight), torch.eye(60, dtype=torch.bool))

    best = tune_prior_weight(ranks_at)
    assert best == pytest.approx(0.7)
    recalls = {weight: recall_metrics(ranks_at(weight))["recall_at_1"] for weight in PRIOR_WEIGHTS}
    assert recalls[best] == max(recalls.values()) > 0.9 > recalls[0.0]
    assert tune_prior_weight(ranks_at, grid=[0.2, 0.6]) == 0.6
    with pytest.raises(ValueError, match="empty"):
        tune_prior_weight(ranks_at, grid=[])


def test_information_gain_per_token_by_hand():
    caption = torch.tensor([[-2.0, -50.0], [-50.0, -4.0]])
    matrix = ScoreMatrix(caption, torch.tensor([-3.0, -10.0]), torch.tensor([2.0, 5.0]))
    gain = gain_row(matrix, torch.eye(2, dtype=torch.bool)).metrics["nats_per_token"]["value"]
    assert gain == pytest.approx((1.0 + 6.0) / 7.0)


# Zero-shot classification


def test_templates_are_ensembled_as_in_the_pipeline(model, processor):
    images, names, templates = make_images(3), ["dog", "cat", "dog"], ["a {}", "two {}s run ."]
    samples = zip(images, [2, 1, 0], strict=True)
    matrix, labels = classify_images(model, processor, samples, names, templates, batch_size=2)
    parts = [pair_by_pair(model, processor, images, [t.format(name) for name in names]) for t in templates]
    mean_caption, mean_prior = ((one + two) / 2 for one, two in zip(*parts, strict=True))
    torch.testing.assert_close(matrix.caption_log_likelihood, mean_caption, atol=1e-4, rtol=0)
    torch.testing.assert_close(matrix.prior_log_likelihood, mean_prior, atol=1e-4, rtol=0)
    assert labels.tolist() == [2, 1, 0]
    pipe = IGZeroShotImageClassificationPipeline(
        model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor
    )
    entries = pipe(images[0], names, hypothesis_template=templates, prior_weight=0.4, return_log_likelihoods=True)
    gains = {entry["label"]: entry["information_gain"] for entry in entries}
    for name, gain in zip(names, matrix.information_gain(0.4)[0].tolist(), strict=True):
        assert gains[name] == pytest.approx(gain, abs=1e-4)


def test_classification_refuses_wrong_labels_and_templates(model, processor):
    image = make_images(1)[0]
    for label in (2, -1):
        with pytest.raises(ValueError, match=f"label {label} of image 0"):
            classify_images(model, processor, [(image, label)], ["dog", "cat"])
    with pytest.raises(ValueError, match="template"):
        classify_images(model, processor, [(image, 0)], ["dog", "cat"], "a photo")


def accuracy(matrix, labels, names, weight=1.0):
    return accuracies(ranks(matrix.information_gain(weight), true_classes(labels, names)), labels)


def slow_accuracy(scores, labels, names):
    """Top-1, top-5 and mean per class, image by image over a sorted list."""
    top1, top5, of_class = [], [], {}
    for row, label in zip(scores, labels.tolist(), strict=True):
        position = slow_rank(row, torch.tensor([name == names[label] for name in names]))
        top1.append(position == 0)
        top5.append(position < 5)
        of_class.setdefault(label, []).append(position == 0)
    means = [sum(hits) / len(hits) for hits in of_class.values()]
    shares = (sum(top1) / len(top1), sum(top5) / len(top5), sum(means) / len(means))
    return dict(zip(("top1", "top5", "mean_per_class"), map(pytest.approx, shares), strict=True))


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.35])
def test_accuracy_equals_a_sorted_list(weight):
    matrix, names = random_matrix(50, 8), [*"abcdefg", "c"]  # a duplicate name, and class 6 never occurs
    matrix.caption_log_likelihood[:, 7] = matrix.caption_log_likelihood[:, 2]
    matrix.prior_log_likelihood[7] = matrix.prior_log_likelihood[2]
    labels = torch.tensor([index % 7 if index % 7 != 6 else 7 for index in range(50)])
    expected = slow_accuracy(matrix.information_gain(weight), labels, names)
    assert accuracy(matrix, labels, names, weight) == expected
    assert 0 < expected["top1"].expected < expected["top5"].expected < 1


def test_classes_of_one_name_are_one_answer():
    matrix = ScoreMatrix(torch.tensor([[-1.0, -2.0, -1.0]]), torch.zeros(3), torch.ones(3))
    for label in (0, 2):
        assert accuracy(matrix, torch.tensor([label]), ["missile", "cat", "missile"])["top1"] == 1
    assert accuracy(matrix, torch.tensor([0]), ["missile", "cat", "rocket"])["top1"] == 0  # only a tie


def test_zero_shot_tuning_takes_the_best_top1_then_the_best_rank():
    labels, names = torch.arange(60) % 10, CIFAR10_CLASSES
    signal = random_matrix(60, 10, seed=1).caption_log_likelihood
    signal[torch.arange(60), labels] += 6
    prior = 30 * random_matrix(1, 10, seed=2).prior_log_likelihood
    matrix = ScoreMatrix(signal + 0.45 * prior, prior, torch.ones(10))
    best = tune_on(matrix, labels, names)
    top1 = {w: accuracy(matrix, labels, names, w)["top1"] for w in PRIOR_WEIGHTS}
    assert top1[best] == max(top1.values()) > 0.9 > top1[0.0] and abs(best - 0.45) < 0.06
    flat = matrix._replace(prior_log_likelihood=torch.zeros(10))
    assert tune_on(flat, labels, names) == PRIOR_WEIGHTS[0]  # equals: the first


# Labels and subsets of shards


def test_labels_from_field():
    by_field = label_from_field(["cat", "dog", "cat"], "c")
    assert [by_field({"json": value}) for value in (b'{"c": "dog"}', b'{"c": "cat"}', b'{"c": 2}')] == [1, 0, 2]
    for value in (b'{"c": "bird"}', b'{"c": 3}', b'{"c": true}'):
        with pytest.raises(ValueError, match="not one of 3 classes"):
            by_field({"json": value})
    with pytest.raises(ValueError, match="there is no 'c'"):
        by_field({"json": b"{}"})
    with pytest.raises(BrokenSampleError, match="bad JSON"):
        by_field({"json": b"{"})


def test_labelled_images_skip_the_broken_and_name_the_unknown(tmp_path):
    image, label = png(make_images(1)[0]), b'{"class_name": "dog"}'
    path = tmp_path / "s.tar"
    write_shard(path, [("a", {"png": image, "json": label}), ("b", {"png": b"", "json": label})])
    samples = Samples(str(path), labelled_decoder(label_from_field(["cat", "dog"])))
    ((good, index),) = samples
    assert good.size == (10, 12) and index == 1
    assert samples.keys == ["a"] and samples.skipped == {"empty image file": 1}
    with pytest.raises(ValueError, match=r"sample 'a'.*'dog'"):
        list(Samples(str(path), labelled_decoder(label_from_field(["cat"]))))


def test_subset_by_hash_is_fixed_and_mixed():
    keys = [f"{name}_{index:04d}" for name in CIFAR10_CLASSES for index in range(200)]  # sorted by class
    chosen = first_by_hash(keys, 300)
    assert chosen == first_by_hash(reversed(keys), 300) and len(chosen) == 300
    assert first_by_hash(keys, 100) < chosen and first_by_hash(keys, None) == set(keys)
    counts = [sum(key.startswith(name) for key in chosen) for name in CIFAR10_CLASSES]
    assert min(counts) > 15 and max(counts) < 45


# The script


def test_script_runs_every_task_on_files_below_the_data_root(monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        return int("captioning" in command)

    monkeypatch.setattr(evaluate_checkpoint, "ig_captioner", run)
    assert evaluate_checkpoint.main(["--data_root", "d", "--output_dir", "o", "--limit", "7"]) == 1
    parsed = [build_parser().parse_args(command) for command in commands]
    assert [str(arguments.output) for arguments in parsed] == [f"o/{name}" for name in evaluate_checkpoint.TASKS]
    for arguments in parsed:
        assert arguments.model is None and arguments.limit == 7  # None: the shipped checkpoint
        given = [vars(arguments).get(name) for name in ("data", "train", "labelled", "pairs")]
        assert all(str(path).startswith("d/") for path in given if path is not None) and arguments.data is not None
    commands.clear()
    assert evaluate_checkpoint.main(["--only", "flickr8k", "cifar10", "--model", "m"]) == 0
    assert [command[1] for command in commands] == ["retrieval", "zero-shot"]
    assert all(command[command.index("--model") + 1] == "m" and "--limit" not in command for command in commands)


# Real data


def real_data():
    default = Path(__file__).parents[1].parent / "shared" / "data"
    root = Path(os.environ.get("IG_CAPTIONER_DATA", default))
    if not (root / "cifar10-test-0000.tar.gz").is_file():
        pytest.skip(f"needs the shards of CIFAR-10 and Flickr8k; none in {root} (IG_CAPTIONER_DATA sets the folder)")
    return str(root)


@pytest.mark.slow
def test_real_labels_agree_and_are_balanced():
    root = real_data()
    by_field, by_index = label_from_field(CIFAR10_CLASSES), label_from_field(CIFAR10_CLASSES, "class_id")
    captions = [f"a photo of a {name}." for name in CIFAR10_CLASSES]
    counts = [0] * 10
    for _, files in read_shard(f"{root}/cifar10-test-0000.tar.gz"):
        assert by_field(files) == captions.index(*read_captions(files)) == by_index(files)
        counts[by_field(files)] += 1
    assert counts == [1000] * 10
