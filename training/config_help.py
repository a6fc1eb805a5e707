"""The help of `python -m training.train`: every setting with its meaning, values and default.

All of it is read from the dataclasses of `config.py` through pydantic's JSON schema, which holds their docstrings.
"""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from .config import TrainConfig, section_in


USAGE = "usage: python -m training.train --config FILE.yaml [--key value] [--section.key value] [--flag]"
INTRODUCTION = """\
Trains a captioner. Settings come from the YAML file, then from the command line; values are written as in YAML. Under
several processes start it with `accelerate launch -m training.train ...` or torchrun (docs/training.md)."""
WIDTH = 100
BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}


def full_help() -> str:
    """Returns the text of `--help`."""
    schema = TypeAdapter(TrainConfig).json_schema()
    return "\n".join([USAGE, "", INTRODUCTION, "", *section_lines(schema, schema["$defs"], "")])


def section_lines(section: dict[str, Any], sections: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yields the lines of a section's own fields, then those of the sections inside it."""
    yield from textwrap.wrap(section["description"], WIDTH)
    inner = {}
    for name, field in section["properties"].items():
        key = f"{prefix}{name}"
        inner_section = section_in(field, sections)
        if inner_section:
            inner[f"{key}.NAME." if "additionalProperties" in field else f"{key}."] = inner_section
        else:
            yield f"  --{key} {values_of(field)}{default_of(field)}"
            yield from textwrap.wrap(
                field["description"], WIDTH, break_on_hyphens=False, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    for inner_prefix, inner_section in inner.items():
        yield ""
        yield from section_lines(inner_section, sections, inner_prefix)


def values_of(field: dict[str, Any]) -> str:
    """Describes what a field may be, as in "INTEGER > 0" or "{adamw,muon}"."""
    if "anyOf" in field:
        return " or ".join(values_of(choice) for choice in field["anyOf"])
    if "enum" in field:
        return "{" + ",".join(field["enum"]) + "}"
    if "prefixItems" in field:
        return f"[{', '.join(values_of(item) for item in field['prefixItems'])}]"
    if field["type"] == "array":
        return f"[{values_of(field['items'])}, ...]"
    kind = {"object": "MAPPING", "null": "null"}.get(field["type"], field["type"].upper())
    bounds = [text.format(field[name]) for name, text in BOUNDS.items() if name in field]
    return " ".join([kind, " and ".join(bounds)]).rstrip()


def default_of(field: dict[str, Any]) -> str:
    """Describes the default; collections are empty where the schema has none, other settings have to be given."""
    empty = {"array": [], "object": {}}.get(field.get("type"))
    default = field.get("default", empty)
    return f"  (default: {json.dumps(default)})" if "default" in field or default is not None else "  (required)"
