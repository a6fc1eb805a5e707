"""Cards: filled by code from configuration, facts and results, and never out of date."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_checkpoint import save_checkpoint

import ig_captioner
from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForConditionalGeneration, IGCaptionerWarning
from ig_captioner.card import (
    CARD_TEMPLATE,
    CardFacts,
    add_results,
    main,
    make_card,
    read_facts,
    read_results,
    write_facts,
)
from ig_captioner.checkpoint import load_model
from ig_captioner.evaluation.report import dataset_name, table_lines, weights_digest, write_results
from ig_captioner.evaluation.rows import Row, bootstrap
from ig_captioner.release import save_release


FACTS = {
    "in_short": "It knows three colours.",
    "title": "Schön & small",
    "summary": "A captioner for tests.\nOf two lines.",
    "license": "other",
    "license_name": "for-tests",
    "license_link": "https://example.org/license",
    "language": ["en", "de"],
    "datasets": ["acme/photos"],
    "base_model": "acme/base",
    "source": "From **elsewhere**.",
    "training": {"data": "ten photos", "loss": r"CE(T\|I)"},
    "terms": "Take it.",
    "limits": ["It knows nothing.", "It {{ guesses }}."],
    "measured": "### By hand\n\nNothing.",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("card") / "tiny")


@pytest.fixture
def source(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, to write beside."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).hardlink_to(path)
    return folder


def write_measured(folder: Path, model: Path, task: str = "zero-shot", **tables: list[float]) -> Path:
    """A `results.json` of two rows per table, the first one's values as given, and a baseline."""

    def row(name, value, weight):
        estimates = bootstrap(lambda drawn: {"top1": value, "top5": 1.0}, 4)
        return Row(name, estimates, weight, baseline=weight is None).as_dict()

    results = {
        "task": task,
        "title": f"Title of {task}",
        "tables": {
            title: [row("likelihood", low, 0.0), row("tuned", high, 0.7), row("blind", 0.99, None)]
            for title, (low, high) in tables.items()
        },
        "notes": ["A note."],
        "data": {"data": "photos/*.tar", "test samples": 4},
        "run": {
            "command": f"ig-captioner evaluate {task} --data 'photos/*.tar'",
            "model": "tiny",
            "weights_sha256": weights_digest(str(model)),
            "date": "2026-01-02",
            "git_commit": "0" * 40,
            "hardware": {"cpu": "slow"},
            "dtype": "float32",
            "versions": {"python": "3"},
        },
    }
    write_results(folder, results)
    return folder / "results.json"


def test_the_template_is_at_the_top_of_the_repository():
    path = Path(__file__).parents[1] / "model_card.md"
    assert path.read_text(encoding="utf-8") == CARD_TEMPLATE.read_text(encoding="utf-8")


def test_the_card_of_the_shipped_checkpoint_is_up_to_date():
    """Else: `python -m ig_captioner.card ig_captioner/checkpoints/tiny`."""
    folder = Path(DEFAULT_CHECKPOINT)
    model = load_model(IGCaptionerForConditionalGeneration, folder)
    assert (folder / "README.md").read_bytes() == make_card(folder, model, "tiny")
    assert "stored as float16, loaded as float32" in (folder / "README.md").read_text(encoding="utf-8")
    for results in read_results(folder):
        assert results["run"]["weights_sha256"] == weights_digest(DEFAULT_CHECKPOINT)


