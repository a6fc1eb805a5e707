"""Calibration and abstaining: against slow, obvious references, and from `evaluate zero-shot` into the pipeline."""

import json
import math
import re
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from evaluation_room import (
    HELD_OUT,
    KEYS,
    LABELS,
    NAMES,
    PHOTOS,
    TEMPLATES,
    by_name,
    make_images,
    png,
    values,
    write_shard,
)
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from ig_captioner import (
    DEFAULT_CHECKPOINT,
    IGCaptionerConfig,
    IGCaptionerForZeroShotImageClassification,
    IGZeroShotImageClassificationPipeline,
)
from ig_captioner.data.shards import is_held_out
from ig_captioner.evaluation import calibration
from ig_captioner.evaluation.calibration import (
    TEMPERATURES,
    Answers,
    abstain_threshold,
    accuracy_of_kept,
    auroc,
    bin_by_score,
    coverage_curve,
    expected_calibration_error,
    fit_temperature,
    is_right,
    merge_equal_names,
    resampled_temperature,
)
from ig_captioner.evaluation.plots import draw_coverage, draw_reliability
from ig_captioner.evaluation.rows import bootstrap
from ig_captioner.evaluation.scores import ScoreMatrix
from ig_captioner.evaluation.zero_shot import save_calibration


def slow_softmax(scores: list[float], temperature: float) -> list[float]:
    highest = max(scores)
    weights = [math.exp((score - highest) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def slow_nll(scores: torch.Tensor, labels: list[int], temperature: float) -> float:
    rows = zip(scores.tolist(), labels, strict=True)
    return sum(-math.log(slow_softmax(row, temperature)[label]) for row, label in rows) / len(labels)


def slow_ece(certainty: list[float], right: list[bool], bins: int = 15) -> float:
    error = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [i for i, score in enumerate(certainty) if low < score <= high or (index == 0 and score == 0)]
        if inside:
            score = sum(certainty[i] for i in inside) / len(inside)
            error += len(inside) / len(certainty) * abs(score - sum(right[i] for i in inside) / len(inside))
    return error


def slow_certainty(scores: torch.Tensor, labels: list[int], temperature: float) -> tuple[list[float], list[bool]]:
    """The highest probability of each row, and whether it is that of the label."""
    probabilities = [slow_softmax(row, temperature) for row in scores.tolist()]
    right = [row.index(max(row)) == label for row, label in zip(probabilities, labels, strict=True)]
    return [max(row) for row in probabilities], right


def slow_auroc(higher: list[float], lower: list[float]) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in higher for b in lower]
    return sum(pairs) / len(pairs)


def planted(number: int, temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of four classes, and labels drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(number, 4, generator=generator)
    labels = torch.multinomial((scores / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    return scores, labels


# Temperature


def test_the_fitted_temperature_is_that_of_a_fine_grid():
    scores, labels = planted(60, 3.0)
    grid = [1.005**step for step in range(-100, 500)]  # 0.6 to 12
    losses = [slow_nll(scores, labels.tolist(), temperature) for temperature in grid]
    best = losses.index(min(losses))
    assert 0 < best < len(grid) - 1
    assert grid[best - 1] < fit_temperature(scores, labels) < grid[best + 1]


def test_a_planted_temperature_is_found_and_scales_with_the_scores():
    for temperature in (0.3, 1.0, 4.0):
        scores, labels = planted(5000, temperature)
        fitted = fit_temperature(scores, labels)
        assert fitted == pytest.approx(temperature, rel=0.08)
        assert fit_temperature(2 * scores + 7, labels) == pytest.approx(2 * fitted)


def test_temperatures_without_a_minimum():
    scores, labels = planted(50, 1.0)
    lowest, highest = TEMPERATURES
    assert fit_temperature(scores, scores.argmax(dim=1)) < 0.1  # all are right: the lower, until the slope is zero
    assert fit_temperature(0.001 * scores, scores.argmax(dim=1)) == pytest.approx(lowest)
    assert fit_temperature(scores, scores.argmin(dim=1)) == pytest.approx(highest)
    assert fit_temperature(torch.zeros(50, 4), labels) == pytest.approx(1)
    with pytest.raises(ValueError, match="1 of 200 scores are not finite"):
        fit_temperature(scores.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)), labels)


def test_one_newton_step_is_near_the_refitted_temperature():
    scores, labels = planted(500, 2.0)
    fitted = fit_temperature(scores, labels)
    metrics = resampled_temperature(scores, labels, fitted)
    assert metrics(torch.arange(500))["temperature"] == pytest.approx(fitted)
    generator, refitted = torch.Generator().manual_seed(0), []
    for _ in range(30):
        drawn = torch.randint(500, (500,), generator=generator)
        refitted.append(fit_temperature(scores[drawn], labels[drawn]))
        assert metrics(drawn)["temperature"] == pytest.approx(refitted[-1], rel=0.05)
    assert max(refitted) / min(refitted) > 1.2  # there was something to follow


def test_resampled_temperatures_stay_in_range():
    scores, _ = planted(20, 1.0)
    for right in (scores.argmax(dim=1), scores.argmin(dim=1)):
        fitted = fit_temperature(scores, right)
        estimate = bootstrap(resampled_temperature(scores, right, fitted), 20, resamples=50)["temperature"]
        assert TEMPERATURES[0] <= estimate["low"] <= estimate["value"] <= estimate["high"] <= TEMPERATURES[1]
        assert estimate["value"] == pytest.approx(fitted)


# Errors and intervals


def test_calibration_error_equals_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    certainty = torch.rand(300, generator=generator).double()
    edges = torch.tensor([0.0, 1 / 15, 0.2, 0.6, 1.0, 1.0]).double()
    certainty = torch.cat([certainty, edges])
    right = torch.rand(306, generator=generator) < certainty.square()
    answers = Answers(certainty, right)
    assert expected_calibration_error(answers) == pytest.approx(slow_ece(certainty.tolist(), right.tolist()))
    bins = bin_by_score(answers)
    distances = (bins.score - bins.right).abs() * bins.images / 306
    assert distances.nansum().item() == pytest.approx(expected_calibration_error(answers))
    assert bins.images.sum() == 306
    sure = Answers(torch.ones(4), torch.tensor([True, False, True, True]))
    assert expected_calibration_error(sure) == 0.25 and bin_by_score(sure).images.tolist() == [0] * 14 + [4]


def test_centred_intervals_are_moved_by_the_bias_of_resampling():
    sample = torch.randn(50, generator=torch.Generator().manual_seed(3)).double()
    sample -= sample.mean() - 0.01

    def metrics(drawn):
        return {"distance": abs(sample[drawn].mean().item())}

    plain, centred = (bootstrap(metrics, 50, centred=names)["distance"] for names in ((), ("distance",)))
    generator = torch.Generator().manual_seed(0)
    metrics_of_draws = [metrics(torch.randint(50, (50,), generator=generator))["distance"] for _ in range(1000)]
    bias = sum(metrics_of_draws) / 1000 - plain["value"]
    assert bias > 0.01 and centred["value"] == plain["value"]
    assert plain["low"] < bias < plain["high"]
    assert centred["low"] == 0 and centred["high"] == pytest.approx(plain["high"] - bias)


def test_classes_of_one_name_are_one():
    names, labels = ["cat", "dog", "cat", "bird"], torch.tensor([2, 3, 1, 0])
    matrix = ScoreMatrix(torch.arange(16.0).view(4, 4), torch.arange(4.0), torch.ones(4))
    merged, found = merge_equal_names(matrix, labels, names)
    assert merged.caption_log_likelihood.tolist() == matrix.caption_log_likelihood[:, [0, 1, 3]].tolist()
    assert merged.prior_log_likelihood.tolist() == [0, 1, 3] and found.tolist() == [0, 2, 1, 0]


def test_ties_are_wrong():
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0]])
    assert is_right(scores, torch.tensor([0, 0])).tolist() == [False, True]


