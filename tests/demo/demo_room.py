"""What the tests of the web demo share; their fixtures are in `conftest.py` beside it."""

import io
import re
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler

import PIL.Image
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


LABELS = ["cat", "dog", "a photo of a cat", "photo"]
TAGS = {"div", "span", "p", "bdi", "small", "details", "summary", "table", "tr", "th", "td"}
TEMPLATES = ["a photo of a {}.", "{}"]
WEIGHTS = (0.0, 0.5, 1.0, 1.5)
# what no label may break: quotes, brackets, other scripts and directions, control characters, markup
ODD_LABELS = [
    "it's",
    '"""',
    "\\",
    "{}",
    "{x}",
    "שלום",
    "\u202egnp",
    "🐱\u200d👤",
    "\x00\x1b[31m",
    "<img src=x>",
    "a" * 500,
]


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """A site on this machine that plays one on the internet."""

    photo = b""
    seen: list = []

    def do_GET(self):
        self.seen.append((self.headers["Host"], self.path, self.headers["Authorization"]))
        name, _, value = self.path[1:].partition("/")
        getattr(self, f"send_{name}")(value)

    def send_photo(self, _):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.photo)

    def send_status(self, status):
        self.send_response(int(status))
        self.end_headers()

    def send_to(self, url):
        self.send_response(302)
        self.send_header("Location", url)
        self.end_headers()

    def send_endless(self, _):
        self.send_response(200)
        self.end_headers()
        while self.write(bytes(2**16)):
            pass

    def send_drops(self, _):
        self.send_response(200)
        self.end_headers()
        while self.write(b"\x89"):
            time.sleep(0.01)

    def write(self, content):
        try:
            self.wfile.write(content)
            return True
        except OSError:
            return False

    def log_message(self, *args):
        pass


class Elements(HTMLParser):
    """Tags in order, checked to be closed in order; attributes of those of a class; all text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def styles(self, name: str) -> list[dict[str, float]]:
        """Left end and width, in per cent, of the elements of a class."""
        styles = [a["style"] for _, a in self.found if name in (a.get("class") or "").split()]
        return [{key: float(value) for key, value in re.findall(r"(\w+):([-\d.]+)%", style)} for style in styles]


FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD_CHARACTERS = st.one_of(
    st.characters(),  # lone surrogates included
    st.sampled_from("\x00\x1b\x7f\u2028\u200f\u202e\u2066\ufeff\ufffd\u0301🐱\U0001f468\u200d<>&'\"{}$`\\,\n"),
)
ODD_TEXTS = st.text(ODD_CHARACTERS, max_size=40) | st.text(ODD_CHARACTERS, min_size=1, max_size=4).map(
    lambda t: t * 2500
)
