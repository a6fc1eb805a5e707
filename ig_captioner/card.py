"""The card of a checkpoint, README.md: a template filled from its configuration, recorded facts and measured results.

What no configuration says is beside the checkpoint: in `card.yaml` what it is, what it was trained on and under
which terms ([`CardFacts`]); in `results/` what `ig-captioner evaluate` measured, a JSON file per task. A README.md
without a `card.yaml` is somebody's own and stays as it is.

    python -m ig_captioner.card DIR [RESULTS ...]

takes in further results (files `results.json`) and writes the card of the checkpoint in DIR again.
"""

import argparse
import html
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from .checkpoint import load_model
from .configuration_ig_captioner import REMOTE_CODE_FILES, IGCaptionerConfig, as_height_width
from .encoder_ig_captioner import IGCaptionerPreTrainedModel
from .evaluation.report import HUB_TASKS, evaluations, to_markdown, weights_digest
from .input_rules import default_templates
from .modeling_ig_captioner import IGCaptionerForConditionalGeneration


CARD_FILE = "README.md"
FACTS_FILE = "card.yaml"
RESULTS_FOLDER = "results"
# The file of the same name in the repository's root is a copy for readers, made with `cp`; a test compares them.
CARD_TEMPLATE = Path(__file__).with_name("model_card.md")
PIPELINE_TAG = "zero-shot-image-classification"
TAGS = [PIPELINE_TAG, "image-to-text", "image-captioning", "information-gain", "ig-captioner"]
LOCAL_FOLDERS = re.compile(r"""(?<![\w:/.])(?:/[^\s'"/]+)+/(?=[^\s'"/])""")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors and torch say it


@strict
@dataclass
class CardFacts:
    """The fields of `card.yaml`. Texts are Markdown.

    title: heading of the card; by default the name under which its examples load the model.
    in_short: one line on what the model is, what it knows and what it does not; commands and the demo show it.
    summary: a paragraph on what the model is.
    license, license_name, license_link, language, datasets, base_model: as in a card's metadata on the Hub.
    source: where the weights come from, if not from training here.
    training: rows of a table.
    terms: under which terms the data, and so the weights, may be used.
    limits: what is to be known beyond the limits of every such model.
    measured: further measurements, beyond `results/`.
    """

    title: str | None = None
    in_short: str | None = None
    summary: str | None = None
    license: str = "unknown"
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    datasets: list[str] = field(default_factory=list)
    base_model: str | list[str] | None = None
    source: str | None = None
    training: dict[str, str] = field(default_factory=dict)
    terms: str | None = None
    limits: list[str] = field(default_factory=list)
    measured: str | None = None


# Beside a checkpoint


