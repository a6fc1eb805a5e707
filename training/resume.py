"""Settings that a resumed run may change, and those that are refused.

A checkpoint holds the settings that its run was using. `--resume` refuses every setting that differs from them, but
for those in `HARMLESS`. `--resume_with_changes` accepts all but those in `IMPOSSIBLE`, which could not act, and
`config.yaml` says from which step the others hold.
"""

import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ig_captioner.data.fingerprints import Fingerprint, compare_shards

from .build import OBJECTIVE_FIELDS
from .checkpoint import write_text_atomically
from .config import CHANGES_KEY, TrainConfig, UsageError, flatten, from_dict, to_dict


NOT_SET = "not set"

# Settings that may differ without a word, and why.
HARMLESS = {
    "output_dir": "the folder may have been moved",
    "resume": "says how this start is meant, not how the run trains",
    "resume_with_changes": "says how this start is meant, not how the run trains",
    "data_root": "the shards may have been moved; their contents are compared with the checkpoint's",
    "tokenizer": "the folder may have been moved; its contents are compared with the checkpoint's tokenizer",
    "trackers": "only where rows of the log are sent",
    "log_every_steps": "only how often rows are written; each row is the mean over the steps since the last",
    "evaluation.every_steps": "only how often; an evaluation changes neither weights nor random states",
    "checkpoint_steps": "only how often checkpoints are written",
    "checkpoint_minutes": "only how often checkpoints are written",
    "keep_checkpoints": "only how many old checkpoints stay on the disk",
    "max_nonfinite_steps": "only when the run gives up",
    "save_dtype": "only the number format of the final folder; weights are trained in float32",
    "data.feature_cache.folder": "the folder may have been moved; its features are found by their fingerprint",
    "data.feature_cache.num_workers": "who decodes; a view is a function of its key, number and seed",
    "data.strict": "only whether a sample that cannot be used ends the run",
    "data.num_workers": "who loads, not what is drawn; with streams, batches may be composed differently, as with "
    "another number of processes, but no sample is lost or repeated",
}

# Settings whose change could not act on a run that has begun, and why. Patterns; `model.*` has exceptions below.
IMPOSSIBLE = {
    "optimizer.name": "the optimiser's state in the checkpoint belongs to the other one",
    "freeze": "the optimiser's state in the checkpoint belongs to other parameters",
    "init_from": "the weights come from the checkpoint",
    "encoder_from": "the weights come from the checkpoint",
    "data.streams": "a run keeps the number of streams that it started with",
    "model.*": "the weights in the checkpoint have this architecture",
}
CHANGEABLE_OF_MODEL = (*(f"model.{name}" for name in OBJECTIVE_FIELDS), "model.*.dropout")
ADVICE = "start a new run with --init_from CHECKPOINT/model to train on from its weights"


class Change(NamedTuple):
    """A setting by its dotted key, before and now."""

    key: str
    before: Any
    now: Any

    def row(self, step: int) -> dict[str, Any]:
        """The change as `config.yaml` and checkpoints record it."""
        return {"from_step": step, **self._asdict()}

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def find_changes(saved: dict[str, Any], config: TrainConfig) -> list[Change]:
    """Settings that differ from those of a checkpoint and are not harmless; what a checkpoint lacks has its default."""
    before = flatten(to_dict(from_dict(TrainConfig, saved)))
    now = flatten(to_dict(config))
    keys = [key for key in {**before, **now} if key not in HARMLESS]
    changes = [Change(key, before.get(key, NOT_SET), now.get(key, NOT_SET)) for key in keys]
    return [change for change in changes if change.before != change.now]


def check_changes(changes: list[Change], accepted: bool) -> None:
    """Raises UsageError for changes that could not act, or that the user has not asked for (`accepted`)."""
    impossible = [f"{change} ({reason})" for change in changes if (reason := why_impossible(change.key))]
    if impossible:
        raise UsageError(f"a resumed run cannot change {'; '.join(impossible)}. Restore them, or {ADVICE}")
    if changes and not accepted:
        raise UsageError(
            f"--resume with other settings than the checkpoint's: {'; '.join(map(str, changes))}. Restore them, or "
            "pass --resume_with_changes to train with the new ones from here on"
        )


def check_sources(before: list[str], now: list[str]) -> None:
    """Raises UsageError where a run is resumed with other sources, by name and order."""
    if before != now:
        raise UsageError(
            f"a resumed run cannot change data.sources: {before} -> {now} (positions in the data belong to "
            f"them). Restore them, or {ADVICE}"
        )


def check_shards(before: dict[str, list[Fingerprint]], now: dict[str, list[Fingerprint]], accepted: bool) -> list[str]:
    """Says how the shards differ from those of the checkpoint. Raises UsageError where that was not accepted.

    Positions in the data are counted along the shards, so that with others samples are lost or come twice.
    """
    differences = [
        f"{source}: {difference}"
        for source, shards in before.items()
        for difference in compare_shards(shards, now.get(source, []))
    ]
    if differences and not accepted:
        raise UsageError(
            f"--resume with other shards than the checkpoint's: {'; '.join(differences)}. Restore them, or pass "
            "--resume_with_changes to go on with these, of which some samples are then drawn too rarely or too often"
        )
    return differences


def why_impossible(key: str) -> str:
    """Says why a change of this setting cannot act; empty if it can."""
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in CHANGEABLE_OF_MODEL):
        return ""
    return next((reason for pattern, reason in IMPOSSIBLE.items() if fnmatch.fnmatchcase(key, pattern)), "")


def write_settings(path: Path, config: TrainConfig, changes: list[dict[str, Any]]) -> None:
    """Writes `config.yaml`: the settings in use, which `--config` reads again, and what was changed from which step."""
    values = to_dict(config) | ({CHANGES_KEY: changes} if changes else {})
    write_text_atomically(path, yaml.safe_dump(values, sort_keys=False))
