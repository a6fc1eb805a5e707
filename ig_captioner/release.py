"""Releases of a checkpoint: the complete folder that the Hub expects, and its upload.

A released folder needs nothing but transformers: weights, configuration, tokenizer, processor, a card, and the code
that `trust_remote_code=True` runs. `RELEASE_FILES` lists what it must hold; `push_release` uploads it.
"""

import ast
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_local_safetensors_metadata,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import Tensor

from .card import CARD_FILE, FACTS_FILE, RESULTS_FOLDER, CardFacts, add_results, make_card, read_facts, write_facts
from .checkpoint import folder_or_repository, load_model, load_processor, own_checkpoint
from .configuration_ig_captioner import AUTO_MAP, CUSTOM_PIPELINES, REMOTE_CODE_FILES, IGCaptionerConfig
from .encoder_ig_captioner import IGCaptionerPreTrainedModel
from .evaluation.report import weights_digest
from .input_rules import tell
from .installed import DEFAULT_CHECKPOINT, __version__
from .modeling_ig_captioner import IGCaptionerForConditionalGeneration, IGCaptionerForZeroShotImageClassification
from .processing_ig_captioner import IGCaptionerProcessor


# What a release consists of, by SHA-256; written last.
MANIFEST = "release.json"
# Every released folder holds these and, in one file or in shards, the weights `model*.safetensors`.
RELEASE_FILES = (
    CARD_FILE,
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    MANIFEST,
    *REMOTE_CODE_FILES,
)
CARD_FILES = (CARD_FILE, FACTS_FILE, f"{RESULTS_FOLDER}/*.json")
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
# All that a release may hold, of other versions of this package, too: what `push_release` removes if it is outdated.
RELEASE_PATTERNS = (
    *RELEASE_FILES,
    *CARD_FILES,
    "*_ig_captioner.py",
    "model*.safetensors",
    "model.safetensors.index.json",
)


# Words in the name of a licence that does not allow everybody everything.
RESTRICTED = re.compile(r"\bnc\b|non-?commercial|research", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint says of itself


def read_in_short(model: str | Path) -> str | None:
    """The one line that `card.yaml` says of a checkpoint, if it has one and can be had."""
    folder = Path(model)
    try:
        if not folder.is_dir():
            folder = Path(hf_hub_download(os.fspath(model), FACTS_FILE)).parent
        facts = read_facts(folder)
    except (OSError, ValueError, HTTPError):  # no such file, out of reach, or damaged: nothing depends on it
        return None
    return None if facts is None or not facts.in_short else " ".join(facts.in_short.split())


# ---------------------------------------------------------------------------------------------------------------------
# Out


def save_release(
    directory: str | Path,
    model: str | Path = DEFAULT_CHECKPOINT,
    *,
    overwrite: bool = False,
    repo_id: str | None = None,
    license: str | None = None,
    results: Sequence[str | Path] = (),
) -> Path:
    """Writes the complete Hub folder of a checkpoint, and loads it again to be sure.

    The folder appears under its name only once it has been verified; an error leaves nothing there. Its card is filled
    from `card.yaml` and `results/` beside the checkpoint (see `card`); a card without those is kept as it is.

    Args:
        directory: missing or empty, unless `overwrite` says that an earlier release there, whatever files it holds,
            may be replaced.
        model: a folder or a repository on the Hub, of either head; weights keep the dtype that they are stored in,
            which may not be the one that the configuration has them loaded in.
        repo_id: the name that the card's examples load; the folder's own by default.
        license: the Hub's name of a licence, for the card's metadata; what the checkpoint says of itself is replaced
            with a warning, and not where it is for research or non-commercial use only.
        results: files `results.json` of `ig-captioner evaluate`, for the card.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: the folder may not be written, the checkpoint is incomplete or of another kind, a file of its card
            is a link to elsewhere, the licence may not be replaced, or the results are not its own.
        OSError: reading or writing failed.
    """
    directory = Path(directory).expanduser().resolve()
    check_target(directory, overwrite)
    if (given := Path(folder_or_repository(model))).is_dir():
        _refuse_links_out(given)
    loaded = load_model(IGCaptionerForConditionalGeneration, model)
    processor = load_processor(model)
    # A checkpoint may come from elsewhere: what it says about code must fit the code it gets.
    loaded.config.auto_map = dict(AUTO_MAP)
    loaded.config.custom_pipelines = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
    source = _source(os.fspath(model))
    with new_folder(directory) as folder:
        loaded.save_pretrained(folder, state_dict=_stored_weights(source))
        processor.save_pretrained(folder)
        _copy_card(source, folder, license)
        add_results(folder, results, weights_digest(os.fspath(model)))
        (folder / CARD_FILE).write_bytes(make_card(folder, loaded, repo_id or directory.name))
        for weights in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
            weights.chmod((folder / CARD_FILE).stat().st_mode)
        (folder / MANIFEST).write_bytes(_manifest({name: folder / name for name in names_of_files(folder)}))
        _verify(folder, loaded, processor)
    return directory


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuses to replace anything but an earlier release: raises ValueError or OSError."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file")
    if directory == Path.cwd().resolve():
        raise ValueError(f"{directory} is the current folder, which cannot be replaced; name another")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{directory} is not empty; overwrite (--overwrite) replaces an earlier release")
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir() and not _holds_results(path))
    try:
        model_type = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        model_type = None
    if folders or model_type != IGCaptionerConfig.model_type:
        reason = f"it holds the folder {folders[0]!r}" if folders else "it is no folder of an IG Captioner"
        raise ValueError(f"{directory} is not overwritten, because {reason}; remove it or name another")


