"""Fixtures of the web demo."""

import socket
import threading
from http.server import ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
import torch
from demo_room import Site, encoded
from small_checkpoint import save_checkpoint

from ig_captioner import DEFAULT_CHECKPOINT
from ig_captioner.demo import inputs
from ig_captioner.demo.inputs import FORMATS
from ig_captioner.demo.scores import Captioner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("demo") / "tiny"))


@pytest.fixture(scope="module")
def captioner(checkpoint) -> Captioner:
    return Captioner(checkpoint, "cpu")


@pytest.fixture(scope="module")
def handlers(captioner):
    pytest.importorskip("gradio")
    from ig_captioner.demo.app import Handlers

    return Handlers(captioner)


@pytest.fixture
def raises_on_the_page():
    gradio = pytest.importorskip("gradio")
    return lambda match: pytest.raises(gradio.Error, match=match)


@pytest.fixture(scope="module")
def photo() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((60, 40))


@pytest.fixture(scope="module")
def pixel_values(captioner, photo) -> torch.Tensor:
    return captioner.read(photo)


@pytest.fixture
def site(photo, monkeypatch):
    """`http://photos.test:PORT`. Its address counts as public; every name but `inside.test` leads there."""
    monkeypatch.setattr(Site, "photo", encoded(photo))
    monkeypatch.setattr(Site, "seen", [])
    lookups, real = [], socket.getaddrinfo

    def look_up(host, port, *args, **kwargs):
        if host.endswith(".test"):
            lookups.append(host)
            # the second time the name leads into the private network
            host = "127.0.0.1" if host != "inside.test" and lookups.count(host) == 1 else "127.0.0.2"
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(inputs, "is_public", lambda address: address == "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"photos.test:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def shipped() -> Captioner:
    return Captioner(DEFAULT_CHECKPOINT, "cpu")


@pytest.fixture(scope="module")
def files(photo) -> dict[str, bytes]:
    animation = {"save_all": True, "append_images": [photo.rotate(180)], "loop": 0}
    return {format: encoded(photo, format, **(animation if format == "GIF" else {})) for format in FORMATS}


@pytest.fixture(scope="module")
def server(checkpoint):
    pytest.importorskip("gradio")
    from ig_captioner.demo import app as demo

    app = demo.build_app(checkpoint, "cpu")
    url = demo.serve(app)
    yield app, url
    app.close()
