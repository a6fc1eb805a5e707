"""Folders of photos and files of names, as people have them."""

import json
import unicodedata
import warnings

import PIL.Image
import pytest

from ig_captioner.cli.arguments import find_photos
from ig_captioner.data.folders import class_numbers, list_images
from ig_captioner.data.prompts import load_prompts, read_class_names, read_templates
from ig_captioner.data.remarks import Remarks
from ig_captioner.data.samples import Samples, label_from_field, labelled_decoder, read_source
from ig_captioner.data.shards import BrokenSampleError, Skipped, read_captions
from ig_captioner.data.texts import decode_text, read_label_lines, read_lines
from ig_captioner.input_rules import IMAGE_EXTENSIONS, IGCaptionerWarning, clean_text, split_list, tell


def write_photo(path, colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8), colour).save(path, format="PNG")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """What is told must be expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        yield


# Which files are photos


def test_classify_and_evaluate_see_the_same_photos(tmp_path):
    for number, extension in enumerate(IMAGE_EXTENSIONS):
        write_photo(tmp_path / f"class {number % 3}" / f"{number}.{extension}")
        write_photo(tmp_path / "B" / f"{number}.{extension.upper()}")
    for name in (".hidden.png", ".git/1.png", "B/._1.png"):
        write_photo(tmp_path / name)
    (tmp_path / "class 0" / "notes.txt").write_text("no photo")
    found = find_photos(str(tmp_path), lambda error: pytest.fail(str(error)))
    keys = [key for key, _ in read_source(str(tmp_path))]
    assert len(found) == len(keys) == 2 * len(IMAGE_EXTENSIONS)
    assert [path.removeprefix(f"{tmp_path}/").rpartition(".")[0] for path in found] == keys


def test_files_that_are_no_photos_are_counted(tmp_path):
    for name in ("1.png", "2.tga", "3.TGA", "4.pdf", "5", "6.txt", "7.json"):
        write_photo(tmp_path / name)
    with pytest.warns(IGCaptionerWarning, match=r"passed over: 2 x \.tga, 1 x"):
        assert [path[-5:] for path in list_images(str(tmp_path))] == ["1.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_photo(tmp_path / "elsewhere" / "cat" / "1.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "elsewhere" / "cat" / "circle").symlink_to(tmp_path / "elsewhere")
    assert [key for key, _ in read_source(str(tmp_path / "photos"))] == ["again/1", "cat/1"]


def test_photos_that_share_a_name_are_two_samples(tmp_path):
    for name in ("1.png", "1.jpg", "2.png"):
        write_photo(tmp_path / "cat" / name)
    (tmp_path / "cat" / "1.txt").write_text("two photos of a cat")
    items = dict(read_source(str(tmp_path)))
    assert list(items) == ["cat/1.jpg", "cat/1.png", "cat/2"]
    assert [sorted(files) for files in items.values()] == [
        ["jpg", "json", "txt"],
        ["json", "png", "txt"],
        ["json", "png"],
    ]


def test_a_photo_that_is_gone_costs_only_itself(tmp_path):
    write_photo(tmp_path / "cat" / "2.png")
    (tmp_path / "cat" / "1.png").symlink_to(tmp_path / "missing.png")
    first, (key, _) = read_source(str(tmp_path))
    assert (first, key) == (Skipped("cat/1", "unreadable file"), "cat/2")
    samples = Samples(str(tmp_path), lambda key, files: key)
    with pytest.warns(IGCaptionerWarning, match=r"skipped: 1 x unreadable file \(1: 'cat/1'\)"):
        assert list(samples) == ["cat/2"]
    with pytest.raises(IGCaptionerWarning, match="unreadable file"):
        list(samples)


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "nothing at .*missing'"), ("a*.tar", "nothing at"), ("1.png", "is an image")]
)
def test_data_that_is_not_there(tmp_path, name, message):
    write_photo(tmp_path / "1.png")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_source(str(tmp_path / name))


# Which class a folder is


def labels_of(folder, names, field):
    return [label for _, label in Samples(str(folder), labelled_decoder(label_from_field(names, field)))]


def test_folders_of_numbers_are_those_classes(tmp_path):
    names = [f"class {number}" for number in range(12)]
    for number in range(12):
        write_photo(tmp_path / "all" / str(number) / "1.png")
    for number in (0, 2, 10):
        write_photo(tmp_path / "some" / f"{number:03d}" / "1.png")
    keys = [key for key, _ in read_source(str(tmp_path / "all"))]
    assert labels_of(tmp_path / "all", names, "class_id") == [int(key.partition("/")[0]) for key in keys]
    assert labels_of(tmp_path / "some", names, "class_id") == [0, 2, 10]


def test_folders_from_one_on_are_said_and_others_are_no_classes():
    with pytest.warns(IGCaptionerWarning, match="folders 1 to 12 are classes 0 to 11"):
        assert class_numbers([str(number) for number in range(1, 13)]) == {str(n): n - 1 for n in range(1, 13)}
    for names in (["3", "10"], ["1", "01"]):
        with pytest.warns(IGCaptionerWarning, match="no class_id"):
            assert class_numbers(names) == {}
    assert class_numbers([]) == {}


@pytest.mark.parametrize("names", [["0_cat", "1_dog", "10_bird"], ["class1", "class2", "class10"]])
def test_folders_whose_order_depends_on_the_reading_of_numbers_are_no_classes(tmp_path, names):
    for name in names:
        write_photo(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=r"there is no class_id.*class10 before class2"):
        labels_of(tmp_path, ["cat", "dog", "bird"], "class_id")
    assert labels_of(tmp_path, sorted(names), "class_name") == [0, 1, 2]


def test_captions_beside_photos_may_have_names_in_capitals(tmp_path):
    write_photo(tmp_path / "1.PNG")
    (tmp_path / "1.TXT").write_text("a cat")
    ((key, files),) = read_source(str(tmp_path))
    assert key == "1" and read_captions(files) == ["a cat"]


def test_places_among_other_folders_than_the_classes_are_refused(tmp_path):
    for name in ("ant", "bee", "cow"):
        write_photo(tmp_path / name / "1.png")
    assert labels_of(tmp_path, ["ant", "bee", "cow"], "class_id") == [0, 1, 2]
    with pytest.raises(ValueError, match="place among 3 folders, but there are 4 class names"):
        labels_of(tmp_path, ["ant", "ape", "bee", "cow"], "class_id")
    assert labels_of(tmp_path, ["ant", "ape", "bee", "cow"], "class_name") == [0, 2, 3]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_folders_may_be_encoded_otherwise_than_the_names(tmp_path, form):
    for name in ("café_au_lait", "écureuil", "übung macht", "plain"):
        write_photo(tmp_path / "photos" / unicodedata.normalize(form, name) / "1.png")
    lines = ["\ufeffcafé au lait", "écureuil ", unicodedata.normalize("NFD", "übung\u00a0macht"), "plain"]
    (tmp_path / "names.txt").write_text("\r\n".join(lines), encoding="utf-8")
    labels = labels_of(tmp_path / "photos", read_class_names(str(tmp_path / "names.txt")), "class_name")
    assert sorted(labels) == [0, 1, 2, 3]


def test_what_a_photos_own_json_says_wins_over_its_folder(tmp_path):
    for name in ("1", "2", "3"):
        write_photo(tmp_path / "cat" / f"{name}.png")
    (tmp_path / "cat" / "1.json").write_text(json.dumps({"captions": ["a cat"]}))
    (tmp_path / "cat" / "2.json").write_text(json.dumps({"class_name": "dog"}))
    (tmp_path / "cat" / "3.json").write_text("{")
    files = [files["json"] for _, files in read_source(str(tmp_path))]
    assert [json.loads(content)["class_name"] for content in files[:2]] == ["cat", "dog"]
    assert json.loads(files[0])["captions"] == ["a cat"] and files[2] == b"{"


def test_shards_beside_photos_are_said(tmp_path):
    write_photo(tmp_path / "cat" / "1.png")
    (tmp_path / "a.tgz").write_bytes(b"")
    with pytest.warns(IGCaptionerWarning, match=r"shards of .* are read, its folders and images are not \(1: 'cat'\)"):
        read_source(str(tmp_path))


# What a line is


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_have_no_byte_order_mark_and_plain_white_space(encoding):
    assert read_captions({"txt": " a\u00a0red \tdog\r\n".encode(encoding)}) == ["a red dog"]
    metadata = json.dumps({"captions": ["\ufeffa cafe\u0301 ", " \u2003", "a\u200b b"]})
    assert read_captions({"json": metadata.encode(encoding)}) == ["a café", "a b"]


def test_captions_of_other_kinds():
    assert read_captions({"json": b'{"captions": "one text"}', "txt": b"other"}) == ["one text"]
    assert read_captions({"json": b'{"captions": []}', "txt": b"other"}) == ["other"]
    for captions in (["a", None], [["a"]], {"a": "b"}, 3):
        with pytest.raises(BrokenSampleError, match="not texts"):
            read_captions({"json": json.dumps({"captions": captions}).encode(), "txt": b"other"})
    with pytest.warns(IGCaptionerWarning, match="several lines"):
        assert read_captions({"txt": b"a dog\nin snow\n"}) == ["a dog in snow"]


def test_text_that_is_no_text():
    assert decode_text(b"") == "" and decode_text("ä".encode()) == "ä"
    for content in (b"\xff", b"\xff\xfea", b"caf\xe9", "cat".encode("utf-16-le"), b"cat\0"):
        with pytest.raises(UnicodeDecodeError):
            decode_text(content)


def test_lines_and_lists(tmp_path):
    def write(content):
        (tmp_path / "names.txt").write_bytes(content.encode())
        return str(tmp_path / "names.txt")

    assert read_lines(write("cat\rdog \r\n\u00a0polar  bear\n\n \n")) == ["cat", "dog", "polar bear"]
    assert read_label_lines(write("tench, Tinca tinca\ngoldfish\n")) == ["tench, Tinca tinca", "goldfish"]
    with pytest.warns(IGCaptionerWarning, match=r"empty lines between others.*'line 2'"):
        assert read_templates(write("a {}\n\nb {}")) == ["a {}", "b {}"]
    with pytest.warns(IGCaptionerWarning, match=r"read as one list \(3: 'cat', 'dog', 'polar bear'"):
        assert read_class_names(write("cat, dog,polar bear\n")) == ["cat", "dog", "polar bear"]
    assert read_templates(write("a {}, photographed\n")) == ["a {}, photographed"]
    with pytest.raises(ValueError, match="no lines in"):
        read_lines(write("\ufeff \n"))


def test_clean_text_keeps_what_can_be_seen():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji of three, by joiners
    for text in ("", "cat", family, "\u0645\u06cc\u200c\u062e\u0648", "a\u0301\u0302".encode().decode(), "x\x1b[31m"):
        assert clean_text(text) == unicodedata.normalize("NFC", text)
    for text in (
        "\ufeffcat",
        "cat\u200b",
        "ca\u034ft",
        "\u061ccat\u2064",
        "cat\u3164",
        "c\u00adat",
        "\u200ecat\u2069",
        "\u2003cat\u3000\r\n",
    ):
        assert clean_text(text) == "cat"


def test_what_is_evidently_one_list_is_split():
    assert split_list([]) == [] and split_list(["cat", "b,c"]) == ["cat", "b,c"]
    assert split_list(["cat,,dog, "]) == split_list(["cat,", "dog"]) == ["cat", "dog"]
    for separator in (";", " | ", "\t", "\n", "\u3001", "\uff0c", "\uff1b"):
        assert split_list([f"hot dog{separator}cat"]) == ["hot dog", "cat"]
    assert split_list(["Paris, France; Rome, Italy"]) == ["Paris, France", "Rome, Italy"]
    assert split_list(["hot dog\n", "cat", "ship"]) == ["hot dog\n", "cat", "ship"]


@pytest.mark.parametrize("line", ["0\tcat", '"cat"', '{"label": "cat"}', '["cat", "dog"]', "cat\u2028dog", "cat\vdog"])
def test_lines_of_tables_and_json_are_said(tmp_path, line):
    (tmp_path / "names.txt").write_text(f"{line}\nhorse\n", encoding="utf-8")
    with pytest.warns(IGCaptionerWarning, match="look like columns, quotes or JSON are texts as they stand"):
        read_class_names(str(tmp_path / "names.txt"))


def test_prompts_with_an_empty_name_are_refused(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"classes": ["cat", " "], "templates": ["{}"]}), encoding="utf-8-sig")
    with pytest.raises(ValueError, match="none empty"):
        load_prompts(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(json.dumps({"classes": ["cat"], "templates": ["{}"]}), encoding="utf-8-sig")
    assert load_prompts(tmp_path / "p.json") == (["cat"], ["{}"])


def test_a_pipeline_asked_about_one_label_with_commas_says_so():
    from ig_captioner.pipeline_ig_captioner import _texts_of

    with pytest.warns(IGCaptionerWarning, match="one label with separators in it is one label"):
        _texts_of({"candidate_labels": ["cat,dog,ship"]}, None)
    _texts_of({"candidate_labels": ["Washington, D.C.", "Rome"]}, None)


def test_remarks_are_said_once_and_other_warnings_pass():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        remarks = Remarks()
        for number in range(5):
            with remarks.about(f"{number}.png"):
                tell("guessed")
                warnings.warn("of another library", UserWarning, stacklevel=1)
        remarks.tell()
        remarks.tell()
    found = [str(warning.message) for warning in caught]
    assert found == ["of another library", "guessed (5: '0.png', '1.png', '2.png', ...)"]
