"""LiT tuning: a text tower for a frozen encoder, on problems that it must solve, and against slow references."""

import json
import math

import pytest
import torch
from evaluation_room import HELD_OUT, png, values, write_shard
from PIL import Image

from ig_captioner import IGCaptionerForZeroShotImageClassification
from ig_captioner.checkpoint import load_model, load_processor
from ig_captioner.data.shards import is_held_out
from ig_captioner.evaluation.linear_probe import mean_pooled_features
from ig_captioner.evaluation.lit import (
    DualEncoder,
    Pairs,
    Recipe,
    choose_tower,
    contrastive_loss,
    load_tower,
    rank_captions,
    read_pairs,
    save_tower,
    train,
)


COLOURS = {"cat": (250, 20, 20), "hot dog": (20, 250, 20), "bird": (20, 20, 250)}
NAMES = list(COLOURS)
SMALL = Recipe(steps=60, batch_size=12, learning_rate=3e-3, width=32, layers=1)


def colourful(number):
    """Images whose colour says what they show, shades apart; name and image of each."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        name = NAMES[index % 3]
        shade = torch.randint(-20, 21, (3,), generator=generator).tolist()
        colour = tuple(max(0, min(255, part + change)) for part, change in zip(COLOURS[name], shade, strict=True))
        yield name, Image.new("RGB", (16, 16), colour)


@pytest.fixture(scope="module")
def pairs():
    """Features that say what is in the image, with two captions each."""
    generator = torch.Generator().manual_seed(0)
    prototypes = 3 * torch.randn(3, 8, generator=generator) + 10
    features = prototypes[torch.arange(60) % 3] + torch.randn(60, 8, generator=generator)
    return Pairs(features, [[f"a photo of a {NAMES[i % 3]}.", f"a small {NAMES[i % 3]}"] for i in range(60)])


def test_a_toy_problem_is_solved(pairs, processor):
    tower = train(pairs.select(range(45)), processor.tokenizer, SMALL)
    new = pairs.select(range(45, 60))
    assert (rank_captions(tower, new) == 0).double().mean() > 0.9
    scores = tower.score_classes(new.features, NAMES, ["a photo of a {}.", "a small {}"])
    assert (scores.argmax(dim=1) == torch.arange(45, 60) % 3).double().mean() > 0.9
    assert scores.abs().max() <= 1 + 1e-5


def test_the_same_recipe_gives_the_same_tower(pairs, processor):
    short = SMALL._replace(steps=4)
    torch.manual_seed(1)
    first = train(pairs, processor.tokenizer, short).state_dict()
    torch.manual_seed(2)  # nobody else's draws matter
    state = torch.get_rng_state()
    again = train(pairs, processor.tokenizer, short).state_dict()
    assert torch.equal(state, torch.get_rng_state())  # and it leaves theirs alone
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = train(pairs, processor.tokenizer, short._replace(seed=1)).state_dict()
    assert not torch.equal(first["text_projection.weight"], other["text_projection.weight"])
    with pytest.raises(ValueError, match="at least two pairs, got 1"):
        train(pairs.select([0]), processor.tokenizer, short)


def test_the_best_recipe_is_taken(pairs, processor):
    recipes = [SMALL._replace(learning_rate=rate) for rate in (1e-9, 3e-3, 1e-8)]
    parts = pairs.select(range(40)), pairs.select(range(40, 60))
    tower, rows = choose_tower(*parts, processor.tokenizer, recipes)
    assert [row.name for row in rows] == ["learning rate 1e-09", "learning rate 0.003, taken", "learning rate 1e-08"]
    expected = train(parts[0], processor.tokenizer, recipes[1])
    assert torch.equal(tower.text_projection.weight, expected.text_projection.weight)
    found = rank_captions(expected, parts[1])
    assert values(rows[1])["recall_at_1"] == (found == 0).double().mean().item() > values(rows[0])["recall_at_1"]


def test_loss_equals_a_slow_loop_with_equal_captions(processor):
    torch.manual_seed(0)
    features, texts = torch.randn(4, 8), ["a cat", "a small hot dog", "a cat", "bird"]
    model = DualEncoder(processor.tokenizer, features, SMALL).eval()
    with torch.no_grad():
        tokens, mask = model.encode(texts)
        loss = contrastive_loss(model.logits(features, tokens, mask), tokens.masked_fill(mask == 0, -1)).item()
        images = model.embed_features(features)
        alone = torch.cat([model.embed_tokens(*model.encode([text])) for text in texts])  # without padding
    logits = (images @ alone.T / 0.07).tolist()

    def cross_entropy(row, right):
        total = math.log(sum(map(math.exp, row)))
        return sum(total - row[index] for index in right) / len(right)

    same = [[0, 2], [1], [0, 2], [3]]
    columns = [list(column) for column in zip(*logits, strict=True)]
    expected = [cross_entropy(row, same[i]) + cross_entropy(columns[i], same[i]) for i, row in enumerate(logits)]
    assert loss == pytest.approx(sum(expected) / 8, abs=1e-4)


def test_the_image_encoder_is_untouched(model, processor):
    before = {name: values.clone() for name, values in model.state_dict().items()}
    images = [image for _, image in colourful(6)]
    pairs = read_pairs(model, processor, zip(images, [["a cat"], ["bird"]] * 3, strict=True))
    torch.testing.assert_close(pairs.features, mean_pooled_features(model, processor, images, 1))
    assert not pairs.features.requires_grad and pairs.captions == [["a cat"], ["bird"]] * 3
    train(pairs, processor.tokenizer, SMALL._replace(steps=3))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lit_on_the_command_line(evaluate, run, room, tmp_path):
    samples = []
    for index, (name, image) in enumerate(colourful(90)):
        labels = {"class_name": name, "captions": [f"a photo of a {name}.", f"a small {name}"]}
        samples.append((f"p{index}", {"png": png(image), "json": json.dumps(labels).encode()}))
    write_shard(tmp_path / "train.tar", samples[:60])
    write_shard(tmp_path / "test.tar", samples[60:])
    keys = [key for key, _ in samples]
    size = ["--steps", 60, "--batch-size", 16, "--width", 32, "--layers", 1, "--learning-rates", "1e-9", "3e-3"]
    data = ["--train", tmp_path / "train.tar", "--data", tmp_path / "test.tar"]
    classes = ["--labelled", tmp_path / "test.tar", "--class-names", room / "prompts.json"]
    results = evaluate("lit", *data, *classes, *size)
    (found,), (images,) = results["tables"]["Image to text"], results["tables"]["Text to image"]
    (classified,) = results["tables"]["3 classes"]
    assert values(found)["recall_at_1"] > 0.9 and values(found)["distinct_top1"] <= 6
    assert values(images)["recall_at_5"] > 0.9 and values(classified)["top1"] > 0.9
    held_out = sum(is_held_out(key, HELD_OUT) for key in keys[:60])
    test = sum(not is_held_out(key, HELD_OUT) for key in keys[60:])
    assert (results["data"]["held-out training samples"], results["data"]["training samples"]) == (
        held_out,
        60 - held_out,
    )
    assert (results["data"]["test samples"], results["data"]["labelled test samples"]) == (test, test)
    assert "--learning-rates 1e-09 0.003 " in results["run"]["command"]
    rates = results["tables"]["Learning rates on held-out training pairs, image to text"]
    assert [row["name"] for row in rates] == ["learning rate 1e-09", "learning rate 0.003, taken"]
    code, lines, errors = run("evaluate", "lit", *map(str, data[:2]), "--output", str(tmp_path / "none"))
    assert (code, lines, len(errors)) == (1, [], 1) and "nothing to test on" in errors[0]
    code, lines, errors = run("evaluate", "lit", *map(str, data[2:]), "--output", str(tmp_path / "none"))
    assert (code, lines, len(errors)) == (1, [], 1) and "either --train" in errors[0]


@pytest.mark.parametrize("pooling", ["mean", "tokens"])
def test_a_trained_tower_is_measured_as_it_was_saved(evaluate, room, tmp_path, pooling):
    captioner = load_model(IGCaptionerForZeroShotImageClassification, room / "model").eval()
    tools = load_processor(room / "model")
    samples = list(colourful(30))
    shard = [(f"p{i}", {"png": png(image), "txt": f"a {name}".encode()}) for i, (name, image) in enumerate(samples)]
    write_shard(tmp_path / "test.tar", shard)
    pairs = read_pairs(captioner, tools, ((image, [f"a {name}"]) for name, image in samples), pooling)
    tower = train(pairs, tools.tokenizer, SMALL._replace(pooling=pooling, steps=10))
    save_tower(tower, tmp_path / "tower")
    loaded = load_tower(tmp_path / "tower", tools.tokenizer)
    assert loaded.recipe == tower.recipe
    texts = ["a cat", "a bird"]
    assert torch.equal(loaded.score(pairs.features, texts), tower.score(pairs.features, texts))
    results = evaluate("lit", "--tower", tmp_path / "tower", "--data", tmp_path / "test.tar")
    test = [index for index in range(30) if not is_held_out(f"p{index}", HELD_OUT)]
    recall = (rank_captions(tower, pairs.select(test)) < 1).float().mean().item()
    assert values(results["tables"]["Image to text"][0])["recall_at_1"] == pytest.approx(recall)
    assert f"pooling {pooling}" in results["data"]["recipe"]
