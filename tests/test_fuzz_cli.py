"""The command line under odd inputs: a result, or one line that says what is wrong, and no more memory than stated.

Inputs are made up by hypothesis, see `fuzz.py`. That nothing hangs is seen from the tests coming to an end.
"""

import csv
import functools
import io
import json
import math
import re

import pytest
from command_line import FIELDS, without_note
from fuzz import (
    FILES,
    LONG_TEXTS,
    ODD_TEXTS,
    bounded_memory,
    check,
    mutated,
    mutated_photos,
    odd,
    surrogates,
    texts,
)
from hypothesis import example, given
from hypothesis import strategies as st

from ig_captioner import checkpoint as loading
from ig_captioner import cli
from ig_captioner.data.texts import decode_text
from ig_captioner.input_rules import clean_text, split_list


pytestmark = pytest.mark.usefixtures("here")


FORMATS = st.sampled_from(["table", "csv", "jsonl"])
COMMANDS = {
    "classify": ["--labels=cat", "--labels=dog"],
    "caption": [],
    "score": ["--texts=cat", "--texts=dog"],
    "retrieve": ["--query=cat", "--query=dog"],
}
OPTION_LIKE = ["-", "---", "-1", "-x", "--labels", "--no such", "--labels=", "-1e400", "-h", "--format", "jsonl"]
words = st.one_of(texts, st.sampled_from(OPTION_LIKE))