def _holds_results(folder: Path) -> bool:
    return folder.name == RESULTS_FOLDER and all(path.suffix == ".json" for path in folder.iterdir())


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its name in the end, or vanishes if there was an error."""
    folder = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    folder.mkdir(parents=True)
    try:
        yield folder
        if directory.exists():
            directory.rename(old)
        try:
            folder.rename(directory)
        except BaseException:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _source(model: str) -> Path:
    """A folder with the weights of a checkpoint, its card and what that is made from, if there is any.

    Raises:
        OSError: the Hub cannot be asked, which is not to be taken for a checkpoint without a card.
    """
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, allow_patterns=[*WEIGHT_FILES, *CARD_FILES]))


def _stored_weights(source: Path) -> dict[str, Tensor]:
    files = sorted(get_local_safetensors_metadata(source).files_metadata)
    return {name: weight for file in files for name, weight in load_file(source / file).items()}


def _copy_card(source: Path, folder: Path, license: str | None) -> None:
    """Copies the facts and results, or the card if it was made from none."""
    facts = read_facts(source)
    if facts is None and (source / CARD_FILE).is_file():
        text = (source / CARD_FILE).read_bytes().decode("utf-8")  # line ends as they are
        if license is not None:
            card = ModelCard(text)
            _check_licence(source, license, card.data.get("license"), card.data.get("license_name"))
            card.data.license = license
            card.data.license_name = card.data.license_link = None
            text = str(card)
        (folder / CARD_FILE).write_bytes(text.encode("utf-8"))
        return
    if facts is not None and license is None:
        shutil.copyfile(source / FACTS_FILE, folder / FACTS_FILE)
    else:
        facts = facts or CardFacts()
        if license is not None:
            _check_licence(source, license, facts.license, facts.license_name)
        write_facts(
            folder, facts if license is None else replace(facts, license=license, license_name=None, license_link=None)
        )
    add_results(folder, (source / RESULTS_FOLDER).glob("*.json"), None)  # they have been checked


def _refuse_links_out(source: Path) -> None:
    """Raises ValueError for a link that leads out of a folder; the Hub's cache keeps its files in a folder beside.

    Whatever its name: transformers reads files that only some checkpoints have, such as `chat_template.jinja`, and
    writes what they say into the release.
    """
    root = source.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(source.rglob("*")):
        if path.is_symlink() and path.exists() and not any(map(path.resolve().is_relative_to, allowed)):
            raise ValueError(f"{path} is a link to a file elsewhere, which does not become part of a release")


def _check_licence(source: Path, wanted: str, license: str | None, name: str | None) -> None:
    """Tells that a licence is replaced. Raises ValueError where the weights are for some uses only."""
    known = " ".join(filter(None, (license, name)))
    if known in ("", "unknown", wanted):
        return
    if RESTRICTED.search(known):
        raise ValueError(
            f"the weights of {source} are under {known!r}, which --license {wanted} cannot change; if they are yours, "
            f"say so in {FACTS_FILE}"
        )
    tell(f"the licence {known!r} that {source} states is replaced by {wanted!r}")


# ---------------------------------------------------------------------------------------------------------------------
# To the Hub


def push_release(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a checkpoint as a complete repository, in one commit.

    A folder that holds a release goes up if every file is as `save_release` wrote it, with the code of this package;
    of any other checkpoint a release is made first, also of a release that was changed. Either way a card that is
    filled by code names `repo_id`. Files that an earlier release had and this one has not are removed; what else is in
    the repository stays.

    Args:
        repo_id: `owner/name`; made if there is no such repository.
        private: whether a new repository is; by default as its owner has it.
        token: by default that of `hf auth login` or the variable HF_TOKEN.
        revision: a branch, made if it is missing; main by default.

    Returns:
        The URL of the commit, whose last part is a `revision` to pin.

    Raises:
        ValueError: no valid name, or as in [`save_release`].
        OSError: no such folder, no token, or the Hub is out of reach or refuses.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"a repository is named owner/name, got {repo_id!r}")
    token = token or get_token()
    if not token:
        raise PermissionError("no token for the Hub: `hf auth login` stores one, the variable HF_TOKEN gives one")
    release = Path(own_checkpoint(Path(folder).expanduser()))
    with TemporaryDirectory() as temporary:
        contents = _read_release(release)
        if contents is None:
            release = save_release(Path(temporary, "release"), release, repo_id=repo_id)
            contents = _read_release(release) or {}
        model = load_model(IGCaptionerForZeroShotImageClassification, release)
        contents[CARD_FILE] = make_card(release, model, repo_id)
        contents[MANIFEST] = _manifest(contents)
        message = commit_message or f"Release by ig_captioner {__version__}"
        return _commit(HfApi(token=token), repo_id, contents, private, revision, message)


def _commit(
    api: HfApi, repo_id: str, contents: dict[str, Path | bytes], private: bool | None, branch: str | None, message: str
) -> str:
    """Makes what a repository holds of releases equal to `contents`. Returns the URL of the commit."""
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=branch)
        outdated = [name for name in there if name not in contents and _is_of_a_release(name)]
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations += [CommitOperationDelete(name) for name in outdated]
        # Not upload_folder, which may make several commits: in between, code and weights would not belong together.
        return str(api.create_commit(repo_id, operations, commit_message=message, revision=branch).commit_url)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # ... as the ways to upload raise them
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of an upload in a thread
        reason = " ".join(str(cause or error).split())
        raise OSError(f"{repo_id!r} was not pushed to {constants.ENDPOINT}: {reason}") from error


def _read_release(folder: Path) -> dict[str, Path | bytes] | None:
    """Lists what a released folder holds beside its manifest, by name, weights as paths.

    None, told, if that is not what `save_release` wrote.
    """
    names = names_of_files(folder)
    if not {*RELEASE_FILES} - {MANIFEST} <= {*names}:
        return None
    _check_code_references(folder)
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        expected = {str(name): str(digest) for name, digest in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        expected = {}
    contents: dict[str, Path | bytes] = {}
    strange = sorted({*names} ^ {*expected, MANIFEST})
    for name in sorted({*names} & {*expected}):
        path = folder / name
        contents[name] = path if path.suffix == ".safetensors" else path.read_bytes()
        is_own_code = name not in REMOTE_CODE_FILES or contents[name] == _package_file(name)
        if path.is_symlink() or not is_own_code or _sha256(contents[name]) != expected[name]:
            strange.append(name)
    if strange:
        tell(
            f"{folder} is not as release wrote it: a release of its checkpoint is made anew, without changes to",
            strange,
        )
        return None
    return contents


def _manifest(contents: Mapping[str, Path | bytes]) -> bytes:
    """Reads what `release.json` says of files, by name."""
    digests = {name: _sha256(content) for name, content in contents.items()}
    return (json.dumps({"ig_captioner": __version__, "sha256": digests}, indent=2) + "\n").encode()


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _package_file(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


def names_of_files(folder: Path) -> list[str]:
    """Of all files and links below a folder, as the Hub names them."""
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _is_of_a_release(name: str) -> bool:
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")  # `*` would match slashes
        for pattern in RELEASE_PATTERNS
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _verify(folder: Path, model: IGCaptionerPreTrainedModel, processor: IGCaptionerProcessor) -> None:
    """Loads what was written. Raises ValueError naming what is missing or differs."""
    missing = sorted(name for name in RELEASE_FILES if not (folder / name).is_file())
    if missing:
        raise ValueError(f"the release would lack {', '.join(missing)}")
    for name in REMOTE_CODE_FILES:
        if (folder / name).read_bytes() != _package_file(name):
            raise ValueError(f"{name} in the release is not the file of this package")
    _check_code_references(folder)

    reloaded = load_model(IGCaptionerForZeroShotImageClassification, folder).state_dict()
    for name, weight in model.state_dict().items():
        # NaN is not equal to itself: broken weights are refused as well
        if reloaded[name].dtype != weight.dtype or not torch.equal(reloaded[name], weight):
            raise ValueError(f"the weight {name} is not finite, or changes when it is saved and loaded")
    again = load_processor(folder)
    sample = "A photo of a cat, and of 2 dogs."
    same_tokens = again.tokenizer(sample)["input_ids"] == processor.tokenizer(sample)["input_ids"]
    if not same_tokens or again.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError("the tokenizer changes when it is saved and loaded")
    if again.image_processor.to_dict() != processor.image_processor.to_dict():
        raise ValueError("the image processor changes when it is saved and loaded")


def _check_code_references(folder: Path) -> None:
    """Raises ValueError if a JSON file names a `file.Class` that is not in the folder."""
    for path in (folder / "config.json", folder / "processor_config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        image_processor = content.get("image_processor", {})
        references = [*content.get("auto_map", {}).values(), *image_processor.get("auto_map", {}).values()]
        references += [pipeline["impl"] for pipeline in content.get("custom_pipelines", {}).values()]
        for reference in references:
            module, _, name = str(reference).partition(".")
            source = folder / f"{module}.py"
            nodes = ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []
            if not any(isinstance(node, ast.ClassDef) and node.name == name for node in nodes):
                raise ValueError(f"{path.name} refers to {reference}, which is not in the release")
