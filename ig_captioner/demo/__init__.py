"""The web demo. Only `app` needs gradio, which is imported when the demo is made."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("build_app", "launch", "serve"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import app

    return getattr(app, name)