# Abstaining


@pytest.fixture(params=["ties", "no ties"])
def answers(request) -> Answers:
    generator = torch.Generator().manual_seed(0)
    certainty = 3 * torch.randn(40, generator=generator)
    certainty = certainty.round() if request.param == "ties" else certainty
    return Answers(certainty, torch.rand(40, generator=generator) < certainty.sigmoid())


def kept_by(answers: Answers, threshold: float) -> list[bool]:
    """Whether each answer that reaches the threshold is right."""
    rows = zip(answers.certainty.tolist(), answers.is_right.tolist(), strict=True)
    return [right for certainty, right in rows if certainty >= threshold]


def test_coverage_curve_equals_a_slow_loop(answers):
    thresholds = sorted(set(answers.certainty.tolist()), reverse=True)
    expected = [(len(kept) / 40, sum(kept) / len(kept)) for kept in (kept_by(answers, t) for t in thresholds)]
    curve = torch.stack(coverage_curve(answers), dim=1)
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64))
    assert curve[-1, 0] == 1 and all(one < other for one, other in pairwise(curve[:, 0].tolist()))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.95, 0.999, 1.0])
def test_thresholds_keep_at_least_their_share(answers, share):
    threshold = abstain_threshold(answers.certainty, share)
    enough = [t for t in answers.certainty.tolist() if len(kept_by(answers, t)) >= share * 40]
    assert threshold == max(enough)
    kept = kept_by(answers, threshold)
    assert accuracy_of_kept(answers, share) == pytest.approx(sum(kept) / len(kept))