def read_facts(folder: Path) -> CardFacts | None:
    """Reads `card.yaml`; None where there is none. Raises ValueError naming what is wrong in it."""
    path = folder / FACTS_FILE
    if not path.is_file():
        return None
    try:
        return CardFacts(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
    except (yaml.YAMLError, StrictDataclassError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_facts(folder: Path, facts: CardFacts) -> None:
    said = {name: value for name, value in asdict(facts).items() if value}
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)
    (folder / FACTS_FILE).write_text(text, encoding="utf-8")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Reads `results/`, in the order of the tasks, then of the file names, which tell equal titles apart."""
    order = list(HUB_TASKS)
    found = [(path.stem, _read_result(path)) for path in sorted((folder / RESULTS_FOLDER).glob("*.json"))]
    found.sort(key=lambda entry: order.index(entry[1]["task"]))
    titles = Counter(results["title"] for _, results in found)
    return [
        {**results, "title": f"{results['title']}: {name}"} if titles[results["title"]] > 1 else results
        for name, results in found
    ]


def _read_result(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["task"] in HUB_TASKS and results["tables"] and results["run"]["command"]:
            return results
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no results.json of ig-captioner evaluate")


def add_results(folder: Path, paths: Iterable[str | Path], digest: str | None) -> None:
    """Copies files `results.json` to `results/`, under the names of their folders; others keep their own.

    Of absolute paths only the last part is copied: where files lie on this machine is nobody's business.

    Args:
        digest: SHA-256 of the checkpoint's weights, if it is known.

    Raises:
        ValueError: a file holds no results, or those of other weights, or two would get the same name.
        OSError: a file cannot be read.
    """
    named: dict[str, Path] = {}
    for path in map(Path, paths):
        name = path.resolve().parent.name if path.name == "results.json" else path.stem
        if name in named:
            raise ValueError(f"{named[name]} and {path} would both become {RESULTS_FOLDER}/{name}.json")
        named[name] = path
    for name, path in named.items():
        measured = _read_result(path)["run"].get("weights_sha256")
        if digest and measured and measured != digest:
            raise ValueError(f"{path} was measured with other weights: SHA-256 {measured}, here {digest}")
        (folder / RESULTS_FOLDER).mkdir(exist_ok=True)
        text = LOCAL_FOLDERS.sub("", path.read_text(encoding="utf-8"))
        (folder / RESULTS_FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


# The card


def fill_card(
    model: IGCaptionerPreTrainedModel,
    repo_id: str,
    facts: CardFacts | None = None,
    results: Sequence[dict[str, Any]] = (),
    *,
    stored_dtype: str | None = None,
    has_code: bool = True,
) -> ModelCard:
    """The template with what a model's configuration, the facts and the results say.

    Args:
        repo_id: the name that the card's examples load.
        stored_dtype: of the weights on disk, if it is not the model's.
        has_code: whether the code that `trust_remote_code=True` runs is beside the card.
    """
    facts = facts or CardFacts()
    dtype = str(model.dtype).removeprefix("torch.")
    stored = stored_dtype or dtype
    return ModelCard.from_template(
        _metadata(repo_id, facts, results),
        template_path=str(CARD_TEMPLATE),
        model_id=repo_id,
        facts=facts,
        has_code=has_code,
        dtype=stored if stored == dtype else f"{stored}, loaded as {dtype}",
        measured="\n".join(map(_section, results)),
        **_sizes(model),
    )


def _plain(content: Any, brackets: str = "[") -> Any:
    """Results with texts that are nothing but text, in Markdown and HTML, whoever wrote them: no tags, no links."""
    if isinstance(content, dict):
        return {_plain(name, brackets): _plain(value, brackets) for name, value in content.items()}
    if isinstance(content, list):
        return [_plain(value, brackets) for value in content]
    if not isinstance(content, str):
        return content
    text = html.escape(" ".join(content.split()), quote=False).replace("[", brackets)
    return re.sub("javascript:", "javascript&#58;", text, flags=re.IGNORECASE)


def _section(results: dict[str, Any]) -> str:
    """The tables of one task, two levels down; its details stay in the results file."""
    shown = _plain({name: value for name, value in results.items() if name != "details"}, brackets="\\[")
    return re.sub("^#", "###", to_markdown(shown), flags=re.MULTILINE)


def _metadata(repo_id: str, facts: CardFacts, results: Sequence[dict[str, Any]]) -> ModelCardData:
    entries = [entry for one in results for entry in evaluations(_plain(one), headlines=True)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.language,
        datasets=facts.datasets or None,
        base_model=facts.base_model,
        tags=TAGS,
        model_name=(facts.title or repo_id) if entries else None,
        eval_results=entries or None,
    )


def _sizes(model: IGCaptionerPreTrainedModel) -> dict[str, Any]:
    text = model.config.text_config
    return {
        "prior_weight": f"{model.config.prior_weight:g}",
        "num_parameters": f"{model.num_parameters():,}",
        **_encoder_in_words(model.config),
        "text_layers": text.num_hidden_layers,
        "text_only_layers": text.num_text_only_layers,
        "text_width": text.hidden_size,
        "fusion": text.fusion.replace("_", " "),
        "templates": " or ".join(f"`{template}`" for template in default_templates(model.config)),
        "max_tokens": text.max_position_embeddings,
        "vocab_size": f"{text.vocab_size:,}",
    }


def _encoder_in_words(config: IGCaptionerConfig) -> dict[str, str]:
    vision = config.vision_config
    (height, width) = config.image_size
    if not config.has_own_encoder:
        tokens = f"{height} x {width} pixels, read as {config.num_image_tokens} tokens"
        name = f"`{vision.model_type}` of transformers, width {config.text_config.encoder_hidden_size}"
        return {"images": tokens, "image_encoder": name}
    patch_height, patch_width = as_height_width(vision.patch_size, "patch_size")
    return {
        "images": f"{height} x {width} pixels, patches of {patch_height} x {patch_width}",
        "image_encoder": f"{vision.num_hidden_layers} layers of width {vision.hidden_size}",
    }


def make_card(folder: Path, model: IGCaptionerPreTrainedModel, repo_id: str) -> bytes:
    """The card of the checkpoint in `folder`: its own, or one made from the files there.

    Args:
        model: that checkpoint, loaded.
        repo_id: as for [`fill_card`].

    Raises:
        ValueError: facts or results are not what they should be, or there are results but the card is its own.
    """
    facts = read_facts(folder)
    results = read_results(folder)
    if facts is None and (folder / CARD_FILE).is_file():
        if results:
            raise ValueError(f"results are for cards that are made from a {FACTS_FILE}, but this one is made from none")
        return (folder / CARD_FILE).read_bytes()
    with safe_open(min(folder.glob("model*.safetensors")), framework="pt") as weights:
        stored = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no dictionary)
    stored_dtype = " and ".join(sorted(DTYPES[name] for name in stored if name in DTYPES))  # counters are no weights
    has_code = all((folder / name).is_file() for name in REMOTE_CODE_FILES)
    card = fill_card(model, repo_id, facts, results, stored_dtype=stored_dtype, has_code=has_code)
    return f"{card}\n".encode()


# Command


def main(argv: Sequence[str] | None = None) -> int:
    description = "Writes the card of a checkpoint again."
    parser = argparse.ArgumentParser(prog="python -m ig_captioner.card", description=description)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the checkpoint, with a card.yaml")
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help="files results.json to take in")
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    try:
        if read_facts(folder) is None:
            raise FileNotFoundError(f"{folder / FACTS_FILE} is missing")
        model = load_model(IGCaptionerForConditionalGeneration, folder)
        add_results(folder, arguments.results, weights_digest(str(folder)))
        (folder / CARD_FILE).write_bytes(make_card(folder, model, folder.resolve().name))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    print(f"{folder / CARD_FILE}: {len(read_results(folder))} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
