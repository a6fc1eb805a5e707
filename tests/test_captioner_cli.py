"""The command line with captioners of the Hub: real folders of a tiny random BLIP and LLaVA, processors included."""

import json

import pytest
from captioner_folders import photo, save_folder

from ig_captioner import DEFAULT_CHECKPOINT, CaptionScorer
from ig_captioner.cli.main import main


@pytest.fixture(scope="module", params=["blip", "llava"])
def folder(request, tmp_path_factory) -> str:
    return save_folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """Two photos of either class, in a folder per class."""
    root = tmp_path_factory.mktemp("photos")
    for index, name in enumerate(("cat", "cat", "dog", "dog")):
        (root / name).mkdir(exist_ok=True)
        photo(index).save(root / name / f"{index}.png")
    return str(root)


def run(capsys, *arguments: str, code: int = 0) -> str:
    found = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.out if code == 0 else printed.err


def lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_classify(folder, photos, capsys):
    labels = ("--labels", "cat", "dog", "--template", "a photo of a {}.")
    answers = lines(run(capsys, "classify", photos, *labels, "--model", folder, "--format", "jsonl"))
    scorer = CaptionScorer.from_pretrained(folder)
    expected = scorer.score(photo(0), scorer.compile_labels(["cat", "dog"], ["a photo of a {}."])).information_gain[0]
    gains = {row["label"]: row["information_gain"] for row in answers[0]["predictions"]}
    assert gains == pytest.approx(dict(zip(("cat", "dog"), expected.tolist(), strict=True)), abs=1e-3)
    assert len(answers) == 4
    prior = ("--label-prior", "3", "1", "--reference-images", photos, "--reference-mean", "geometric")
    shifted = run(capsys, "classify", photos, *labels, *prior, "--model", folder, "--format", "jsonl")
    assert lines(shifted)[0] != answers[0]
    asked = run(capsys, "classify", photos, *labels, "--model", folder, "--prompt", "this is", "--format", "jsonl")
    assert lines(asked)[0] != answers[0]
    assert "cat" in run(capsys, "classify", photos, *labels, "--model", folder)


def test_labels_compiled_on_the_command_line(folder, photos, capsys, tmp_path):
    labels = ("--labels", "cat", "dog", "--template", "a photo of a {}.")
    told = run(capsys, "compile-labels", tmp_path / "labels", *labels, "--model", folder)
    assert "2 labels in 1 templates" in told
    compiled = ("--labels-file", tmp_path / "labels")
    plain = run(capsys, "classify", photos, *labels, "--model", folder, "--format", "csv")
    assert run(capsys, "classify", photos, *compiled, "--model", folder, "--format", "csv") == plain
    error = run(capsys, "classify", photos, *compiled, "--model", folder, "--prompt", "this is", code=1)
    assert "compiled for prompt" in error


def test_caption_score_and_retrieve(folder, photos, capsys):
    captions = lines(run(capsys, "caption", photos, "--max-new-tokens", 4, "--model", folder, "--format", "jsonl"))
    assert len(captions) == 4 and all(isinstance(row["caption"], str) for row in captions)
    texts = ("--texts", "a cat", "two dogs on a sofa")
    scores = lines(run(capsys, "score", photos, *texts, "--model", folder, "--format", "jsonl"))
    scorer = CaptionScorer.from_pretrained(folder)
    expected = scorer.score(photo(0), ["a cat", "two dogs on a sofa"]).information_gain[0].tolist()
    assert [row["information_gain"] for row in scores[0]["texts"]] == pytest.approx(expected, abs=1e-3)
    found = lines(run(capsys, "retrieve", photos, "--query", "a cat", "--model", folder, "--format", "jsonl"))
    assert len(found[0]["images"]) == 4


def test_info_says_family_prompt_reading_mode_and_prior(folder, capsys):
    told = run(capsys, "info", folder)
    name = "blip" if "blip" in folder else "llava"
    assert f"{name} (" in told and "reading mode:" in told and "tree" in told
    prior = {"blip": "reference_images", "llava": "unconditional"}[name]
    assert f"prior source:    {prior}" in told or prior in told
    assert ("Describe the image" in told) == (name == "llava")
    own = lines(run(capsys, "info", DEFAULT_CHECKPOINT, "--format", "jsonl"))[0]
    assert own["prior_source"] == "unconditional"


def test_models_that_cannot_be_scored_with_are_refused_in_one_line(photos, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    error = run(capsys, "classify", photos, "--labels", "cat", "--model", tmp_path, code=1)
    assert "use transformers' own pipeline" in error and error.count("\n") == 1
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}', encoding="utf-8")
    error = run(capsys, "classify", photos, "--labels", "cat", "--model", tmp_path, code=1)
    assert "--trust-remote-code" in error


def evaluate(capsys, tmp_path, task: str, *arguments: str) -> dict:
    run(capsys, "evaluate", task, *arguments, "--output", tmp_path / "out")
    return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))


def test_evaluate_zero_shot(folder, photos, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8")
    data = ("--data", photos, "--class-names", tmp_path / "names.txt", "--held-out-fraction", 0.5)
    results = evaluate(capsys, tmp_path, "zero-shot", *data, "--model", folder)
    rows = results["tables"]["2 classes"]
    assert [row["prior_weight"] for row in rows[:2]] == [0.0, 1.0]
    assert 0 <= rows[1]["metrics"]["top1"]["value"] <= 1
    assert results["data"]["reading mode"].startswith("reading mode tree")
    assert results["run"]["model"] == folder
    references = ("--reference-images", photos, "--reference-mean", "geometric")
    other = evaluate(capsys, tmp_path, "zero-shot", *data, "--model", folder, *references)
    assert other["tables"]["True classes"] != results["tables"]["True classes"]
    error = run(
        capsys, "evaluate", "zero-shot", *data, "--model", folder, "--save-temperature", "--output", tmp_path, code=1
    )
    assert "only into a checkpoint of this package" in error


def test_evaluate_retrieval_captioning_and_compositional(folder, capsys, tmp_path):
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    for index in range(4):
        photo(index).save(captioned / f"{index}.png")
        (captioned / f"{index}.txt").write_text(f"photo number {index}\nthe {index} of four", encoding="utf-8")
    common = ("--data", captioned, "--model", folder)
    found = evaluate(capsys, tmp_path, "retrieval", *common, "--held-out-fraction", 0.5)
    assert found["tables"]["Image to text"]
    written = evaluate(capsys, tmp_path, "captioning", *common, "--max-new-tokens", 4)
    assert written["data"]["test samples"] == 4
    pairs = {
        str(index): {"filename": f"{index}.png", "caption": "a cat on a mat", "negative_caption": "a mat on a cat"}
        for index in range(4)
    }
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    asked = ("--format", "sugarcrepe", "--pairs", tmp_path / "pairs.json", "--held-out-fraction", 0.5)
    items = evaluate(capsys, tmp_path, "compositional", *asked, *common)
    assert items["tables"]["Items with their images"] and items["tables"]["All items, text alone"]