def test_auroc_equals_all_pairs(answers):
    higher = answers.certainty
    lower = torch.cat([answers.certainty[:17] - 1, torch.tensor([-math.inf])])
    assert auroc(higher, lower) == pytest.approx(slow_auroc(higher.tolist(), lower.tolist()))


def test_no_class_is_left_of_one():
    ways = calibration.ways_to_abstain(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]), 1.0)
    assert [nothing.tolist() for _, nothing in ways.values()] == [[-math.inf] * 2, [0.0] * 2]
    assert all(row.metrics["none_auroc"]["value"] == 1 for row in calibration.abstaining_rows(ways, 1.0))


# Pictures


def test_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    scores, labels = planted(50, 1.0)
    answers = Answers(scores.softmax(dim=1).amax(dim=1), is_right(scores, labels))
    drawings = {
        "one.png": lambda path: draw_reliability(path, {"one": bin_by_score(answers)}),
        "two.png": lambda path: draw_reliability(path, dict.fromkeys(("one", "two"), bin_by_score(answers))),
        "coverage.png": lambda path: draw_coverage(path, {"one": coverage_curve(answers)}),
    }
    for name, draw in drawings.items():
        assert draw(tmp_path / name)
    widths = {name: Image.open(tmp_path / name).size[0] for name in drawings}
    assert widths["two.png"] == 2 * widths["one.png"] == 2 * widths["coverage.png"] > 400
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name, draw in drawings.items():
        assert not draw(tmp_path / f"without-{name}") and not (tmp_path / f"without-{name}").exists()


# From the command line into the pipeline

TEST = [index for index, key in enumerate(KEYS) if not is_held_out(key, HELD_OUT)]
TUNING = [index for index in range(PHOTOS) if index not in TEST]


def test_calibration_of_zero_shot_equals_a_slow_loop(evaluate, room, class_scores):
    caption, prior = class_scores
    labels = torch.tensor(LABELS)

    results = evaluate("zero-shot", "--data", room / "shards", "--class-names", room / "prompts.json")

    rows = by_name(results["tables"]["Calibration"])
    weights = ("likelihood", "information gain", "tuned")
    assert list(rows) == [name + fitted for name in weights for fitted in ("", ", fitted temperature")]
    for name, row in rows.items():
        gain = (caption - row["prior_weight"] * prior).double()
        expected = fit_temperature(gain[TUNING], labels[TUNING]) if name.endswith("fitted temperature") else 1
        temperature = values(row)["temperature"]
        assert temperature == pytest.approx(expected, rel=1e-3)
        tested = gain[TEST]
        classes = labels[TEST].tolist()
        assert values(row)["ece"] == pytest.approx(slow_ece(*slow_certainty(tested, classes, temperature)), abs=1e-3)
        assert values(row)["nll"] == pytest.approx(slow_nll(tested, classes, temperature), abs=1e-3)