@pytest.fixture(scope="module", autouse=True)
def memory(checkpoint, tmp_path_factory):
    """What all these commands together may take. The model is read once, which is not counted."""
    photo = tmp_path_factory.mktemp("first") / "photo.png"
    photo.write_bytes(FILES["PNG"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_model", "load_processor"):
            patch.setattr(loading, name, functools.cache(getattr(loading, name)))
        for name, options in COMMANDS.items():
            assert cli.main([name, str(photo), "--model", checkpoint, *options]) == 0
        with bounded_memory():
            yield


@pytest.fixture
def ask(capsys):
    """Runs a command and checks what all promise. Gives the exit code, stdout, and the errors on stderr."""

    def command(*arguments: str) -> tuple[int, str, list[str]]:
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        lines = without_note(err)
        assert all(line.isprintable() for line in lines)
        errors = [line for line in lines if not line.startswith("ig-captioner: note: ")]
        assert code in (0, 1, 2) and bool(errors) == (code != 0), (code, errors)
        for error in errors:
            assert re.match(r"ig-captioner( \w+)?: error: .", error)
            # the form of an exception that the program does not foresee
            assert not re.match(r"ig-captioner: error: \w*(Error|Exception)\b", error), error
        assert code < 2 or (len(errors) == 1 and not out)
        return code, out, errors

    return command


def read_json(out: str) -> list[dict]:
    """Objects of JSON lines; NaN and infinities are no JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


def check_gains(rows: list[dict]) -> None:
    for row in rows:
        caption, prior, gain = (row[name] for name in FIELDS[2:])
        assert gain == pytest.approx(caption - 0.75 * prior, abs=1e-3) and math.isfinite(gain)


# Texts


@odd()
@given(st.lists(words, min_size=1, max_size=8), texts, st.booleans())
@example(LONG_TEXTS, "a photo of a {}.", False)
@example(["cat"] * 50, "{}", True)
@example([*filter(clean_text, ODD_TEXTS), *OPTION_LIKE], "{}\0{}", False)
@example(["cat", ""], "{}", False)
def test_every_text_is_a_label(ask, labels, template, multi_label):
    options = [*(f"--labels={label}" for label in labels), f"--template={template}", *["--multi-label"] * multi_label]
    code, out, errors = ask("classify", "0.png", "--format", "jsonl", *options)
    labels = [clean_text(label) for label in split_list(labels)]
    if not labels or "" in labels or not clean_text(template):
        assert (code and not out) and re.search("is empty|no labels", errors[0])
        return
    if "{}" not in clean_text(template):
        assert (code, out, len(errors)) == (1, "", 1) and "--template must be" in errors[0]
        return
    (result,) = read_json(out)
    assert code == 0
    check(result["predictions"], labels, multi_label)
    check_gains(result["predictions"])


@odd(40)
@given(st.sampled_from(["classify", "score", "retrieve"]), st.lists(words, min_size=1, max_size=8))
@example("score", LONG_TEXTS)
@example("retrieve", [*filter(clean_text, ODD_TEXTS), *OPTION_LIKE])
@example("classify", ["a\rb", "a\r\n", '"', "a, b"])
def test_every_text_is_printed(ask, command, given_texts):
    option = COMMANDS[command][0].split("=")[0]
    arguments = [command, "0.png", "1.png", *(f"{option}={text}" for text in given_texts)]
    code, table, errors = ask(*arguments)
    if command == "classify":
        given_texts = split_list(given_texts)
    given_texts = [clean_text(text) for text in given_texts]
    if not given_texts or "" in given_texts:
        assert (code and not table) and re.search("is empty|no labels", errors[0])
        return
    assert code == 0 and all(line.isprintable() for line in table.split("\n"))
    code, out, _ = ask(*arguments, "--format", "jsonl")
    objects = read_json(out)
    assert code == 0 and len(objects) == (len(given_texts) if command == "retrieve" else 2)
    in_csv = csv.reader(io.StringIO(ask(*arguments, "--format", "csv")[1], newline=""))
    about, inner, *_ = next(in_csv)
    for written in objects:
        name, rows = written.values()
        check_gains(rows)
        for row in rows:
            cells = next(in_csv)
            assert cells == [name, row[inner], *map(str, list(row.values())[1:])] and written[about] == name
    found = [name for name, _ in map(dict.values, objects)]
    if command != "retrieve":
        found = [row[inner] for row in objects[0].popitem()[1]]
    assert sorted(found) == sorted(given_texts) and next(in_csv, None) is None


@odd()
@given(surrogates, st.text(max_size=5), st.sampled_from(["--labels", "--template", "--texts", "--query"]))
def test_half_a_surrogate_pair_is_no_text(ask, half, text, option):
    command = {"--texts": "score", "--query": "retrieve"}.get(option, "classify")
    labels = ["--labels=cat"] if option == "--template" else []
    code, out, (error,) = ask(command, "0.png", *labels, f"{option}={text}{{}}{half}")
    assert (code, out) == (1, "") and "UTF-8" in error and repr(half)[1:-1] in error


# The arguments of a command


OPTIONS = [
    *("--labels", "--template", "--texts", "--query", "--labels-file", "--templates-file", "--texts-file"),
    *("--top-k", "--prior-weight", "--abstain-below", "--multi-label", "--batch-size", "--compiled-labels"),
    *("--num-beams", "--max-new-tokens", "--device", "--format", "--help"),
]
arguments = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(["0.png", "1.png", "broken.png", "missing.png", "*.png", "2", "0.5", "csv", "cpu", "cifar10"]),
    st.sampled_from(
        [*OPTION_LIKE, *LONG_TEXTS, "--", "--labels=--", "--top-k=--", "[", "?", "\0*", "\udcff*", "\udcff"]
    ),
    texts.filter(lambda text: not text.startswith(("/", "~"))),  # which could name all files of this machine
)


@odd(120)
@given(
    st.sampled_from(sorted(COMMANDS)),
    st.lists(arguments, max_size=2),
    st.lists(st.tuples(st.sampled_from(OPTIONS), arguments), max_size=2),
)
@example("classify", [], [("--labels-file", "x" * 10_000)])
@example("classify", [], [("--labels-file", "\0")])
@example("classify", [], [("--labels-file", "\udcff")])
@example("classify", [], [("--templates-file", "cifar10"), ("--format", "csv")])
@example("score", [], [("--texts-file", "\0")])
@example("caption", ["\0*", "\udcff*", "x" * 10_000, ""], [])
def test_any_words(ask, command, photos, options):
    ask(command, *photos, "0.png", *COMMANDS[command], *(word for option in options for word in option))


@odd(40)
@given(st.sampled_from(["", "\0", "\udcff", "a b", "-", *ODD_TEXTS, *LONG_TEXTS]), st.sampled_from(sorted(COMMANDS)))
def test_models_that_are_none(ask, model, command):
    assert ask(command, "0.png", *COMMANDS[command], f"--model={model}")[0] == 1


numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1e400", "-0", "5e-324", "1.7e308", "1_0", "٣", "²", " 1 ", "0x10", "9" * 5000, "1" * 400 + ".5"]),
    texts,
)


@odd(120)
@given(st.sampled_from(["--prior-weight", "--abstain-below", "--top-k", "--batch-size"]), numbers, st.booleans())
@example("--prior-weight", "100", False)
@example("--abstain-below", "1.7e308", False)
@example("--abstain-below", "-1.7e308", True)
@example("--batch-size", "65536", False)
def test_numbers(ask, option, number, multi_label):
    labels = ["cat", "dog", "hot dog"]
    options = [*(f"--labels={label}" for label in labels), f"{option}={number}", *["--multi-label"] * multi_label]
    code, out, errors = ask("classify", "0.png", "--format", "jsonl", *options)
    if code:
        assert code == 2 and option in errors[0] and "must be a" in errors[0]
        return
    (result,) = read_json(out)
    entries = [{**entry, "label": entry["label"] or ""} for entry in result["predictions"]]
    if option == "--top-k":
        assert len(entries) == min(int(number), 3)
        labels, multi_label = [entry["label"] for entry in entries], multi_label or len(entries) < 3
    check(entries, [*labels, ""] if option == "--abstain-below" else labels, multi_label)


@odd(20)
@given(st.sampled_from(["--num-beams", "--max-new-tokens"]), st.one_of(st.integers(-1, 70).map(str), numbers))
@example("--num-beams", "64")
def test_numbers_of_captions(ask, option, number):
    code, out, errors = ask("caption", "0.png", "--format", "jsonl", f"{option}={number}")
    check_gains(read_json(out))
    assert code == 0 or option in errors[0]


# Files


@odd()
@given(mutated_photos, st.sampled_from(sorted(COMMANDS)), st.sampled_from("12"))
@example(b"", "classify", "2")
def test_damaged_photos(ask, here, content, command, batch_size):
    (here / "damaged.png").write_bytes(content)
    options = [*COMMANDS[command], "--format", "jsonl", "--batch-size", batch_size]
    code, out, errors = ask(command, "damaged.png", "0.png", *options)
    assert len(errors) == code < 2 and all("cannot read the image 'damaged.png'" in error for error in errors)
    read = ["damaged.png", "0.png"][code:]
    objects = read_json(out)
    if command == "retrieve":
        for ranking in objects:
            assert sorted(row["image"] for row in ranking["images"]) == sorted(read)
            check_gains(ranking["images"])
        return
    assert [entry["image"] for entry in objects] == read
    for entry in objects:
        check_gains([entry] if command == "caption" else entry.get("predictions") or entry["texts"])
        if command == "classify":
            check(entry["predictions"], ["cat", "dog"])


TEXT_FILE = "\ufeffcat\r\n\n a {} photo\u2028of\n".encode()
PROMPTS = b'{"classes": ["cat", ["a {}", "of"]], "templates": ["a {}.", "{}"]}'


@odd(120)
@given(
    st.one_of(st.binary(max_size=40), mutated([TEXT_FILE, PROMPTS, FILES["GIF"]])),
    st.sampled_from(["labels.txt", "labels.json"]),
    st.sampled_from(
        ["classify --labels-file", "classify --templates-file", "score --texts-file", "retrieve --texts-file"]
    ),
)
@example(b'{"classes": ["\\ud800"], "templates": ["{}"]}', "labels.json", "score --texts-file")
@example(b"[" * 100_000, "labels.json", "classify --labels-file")
def test_files_of_texts(ask, here, content, name, use):
    (here / name).write_bytes(content)
    command, option = use.split()
    labels = ["--labels=cat"] if option == "--templates-file" else []
    code, out, errors = ask(command, "0.png", "--format", "jsonl", *labels, option, name)
    assert code < 2
    if name.endswith(".txt") and option != "--templates-file":
        try:
            lines = [clean_text(line) for line in re.split("\r\n|\r|\n", decode_text(content))]
            lines = list(filter(None, lines))
            lines = split_list(lines) if command == "classify" else lines
        except UnicodeDecodeError:
            lines = []
        assert code == (not lines) and all(name in error for error in errors)
    for result in read_json(out):
        entries = result.get("predictions") or result["texts"]
        check_gains(entries)
        if name.endswith(".txt"):
            found = [entry.get("label", entry.get("text")) for entry in entries]
            assert sorted(found) == (["cat"] if labels else sorted(lines))
        if command == "classify":
            check(entries, [entry["label"] for entry in entries])
