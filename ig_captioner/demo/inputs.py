"""Checks of what the web demo lets in: photos and labels within limits, and URLs on the public internet. No Gradio.

Everything that is refused is an `InputError` whose message is meant for the person at the browser.
"""

import asyncio
import io
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import PIL.Image

from ..input_rules import (
    NOT_AN_IMAGE,
    TOO_MANY_PIXELS,
    ImageError,
    clean_text,
    read_image_file,
    split_list,
)


MAX_BYTES = 25 * 2**20  # of a photo's file
MAX_PIXELS = 64_000_000  # phones take up to 50; decoded they take three bytes each
MAX_LABELS = 1_000  # typed ones, each in each sentence
MAX_SENTENCES = 16
MAX_CHARACTERS = 500  # of a label, and of the sentence around it
MAX_PLACES = 3  # of a label in a sentence
MAX_ALL_CHARACTERS = 100_000  # of all labels in all sentences
MAX_URL_CHARACTERS = 2_000
MAX_REDIRECTS = 3
FETCH_SECONDS = 15.0  # for all of a photo at a URL, redirects included
# Those of `input_rules.FORMATS` that browsers show, too.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Of IANA's registries of special-purpose addresses: what `is_global` of older Pythons lets pass.
SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "5f00::/16")))


class InputError(ValueError):
    """Something typed or uploaded cannot be used; the message says what and why."""


# Texts


def parse_labels(text: str) -> list[str]:
    """Labels from a text box: a line each, or, in a single line, between commas or the like. Repeated ones count once.

    Raises:
        InputError: for no label, too many, or one that is too long or no text.
    """
    lines = [line for line in map(clean_text, text.splitlines()) if line]
    labels = list(dict.fromkeys(split_list(lines)))
    if not labels:
        raise InputError("There are no labels: write one per line.")
    if len(labels) > MAX_LABELS:
        raise InputError(f"{len(labels):,} labels are too many: {MAX_LABELS:,} at most.")
    for label in labels:
        _check_text("label", label)
    return labels


def parse_templates(text: str) -> list[str]:
    """Sentences around labels from a text box, a line each.

    Raises:
        InputError: for no sentence, too many, or one that has no place for labels, is too long, or no text.
    """
    templates = [line for line in map(clean_text, text.splitlines()) if line] or [text]
    if len(templates) > MAX_SENTENCES:
        raise InputError(f"{len(templates):,} sentences are too many: {MAX_SENTENCES} at most.")
    for template in templates:
        _check_text("sentence", template)
        if "{}" not in template:
            raise InputError(f"The sentence {template!r} has no {{}}, where the label goes.")
        if template.count("{}") > MAX_PLACES:
            raise InputError(
                f"The sentence {template[:40]!r} has {template.count('{}')} places for the label: {MAX_PLACES} at most."
            )
    return templates


