"""Samples that are broken in eight ways, and shards with them."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from training_runs import good_members, image_bytes, write_shard


def bomb() -> bytes:
    """A PNG of 300 bytes that claims 30,000 x 30,000 pixels."""
    content = bytearray(image_bytes())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


BROKEN = {  # reason in the log: how often, and the files
    "undecodable image": (4, [("jpg", noise()[:2000]), ("txt", b"t")]),
    "empty image file": (3, [("jpg", b""), ("txt", b"t")]),
    "not an image": (3, [("jpg", b"<!DOCTYPE html><html><body>404</body></html>"), ("txt", b"t")]),
    "too many pixels": (2, [("png", bomb()), ("txt", b"t")]),
    "missing caption": (3, [("png", image_bytes())]),
    "caption is not UTF-8": (2, [("png", image_bytes()), ("txt", b"caf\xe9 \xff")]),
    "bad JSON": (2, [("png", image_bytes()), ("txt", b"t"), ("json", b'{"captions": [')]),
    "broken shard": (1, []),
}
EXPECTED = {reason: count for reason, (count, _) in BROKEN.items()}
GOOD = 380


def write_dirty_shards(root: Path) -> Path:
    """400 samples of which 20 are broken, in 4 shards, one of which breaks off inside its last sample."""
    broken = [(reason, files) for reason, (count, files) in BROKEN.items() for _ in range(count) if files]
    for shard in range(4):
        members = []
        for index in range(95):
            members += good_members(1000 * shard + index, 1, ["a red square."])
            if index % 20 == 10:
                number = shard * 5 + index // 20
                if number < len(broken):
                    members += [(f"bad{number}.{suffix}", content) for suffix, content in broken[number][1]]
        if shard == 3:
            members += [("cut.png", image_bytes(size=(60, 60))), ("cut.txt", b"t")]
        path = write_shard(root / f"{shard}.tar", members)
        if shard == 3:
            path.write_bytes(path.read_bytes().partition(b"cut.png")[0] + b"cut.png" + bytes(300))
    return root
