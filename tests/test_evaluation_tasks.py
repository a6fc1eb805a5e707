"""Compositional sets in their public formats, and the linear probe, against slow, obvious references."""

import json
import re

import pytest
import torch
from evaluation_room import HELD_OUT, KEYS, LABELS, PAIRS, PHOTOS, by_name, make_images, pair_by_pair, values

from ig_captioner.data.shards import is_held_out
from ig_captioner.evaluation import compositional, linear_probe
from ig_captioner.evaluation.compositional import Item, ItemScores, find_name, read_items
from ig_captioner.evaluation.ranking import PRIOR_WEIGHTS
from tiny import assert_clear_order


# Compositional sets


def test_files_are_read_as_published(sets):
    items = read_items("sugarcrepe", sets / "sugarcrepe")
    assert len(items) == 13
    assert items[0] == Item("replace_obj", ("000000000003",), ("a small cat 3", "hot 3"))
    assert read_items("sugarcrepe", sets / "sugarcrepe" / "swap_att.json") == items[5:]
    aro = read_items("aro", sets / "visual_genome_relation.json")
    assert aro[3] == Item("visual_genome_relation", ("000000000001",), ("a cat 3", "3 a cat"), (1, 3, 7, 8))
    winoground = read_items("winoground", sets)
    assert winoground[2] == Item("winoground", ("ex_2_img_0", "ex_2_img_1"), ("a cat 2", "cat a 2"))


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("sugarcrepe", "[]", "pairs.json is no file of sugarcrepe"),
        ("sugarcrepe", "{}", "no items in"),
        ("sugarcrepe", '{"0": {"filename": "a.jpg"}}', "no file of sugarcrepe: KeyError: 'caption'"),
        ("aro", '{"0": 1}', "no file of aro"),
        ("winoground", "{", "no file of winoground"),
        ("other", "", "one of sugarcrepe, aro, winoground, got 'other'"),
    ],
)
def test_wrong_files_are_named(tmp_path, format, content, message):
    (tmp_path / "pairs.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_items(format, tmp_path / "pairs.json")


def test_a_folder_without_files_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no \.jsonl file in"):
        read_items("winoground", tmp_path)


def test_names_in_keys():
    names = {"000000000001", "ex_1_img_0"}
    keys = ("val/coco_000000000001", "000000000001", "a/ex_1_img_0", "img_0", "000000000002")
    assert [find_name(key, names) for key in keys] == ["000000000001", "000000000001", "ex_1_img_0", None, None]


def slow_right(scores):
    """Text and image score of one item, from its table [I][K]; ties count against."""
    images, texts = range(len(scores)), range(len(scores[0]))
    text = all(scores[i][i] > scores[i][k] for i in images for k in texts if k != i)
    image = all(scores[i][i] > scores[j][i] for i in images for j in images if j != i)
    return text, image


@pytest.mark.parametrize(("images", "texts"), [(1, 2), (1, 5), (2, 2)])
def test_right_answers_equal_a_slow_loop(images, texts):
    scores = torch.randn(300, images, texts, generator=torch.Generator().manual_seed(0)).mul(2).round()  # with ties
    expected = [slow_right(item) for item in scores.tolist()]
    assert compositional.text_is_right(scores).tolist() == [text for text, _ in expected]
    assert compositional.image_is_right(scores).tolist() == [image for _, image in expected]
    assert 0 < sum(text for text, _ in expected) < 300


def test_items_of_different_numbers_of_texts():
    scores = [torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0]])]
    stacked = compositional.stack_scores(scores, [torch.tensor([-9.0, 3.0, -1.0]), torch.tensor([1.0, 1.0])])
    assert compositional.text_is_right(stacked.information_gain(0.0)).tolist() == [False, True]
    assert compositional.text_is_right(stacked.information_gain(1.0)).tolist() == [True, True]
    row = compositional.blind_row([torch.tensor([-9.0, 3.0, -1.0]), torch.tensor([2.0, 1.0])], ["a", "b"])
    assert values(row) == {"a": 0.0, "b": 1.0, "all": 0.5}


