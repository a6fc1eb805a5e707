"""Checkpoints of JAX code on disk: names, shapes and arrays of their leaves, without JAX and without pickle.

Three stores hold the same tree. `.npz` needs numpy alone. A tensorstore folder (what big_vision's HEAD writes) has one
zarr sub-folder per leaf, with `~` for `/` in its name; listing it needs nothing, reading it the package tensorstore,
which an Orbax folder (clip-jax) needs for both. Shapes are known before any array is read, so that a conversion can be
planned, and refused, at no cost.
"""

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


# What trainers of big_vision store beside `params`: optimizer state, timers, and the counters of older versions.
TRAINING_STATE = ("opt", "chrono", "extra")
BFLOAT16 = np.dtype("V2")  # numpy has no bfloat16 and stores its two bytes as they are


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, and why."""


@dataclass(frozen=True)
class Leaf:
    """One array as the store describes it. `dtype` is numpy's name, or "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str


def dtype_name(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


class NpzStore:
    """The arrays of an `.npz` file, read one at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.files = [path]
        with path.open("rb") as file:
            _check_npz_start(path, file.read(8))
        try:
            self._zip = zipfile.ZipFile(path)
            self.leaves = {self._leaf_name(name): self._header(name) for name in self._zip.namelist()}
        except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
            raise ConversionError(f"{path} is truncated or damaged: {error}") from error

        if len(self.leaves) != len(self._zip.namelist()):
            raise ConversionError(f"{path} holds leaves of the same name twice")

    def _leaf_name(self, member: str) -> str:
        if not member.endswith(".npy"):
            hint = "; it looks like a PyTorch checkpoint" if member.endswith("data.pkl") else ""
            raise ConversionError(f"{self.path} is a zip but no .npz, as it holds {member!r}{hint}")
        return member.removesuffix(".npy")

    def _header(self, member: str) -> Leaf:
        with self._zip.open(member) as file:
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            except ValueError as error:
                raise ConversionError(f"{member!r} in {self.path} is damaged: {error}") from error
        if dtype.hasobject:
            raise ConversionError(f"{member!r} in {self.path} is a pickle, which is never loaded")
        return Leaf(shape, dtype_name(dtype))

    def read(self, name: str) -> np.ndarray:
        try:
            with self._zip.open(name + ".npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
            raise ConversionError(f"{name!r} in {self.path} is truncated or damaged: {error}") from error


def _check_npz_start(path: Path, start: bytes) -> None:
    """Raises ConversionError unless a file begins like a zip, naming what else it may be."""
    if start.startswith(b"PK"):
        return
    kinds = {b"\x93NUMPY": "a single array (.npy)", b"\x80": "a pickle, which is never loaded", b"\x89HDF": "HDF5"}
    kind = next((text for magic, text in kinds.items() if start.startswith(magic)), "something else")
    if start[3:] == bytes(5):  # the length of its header, as a little-endian integer
        kind = "a safetensors file"
    raise ConversionError(f"{path} is no .npz file but {kind if start else 'empty'}")


class TensorstoreStore:
    """The arrays of a folder with one zarr sub-folder (version 2 or 3) per leaf."""

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(file for file in path.rglob("*") if file.is_file())
        self.leaves = {}
        for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
            self.leaves[folder.name.replace("~", "/")] = self._metadata(folder)
        if not self.leaves:
            raise ConversionError(f"{path} holds no arrays: expected one zarr folder per leaf, or an .npz file")

    def _metadata(self, folder: Path) -> Leaf:
        files = [folder / name for name in (".zarray", "zarr.json") if (folder / name).is_file()]
        if not files:
            orbax = any(self.path.rglob("_METADATA")) or any(self.path.rglob("_CHECKPOINT_METADATA"))
            hint = "; it looks like an Orbax checkpoint, as clip-jax writes, without its arrays" if orbax else ""
            raise ConversionError(f"{folder} is no zarr array (neither .zarray nor zarr.json){hint}")
        return _zarr_leaf(files[0].read_bytes(), str(files[0]))

    def read(self, name: str) -> np.ndarray:
        tensorstore = _import_tensorstore(self.path)
        folder = self.path / name.replace("/", "~")
        driver = "zarr" if (folder / ".zarray").is_file() else "zarr3"
        kvstore = {"driver": "file", "path": str(folder.resolve())}
        return _read_zarr(tensorstore, driver, kvstore, f"{name!r} in {self.path}")


def _import_tensorstore(path: Path) -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise ConversionError(
            f"{path} is a tensorstore folder, which only the package tensorstore reads: pip install tensorstore"
        ) from error
    return tensorstore


def _zarr_leaf(metadata: bytes, name: str) -> Leaf:
    """Facts in the metadata of a zarr array (version 2 or 3)."""
    try:
        content = json.loads(metadata)
        dtype = content["dtype"] if "dtype" in content else content["data_type"]
        return Leaf(tuple(content["shape"]), dtype if dtype == "bfloat16" else np.dtype(dtype).name)
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{name} is damaged: {error!r}") from error


def _read_zarr(tensorstore: Any, driver: str, kvstore: dict, name: str) -> np.ndarray:
    # A missing chunk would read as zeros: a folder that was not copied completely must not pass.
    spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
    try:
        return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())
    except (ValueError, OSError) as error:
        raise ConversionError(f"{name} is truncated or damaged: {error}") from error


class OrbaxStore:
    """The arrays of an Orbax checkpoint: zarr arrays in one OCDBT database, or in a folder each.

    Their names are the levels of the tree joined by `.`, for which `/` stands here.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(file for file in path.rglob("*") if file.is_file())
        self._tensorstore = _import_tensorstore(path)
        self._kvstore: dict[str, Any] = {"driver": "file", "path": f"{path.resolve()}/"}
        if (path / "manifest.ocdbt").is_file():
            self._kvstore = {"driver": "ocdbt", "base": self._kvstore}
        self.leaves: dict[str, Leaf] = {}
        self._stored: dict[str, tuple[str, str]] = {}
        try:
            entries = self._tensorstore.KvStore.open(self._kvstore).result()
            for key in entries.list().result():
                folder, _, file = key.decode().rpartition("/")
                if driver := {".zarray": "zarr", "zarr.json": "zarr3"}.get(file):
                    name = folder.replace(".", "/")
                    self._stored[name] = (driver, folder)
                    self.leaves[name] = _zarr_leaf(entries.read(key).result().value, f"{folder!r} in {path}")
        except (ValueError, OSError) as error:
            raise ConversionError(f"{path} is truncated or damaged: {error}") from error
        if not self.leaves:
            raise ConversionError(f"{path} is an Orbax checkpoint that holds no arrays")

    def read(self, name: str) -> np.ndarray:
        driver, folder = self._stored[name]
        prefix = "" if self._kvstore["driver"] == "ocdbt" else self._kvstore["path"]
        kvstore = {**self._kvstore, "path": f"{prefix}{folder}/"}
        return _read_zarr(self._tensorstore, driver, kvstore, f"{name!r} in {self.path}")


def find_orbax(path: Path) -> Path | None:
    """The folder with the arrays of an Orbax checkpoint: `path`, its item, or that of the last step in it."""
    steps = sorted((entry for entry in path.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name))
    for folder in (path, *steps[-1:]):
        for item in (folder, folder / "default"):
            if (item / "manifest.ocdbt").is_file() or (item / "_METADATA").is_file():
                return item
    return None


@dataclass
class Checkpoint:
    """The parameters in a store, by their names in the model.

    leaves: name -> shape and dtype. skipped: names in the store that are deliberately not converted (training state,
    and what lies outside a requested subtree). stored: name -> name in the store.
    """

    store: NpzStore | TensorstoreStore | OrbaxStore
    leaves: dict[str, Leaf]
    skipped: list[str]
    stored: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """One parameter as float32. Raises ConversionError if it is no finite floating-point array."""
        array = self.store.read(self.stored[name])
        if array.dtype == BFLOAT16 or array.dtype.name == "bfloat16":
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if array.dtype.kind != "f":
            raise ConversionError(f"the leaf {name!r} holds {array.dtype}, not floating-point numbers")
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise ConversionError(f"the leaf {name!r} holds {np.sum(~np.isfinite(array))} values that are not finite")
        return array

    def sha256(self) -> str:
        """Of the file; for a folder, of the list of its files' names and digests."""
        if self.store.files == [self.store.path]:
            return _sha256(self.store.path)
        listing = [f"{file.relative_to(self.store.path)} {_sha256(file)}\n" for file in self.store.files]
        return hashlib.sha256("".join(listing).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_checkpoint(argument: str | Path) -> Checkpoint:
    """Opens `FILE_OR_DIR[:subtree]` in any form that big_vision or clip-jax writes; no array is read.

    A tensorstore checkpoint may also be named without its step (`.../checkpoint.bv`), as upstream does, or by the
    folder it stands in: the file `checkpoint.bv-LAST` then says which step is meant. Of the steps in an Orbax folder
    the last is taken. Where boxed parameters were stored, the ending `/value` of their names is left out.

    Raises:
        ConversionError: no such file, another format, or no such subtree.
    """
    path, subtree = _split_subtree(str(argument))
    path = _last_step(path)
    if not path.exists():
        raise ConversionError(f"no such checkpoint: {path}")
    store = _open_store(path)
    prefix, skipped = _find_parameters(list(store.leaves), others=isinstance(store, OrbaxStore))
    if subtree:
        outside = [name for name in store.leaves if name not in skipped and not name.startswith(f"{prefix}{subtree}/")]
        skipped += outside
        prefix = f"{prefix}{subtree}/"
    kept = store.leaves.keys() - set(skipped)
    boxed = "/value" if all(name.endswith("/value") for name in kept) else ""
    stored = {name.removeprefix(prefix).removesuffix(boxed): name for name in store.leaves if name in kept}
    if not stored:
        tops = sorted({name.split("/")[0] for name in store.leaves})
        raise ConversionError(f"{path} has no parameters under {prefix!r}; at its top are {', '.join(tops)}")
    return Checkpoint(store, {name: store.leaves[stored[name]] for name in stored}, skipped, stored)


def _open_store(path: Path) -> NpzStore | TensorstoreStore | OrbaxStore:
    if not path.is_dir():
        return NpzStore(path)
    orbax = find_orbax(path)
    return TensorstoreStore(path) if orbax is None else OrbaxStore(orbax)


def _split_subtree(argument: str) -> tuple[Path, str]:
    path, colon, subtree = argument.rpartition(":")
    if not colon or Path(argument).expanduser().exists():
        path = argument
        subtree = ""
    return Path(path).expanduser(), subtree.strip("/")


def _last_step(path: Path) -> Path:
    """The folder of the latest step, if `path` names the checkpoint without its step or the folder around it."""
    for base in (path, path / "checkpoint.bv"):
        pointer = base.with_name(base.name + "-LAST")
        if pointer.is_file():
            return base.with_name(f"{base.name}-{pointer.read_text(encoding='utf-8').strip()}")
    return path


def _find_parameters(names: list[str], others: bool) -> tuple[str, list[str]]:
    """The prefix of the parameters, and the names that are training state: with `others`, all that are not under it.

    What is under neither is left to the caller, whose key map will not know it.
    """
    if any(name.startswith("params/") for name in names):
        prefix = "params/"
    elif any(name.startswith("opt/target/") for name in names):
        prefix = "opt/target/"
    else:
        return "", []
    state = [name for name in names if not name.startswith(prefix)]
    if not others:
        state = [name for name in state if name.split("/")[0] in TRAINING_STATE]
    return prefix, state