def test_abstaining_of_zero_shot_equals_a_slow_loop(evaluate, room, class_scores, tmp_path):
    caption, prior = class_scores
    gain = caption - prior
    labels = torch.tensor(LABELS)
    answers = Answers(gain[TEST].amax(dim=1), is_right(gain[TEST], labels[TEST]))

    results = evaluate("zero-shot", "--data", room / "shards", "--class-names", room / "prompts.json")

    by_gain, _ = results["tables"]["Abstaining"]
    assert values(by_gain)["top1_of_50"] == pytest.approx(accuracy_of_kept(answers, 0.5))
    right_class_left_out = gain[TEST].scatter(1, labels[TEST, None], -math.inf).amax(dim=1)
    expected = slow_auroc(answers.certainty.tolist(), right_class_left_out.tolist())
    assert values(by_gain)["none_auroc"] == pytest.approx(expected, abs=2e-3)

    keeps_half = results["details"]["Thresholds of information gain"][-1]["threshold in nats"]
    assert keeps_half == pytest.approx(abstain_threshold(gain[TUNING].amax(dim=1), 0.5), abs=2e-3)
    assert f"| 50.0 | {keeps_half} | " in (tmp_path / "out" / "results.md").read_text()
    reliability = results["details"]["Reliability at prior weight 1"]
    assert sum(line["temperature 1: images"] for line in reliability) == len(TEST)


@pytest.mark.parametrize(
    ("number", "temperature", "words"),
    [(100, 1.0, []), (99, 1.0, ["Only 99"]), (100, 0.01, ["ended at 0.01"]), (5, 100.0, ["Only 5", "ended at 100"])],
)
def test_doubts(number, temperature, words):
    answers = Answers(torch.zeros(number), torch.ones(number, dtype=torch.bool))
    doubts = calibration.Calibration(temperature, answers, {}, {}, {}, {}).doubts
    assert len(doubts) == len(words) and all(word in doubt for word, doubt in zip(words, doubts, strict=True))


def test_a_calibration_in_doubt_is_told_and_not_saved(run, room, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(room / "model", folder)
    before = (folder / "config.json").read_bytes()
    arguments = ["--data", room / "shards", "--class-names", room / "prompts.json", "--model", folder]
    options = ["--held-out-fraction", HELD_OUT, "--output", tmp_path / "out", "--save-temperature"]
    code, lines, errors = run("evaluate", "zero-shot", *map(str, [*arguments, *options]))
    doubt = f"Only {len(TUNING)} images are held out"
    assert code == 1 and "nothing is saved" in errors[-1] and doubt in errors[-1]
    assert any(doubt in line for line in lines)  # the report is written nevertheless
    assert (folder / "config.json").read_bytes() == before


def write_nearly_right(path, gain: torch.Tensor) -> torch.Tensor:
    """A shard whose images have their best class, but for the second best of one to tune on. Gives the classes."""
    labels = gain.argmax(dim=1)
    labels[TUNING[0]] = gain[TUNING[0]].argsort()[-2]
    names = [json.dumps({"class_name": NAMES[label]}).encode() for label in labels]
    samples = zip(KEYS, make_images(PHOTOS), names, strict=True)
    write_shard(path, [(key, {"png": png(image), "json": name}) for key, image, name in samples])
    return labels


@pytest.fixture
def fitted(run, room, class_scores, tmp_path, monkeypatch):
    """A copy of the room's model after `evaluate zero-shot` has saved what it fitted; the gains [N, C] and classes."""
    monkeypatch.setattr(calibration, "FEWEST_HELD_OUT", len(TUNING))
    folder = tmp_path / "calibrated"
    shutil.copytree(room / "model", folder)
    caption, prior = class_scores
    gain = caption - prior
    labels = write_nearly_right(tmp_path / "photos.tar", gain)
    data = ["--data", tmp_path / "photos.tar", "--class-names", room / "prompts.json"]
    fitting = ["--model", folder, "--held-out-fraction", HELD_OUT, "--output", tmp_path / "fit"]
    saving = ["--save-temperature", "--save-threshold", "0.5"]
    code, lines, errors = run("evaluate", "zero-shot", *map(str, [*data, *fitting, *saving]))
    assert (code, errors) == (0, [])
    return folder, gain, labels, lines


def test_what_is_fitted_is_saved_in_the_configuration_alone(fitted, room, tmp_path):
    folder, gain, labels, lines = fitted
    config = IGCaptionerConfig.from_pretrained(folder)
    assert config.score_temperature == pytest.approx(fit_temperature(gain[TUNING], labels[TUNING]), rel=1e-3)
    assert config.abstain_threshold == pytest.approx(abstain_threshold(gain[TUNING].amax(dim=1), 0.5), abs=2e-3)

    before, after = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (room / "model", folder))
    assert {name for name in after if after[name] != before.get(name)} == {"config.json"}
    fields, own_fields = (json.loads(files["config.json"]) for files in (before, after))
    changed = {"score_temperature": config.score_temperature, "abstain_threshold": config.abstain_threshold}
    assert own_fields == fields | changed

    assert re.search(r"temperature \d+\.\d+, abstain_threshold -?\d+\.\d+$", lines[-1])
    command = json.loads((tmp_path / "fit" / "results.json").read_text())["run"]["command"]
    assert command.endswith("--save-temperature --save-threshold 0.5")