def test_tuning_finds_the_weight_that_was_planted():
    generator = torch.Generator().manual_seed(0)
    prior = 20 * torch.randn(200, 2, generator=generator)
    signal = torch.randn(200, 1, 2, generator=generator) + torch.tensor([4.0, 0.0])
    scores = ItemScores(signal + 0.6 * prior[:, None], prior)
    assert compositional.tune_on(scores) == pytest.approx(0.6, abs=0.06)


def test_sugarcrepe_equals_a_slow_loop(evaluate, sets, room, model, processor):
    arguments = ["--format", "sugarcrepe", "--pairs", sets / "sugarcrepe"]
    with_photos = [*arguments, "--data", sets / "photos.tar", "--clip", room / "clip"]
    results = evaluate("compositional", *with_photos)
    assert results["tables"] == evaluate("compositional", *with_photos, "--batch-size", "1")["tables"]
    assert results["data"]["items"] == 13 and results["data"]["items skipped for a missing image"] == 1
    rows = by_name(results["tables"]["Items with their images"])
    assert list(rows) == ["likelihood", "information gain", "tuned", "blind", str(room / "clip")]
    right = {name: {} for name in ("likelihood", "information gain", "blind")}
    blind = {category: [] for category in PAIRS}
    for category, pairs in PAIRS.items():
        for name, *texts in pairs:
            index, stem = int(name[:-4]), name[:-4]
            caption, prior = pair_by_pair(model, processor, make_images(12)[index % 12 : index % 12 + 1], texts)
            assert_clear_order(torch.stack([caption[0], caption[0] - prior, prior]))
            blind[category].append(bool(prior[0] > prior[1]))
            if index == 99 or is_held_out(stem, HELD_OUT):
                continue
            for row, scores in zip(right, (caption[0], caption[0] - prior, prior), strict=True):
                right[row].setdefault(category, []).append(bool(scores[0] > scores[1]))
    assert sum(map(len, right["blind"].values())) == results["data"]["test samples"]
    for name, columns in right.items():
        check_shares(rows[name], columns)
    assert rows["tuned"]["prior_weight"] in PRIOR_WEIGHTS
    (alone,) = results["tables"]["All items, text alone"]
    check_shares(alone, blind)


def check_shares(row, columns):
    everything = [right for column in columns.values() for right in column]
    shares = {name: sum(column) / len(column) for name, column in {**columns, "all": everything}.items()}
    assert values(row) == pytest.approx(shares)


def test_boxes_are_cut_out(evaluate, sets, model, processor):
    pairs = sets / "visual_genome_relation.json"
    results = evaluate("compositional", "--format", "aro", "--pairs", pairs, "--data", sets / "photos.tar")
    likelihood, gain, *_ = results["tables"]["Items with their images"]
    right = {0.0: [], 1.0: []}
    for index in range(12):
        if is_held_out(f"{index // 2:012d}", HELD_OUT):
            continue
        image = make_images(12)[index // 2].crop((1, 2 + index % 2, 7, 7 + index % 2))
        caption, prior = pair_by_pair(model, processor, [image], [f"a cat {index}", f"{index} a cat"])
        for weight, found in right.items():
            scores = caption[0] - weight * prior
            assert_clear_order(scores)
            found.append(bool(scores[0] > scores[1]))
    for row, weight in ((likelihood, 0.0), (gain, 1.0)):
        assert values(row) == {"visual_genome_relation": pytest.approx(sum(right[weight]) / len(right[weight]))}


def test_winoground_has_text_image_and_group_scores(evaluate, sets, model, processor):
    arguments = ["--format", "winoground", "--pairs", sets / "examples.jsonl", "--data", sets / "images"]
    results = evaluate("compositional", *arguments)
    assert results["data"]["items"] == 7 and results["data"]["items skipped for a missing image"] == 1
    rows = by_name(results["tables"]["Items with their images"])
    assert list(results["tables"]) == ["Items with their images"]
    test = [index for index in range(6) if not is_held_out(f"ex_{index}_img_0", HELD_OUT)]
    for name, weight in (("likelihood", 0.0), ("information gain", 1.0)):
        right = []
        for index in test:
            images, texts = make_images(12)[2 * index : 2 * index + 2], [f"a cat {index}", f"cat a {index}"]
            caption, prior = pair_by_pair(model, processor, images, texts)
            scores = caption - weight * prior
            assert_clear_order(torch.cat([scores, scores.T]))
            right.append(slow_right(scores.tolist()))
        shares = {
            "text": sum(text for text, _ in right) / len(test),
            "image": sum(image for _, image in right) / len(test),
            "group": sum(text and image for text, image in right) / len(test),
        }
        assert values(rows[name]) == pytest.approx(shares)
    assert values(rows["blind"]) == {"text": 0, "image": 0, "group": 0}


def test_text_alone(run, sets, room, tmp_path):
    options = ["--model", str(room / "model"), "--output", str(tmp_path), "--limit", "5"]
    arguments = ["evaluate", "compositional", "--format", "sugarcrepe", "--pairs", str(sets / "sugarcrepe")]
    assert run(*arguments, *options)[0] == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["tables"]) == ["All items, text alone"] and results["data"]["items"] == 5
    pairs = ["--format", "winoground", "--pairs", str(sets / "examples.jsonl")]
    code, lines, errors = run("evaluate", "compositional", *pairs, *options)
    assert (code, lines, len(errors)) == (1, [], 1) and "--data is missing" in errors[0]
    photos = ["--data", str(room / "shards")]
    code, lines, errors = run(*arguments, *options, *photos)
    assert (code, lines, len(errors)) == (1, [], 1) and re.search("none of 5 items", errors[0])


