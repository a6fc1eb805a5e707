"""Photos on a Ray cluster, without one: what its tasks and actors do, called here; and who gets which CPUs."""

import io
import json
import pickle
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from broken_samples import EXPECTED, GOOD, write_dirty_shards
from captioner_folders import save_folder
from command_line import write_photo
from PIL import Image
from small_checkpoint import save_checkpoint
from training_runs import image_bytes

from ig_captioner import CaptionScorer, zero_shot_pipeline
from ig_captioner.cli.main import main


pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ig_captioner[cluster]'")

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs, parquet

from ig_captioner.data.ray import batch, scoring
from ig_captioner.data.ray import photos as reading
from ig_captioner.data.ray.output import ParquetFolder
from ig_captioner.data.ray.photos import Photo, as_table, digests, is_done, key_of
from ig_captioner.data.ray.places import Place
from ig_captioner.data.ray.resources import fits, share_cpus


LABELS = ["cat", "dog", "a photo", "of"]
PHOTO_ERRORS = {"undecodable image", "empty image file", "not an image", "too many pixels", "broken shard"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path) -> str:
    """Photos in two folders, one of which is hidden, and what is no photo."""
    for index, name in enumerate(("b/0.png", "b/1.jpg", "2.PNG", ".hidden/3.png", ".4.png")):
        write_photo(tmp_path / "photos" / name, index)
    (tmp_path / "photos" / "b" / "notes.txt").write_text("no photo")
    return str(tmp_path / "photos")


def read(location, done=(), **options) -> list[Photo]:
    """All photos at a place, as tasks read them."""
    columns = {"key_column": "key", "image_column": "image", "filesystem": None, **options}
    items, read_item = reading._find(str(location), **columns)
    finished = digests(done)
    return [photo for item in items for photo in read_item(item, lambda key: not is_done(key, finished))]


def decoded(photos: list[Photo], preparer) -> pa.Table:
    return scoring.decode(as_table(photos), preparer)


# Who gets which CPUs


@pytest.mark.parametrize(
    ("nodes", "actors", "chosen", "expected"),
    [
        ([{"CPU": 4}], 2, {}, (1, 0.75)),
        ([{"CPU": 2}], 2, {}, (0.75, 0.5)),
        ([{"CPU": 1}], 1, {}, (0.5, 0.25)),
        ([{"CPU": 16}], 16, {}, (0.75, 0.5)),
        ([{"CPU": 64, "GPU": 8}], 8, {"num_gpus": 1}, (1, 0.75)),
        ([{"CPU": 8, "GPU": 1}] * 4, 8, {"num_gpus": 0.5}, (1, 0.75)),
        ([{"CPU": 1, "GPU": 1}] * 4, 4, {"num_gpus": 1}, (0.5, 0.25)),
        ([{"CPU": 4}], 3, {"num_cpus": 1}, (1, 0.75)),
        ([{"CPU": 4}], 2, {"num_cpus": 0.75}, (0.75, 0.5)),
        ([{"CPU": 4}], 2, {"num_cpus": 1.75}, (1.75, 0.5)),
    ],
)
def test_shares_leave_a_cpu_for_reading(nodes, actors, chosen, expected):
    shares = share_cpus(nodes, actors, **chosen)
    assert shares == expected


@pytest.mark.parametrize(
    ("nodes", "actors", "chosen", "arithmetic"),
    [
        (
            [{"CPU": 2}],
            2,
            {"num_cpus": 1},
            r"2 actors x 1 CPU.* are 2.25 CPUs: the cluster has 2 logical CPUs on 1 node",
        ),
        ([{"CPU": 2}], 5, {}, "5 actors x 0.5 CPU.* room for 4"),
        ([{"CPU": 1}] * 8, 8, {"num_cpus": 1}, "8 nodes"),
        ([{"CPU": 64, "GPU": 4}], 5, {"num_gpus": 1}, "and 5 GPUs: the cluster has 64 logical CPUs and 4 GPUs"),
        ([{"CPU": 2}] * 4, 1, {"num_cpus": 3}, "room for 0 such actors"),
        ([{"CPU": 2}], 0, {}, "at least 1, got 0"),
    ],
)
def test_standstill_is_refused_with_the_arithmetic(nodes, actors, chosen, arithmetic):
    with pytest.raises(ValueError, match=arithmetic):
        share_cpus(nodes, actors, **chosen)