def test_a_card_is_filled_from_the_configuration(checkpoint, tmp_path):
    text = (save_release(tmp_path / "tiny", checkpoint, repo_id="acme/tiny") / "README.md").read_text()
    assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
    for part in ('model="acme/tiny"', "0.75 in this", "16 x 24 pixels, patches of 8 x 8", "float32", "up to 12 tokens"):
        assert part in text
    number = sum(weight.numel() for weight in load_file(checkpoint / "model.safetensors").values())
    assert f"{number:,}" in text
    assert "is not recorded" in text and "not been measured" in text and "holds no code" not in text
    data = ModelCard(text).data.to_dict()
    assert data.pop("tags")[:2] == ["zero-shot-image-classification", "image-to-text"]
    expected = {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification", "license": "unknown"}
    assert data == expected
    other = save_release(tmp_path / "other", checkpoint, license="mit")
    assert ModelCard.load(other / "README.md").data.license == "mit" == read_facts(other).license


def test_a_card_tells_the_facts(source, tmp_path):
    assert set(FACTS) == set(asdict(CardFacts()))
    (source / "card.yaml").write_text(yaml.safe_dump(FACTS, allow_unicode=True), encoding="utf-8")
    folder = save_release(tmp_path / "tiny", source)
    card = ModelCard.load(folder / "README.md")
    named = ("license", "license_name", "license_link", "language", "datasets", "base_model")
    assert {name: card.data.get(name) for name in named} == {name: FACTS[name] for name in named}
    for name in set(FACTS) - {*named, "in_short", "training", "limits"}:  # in_short is for commands and demo
        assert FACTS[name] in card.text, name
    assert "| data | ten photos |\n| loss | CE(T\\|I) |\n" in card.text
    assert "- It knows nothing.\n- It {{ guesses }}.\n" in card.text
    assert "is not recorded" not in card.text and "not been measured" not in card.text and "\n\n\n" not in card.text
    headings = re.findall("^##? (.*)", card.text, flags=re.MULTILINE)
    expected = ["Use", "How it scores", "Model", "Source", "Training", "Terms", "Measured", "Limits"]
    assert headings == [FACTS["title"], *expected]
    assert (folder / "card.yaml").read_bytes() == (source / "card.yaml").read_bytes()

    changed = save_release(tmp_path / "changed", folder, license="mit")
    assert read_facts(changed) == CardFacts(**{**FACTS, "license": "mit", "license_name": None, "license_link": None})


def test_results_are_in_metadata_and_text(source, tmp_path):
    values = {"3 classes": [0.25, 0.5], "Again": [0.125, 0.375]}
    probe = write_measured(tmp_path / "probe", source, "linear-probe", **{"3 classes": [0.625, 0.75]})
    shot = write_measured(tmp_path / "all-classes", source, **values)
    folder = save_release(tmp_path / "tiny", source, results=[probe, shot])
    assert sorted(path.name for path in (folder / "results").iterdir()) == ["all-classes.json", "probe.json"]
    assert json.loads(shot.read_text()) == json.loads((folder / "results" / "all-classes.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert card.text.index("### Title of zero-shot") < card.text.index("### Title of linear-probe")
    for path in (shot, probe):
        results = json.loads(path.read_text())
        lines = [line for rows in results["tables"].values() for line in table_lines(rows)]
        assert all(line in card.text for line in [*lines, f"- `{results['run']['command']}`", "A note."])

    found = [
        (entry.task_type, entry.dataset_config, *entry.dataset_args.values(), *entry.metric_args.values())
        for entry in card.data.eval_results
    ]
    figures = [(entry.metric_name, entry.metric_value) for entry in card.data.eval_results]
    rows, expected = [], []
    hub_tasks = {"zero-shot": "zero-shot-image-classification", "linear-probe": "image-classification"}
    for task, tables in {"zero-shot": values, "linear-probe": {"3 classes": [0.625, 0.75]}}.items():
        command = f"ig-captioner evaluate {task} --data 'photos/*.tar'"
        title, (low, high) = next(iter(tables.items()))  # the metadata have the first metric of the first table
        for name, weight, value in (("likelihood", 0.0, low), ("tuned", 0.7, high)):
            rows.append((hub_tasks[task], title, command, weight))
            expected.append((f"top-1 %, {name}", 100 * value))
    assert (found, figures) == (rows, expected)

    again = save_release(tmp_path / "again", folder)  # results travel with a release
    assert ModelCard.load(again / "README.md").data.to_dict()["model-index"][0]["name"] == "again"
    assert (again / "results" / "probe.json").read_bytes() == probe.read_bytes()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("data/cifar10-test-*.tar.gz", "cifar10-test"),
        ("cifar10-test-0000.tar.gz", "cifar10-test"),
        ("flickr8k-val-{0000..0003}.tar", "flickr8k-val"),
        ("photos/", "photos"),
        ("acme/imagenet1k", "imagenet1k"),
        ("*.tar", "*"),
    ],
)
def test_data_sets_have_the_names_of_their_files(data, name):
    assert dataset_name(data) == name


def test_results_tell_no_folders_of_this_machine(source, tmp_path):
    path = write_measured(tmp_path / "out", source, classes=[0.1, 0.2])
    results = json.loads(path.read_text())
    told = results["run"]
    told |= {"model": str(source), "command": f"evaluate --data {tmp_path}/b.tar --clip a/b --more 'hf://x/y/z.tar'"}
    told["hardware"]["cpu"] = "a/b 1 / 2"
    path.write_text(json.dumps(results))
    folder = save_release(tmp_path / "tiny", source, results=[path])
    told |= {"model": "source", "command": "evaluate --data b.tar --clip a/b --more 'hf://x/y/z.tar'"}
    assert read_results(folder) == [results] and str(tmp_path) not in (folder / "README.md").read_text()


def test_results_of_one_name_are_refused(source, tmp_path):
    first, second = (write_measured(tmp_path / part / "photos", source, A=[0.1, 0.2]) for part in ("a", "b"))
    for paths in ([first, second], [first, second.rename(tmp_path / "photos.json")]):
        with pytest.raises(ValueError, match=f"{paths[0]} and {paths[1]} .* results/photos.json"):
            add_results(source, paths, None)
        assert not (source / "results").exists()


def test_results_of_other_weights_or_of_nothing_are_refused(source, tmp_path):
    path = write_measured(tmp_path / "out", source, classes=[0.1, 0.2])
    results = json.loads(path.read_text())
    spoiled = {"of other weights": {"run": {**results["run"], "weights_sha256": "0" * 64}}}
    spoiled |= {"no results.json": {"task": "chess"}, "is no results.json": {"tables": {}}}
    for message, change in {**spoiled, "is no results": {"run": {}}}.items():
        path.write_text(json.dumps({**results, **change}))
        with pytest.raises(ValueError, match=message.replace("of other", "with other")):
            save_release(tmp_path / "tiny", source, results=[path])
    path.write_text("[1]")
    with pytest.raises(ValueError, match="out/results.json is no results"):
        save_release(tmp_path / "tiny", source, results=[path])
    with pytest.raises(FileNotFoundError):
        save_release(tmp_path / "tiny", source, results=[tmp_path / "missing.json"])
    path.write_text(json.dumps(results))
    (source / "README.md").write_text("# My own")
    with pytest.raises(ValueError, match="made from none"):
        save_release(tmp_path / "tiny", source, results=[path])
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("text", ["titel: x", "title: [1]", "training: {a: {b: c}}", "- a", "a: b: c", "\x00"])
def test_wrong_facts_are_named(source, tmp_path, text):
    (source / "card.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"card\.yaml"):
        save_release(tmp_path / "tiny", source)


def test_facts_survive_writing(tmp_path):
    write_facts(tmp_path, CardFacts(**FACTS))
    assert read_facts(tmp_path) == CardFacts(**FACTS)
    assert read_facts(tmp_path / "missing") is None


def test_the_command_takes_in_results_and_writes_the_card(source, tmp_path, capsys):
    def run(*arguments):
        try:
            code = main([str(source), *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr()

    code, output = run()
    assert code == 1 and output.err.count("\n") == 1 and "card.yaml is missing" in output.err
    (source / "card.yaml").write_text("title: Small\n")
    path = write_measured(tmp_path / "shots", source, classes=[0.1, 0.2])
    code, output = run(path)
    assert code == 0 and "1 results" in output.out
    text = (source / "README.md").read_text()
    assert "# Small" in text and "| likelihood | 0 | 10.0 (10.0 - 10.0) |" in text
    assert "`ig-captioner release source` writes" in text  # no code stands beside this one
    assert run()[0] == 0 and (source / "README.md").read_text() == text
    model = load_model(IGCaptionerForConditionalGeneration, source)
    torch.nn.init.ones_(model.get_input_embeddings().weight)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source)
    code, output = run(path)
    assert code == 1 and "measured with other weights" in output.err.splitlines()[-1]


def test_results_of_strangers_are_text_and_nothing_else(source, tmp_path):
    """What a results.json says reaches the card without tags, links and headings of its own."""
    measured = write_measured(tmp_path / "hostile", source, "linear-probe", **{"3 classes": [0.5, 0.75]})
    results = json.loads(measured.read_text())
    evil = "<script>alert(1)</script>[x](javascript:alert(2))\n# Heading"
    results["title"] = results["run"]["command"] = results["data"]["data"] = evil
    results["tables"] = {evil: results["tables"]["3 classes"]}
    results["notes"].append(evil)
    measured.write_text(json.dumps(results))
    card = (save_release(tmp_path / "tiny", source, results=[measured]) / "README.md").read_text()
    assert "<script" not in card and "javascript:" not in card.lower() and "\n# Heading" not in card
    text = ModelCard(card).text  # without the metadata, which is no Markdown
    assert "&lt;script&gt;" in text and "[x](" not in text.replace("\\[x](", "")


def test_a_licence_for_research_only_is_not_replaced(source, tmp_path):
    (source / "card.yaml").write_text("license: other\nlicense_name: non-commercial-research\n")
    with pytest.raises(ValueError, match="non-commercial-research', which --license apache-2.0 cannot change"):
        save_release(tmp_path / "tiny", source, license="apache-2.0")
    (source / "card.yaml").write_text("license: mit\n")
    with pytest.warns(IGCaptionerWarning, match="the licence 'mit' that .* states is replaced by 'apache-2.0'"):
        save_release(tmp_path / "tiny", source, license="apache-2.0")
    (source / "card.yaml").unlink()
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Own\n")
    with pytest.raises(ValueError, match="'cc-by-nc-4.0', which --license mit cannot change"):
        save_release(tmp_path / "other", source, license="mit")


def test_the_former_name_of_the_shipped_checkpoint_is_deprecated():
    with pytest.warns(DeprecationWarning, match="DEFAULT_CHECKPOINT"):
        assert ig_captioner.TINY_CHECKPOINT == DEFAULT_CHECKPOINT
