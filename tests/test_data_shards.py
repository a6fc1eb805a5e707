"""Shards as they come damaged, hostile, or from other programs: nothing is lost, mixed up or let in without a word."""

import gc
import gzip
import io
import itertools
import logging
import os
import tarfile

import PIL.Image
import pytest

from benchmarks import damage_shards
from ig_captioner.data import archive, fingerprints, shards
from ig_captioner.data.fingerprints import Fingerprint, compare_shards, list_fingerprints, mark_shards
from ig_captioner.data.shards import Skipped, base_of, read_shard, split_name
from ig_captioner.input_rules import IGCaptionerWarning


def tar(members, end=True, **options) -> bytes:
    """A tar of (name, content) pairs or (TarInfo, content) pairs; without its end-of-archive if `end` is False."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as writer:
        for name, content in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(content)
            writer.addfile(header, io.BytesIO(content))
        size = buffer.tell()
    return buffer.getvalue() if end else buffer.getvalue()[:size]


def sample(number, size=700):
    return [(f"{number:03d}.jpg", bytes([number]) * size), (f"{number:03d}.txt", b"caption %d" % number)]


SAMPLES = list(itertools.chain.from_iterable(map(sample, range(10))))
BYTES_PER_SAMPLE = 512 * (1 + 2 + 1 + 1)


def read(tmp_path, content: bytes, name="s.tar"):
    """What a shard of this content gives, samples and what was skipped."""
    (tmp_path / name).write_bytes(content)
    items = list(read_shard(str(tmp_path / name)))
    return [item for item in items if not isinstance(item, Skipped)], [x for x in items if isinstance(x, Skipped)]


def keys(samples):
    return [key for key, _ in samples]


# Damage


def zeros_from(content, place):
    return content[:place] + bytes(len(content) - place)


def flipped(content, place, bit=0):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


WHOLE = tar(SAMPLES)
MIDDLE = 4 * BYTES_PER_SAMPLE
DAMAGED = {  # what is left of a shard of ten samples: how many are read
    "a flipped bit in a header": (flipped(WHOLE, MIDDLE + 3), 3),
    "a flipped bit in a checksum": (flipped(WHOLE, MIDDLE + 150), 3),
    "a flipped bit in a second header": (flipped(WHOLE, MIDDLE + 512 * 3), 4),
    "cut between two samples": (WHOLE[:MIDDLE], 3),
    "cut between two files": (WHOLE[: MIDDLE + 512 * 3], 4),
    "cut inside a file": (WHOLE[: MIDDLE + 512 + 100], 4),
    "cut inside a header": (WHOLE[: MIDDLE + 100], 3),
    "zeros from a header on": (zeros_from(WHOLE, MIDDLE), 4),
    "zeros from inside a file on": (zeros_from(WHOLE, MIDDLE + 512 + 100), 5),
    "no end-of-archive": (tar(SAMPLES, end=False), 9),
    "half an end-of-archive": (tar(SAMPLES, end=False) + bytes(512), 10),
    "another archive behind it": (WHOLE + WHOLE, 10),
    "one block of zeros in between": (WHOLE[:MIDDLE] + bytes(512) + WHOLE[MIDDLE:], 4),
    "far more zeros than a record": (WHOLE + bytes(20_480), 10),
    "empty": (b"", 0),
    "no archive": (b"<html>404</html>" * 99, 0),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_reported_and_names_the_shard(tmp_path, caplog, damage):
    content, count = DAMAGED[damage]
    with caplog.at_level(logging.WARNING):
        samples, skipped = read(tmp_path, content)
    assert [item.reason for item in skipped] == ["broken shard"] and skipped[0].key.startswith("s.tar:")
    assert str(tmp_path / "s.tar") in caplog.text
    whole = read(tmp_path, WHOLE, "whole.tar")[0]
    whole_again = samples[:-1] if "inside a file on" in damage else samples  # beyond the format, and reported
    assert keys(samples) == keys(whole)[:count] and whole_again == whole[: len(whole_again)]


@pytest.mark.parametrize("write", [lambda content: content, gzip.compress])
def test_whole_shards_are_read_without_a_report(tmp_path, write):
    record = -(-len(tar(SAMPLES, end=False)) // 512) * 512
    for content in (WHOLE, tar(SAMPLES, end=False) + bytes(1024), tar([]), tar(SAMPLES, format=tarfile.USTAR_FORMAT)):
        samples, skipped = read(tmp_path, write(content))
        assert skipped == [] and len(samples) in (0, 10)
    assert record % 512 == 0


@pytest.mark.parametrize("place", [-1, -5, -9, 30, 200])
def test_gzip_is_checked_to_its_last_byte(tmp_path, place):
    content = gzip.compress(WHOLE, mtime=0)
    assert read(tmp_path, flipped(content, place % len(content)), "s.tar.gz")[1][-1].reason == "broken shard"
    assert read(tmp_path, content[:place], "s.tar.gz")[1][-1].key.startswith("s.tar.gz:")


@pytest.mark.parametrize(("module", "suffix"), [("gzip", "gz"), ("bz2", "bz2"), ("lzma", "xz")])
def test_compression_shows_from_the_content(tmp_path, module, suffix):
    content = __import__(module).compress(WHOLE)
    for name in ("s.tar", f"s.tar.{suffix}"):
        assert read(tmp_path, content, name) == read(tmp_path, WHOLE)


def test_the_damage_script_finds_nothing(capsys):
    damage_shards.main(["--flips", "40", "--truncations", "10", "--samples", "4", "--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4 and not any('"UN' in line for line in lines)


# Names


def test_files_of_macos_are_passed_over(tmp_path):
    names = ["._1.jpg", "1.jpg", "._1.txt", "1.txt", ".DS_Store", "__MACOSX/._2.jpg", "2.jpg", "2.txt", ".x/3.jpg"]
    samples, skipped = read(tmp_path, tar([(name, name.encode()) for name in names]))
    assert samples == [("1", {"jpg": b"1.jpg", "txt": b"1.txt"}), ("2", {"jpg": b"2.jpg", "txt": b"2.txt"})]
    assert skipped == []
    in_folder = tar([(f"./{name}", b"") for name in ("1.jpg", "1.txt")])
    assert keys(read(tmp_path, in_folder)[0]) == ["./1"]


KEYS = {  # names of consecutive files: keys of samples with the names of their files
    ("22.00.jpg", "22.00.txt", "22.01.jpg", "22.01.txt"): {"22.00": "jpg txt", "22.01": "jpg txt"},
    ("key.jpg", "key.seg.png", "key.txt"): {"key": "jpg seg.png txt"},
    ("key.albedo.png", "key.depth.png", "key.jpg", "key.txt"): {"key": "albedo.png depth.png jpg txt"},
    ("a.jpg", "a.seg.mask.png", "b.jpg"): {"a": "jpg seg.mask.png", "b": "jpg"},
    ("22.jpg", "22.txt", "22.00.jpg", "22.00.txt"): {"22": "jpg txt", "22.00": "jpg txt"},
    ("photo.final.jpg", "photo.draft.jpg"): {"photo.final": "jpg", "photo.draft": "jpg"},
    ("St. Louis.jpg", "St. Paul.jpg"): {"St. Louis": "jpg", "St. Paul": "jpg"},
    ("2021.05.03-1.JPG", "2021.05.03-2.JPG"): {"2021.05.03-1": "jpg", "2021.05.03-2": "jpg"},
    ("a.b/1.jpg", "a.b/1.txt", "a.c/1.jpg"): {"a.b/1": "jpg txt", "a.c/1": "jpg"},
    ("1.jpg", "README", "1.txt"): {"1": "jpg txt"},
}


@pytest.mark.parametrize("names", KEYS)
def test_keys_are_as_people_mean_them(tmp_path, caplog, names):
    samples, skipped = read(tmp_path, tar([(name, b"x") for name in names]))
    assert {key: " ".join(files) for key, files in samples} == KEYS[names] and skipped == []
    assert ("README" in caplog.text) == ("README" in names)


def test_links_in_place_of_files_cost_their_sample_and_are_counted(tmp_path):
    """GNU tar writes a second name of one file as a hard link; its captions must not come from elsewhere."""
    link = tarfile.TarInfo("001.json")
    link.type, link.linkname = tarfile.LNKTYPE, "000.json"
    samples, skipped = read(tmp_path, tar([*sample(0), *sample(1), (link, b""), *sample(2)]))
    assert keys(samples) == ["000", "002"] and skipped == [Skipped("001", archive.NOT_A_FILE)]


def test_names_with_words_are_samples_where_they_have_an_image_and_a_text(tmp_path):
    names = ["a.left.jpg", "a.left.txt", "a.jpg", "a.txt", "a.seg.png"]
    samples, _ = read(tmp_path, tar([(name, b"x") for name in names]))
    assert [(key, sorted(files)) for key, files in samples] == [
        ("a.left", ["jpg", "txt"]),
        ("a", ["jpg", "seg.png", "txt"]),
    ]


def test_several_images_of_one_sample_are_said():
    content = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(content, "PNG")
    with pytest.warns(IGCaptionerWarning, match="images, which differ in their extensions only.*'jpg', 'png'"):
        shards.image_of({"png": b"", "jpg": content.getvalue()})


def test_an_archive_without_files_is_said(tmp_path, caplog):
    assert read(tmp_path, tar([])) == ([], []) and "s.tar holds no files" in caplog.text


def test_two_files_of_one_name_are_not_mixed(tmp_path):
    files = [*sample(1), ("002.jpg", b"a"), ("002.jpg", b"b"), ("002.txt", b"c"), *sample(3)]
    samples, skipped = read(tmp_path, tar(files))
    assert keys(samples) == ["001", "003"] and skipped == [Skipped("002", "two files of one name")]


def test_many_names_with_words_are_not_one_sample(tmp_path):
    letters = ["".join(pair) for pair in itertools.product("abcdefghij", repeat=2)]
    samples, skipped = read(tmp_path, tar([(f"holiday.{word}.jpg", b"x") for word in letters]))
    assert keys(samples) == [f"holiday.{word}" for word in letters] and skipped == []


def test_parts_of_names():
    assert split_name("a/22.00.JPG") == ("a/22.00", "jpg") and split_name("x.y/README") == ("x.y/README", "")
    assert split_name("._1.jpg")[1] == split_name("../.a/1.jpg")[1] == "" and split_name("../1.jpg")[1] == "jpg"
    assert base_of("key.seg") == "key" and base_of("22.00") == "22.00" and base_of("a.b/c") == "a.b/c"


# Hostile members


def sparse_header(name, size, **pax):
    header = tarfile.TarInfo(name)
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name} | pax
    header.pax_headers |= {"GNU.sparse.realsize": str(size)}
    return header


@pytest.mark.parametrize("size", [8 * 2**30, 2**40])
def test_sparse_files_are_refused_whatever_their_size(tmp_path, size):
    content = b"1\n0\n0\n".ljust(512, b"\0")  # no data at all: the map of one empty part
    files = [*sample(1), (sparse_header("002.jpg", size), content), ("002.txt", b"two"), *sample(3)]
    samples, skipped = read(tmp_path, tar(files, format=tarfile.PAX_FORMAT))
    assert keys(samples) == ["001", "003"] and skipped == [Skipped("002", "sparse file")]


@pytest.mark.parametrize(
    "pax", [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "x"}, {"size": "-1"}, {"size": "9" * 99}]
)
def test_garbage_in_headers_is_damage(tmp_path, pax):
    header = tarfile.TarInfo("002.jpg")
    header.pax_headers = pax
    samples, skipped = read(
        tmp_path, tar([*sample(0), *sample(1), (header, b"x"), *sample(3)], format=tarfile.PAX_FORMAT)
    )
    assert keys(samples)[0] == "000" and [item.key[:6] for item in skipped] == ["s.tar:"]


@pytest.mark.parametrize("form", [bytes, gzip.compress])
def test_files_beyond_the_limit_are_not_read(tmp_path, monkeypatch, form):
    for module in (archive, shards):
        monkeypatch.setattr(module, "MAX_BYTES", 1000)
    monkeypatch.setattr(archive.ForwardFile, "seek", slow_seek := CountedSeek(archive.ForwardFile.seek))
    files = [*sample(1), ("002.jpg", bytes(100_000)), ("002.txt", b"two"), *sample(3)]
    files += [("004.jpg", bytes(700)), ("004.seg.png", bytes(700)), *sample(5)]  # together too much
    samples, skipped = read(tmp_path, form(tar(files)))
    assert keys(samples) == ["001", "003", "005"] and slow_seek.calls
    assert skipped == [Skipped("002", "file too large"), Skipped("004", "file too large")]


class CountedSeek:
    """A method that says whether it was called."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, instance, owner):
        def call(target):
            self.calls += 1
            return self.method(instance, target)

        return call