def test_a_reader_fits_wherever_actors_go():
    """Compared with all placements on small clusters."""

    def placements(room, actors):
        if not room:
            return [[]] if actors == 0 else []
        return [[n, *rest] for n in range(min(room[0], actors) + 1) for rest in placements(room[1:], actors - n)]

    for cpus in ((1,), (2,), (1, 2), (2, 2), (1, 1, 3)):
        for actor in (0.5, 0.75, 1.0):
            for reader in (0.25, 0.5, 1.0):
                room = [int(cpu / actor + 1e-6) for cpu in cpus]
                for actors in range(1, sum(room) + 2):
                    all_placements = placements(room, actors)
                    left = [
                        max(cpu - n * actor for cpu, n in zip(cpus, placed, strict=True)) for placed in all_placements
                    ]
                    always = bool(left) and min(left) + 1e-6 >= reader
                    claimed = fits([{"CPU": cpu} for cpu in cpus], actors, actor, 0, reader)
                    assert always or not claimed, (cpus, actor, reader, actors)


# Reading


def test_folder(folder):
    photos = read(folder)
    assert [photo.key for photo in photos] == ["2.PNG", "b/0.png", "b/1.jpg"]
    assert all(photo.image and photo.error is None for photo in photos)
    assert [photo.key for photo in read(folder, done=["b/0.png", "3.png"])] == ["2.PNG", "b/1.jpg"]


@pytest.mark.parametrize("kind", ["pyarrow", "fsspec", "url"])
def test_folder_on_another_file_system_is_the_same(folder, kind):
    location, filesystem = "photos", None
    root = folder.removesuffix("photos")
    if kind == "pyarrow":
        filesystem = fs.SubTreeFileSystem(root, fs.LocalFileSystem())
    elif kind == "fsspec":
        filesystem = fsspec.filesystem("dir", path=root, target_protocol="file")
    else:
        location = f"local://{folder}"  # a name that fsspec knows, and pyarrow does not
    assert read(location, filesystem=filesystem) == read(folder)


def test_a_file_that_cannot_be_read_is_a_row(folder, tmp_path):
    items, read_item = reading._find(folder, None, "key", "image")
    (tmp_path / "photos" / "2.PNG").unlink()
    first, *others = read_item(items[0], lambda key: True)
    assert first.key == "2.PNG" and first.error.startswith("unreadable file: ") and first.image is None
    assert all(photo.image for photo in others)


def test_names_that_are_no_unicode_have_keys():
    names = [b"a\xff.png".decode("utf-8", "surrogateescape"), "a.png", "ä.png"]
    assert len({key_of(name).encode() for name in names}) == 3


@pytest.mark.parametrize("form", ["shards", "shards/*.tar", "shards/{0..3}.tar"])
def test_shards_with_errors_of_eight_kinds(tmp_path, form):
    """Five kinds are errors of the photo; captions are not read, so that those of the other three have scores.

    The sample before the place where a shard breaks off may be incomplete, and goes with the rest.
    """
    (tmp_path / "shards").mkdir()
    write_dirty_shards(tmp_path / "shards")
    photos = read(tmp_path / form)
    assert len(photos) == len({photo.key for photo in photos}) == GOOD - 1 + 20
    assert {"0.tar:0000", "3.tar:3093", "3.tar"} <= {photo.key for photo in photos}
    assert [photo.error for photo in photos if photo.key == "3.tar"] == ["broken shard: at '3094'"]
    table = decoded(photos, CaptionScorerWithoutWeights())
    reasons = Counter(error.partition(":")[0] for error in table.column("error").to_pylist() if error)
    assert reasons == {reason: count for reason, count in EXPECTED.items() if reason in PHOTO_ERRORS}
    usable = [photo is not None for photo in table.column("photo").to_pylist()]
    assert usable == [error is None for error in table.column("error").to_pylist()]


