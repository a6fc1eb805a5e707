"""The server of the web demo, and the Space."""

import re
import runpy
import signal
import threading
import time
from configparser import ConfigParser
from pathlib import Path

import httpx
import pytest
import yaml
from demo_room import Site, encoded

from ig_captioner import DEFAULT_CHECKPOINT
from ig_captioner.demo.inputs import MAX_BYTES
from ig_captioner.demo.lanes import SHORT_TEXTS, Lanes


SPACE = Path(__file__).parents[2] / "examples" / "space"


# The server


def test_the_server_is_private(server):
    app, url = server
    assert url.startswith("http://127.0.0.1:") and not app.share and app.share_url is None
    assert not app.analytics_enabled and not app.run_history and not app.enable_monitoring
    assert not any(fn.api_visibility == "public" for fn in app.fns.values())
    page = httpx.get(url).text
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//(?!127\.0\.0\.1)[^\"]*\"", page)


def test_the_server_limits_uploads(server):
    _, url = server
    for size, status in ((1000, 200), (MAX_BYTES + 1, 413)):
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", bytes(size))})
        assert answer.status_code == status


def read_events(server, file: dict) -> str:
    """What the server answers to a client that says where its photo is."""
    app, url = server
    read = next(i for i, fn in app.fns.items() if fn.name == "read")
    job = {"data": [file], "fn_index": read, "session_hash": "s", "event_data": None, "trigger_id": None}
    httpx.post(f"{url}gradio_api/queue/join", json=job).raise_for_status()
    return httpx.get(f"{url}gradio_api/queue/data", params={"session_hash": "s"}, timeout=30).text


UPLOADED = {"_type": "gradio.FileData"}


@pytest.mark.parametrize("file", [{"meta": UPLOADED}, {"meta": {"_type": "x"}}, {}])
def test_a_client_cannot_name_a_file_or_url(server, site, photo, tmp_path, file):
    (tmp_path / "photo.png").write_bytes(encoded(photo))
    port = site.split(":")[1]
    urls = [f"http://{host}:{port}/photo" for host in ("127.0.0.1", "photos.test")]
    for path in (*urls, str(tmp_path / "photo.png"), __file__, "/dev/zero", "", None):
        events = read_events(server, {"path": path, **file})
        assert '"success":false' in events and '"success":true' not in events
        if file.get("meta") != UPLOADED:  # Gradio lets them through
            assert "no uploaded file" in events
        elif path in urls:
            assert "Photos are uploaded" in events
    assert Site.seen == []


@pytest.mark.parametrize("file", [{"meta": UPLOADED}, {}])
def test_a_client_can_name_what_it_uploaded(server, photo, file):
    answer = httpx.post(f"{server[1]}gradio_api/upload", files={"files": ("a.png", encoded(photo))})
    assert '"success":true' in read_events(server, {"path": answer.json()[0], **file})


def test_launch(checkpoint, monkeypatch, capsys):
    pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    calls = []
    monkeypatch.setattr(demo, "serve", lambda app, *arguments: calls.append(arguments) or "http://there/")
    monkeypatch.setattr(demo.gr.Blocks, "block_thread", lambda self: calls.append("waits"))
    demo.launch(checkpoint, port=1234, device="cpu")
    assert calls == [("127.0.0.1", 1234, False), "waits"] and "http://there/" in capsys.readouterr().out
    with pytest.raises(OSError, match="no such model folder"):
        demo.launch("./missing")


def test_sigterm_ends_the_server_as_ctrl_c_does(checkpoint, monkeypatch):
    pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    monkeypatch.setattr(demo, "serve", lambda *arguments: "http://there/")
    monkeypatch.setattr(demo.gr.Blocks, "block_thread", lambda self: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.launch(checkpoint, device="cpu")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_short_request_does_not_wait_for_a_long_one():
    lanes, order, long_runs = Lanes(), [], threading.Event()

    def long_request():
        with lanes.enter(SHORT_TEXTS + 1):
            long_runs.set()
            short_is_done.wait(10)
            order.append("long")

    short_is_done = threading.Event()
    thread = threading.Thread(target=long_request)
    thread.start()
    assert long_runs.wait(10)
    with lanes.enter(SHORT_TEXTS):
        order.append("short")
    short_is_done.set()
    thread.join(10)
    assert order == ["short", "long"]


def test_long_requests_wait_for_one_another():
    lanes, running, most = Lanes(), [], []

    def long_request():
        with lanes.enter(SHORT_TEXTS + 1):
            running.append(1)
            most.append(len(running))
            time.sleep(0.01)
            running.pop()

    threads = [threading.Thread(target=long_request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1, 1, 1, 1]


# The Space


def test_the_space_is_complete(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    calls = []
    monkeypatch.setattr(demo, "launch", lambda model, **options: calls.append((model, options)))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls == [(DEFAULT_CHECKPOINT, {"host": "0.0.0.0", "port": 7860})]
    about = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---")[1])
    assert about["sdk"] == "gradio" and about["app_file"] == "app.py" and about["sdk_version"] == gradio.__version__
    setup = ConfigParser()
    setup.read(SPACE.parent.parent / "setup.cfg", "utf-8")
    needed = setup["options"]["install_requires"].split()
    lines = (SPACE / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "--"))] == needed