def test_the_pipeline_uses_what_was_fitted(fitted, processor):
    folder, gain, _, _ = fitted
    model = IGCaptionerForZeroShotImageClassification.from_pretrained(folder).eval()
    classifier = IGZeroShotImageClassificationPipeline(
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        task="zero-shot-image-classification",
        hypothesis_template=TEMPLATES,
        device="cpu",
    )
    for image, gains in zip(make_images(3), gain.tolist(), strict=False):
        expected = slow_softmax([*gains, model.config.abstain_threshold], model.config.score_temperature)
        entries = {entry["label"]: entry["score"] for entry in classifier(image, NAMES)}
        assert entries == pytest.approx(dict(zip([*NAMES, None], expected, strict=True)), abs=1e-3)


def test_only_a_folder_of_ones_own_is_changed(run, room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(room / "shards"), "--class-names", str(room / "prompts.json"), "--output", "out"]
    for model_name, message in ((DEFAULT_CHECKPOINT, "in the package"), ("someone/model", "'someone/model'")):
        code, lines, errors = run("evaluate", "zero-shot", *arguments, "--model", model_name, "--save-temperature")
        assert (code, lines, len(errors)) == (1, [], 1) and message in errors[0]
    code, _, errors = run("evaluate", "zero-shot", *arguments, "--save-threshold", "95")
    assert code == 2 and "between 0 and 1, got '95'" in errors[0]
    assert not list(tmp_path.iterdir())


# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score_temperature", 0),
        ("score_temperature", -1.0),
        ("score_temperature", math.nan),
        ("score_temperature", math.inf),
        ("score_temperature", "1"),
        ("score_temperature", None),
        ("abstain_threshold", math.inf),
        ("abstain_threshold", math.nan),
        ("abstain_threshold", "0"),
    ],
)
def test_wrong_fields_are_named_and_not_saved(field, value, tmp_path):
    with pytest.raises(StrictDataclassError, match=field):
        IGCaptionerConfig(**{field: value})
    IGCaptionerConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(StrictDataclassError, match=field):
        save_calibration(tmp_path, **{field: value})
    assert (tmp_path / "config.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_fields_survive_a_round_trip(tmp_path):
    IGCaptionerConfig(score_temperature=2, abstain_threshold=-3.5).save_pretrained(tmp_path)
    config = IGCaptionerConfig.from_pretrained(tmp_path)
    assert (config.score_temperature, config.abstain_threshold) == (2, -3.5)
    assert (IGCaptionerConfig().score_temperature, IGCaptionerConfig().abstain_threshold) == (1.0, None)