class CaptionScorerWithoutWeights:
    """A preparer: the size of an image."""

    def __call__(self, image):
        return {"size": torch.tensor(image.size)}


def test_parquet_with_bytes_structs_paths_and_urls(tmp_path, monkeypatch):
    monkeypatch.setattr("ig_captioner.data.remote.FIRST_WAIT", 0.0)
    write_photo(tmp_path / "web" / "photo.png", 0)
    content = (tmp_path / "web" / "photo.png").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        table = {"id": [1, 2, 3, 4], "url": [f"{url}/photo.png", f"{url}/missing.png", "../web/photo.png", None]}
        (tmp_path / "tables").mkdir()
        parquet.write_table(pa.table(table), tmp_path / "tables" / "a.parquet")
        photos = read(tmp_path / "tables", key_column="id", image_column="url")
    finally:
        server.shutdown()
        server.server_close()
    assert [photo.key for photo in photos] == ["1", "2", "3", "4"]
    assert [photo.image == content for photo in photos] == [True, False, True, False]
    assert photos[1].error.startswith("unreachable file: ") and "404" in photos[1].error
    assert photos[3].error == "missing image"
    images = [
        {"bytes": content, "path": None},
        {"bytes": None, "path": "../web/photo.png"},
        {"bytes": None, "path": None},
    ]
    parquet.write_table(pa.table({"image": images}), tmp_path / "tables" / "a.parquet")
    photos = read(tmp_path / "tables")
    assert [photo.key for photo in photos] == ["a.parquet:0", "a.parquet:1", "a.parquet:2"]
    assert [photo.image == content for photo in photos] == [True, True, False]
    assert [photo.key for photo in read(tmp_path / "tables", done=["a.parquet:1"])] == ["a.parquet:0", "a.parquet:2"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_a_broken_parquet_file_is_one_row(tmp_path):
    table = pa.table({"key": ["a", "b"], "image": [image_bytes(), image_bytes()]})
    parquet.write_table(table, tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-20])
    photos = read(tmp_path)
    assert [photo.key for photo in photos] == ["a", "b", "2.parquet"]
    assert photos[-1].error.startswith("broken file: ")