def check_number(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raises InputError if labels in sentences make too many texts."""
    if len(labels) * len(templates) > MAX_LABELS:
        raise InputError(
            f"{len(labels):,} labels in {len(templates)} sentences are {len(labels) * len(templates):,} texts: "
            f"{MAX_LABELS:,} at most."
        )


def check_characters(labels: Sequence[str], templates: Sequence[str]) -> None:
    """Raises InputError if labels in sentences make more text than a request may ask for."""
    in_labels = sum(map(len, labels))
    characters = 0
    for template in templates:
        places = template.count("{}")
        characters += len(labels) * (len(template) - 2 * places) + places * in_labels
    if characters > MAX_ALL_CHARACTERS:
        raise InputError(
            f"The labels in their sentences have {characters:,} characters in all: {MAX_ALL_CHARACTERS:,} at most."
        )


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"The {name} {text[:40]!r}... has {len(text):,} characters: {MAX_CHARACTERS} at most.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"The {name} {text[:40]!r} holds half a character, {text[error.start]!r}.") from error


# Photos


def read_upload(path: Any, folder: str) -> bytes:
    """The bytes of a file in the folder of uploads, up to one more than the limit. The path comes from the client.

    Raises:
        InputError: for what is no regular file in there, links to elsewhere included.
    """
    try:
        file = Path(path).resolve()
        if file.is_relative_to(Path(folder).resolve()) and file.is_file():
            with file.open("rb") as opened:
                return opened.read(MAX_BYTES + 1)
    except (TypeError, ValueError, OSError, RuntimeError):  # no path, or one that leads round in circles
        pass
    raise InputError(f"There is no uploaded file {path!r}: choose the photo again.")


def open_photo(content: bytes) -> PIL.Image.Image:
    """The RGB image in a file's bytes, of an animation the first frame. Its size is known before it is decoded.

    Raises:
        InputError: for too many bytes or pixels, a file of another format, or a damaged one.
    """
    if len(content) > MAX_BYTES:
        raise InputError(f"The photo has more than {MAX_BYTES // 2**20} MiB, which is the limit.")
    try:
        return read_image_file(io.BytesIO(content), MAX_PIXELS, FORMATS)
    except ImageError as error:
        messages = {
            NOT_AN_IMAGE: f"This file is no photo that can be read: {', '.join(FORMATS)} are.",
            TOO_MANY_PIXELS: f"The photo has more than {MAX_PIXELS // 10**6} megapixels, which is the limit.",
        }
        raise InputError(messages.get(error.reason, f"The photo is damaged: {error.__cause__ or error}")) from error


# URLs


async def fetch(url: str) -> bytes:
    """Fetches the bytes at an http or https URL, from an address on the public internet.

    A name is looked up once for each redirect, and the connection goes to the address that was checked: a name that
    leads elsewhere the next time does not help. Proxies of the environment are not used.

    Raises:
        InputError: for other URLs, private addresses, and whatever goes wrong on the way, limits of time and size
            included.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise InputError(f"The URL has {len(url):,} characters: {MAX_URL_CHARACTERS:,} at most.")
    try:
        return await asyncio.wait_for(_follow(url), FETCH_SECONDS)
    except TimeoutError as error:
        raise InputError(f"No photo came from {url!r} within {FETCH_SECONDS:g} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise InputError(f"Cannot load {url!r}: {error or type(error).__name__}") from error


async def _follow(url: str) -> bytes:
    target = httpx.URL(url.strip())
    headers = {"User-Agent": "ig_captioner", "Accept": "image/*", "Accept-Encoding": "identity"}
    async with httpx.AsyncClient(trust_env=False, headers=headers, timeout=FETCH_SECONDS) as client:
        for _ in range(MAX_REDIRECTS + 1):
            response = await client.send(await _pinned_request(client, target), stream=True)
            try:
                if not response.has_redirect_location:
                    return await _read(response, target)
                target = target.join(response.headers["Location"])
            finally:
                await response.aclose()
    raise InputError(f"{url!r} leads on more than {MAX_REDIRECTS} times.")


async def _pinned_request(client: httpx.AsyncClient, target: httpx.URL) -> httpx.Request:
    """A request that connects to an address already checked, under the name that was asked for."""
    if target.scheme not in ("http", "https") or not target.host or (target.port or 80) >= 2**16:
        raise InputError(f"{str(target)!r} is no http or https URL.")
    found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise InputError(f"{target.host!r} is not on the public internet.")
    return client.build_request(
        "GET",
        target.copy_with(host=addresses[0], username=None, password=None, fragment=None),
        headers={"Host": target.netloc.decode("ascii")},
        extensions={"sni_hostname": target.raw_host.decode("ascii")},
    )


async def _read(response: httpx.Response, target: httpx.URL) -> bytes:
    if response.status_code != httpx.codes.OK:
        raise InputError(f"{target.host!r} answered {response.status_code} {response.reason_phrase}.")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_BYTES:
            raise InputError(f"The photo has more than {MAX_BYTES // 2**20} MiB, which is the limit.")
    return bytes(content)


def is_public(address: str) -> bool:
    """Tells whether an IP address is on the public internet; IPv6 addresses that mean IPv4 ones count as those."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) % 2**32)
        if inner is not None:
            return is_public(str(inner))
        if ip not in GLOBAL_IPV6:
            return False
    if any(ip in network for network in SPECIAL):
        return False
    return ip.is_global and not ip.is_multicast
