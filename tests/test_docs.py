"""What README, docs/ and the other pages show: Python runs, commands parse, links and paths lead somewhere.

Blocks of "python" run as they stand, one after the other, with the shipped checkpoint; those of "py" need the Hub
and are only compiled. Blocks of shell are read by the parsers of the programs that they call.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ig_captioner import DEFAULT_CHECKPOINT, cli
from ig_captioner.demo.examples import LABEL_OF, NO_CLASS


ROOT = Path(__file__).parent.parent
PAGES = sorted(page for folder in ("", "docs", "examples/space") for page in (ROOT / folder).glob("*.md"))
PAGES.remove(ROOT / "model_card.md")  # a template, whose snippets tests/test_hub.py runs
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OF_OTHERS = {"pip", "hf", "img2dataset"}
OURS = "benchmarks|conversion|docs|examples|ig_captioner|tests|training"


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a photo."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg")


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page, capsys):
    names: dict = {}
    for snippet in blocks(page, "python"):
        for module in re.findall(r"^from (torchao)", snippet, re.MULTILINE):
            pytest.importorskip(module)
        exec(compile(snippet, page.name, "exec"), names)
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_that_needs_the_hub_compiles(page):
    for snippet in blocks(page, "py"):
        compile(snippet, page.name, "exec")


# Commands


def setup_cfg() -> ConfigParser:
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


class Parsed(Exception):
    """A program has read its arguments, and would begin to work."""


def commands(page: Path) -> list[list[str]]:
    """The words of every command, without variables in front of it."""
    lines = "\n".join(blocks(page, "", "bash", "sh")).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if not re.match(r"\w+=\$\(", line)]
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        while words and (words[0] in ("export", "srun") or re.match(r"\w+=", words[0])):
            words = words[1:]
        if words:
            found.append(words)
    return found


def reads_arguments(monkeypatch, words: list[str]) -> None:
    """Starts `-m module ...` or `file ...`, as Python would, up to where the arguments have been read."""
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if module == "training.train":
        pytest.importorskip("accelerate")
        from training.config import load_config

        assert arguments[0] == "--config"
        load_config(ROOT / arguments[1], arguments[2:])
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module, *arguments])
        if words[0] == "-m":
            runpy.run_module(module, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / module), run_name="__main__")


def without_launcher(words: list[str]) -> list[str]:
    """What `accelerate launch` or `torchrun` starts, by their own parsers."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
    else:
        pytest.importorskip("accelerate")
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        options = launch_command_parser().parse_args(words[2:])
        assert options.config_file is None or (ROOT / options.config_file).is_file()
    assert options.module, f"{words} cannot import the package without -m"
    return ["-m", options.training_script, *options.training_script_args]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_parse(page, monkeypatch):
    for words in commands(page):
        program, *rest = words
        if program == "ig-captioner":
            cli.build_parser().parse_args(rest)
        elif program == "make":
            assert re.search(rf"^[\w -]*\b{rest[0]}\b[\w -]*:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        elif program in ("accelerate", "torchrun"):
            reads_arguments(monkeypatch, without_launcher(words))
        elif program == "python":
            reads_arguments(monkeypatch, rest)
        elif program.startswith("."):
            assert (ROOT / program).is_file()
        else:
            assert program in OF_OTHERS, words
        for extra in re.findall(r"ig_captioner\[(\w+)\]", " ".join(words)):
            assert extra in setup_cfg()["options.extras_require"]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_and_commands_in_sentences_exist(page):
    text = prose(page)
    for module in re.findall(r"python\s+-m\s+([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    known = cli.build_parser().format_help()
    for command in re.findall(r"`ig-captioner ([a-z][\w-]*)", text):
        assert re.search(rf"^ +{command} ", known, re.MULTILINE), command


# Links


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("https://", "http://")):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_exist(page):
    for path in re.findall(rf"`((?:{OURS})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", prose(page))
        new |= {(page.parent / link).resolve() for link in links if "://" not in link} - reached
    assert set((ROOT / "docs").glob("*.md")) <= reached


# Pictures and examples


def run_script(monkeypatch, path: str, *arguments) -> None:
    script = ROOT / path
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def draws(monkeypatch, name: str, output: Path) -> None:
    """Runs the script of a picture of docs/, and compares the sizes."""
    pytest.importorskip("matplotlib")
    run_script(monkeypatch, f"docs/draw_{name}.py", "--output", output)
    with Image.open(output) as picture, Image.open(ROOT / f"docs/images/{name}.png") as shown:
        assert picture.size == shown.size


def test_the_trie_is_drawn_and_counted_as_the_page_says(monkeypatch, tmp_path, capsys):
    draws(monkeypatch, "trie", tmp_path / "trie.png")
    nodes, edges, tokens = map(int, re.findall(r" (\d+) ", capsys.readouterr().out))
    assert f"{tokens} tokens need {nodes} nodes, {edges} edges" in (ROOT / "docs/scoring.md").read_text("utf-8")


def test_prior_weights_are_drawn_and_win_as_the_page_says(monkeypatch, tmp_path, capsys):
    draws(monkeypatch, "prior_weight", tmp_path / "prior_weight.png")
    found = re.findall(r"(\w+): (\w+)[ \w]* from ([\d.]+) to ([\d.]+)", capsys.readouterr().out)
    won = {(photo, label): (float(first), float(last)) for photo, label, first, last in found}
    text = (ROOT / "docs/prior_weight.md").read_text("utf-8")
    limits = re.search(r"the cat is\s+right up to ([\d.]+) and the bee up to ([\d.]+)", text)
    for photo, limit in zip(("cat", "bee"), limits.groups(), strict=True):
        assert won[photo, photo] == (0.0, pytest.approx(float(limit), abs=0.02))
        assert won[photo, "cup"][0] >= won[photo, photo][1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 60


def test_the_demo_prints_tables_and_draws(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run_script(monkeypatch, "examples/demo.py", "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    tables = re.findall(r"^(\w+): [^\n]*\* highest of its column\)\n(.*?)\n\n", printed, re.M | re.S)
    right = {name: bool(re.search(rf"^ *{LABEL_OF[name]} .*\*$", table, re.M)) for name, table in tables}
    assert len(right) == len(LABEL_OF) >= 8
    assert {name for name in right if not right[name]} <= NO_CLASS
    assert f"right of {len(right)} photos: {sum(right.values())} by information gain" in printed
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 900


def test_words_are_explained(monkeypatch, capsys):
    run_script(monkeypatch, "examples/explain_words.py", "photo.jpg", "a dog runs through the snow")
    *_, last, total = capsys.readouterr().out.splitlines()
    assert "EOS" in last
    with_image, without, gain = map(float, total.split()[1:])
    assert gain == pytest.approx(with_image - without, abs=0.02)


def test_photos_are_searched(monkeypatch, capsys):
    run_script(monkeypatch, "examples/search_photos.py", ".", "a dog", "a cat")
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(("'a dog': photo.jpg", "'a cat': photo.jpg")) for line in lines] == [True, True, False]
    assert lines[-1].startswith("photo.jpg: 'a ")


def test_a_folder_per_class_fine_tunes(monkeypatch, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("red_square", "blue_square"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), name.split("_")[0]).save(tmp_path / "photos" / name / f"{index}.png")
    arguments = (tmp_path / "photos", tmp_path / "tuned", "--epochs", 1, "--batch_size", 4)
    run_script(monkeypatch, "examples/finetune_trainer.py", *arguments)
    assert "captions of blue square, red square" in capsys.readouterr().out
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {
        path.name for path in (tmp_path / "tuned").iterdir()
    }


# Facts that stand in two places


def test_the_metadata_of_the_wheel_name_the_terms_of_all_that_it_holds():
    """It holds weights and photos, whose terms are not those of the code."""
    metadata = setup_cfg()["metadata"]
    card = yaml.safe_load(Path(DEFAULT_CHECKPOINT, "card.yaml").read_text("utf-8"))
    terms = metadata["license_expression"].split(" AND ")
    assert {"Apache-2.0", "CC0-1.0", f"LicenseRef-{card['license_name']}"} <= set(terms)
    files = metadata["license_files"].split()
    assert len(files) == 3 and all((ROOT / name).is_file() for name in files)
    assert "## Terms" in (ROOT / files[2]).read_text("utf-8")
    for line in metadata["project_urls"].strip().splitlines():
        label, _, url = line.partition(" = ")
        assert "," not in label and url.startswith("https://")  # a comma would end the label


def test_the_citation_names_the_version_and_both_papers():
    citation, metadata = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8")), setup_cfg()["metadata"]
    assert citation["version"] == metadata["version"]
    assert metadata["license_expression"].split(" AND ")[0] == citation["license"]
    papers = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert papers == {"arXiv:2311.17072", "arXiv:2306.07915"}


def test_the_limits_of_the_demo_are_those_of_its_code():
    from ig_captioner.demo import inputs as limits

    text = (ROOT / "SECURITY.md").read_text("utf-8")
    for said in (
        f"{limits.MAX_BYTES // 2**20} MiB",
        f"{limits.MAX_PIXELS // 10**6} megapixels",
        f"{limits.MAX_LABELS:,} texts; {limits.MAX_CHARACTERS} characters each, {limits.MAX_ALL_CHARACTERS:,} in all",
        f"{limits.MAX_REDIRECTS} redirects, {limits.FETCH_SECONDS:g} seconds",
        f"{', '.join(limits.FORMATS[:-1])} or {limits.FORMATS[-1]}",
    ):
        assert said in text, said