def test_a_header_that_claims_a_terabyte(tmp_path):
    header = tarfile.TarInfo("002.jpg")
    header.size = 2**40
    content = tar(sample(1), end=False) + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    samples, skipped = read(tmp_path, content)
    assert [item.key for item in skipped] == ["s.tar:002"] and len(samples) <= 1


def test_long_names_without_end(tmp_path):
    link = tarfile.TarInfo("././@LongLink")
    link.type, link.size = tarfile.GNUTYPE_LONGNAME, 2
    chain = (link.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")) * 3000
    assert read(tmp_path, tar(sample(1), end=False) + chain)[1][0].key.startswith("s.tar:")
    link.size = 2**33
    assert read(tmp_path, tar(sample(1), end=False) + link.tobuf(tarfile.GNU_FORMAT))[1][0].key.startswith("s.tar:")


def count_headers():
    """Headers that are alive. `isinstance` would ask what dead weak references stood for."""
    return sum(issubclass(type(entry), tarfile.TarInfo) for entry in gc.get_objects())


def test_headers_do_not_pile_up(tmp_path):
    (tmp_path / "s.tar").write_bytes(
        tar(itertools.chain.from_iterable(sample(number % 250, 1) for number in range(300)))
    )
    before = count_headers()
    most = 0
    for number, _ in enumerate(read_shard(str(tmp_path / "s.tar"))):
        if number % 50 == 0:
            most = max(most, count_headers() - before)
    assert most <= 4


# Fingerprints


def fingerprint(tmp_path, content, name="s.tar"):
    (tmp_path / name).write_bytes(content)
    found = []
    list(read_shard(str(tmp_path / name), found))
    return found


@pytest.mark.parametrize("damage", [None, *DAMAGED])
def test_the_fingerprint_is_of_all_bytes_whether_they_are_damaged_or_not(tmp_path, damage):
    import hashlib

    content = WHOLE if damage is None else DAMAGED[damage][0]
    expected = Fingerprint("s.tar", len(content), hashlib.sha256(content).hexdigest())
    assert fingerprint(tmp_path, content) == [expected]
    assert list_fingerprints([str(tmp_path / "s.tar"), "https://host/a.tar?signature=1"]) == [
        Fingerprint("s.tar", len(content)),
        Fingerprint("a.tar"),
    ]


def test_a_large_shard_is_known_again_by_its_blocks(tmp_path):
    path, content = tmp_path / "s.tar", bytearray(fingerprints.BLOCKS * fingerprints.BLOCK_SIZE * 2)
    marks = []
    for place in (None, 0, len(content) - 1):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        marks += mark_shards([str(path)])
    assert len(set(marks)) == 3 and {mark.size for mark in marks} == {len(content)}
    os.utime(path, (1, 1))
    assert compare_shards(marks[2:], list(mark_shards([str(path)]))) == []
    assert compare_shards(marks[:1], marks[1:2]) == ["s.tar has other content"]


def test_every_change_of_a_list_of_shards_is_said():
    a, b, c = Fingerprint("a", 10, "x"), Fingerprint("b", 2000, "y"), Fingerprint("c", 30, "z")
    assert compare_shards([a, b], [a, b]) == compare_shards([], []) == []
    assert compare_shards([a, b], [a]) == ["b is gone"] and compare_shards([a], [a, b]) == ["b is new"]
    assert compare_shards([a, b], [a, c]) == ["b is gone", "c is new"]
    assert compare_shards([a, b], [b, a]) == ["the shards were a, b, in this order, and are b, a"]
    assert compare_shards([b], [b._replace(size=1, sha256="")]) == ["b had 2,000 bytes and has 1"]
    assert compare_shards([b], [b._replace(sha256="z")]) == ["b has other content"]
    assert compare_shards([b], [Fingerprint("b", 2000)]) == compare_shards([Fingerprint("b")], [b]) == []
    assert compare_shards([b], [Fingerprint("b")]) == ["b could not be read"]