# Linear probe


def test_ridge_regression_equals_gradient_descent():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 4, generator=generator) * 3 + 5, torch.arange(30) % 3
    features[:, 0] += labels
    probe = linear_probe.fit(features, labels, 3, penalty=0.1)
    scaled = ((features - features.mean(dim=0)) / features.std(dim=0, correction=0)).double()
    targets = torch.nn.functional.one_hot(labels, 3).double()
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (3,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = (scaled @ weight + bias - targets).square().sum() / 30 + 0.1 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(probe(features), (scaled @ weight + bias).detach(), atol=1e-6, rtol=0)
    constant = torch.cat([features, torch.ones(30, 1)], dim=1)  # a feature without variance changes nothing
    torch.testing.assert_close(linear_probe.fit(constant, labels, 3, 0.1)(constant), probe(features))


def test_shots_are_fixed_and_as_many_as_there_are():
    keys, labels = [f"k{index}" for index in range(40)], [index % 2 for index in range(39)] + [2]
    chosen = linear_probe.choose_shots(keys, labels, 5)
    assert [sum(labels[index] == label for index in chosen) for label in range(3)] == [5, 5, 1]
    assert linear_probe.count_shots([labels[index] for index in chosen]) == "1 to 5 per class"
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = linear_probe.choose_shots([keys[index] for index in order], [labels[index] for index in order], 5)
    assert {keys[order[index]] for index in shuffled} == {keys[index] for index in chosen}


def test_probe_on_the_command_line(evaluate, room, model, processor):
    data = ["--data", room / "shards", "--train", room / "folder", "--class-names", room / "prompts.json"]
    options = ["--shots", "4", "--clip", room / "clip"]
    results = evaluate("linear-probe", *data, *options, "--batch-size", "5")
    again = evaluate("linear-probe", *data, *options, "--batch-size", "2")
    (ours, clip), (same, _) = results["tables"]["3 classes"], again["tables"]["3 classes"]
    assert values(ours) == values(same) and clip["baseline"] and not ours["baseline"]
    assert results["data"]["shots"] == "4 per class" and ours["penalty"] in linear_probe.PENALTIES
    names = {0: "cat", 1: "hot_dog"}
    keys = [f"{names[label]}/{key}" for key, label in zip(KEYS, LABELS, strict=True)]
    shots = linear_probe.choose_shots(keys, LABELS, 4)
    features = []
    for image in make_images(PHOTOS):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = model.model.vision_model(pixels).last_hidden_state[0]
        features.append(states[: len(states) - model.config.vision_config.num_register_tokens].mean(dim=0))
    features, labels = torch.stack(features), torch.tensor(LABELS)
    test = [index for index, key in enumerate(KEYS) if not is_held_out(key, HELD_OUT)]
    probe = linear_probe.fit(features[shots], labels[shots], 3, ours["penalty"])
    scores = probe(features[test])
    assert_clear_order(scores)
    right = scores.argmax(dim=1) == labels[test]
    assert values(ours)["top1"] == pytest.approx(right.double().mean().item())
