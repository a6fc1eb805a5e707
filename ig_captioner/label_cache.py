"""Compiled labels kept on disk between runs: in `HF_HOME/ig_captioner/labels`.

There is a folder for each model, tokenizer, labels and templates; a damaged one is compiled again. Nothing is ever
evicted: it is a cache, delete it as you like.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from .compiled_labels import CompiledLabels, compile_labels
from .processing_ig_captioner import default_templates


logger = logging.getLogger(__name__)


def compile_labels_once(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    templates: Sequence[str] | None = None,
    *,
    cache_dir: str | Path | None = None,
) -> CompiledLabels:
    """`compile_labels`, unless an earlier run has left the result.

    Args:
        templates: the checkpoint's own if there are none.
        cache_dir: instead of the folder in `HF_HOME`.
    """
    templates = list(templates or default_templates(model.config))
    root = Path(HF_HOME, "ig_captioner", "labels") if cache_dir is None else Path(cache_dir)
    prior = (model.config.prior_source, model.config.num_reference_images)
    key = json.dumps([model.fingerprint(), prior, list(labels), templates, *_rules_of(tokenizer)])
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.is_dir():
        try:
            return CompiledLabels.load(folder)
        except ValueError as error:
            logger.warning("%s; compiled again", error)
            shutil.rmtree(folder, ignore_errors=True)
    compiled = compile_labels(model, tokenizer, labels, templates)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as unfinished:
            compiled.save(Path(unfinished, "labels"))
            Path(unfinished, "labels").rename(folder)
    except OSError as error:  # a read-only home, a full disk, or another process that was faster
        logger.warning("compiled labels were not kept: %s", error)
    return compiled


def _rules_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that tokens of a text depend on."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call has left there; the limit that counts is that of every call.
    rules |= {"truncation": None, "padding": None}
    return [rules, tokenizer.model_max_length]