def test_wrong_places_are_errors_that_name_them(tmp_path, folder):
    for location, error, words in (
        ("nothing", FileNotFoundError, "nothing at '.*nothing'"),
        ("empty", FileNotFoundError, "no images in the folder '.*empty'"),
        ("photos/2.PNG", ValueError, "neither a shard nor a Parquet file"),
        ("tables", ValueError, "no column 'image', but x: name"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "tables").mkdir(exist_ok=True)
        parquet.write_table(pa.table({"x": [1]}), tmp_path / "tables" / "a.parquet")
        with pytest.raises(error, match=words):
            read(tmp_path / location)


def test_digests_find_keys_among_many():
    keys = [f"photo {number}" for number in range(3000)]
    finished = digests(keys[::2])
    assert [is_done(key, finished) for key in keys] == [number % 2 == 0 for number in range(3000)]
    assert not is_done("photo 0", digests([]))


# Scores


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Files of four sizes and modes, one broken."""
    found = []
    for seed, (mode, size) in enumerate({"RGB": (30, 20), "L": (16, 24), "RGBA": (9, 50), "P": (64, 64)}.items()):
        noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return [*found[:2], b"broken", *found[2:]]


def actor(model: str, form, output=None, labels=LABELS, **weights) -> tuple[scoring.BatchScorer, object]:
    """An actor, here, and what tasks make of images."""
    captioner = scoring.Captioner.named(model, None, 0)
    compiled, preparer, _ = scoring._compile(captioner, labels, None, {}, 1)
    return scoring.BatchScorer(captioner, compiled, 1, form, weights, output), preparer


@pytest.mark.parametrize("family", ["own", "blip"])
def test_predictions_are_those_of_the_pipeline(family, model, images, tmp_path):
    name = model if family == "own" else save_folder(family, tmp_path)
    scorer, preparer = actor(name, scoring.Ranking({"top_k": 2, "multi_label": False}), prior_weight=0.5)
    photos = [Photo(str(number), "", content) for number, content in enumerate(images)]
    rows = scorer(decoded(photos, preparer)).to_pylist()
    assert [row["error"] for row in rows] == [None, None, "not an image", None, None]
    assert rows[2]["labels"] is None and rows[2]["scores"] is None
    expected = zero_shot_pipeline(CaptionScorer.from_pretrained(name))(
        [Image.open(io.BytesIO(content)) for content in images if content != b"broken"],
        candidate_labels=LABELS,
        prior_weight=0.5,
        top_k=2,
        return_log_likelihoods=True,
    )
    for row, entries in zip((row for row in rows if row["error"] is None), expected, strict=True):
        assert row["labels"] == [entry["label"] for entry in entries]
        assert row["scores"] == pytest.approx([entry["score"] for entry in entries], abs=1e-5)
        for name in scoring.FIGURES:
            assert row[name] == pytest.approx([entry[name] for entry in entries], abs=1e-4)


def test_scores_of_texts_in_their_order(model, images):
    scorer, preparer = actor(model, scoring.AllScores())
    rows = scorer(decoded([Photo("a", "", images[0])], preparer)).to_pylist()
    expected = CaptionScorer.from_pretrained(model).score(Image.open(io.BytesIO(images[0])), scorer.labels)
    assert rows[0]["information_gain"] == pytest.approx(expected.information_gain[0].tolist(), abs=1e-4)
    assert rows[0]["prior_log_likelihood"] == pytest.approx(expected.prior_log_likelihood.tolist(), abs=1e-4)


def test_a_photo_that_the_model_refuses_costs_only_itself(model, images, monkeypatch):
    scorer, preparer = actor(model, scoring.AllScores())
    photos = [Photo(str(number), "", images[number]) for number in (0, 1, 3)]
    expected = scorer(decoded(photos, preparer)).to_pylist()
    own_score = scorer.scorer.score

    def refuse(images, labels, **weights):
        if any(float(image["pixel_values"].sum()) == refused for image in images):
            raise ValueError("it is too dark")
        return own_score(images, labels, **weights)

    batch = decoded(photos, preparer)
    refused = float(scoring.load(batch.column("photo")[1].as_py())["pixel_values"].sum())
    monkeypatch.setattr(scorer.scorer, "score", refuse)
    rows = scorer(batch).to_pylist()
    assert [row["error"] for row in rows] == [None, "unscorable image: it is too dark", None]
    for number in (0, 2):
        assert rows[number]["information_gain"] == pytest.approx(expected[number]["information_gain"], abs=1e-4)


def test_what_prepares_images_is_small(model):
    assert len(pickle.dumps(CaptionScorer.from_pretrained(model).preparer())) < 20_000


def test_labels_of_another_model_are_refused_before_anything_starts(model, tmp_path):
    other = save_folder("blip", tmp_path)
    labels = CaptionScorer.from_pretrained(model).compile_labels(LABELS)
    with pytest.raises(ValueError, match="compiled"):
        scoring._compile(scoring.Captioner.named(other, None, 0), labels, None, {}, 1)


# Files


def results(keys, errors=None) -> pa.Table:
    return pa.table({"key": keys, "error": pa.array(errors or [None] * len(keys), pa.string())})


@pytest.fixture(params=["local", "fsspec"])
def output(request, tmp_path) -> ParquetFolder:
    if request.param == "local":
        return ParquetFolder.find(str(tmp_path / "out"))
    return ParquetFolder.find("out", fsspec.filesystem("dir", path=str(tmp_path), target_protocol="file"))


def test_batches_that_are_written_again_replace_their_files(output):
    output.begin({}, resume=False)
    first = output.write(results(["a", "b"]), ["s", "s"])
    assert output.write(results(["a", "b"]), ["s", "s"]) == first
    assert output.write(results(["a", "b"]), ["t", "t"]) != first  # the same keys of another file
    assert len(output.names()) == 2 and all(not name.startswith(".") for name in output.place.files())


def test_resuming_finds_keys_and_errors(output):
    assert output.begin({"labels": 2}, resume=True).photos == 0
    output.write(results(["a", "b", "c"], [None, "broken: x", "broken"]), ["", "", ""])
    output.write(results(["d"]), [""])
    leftover = (output.place / ".part-1.parquet.0.partial").path  # of a process that was killed
    output.place.filesystem.open_output_stream(leftover).close()
    finished = output.begin({"labels": 2}, resume=True)
    assert finished.photos == 4 and finished.reasons == {"broken": 2}
    assert [is_done(key, finished.keys) for key in "abcde"] == [True] * 4 + [False]
    assert not any(name.endswith(".partial") for name in output.place.files())


def test_actors_of_a_run_that_was_replaced_write_no_more(output):
    output.begin({}, resume=False)
    output.write(results(["a"]), [""])
    after = ParquetFolder(output.place, "another")
    assert after.begin({}, resume=True).photos == 1
    with pytest.raises(RuntimeError, match="run another writes into"):
        output.write(results(["b"]), [""])
    assert len(output.names()) == 1


def test_the_end_misses_files_and_deletes_what_nobody_has_reported(output):
    output.begin({}, resume=False)
    first, second = (output.write(results([key]), [""]) for key in "ab")
    after = ParquetFolder(output.place, "another")
    after.begin({}, resume=True)
    own = after.write(results(["c"]), [""])
    after.write(results(["c", "d"]), ["", ""])
    after.end({own})
    assert set(output.names()) == {first, second, own}
    with pytest.raises(OSError, match="1 of 2 files of results are not in .*share"):
        after.end({own, "part-of-another-node.parquet"})


def test_settings_are_what_was_chosen_and_has_an_effect():
    prepared = scoring.Prepared(None, None, "weights", "tokens", 1)
    chosen = {"top_k": None, "multi_label": False, "prior_weight": 0.0, "label_prior": (1, 2), "batch_size": 8}
    settings = batch._settings(prepared, 2, {"reference_images": ["a.png"]}, chosen)
    assert settings == json.loads(json.dumps(settings))
    assert set(settings) == {"labels", "fingerprint", "tokens_sha256", "prior", "prior_weight", "label_prior"}
    assert settings["prior"] == {"reference_images": "['a.png']"} and settings["prior_weight"] == 0.0


def test_results_are_never_mixed(output):
    output.begin({"top_k": 1, "labels": 2}, resume=False)
    output.write(results(["a"]), [""])
    with pytest.raises(FileExistsError, match="holds 1 files of results: resume"):
        output.begin({"top_k": 1, "labels": 2}, resume=False)
    with pytest.raises(ValueError, match="made with top_k 1, not 5"):
        output.begin({"top_k": 5, "labels": 2}, resume=True)


class FullDisk(LocalFileSystem):
    """Takes the first bytes of a file and no more."""

    def open(self, path, mode="rb", **options):
        file = super().open(path, mode, **options)
        if "w" not in mode:
            return file
        return HalfFile(file)


class HalfFile(io.BytesIO):
    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, content):
        self.file.write(bytes(content)[:10])
        self.file.close()
        raise OSError("disk full")


def test_a_file_that_cannot_be_written_whole_does_not_appear(tmp_path):
    output = ParquetFolder.find(str(tmp_path))
    output.begin({}, resume=False)
    output = replace(output, place=Place.find(str(tmp_path), FullDisk()))
    with pytest.raises(OSError, match="disk full"):
        output.write(results(["a"]), [""])
    assert output.names() == []


# The command


def test_without_ray_the_error_names_the_extra(monkeypatch, capsys, folder, model):
    import ig_captioner.data

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delattr(ig_captioner.data, "ray")
    for name in [name for name in sys.modules if name.startswith("ig_captioner.data.ray")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["batch", "--input", folder, "--labels", "a", "--output", "out", "--model", model]) == 1
    assert "pip install 'ig_captioner[cluster]'" in capsys.readouterr().err
