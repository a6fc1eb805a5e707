"""Shards behind URLs, from a server on this machine that fails in the ways that servers fail."""

import functools
import http.server
import itertools
import tarfile
import threading
from collections import Counter

import pytest
from training_runs import good_members, load, take, write_shard

import ig_captioner.data.remote
from ig_captioner.data.fingerprints import Fingerprint, compare_shards, mark_shards
from ig_captioner.data.remote import UnreachableError, is_url, open_url
from ig_captioner.data.shards import EmptySourceError, Skipped, find_shards, read_shard
from training.config import DataConfig, SourceConfig


CHANGING = ("new", "longer", "stubborn", "unmarked-new")  # from the second request on the file is another one


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; the path of a URL says how often and how it fails before it does."""

    counts: Counter[str] = Counter()
    ranges: list[str | None] = []

    def do_GET(self):
        manner, _, name = self.path.lstrip("/").partition("/")
        number = self.counts[self.path] = self.counts[self.path] + 1
        self.ranges.append(self.headers.get("Range"))
        if manner == "busy" and number <= 2:
            return self.send_error(503)
        if manner == "forbidden":
            return self.send_error(403)
        try:
            content = open(f"{self.directory}/{name}", "rb").read()  # noqa: SIM115
        except OSError:
            return self.send_error(404)
        number_of_version = self.counts[name] = self.counts[name] + 1
        if manner in CHANGING and number_of_version > 1:
            content = content[::-1] if manner != "longer" else content + bytes(512)
        etag = None if manner in ("unmarked", "unmarked-new") else f'"{manner in CHANGING and number_of_version}"'
        start = self.wanted(manner, etag)
        self.send_response(206 if start else 200)
        if manner != "no-length":
            self.send_header("Content-Length", str((len(content) - start) // (2 if manner == "short-length" else 1)))
        if etag:
            self.send_header("ETag", etag)
        if start:
            shown = {"wrong-range": 512, "no-range": None}.get(manner, start)
            if shown is not None:
                self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        tries = {"trickle": 10**9, "no-length": 10**9, "plain": 0, "busy": 0, "stuck": 0, "short-length": 0}
        cut = tries.get(manner, 1)
        # "trickle" gives a little more each time, "stuck" never anything after the first bytes
        if manner == "stuck":
            content = content[:15_000] if not start else b""
        if manner == "drip":
            return self.drip(content[start:])
        self.wfile.write(content[start : start + 10_000] if number <= cut else content[start:])

    def wanted(self, manner, etag):
        """Where the answer begins: at 0 for servers that know no ranges, and where `If-Range` is another version."""
        validator = self.headers.get("If-Range")
        if "Range" not in self.headers or manner == "whole" or (manner != "stubborn" and validator != etag):
            return 0
        return int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))

    def drip(self, content):
        try:
            for place in range(len(content)):
                self.wfile.write(content[place : place + 1])
                self.wfile.flush()
                threading.Event().wait(0.02)
        except OSError:  # the reader has given up
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    for shard in range(3):
        write_shard(tmp_path / f"s-{shard}.tar", good_members(10 * shard, 10))
        write_shard(tmp_path / f"s-{shard}.tar.gz", good_members(10 * shard, 10))
    assert (tmp_path / "s-0.tar").stat().st_size > 20_000
    monkeypatch.setattr(Handler, "counts", Counter())
    monkeypatch.setattr(Handler, "ranges", [])
    monkeypatch.setattr(ig_captioner.data.remote, "_given_up", Counter())
    monkeypatch.setattr(ig_captioner.data.remote, "BUFFER_SIZE", 4096)
    waits = []
    monkeypatch.setattr(ig_captioner.data.remote.time, "sleep", waits.append)
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        running.url, running.waits = f"http://127.0.0.1:{running.server_port}", waits
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("manner", "said"), [("plain", []), ("unmarked", []), ("new", ["other content"]), ("longer", ["bytes and has"])]
)
def test_another_version_of_a_shard_shows_without_reading_it(server, manner, said):
    url = f"{server.url}/{manner}/s-0.tar"
    before, now = list(mark_shards([url])), list(mark_shards([url]))
    differences = compare_shards(before, now)
    assert len(differences) == len(said) and all(map(str.__contains__, differences, said))
    assert list(mark_shards([f"{server.url}/forbidden/s-1.tar"])) == [Fingerprint("s-1.tar")]


def test_urls_are_expanded_and_not_joined_to_the_root():
    assert find_shards(["http://host/s-{0..1}.tar?a*"], "/data") == ["http://host/s-0.tar?a*", "http://host/s-1.tar?a*"]
    assert find_shards(["s-{0..1}.tar"], "https://host/x") == ["https://host/x/s-0.tar", "https://host/x/s-1.tar"]
    assert is_url("hf://datasets/a/b.tar") and not is_url("/a/b.tar") and not is_url("c:/b.tar")
    with pytest.raises(ValueError, match="nonsense"):
        find_shards(["nonsense://host/s.tar"])


@pytest.mark.parametrize("manner", ["plain", "busy", "cut", "whole", "trickle", "unmarked"])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_content_is_the_same_whatever_the_server_does(server, tmp_path, manner, suffix):
    name = f"s-1.{suffix}"
    assert list(read_shard(f"{server.url}/{manner}/{name}")) == list(read_shard(str(tmp_path / name)))
    assert server.waits == ([1, 2] if manner == "busy" else [1] * len(server.waits)), "each success starts afresh"


def test_a_cut_connection_is_taken_up_where_it_broke(server, tmp_path):
    size = (tmp_path / "s-0.tar").stat().st_size
    assert open_url(f"{server.url}/cut/s-0.tar").read() == (tmp_path / "s-0.tar").read_bytes()
    assert size > 10_000 and Handler.ranges == [None, "bytes=10000-"] and server.waits == [1]


def test_rest_of_a_shard_that_stays_away_is_skipped(server):
    *samples, last = read_shard(f"{server.url}/stuck/s-0.tar")
    assert samples and last == Skipped(f"s-0.tar:{len(samples):04d}", "unreachable shard")
    assert server.waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("manner", CHANGING)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_two_versions_of_a_shard_are_never_mixed(server, tmp_path, manner, suffix):
    (tmp_path / f"s-0.{suffix}").write_bytes(b"".join(path.read_bytes() for path in [tmp_path / f"s-0.{suffix}"] * 2))
    *samples, last = read_shard(f"{server.url}/{manner}/s-0.{suffix}")
    whole = [item for item in read_shard(str(tmp_path / f"s-0.{suffix}")) if not isinstance(item, Skipped)]
    if (tmp_path / f"s-0.{suffix}").stat().st_size > 10_000:
        assert last.reason == "unreachable shard" and server.waits == [1]
        assert samples == whole[: len(samples)] and len(samples) < len(whole)


@pytest.mark.parametrize("manner", ["wrong-range", "no-range"])
def test_other_bytes_than_those_asked_for_are_refused(server, tmp_path, manner):
    with pytest.raises(UnreachableError, match=r"WrongRangeError: asked for bytes from 10000 on, the server gave"):
        open_url(f"{server.url}/{manner}/s-0.tar").read()
    *samples, last = read_shard(f"{server.url}/{manner}/s-1.tar")
    assert samples == list(read_shard(str(tmp_path / "s-1.tar")))[: len(samples)]
    assert last.reason == "unreachable shard"


@pytest.mark.parametrize("manner", ["no-length", "short-length"])
def test_a_body_that_ends_too_early_is_reported(server, tmp_path, manner):
    for name in ("s-0.tar", "s-0.tar.gz"):
        *samples, last = read_shard(f"{server.url}/{manner}/{name}")
        whole = list(read_shard(str(tmp_path / name)))
        if (tmp_path / name).stat().st_size > 10_000 or manner == "short-length":
            assert isinstance(last, Skipped) and last.key.startswith(f"{name}:") and last.reason == "broken shard"
            assert samples == whole[: len(samples)] and len(samples) < len(whole)


def test_a_server_that_drips_is_given_up(server, monkeypatch):
    monkeypatch.setattr(ig_captioner.data.remote, "TIMEOUT", 0.1)
    monkeypatch.setattr(ig_captioner.data.remote, "RETRIES", 2)
    *_, last = read_shard(f"{server.url}/drip/s-0.tar")
    assert last.reason == "unreachable shard" and server.waits == [1, 1]
    with pytest.raises(UnreachableError, match="bytes per second are less than 1,000"):
        open_url(f"{server.url}/drip/s-1.tar").read()


@pytest.mark.parametrize("manner", ["missing", "forbidden"])
def test_missing_file_is_not_tried_again(server, manner):
    url = f"{server.url}/{manner}/s-9.tar"
    with pytest.raises(UnreachableError, match="s-9.tar: HTTPError"):
        open_url(url).read(1)
    assert list(read_shard(url)) == [Skipped("s-9.tar:", "unreachable shard")] and server.waits == []


def test_server_that_is_down_costs_fewer_retries_for_each_file(server):
    server.shutdown()
    server.socket.close()
    for _ in range(10):
        assert [item.reason for item in read_shard(f"{server.url}/plain/s-0.tar")] == ["unreachable shard"]
    assert [server.waits.count(wait) for wait in (1, 2, 4, 8, 16, 32)] == [5, 4, 3, 2, 1, 0]


def test_other_urls_go_through_fsspec(tmp_path):
    import fsspec

    path = write_shard(tmp_path / "s.tar", good_members(0, 3))
    with fsspec.open("memory://shards/s.tar", "wb") as file:
        file.write(path.read_bytes())
    assert find_shards(["memory://shards/{s,t}.tar"])[1] == "memory://shards/t.tar"
    assert list(read_shard("memory://shards/s.tar")) == list(read_shard(str(path)))
    assert list(read_shard("memory://shards/t.tar")) == [Skipped("t.tar:", "unreachable shard")]


@pytest.mark.parametrize("cached", [True, False])
def test_run_goes_on_without_what_cannot_be_reached(server, tokenizer, cached):
    shards = [f"{server.url}/plain/s-{{0..1}}.tar", f"{server.url}/plain/s-7.tar", f"{server.url}/cut/s-2.tar.gz"]
    data = load(DataConfig({"x": SourceConfig(shards)}, cache_in_memory=cached, shuffle_buffer=8), tokenizer, "/none")
    batches = take(data.loader, 16)
    assert {key for batch in batches for key in batch["keys"]} == {f"{number:04d}" for number in range(30)}
    skipped = data.skipped + list(itertools.chain(*(batch["skipped"] for batch in batches)))
    assert set(skipped) == {Skipped("s-7.tar:", "unreachable shard")}


@pytest.mark.parametrize("cached", [True, False])
def test_nothing_reachable_fails_fast_with_counts(server, tokenizer, cached):
    config = DataConfig({"x": SourceConfig([f"{server.url}/plain/t-{{0..3}}.tar"])}, cache_in_memory=cached)
    with pytest.raises(EmptySourceError, match=r"source 'x' .* 4 shard\(s\).* 4 x unreachable shard"):
        next(iter(load(config, tokenizer, "/none").loader))
    assert server.waits == []


def test_broken_archive_is_no_matter_of_the_network(server, tmp_path):
    (tmp_path / "b.tar").write_bytes((tmp_path / "s-0.tar").read_bytes()[:9000])
    *_, last = read_shard(f"{server.url}/plain/b.tar")
    assert last.reason == "broken shard" and server.waits == []
    assert tarfile.is_tarfile(tmp_path / "s-0.tar")
