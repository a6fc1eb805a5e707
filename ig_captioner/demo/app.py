"""The web demo, a Gradio app: `ig-captioner demo`, or `launch` here. Needs the extra `app`.

`inputs.py` says what is let in, `scores.py` computes, `page.py` draws; here are the page and its events.
A photo is decoded once, to the `pixel_values` that its browser session keeps. The prior weight re-ranks what the model
said before, without running it.

Nothing is sent anywhere: no analytics, no share link, fonts and scripts from this machine. Uploads are deleted after an
hour.
"""

import asyncio
import functools
import html
import inspect
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from ..input_rules import IGCaptionerWarning
from .inputs import (
    FORMATS,
    MAX_BYTES,
    MAX_LABELS,
    MAX_PIXELS,
    InputError,
    check_characters,
    check_number,
    fetch,
    open_photo,
    parse_labels,
    parse_templates,
    read_upload,
)
from .lanes import Lanes
from .page import CSS, MAX_SHOWN, caption_view, header, label_bars, note, placeholder, threshold_note, token_view
from .scores import Captioner, Scores, as_code, large_set


try:
    import gradio as gr
    import gradio.processing_utils
    import gradio.utils
except ImportError as error:
    raise ImportError(f"the web demo needs gradio ({error}): pip install 'ig_captioner[app]'") from error


MAX_PRIOR_WEIGHT = 1.5
MAX_WAITING = 40  # requests that wait for the model, each in a thread; Gradio queues the rest
KEPT_SECONDS = 3600  # uploads, and what a session has computed
LABELS = ["cat", "dog", "horse", "woman", "cup of coffee", "rocket", "motorcycle"]
CHOICE = "Which words does the image support?"
NO_RESULT = placeholder("Choose a photo: scores of your labels appear here.")
NO_CAPTION = placeholder("The caption of your photo appears here.")
NO_LARGE_RESULT = placeholder("Not computed for this photo yet.")


def shows_errors(handler: Callable) -> Callable:
    """Turns `InputError` of a handler, or of what it awaits, into a message on the page."""

    def shown(error: InputError) -> gr.Error:
        return gr.Error(html.escape(str(error)), print_exception=False)

    @functools.wraps(handler)
    def wrapped(*args: Any) -> Any:
        try:
            return handler(*args)
        except InputError as error:
            raise shown(error) from error

    @functools.wraps(handler)
    async def wrapped_async(*args: Any) -> Any:
        try:
            return await handler(*args)
        except InputError as error:
            raise shown(error) from error

    return wrapped_async if inspect.iscoroutinefunction(handler) else wrapped


class Handlers:
    """Handlers of the page's events: from values of its components to values of its components."""

    def __init__(self, captioner: Captioner) -> None:
        self.captioner, self.lanes = captioner, Lanes()

    @shows_errors
    def read(self, upload: dict[str, Any] | None) -> Tensor:
        """`pixel_values` of an uploaded file, as Gradio describes it."""
        if upload is None:
            raise InputError("Choose a photo first.")
        content = read_upload(upload.get("path"), gradio.utils.get_upload_folder())
        return self._decode(content)[1]

    @shows_errors
    async def fetch(self, url: str) -> tuple[PIL.Image.Image, Tensor]:
        """Fetches the photo at a URL, and makes its `pixel_values`."""
        return await asyncio.to_thread(self._decode, await fetch(url))

    def _decode(self, content: bytes) -> tuple[PIL.Image.Image, Tensor]:
        with self.lanes.enter():  # one photo at a time is decoded
            photo = open_photo(content)
            return photo, self.captioner.read(photo)

    def forget(self) -> tuple:
        """Nothing to be kept, and nothing to be shown: what a new photo begins with."""
        choice = gr.Dropdown(choices=[], value=None, visible=False)
        return None, None, None, NO_RESULT, "", choice, "", NO_CAPTION, NO_LARGE_RESULT

    @shows_errors
    def classify(self, pixel_values: Tensor | None, text: str, sentences: str, prior_weight: float) -> tuple:
        """Scores to be kept; bars, choice of labels, tokens and code to be shown."""
        labels, templates = parse_labels(text), parse_templates(sentences)
        check_number(labels, templates)
        check_characters(labels, templates)
        with self.lanes.enter(len(labels) * len(templates)):
            scores = self.captioner.classify(_chosen(pixel_values), labels, templates)
        best = scores.ranked(prior_weight)[0].label
        choice = gr.Dropdown(choices=list(scores.labels), value=best, visible=True)
        return scores, *self.rank(scores, prior_weight), choice, self.explain(scores, best)

    @shows_errors
    def classify_large_set(self, pixel_values: Tensor | None, sentences: str, prior_weight: float) -> tuple:
        """Scores of the large set to be kept, and bars."""
        templates = parse_templates(sentences)
        check_characters(large_set(), templates)
        with self.lanes.enter(len(large_set()) * len(templates)):
            scores = self.captioner.classify_large_set(_chosen(pixel_values), templates)
        return scores, self.rank_large_set(scores, prior_weight)

    @shows_errors
    def caption(self, pixel_values: Tensor | None) -> str:
        with self.lanes.enter():
            caption = self.captioner.caption(_chosen(pixel_values))
        return caption_view(caption, self.captioner.pieces(caption.tokens))

    def rank(self, scores: Scores | None, prior_weight: float) -> tuple[str, str]:
        """Bars and code at a prior weight, from scores that are there."""
        if scores is None:
            return NO_RESULT, ""
        bars = _bars(scores, prior_weight)
        if scores.num_cut:
            bars += note(f"{scores.num_cut} texts were cut: the model reads {self.captioner.max_tokens} tokens.")
        return bars, as_code(self.captioner.name, scores, prior_weight)

    def rank_large_set(self, scores: Scores | None, prior_weight: float) -> str:
        if scores is None:
            return NO_LARGE_RESULT
        return _bars(scores, prior_weight)

    def explain(self, scores: Scores | None, label: str | None) -> str:
        """The tokens of a label's text."""
        if scores is None or label not in scores.labels:
            return ""
        view = token_view(self.captioner.pieces(scores.tokens[scores.labels.index(label)]))
        if len(scores.templates) > 1:
            view += note(f"In the first of {len(scores.templates)} sentences; the bars show means over all of them.")
        return view


def _bars(scores: Scores, prior_weight: float) -> str:
    rows = scores.ranked(prior_weight, MAX_SHOWN)
    bars = label_bars(rows, len(scores.labels), prior_weight, scores.temperature)
    return bars + threshold_note(rows[0], scores.abstain_threshold)


def _chosen(pixel_values: Tensor | None) -> Tensor:
    if pixel_values is None:
        raise InputError("Choose a photo first.")
    return pixel_values


def build_app(model: str, device: str = "auto") -> gr.Blocks:
    """The page and its events, for a checkpoint (folder or Hub name). `launch` adds limits that the server keeps."""
    captioner = Captioner(model, device)
    with gr.Blocks(title="ig_captioner", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        gr.HTML(header(captioner.name, captioner.in_short))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = _add_inputs(captioner.templates)
            with gr.Column(scale=3, min_width=320):
                outputs = _add_outputs(captioner)
        _connect(Handlers(captioner), {**inputs, **outputs})
    return app


def _add_inputs(templates: list[str]) -> dict[str, Any]:
    limits = f"{', '.join(FORMATS)}: up to {MAX_BYTES // 2**20} MiB and {MAX_PIXELS // 10**6} megapixels"
    lines = f"One per line, {MAX_LABELS:,} at most. A single line is split at its commas."
    return {
        "photo": gr.Image(
            label="Photo",
            placeholder=f"# Drop, paste or choose a photo\n{limits}",
            sources=["upload", "clipboard"],
            format="png",
            height=270,
            buttons=[],
            alt_text="The photo to be classified",
            elem_id="photo",
        ),
        "url": gr.Textbox(
            label="Photo from a URL", placeholder="https://...", submit_btn="Load", max_lines=1, elem_id="url"
        ),
        "labels": gr.Textbox("\n".join(LABELS), label="Labels", info=lines, lines=7, max_lines=12, elem_id="labels"),
        "template": gr.Textbox(
            "\n".join(templates),
            label="Sentence",
            info="{} is where the label goes. Several, one per line, are averaged.",
            lines=len(templates),
            max_lines=4,
            elem_id="template",
        ),
        "run": gr.Button("Classify", variant="primary", elem_id="run"),
    }


def _add_outputs(captioner: Captioner) -> dict[str, Any]:
    states = {name: gr.State(time_to_live=KEPT_SECONDS) for name in ("pixel_values", "scores", "large_scores")}
    weight = gr.Slider(
        0,
        MAX_PRIOR_WEIGHT,
        min(captioner.prior_weight, MAX_PRIOR_WEIGHT),
        step=0.05,
        label="Prior weight",
        info="Ranks again without running the model.",
        elem_id="weight",
    )
    with gr.Tab("Labels"):
        bars = gr.HTML(NO_RESULT, elem_id="bars")
        choice = gr.Dropdown([], label=CHOICE, interactive=True, visible=False, elem_id="choice")
        tokens = gr.HTML(elem_id="tokens")
    with gr.Tab("Caption"):
        caption = gr.HTML(NO_CAPTION, elem_id="caption")
    with gr.Tab("ImageNet"):
        run_large_set = gr.Button(f"Rank the {len(large_set())} class names of ImageNet", elem_id="run-large")
        large_bars = gr.HTML(NO_LARGE_RESULT, elem_id="large-bars")
    with gr.Tab("As code"):
        code = gr.Code(language="python", label="The same scores", wrap_lines=True, interactive=False, elem_id="code")
    shown = {"weight": weight, "bars": bars, "choice": choice, "tokens": tokens, "caption": caption, "code": code}
    return {**states, **shown, "run_large_set": run_large_set, "large_bars": large_bars}


def _connect(handlers: Handlers, parts: dict[str, Any]) -> None:
    """The page's events. Those that run the model wait for one another in `Lanes`."""

    def pick(names: str) -> list[Any]:
        return [parts[name] for name in names.split()]

    private: dict[str, Any] = {"api_visibility": "private"}
    model = {**private, "concurrency_id": "model", "concurrency_limit": MAX_WAITING}
    at_once = {**private, "show_progress": "hidden"}
    classify = {
        "fn": handlers.classify,
        "inputs": pick("pixel_values labels template weight"),
        "outputs": pick("scores bars code choice tokens"),
        **model,
    }
    caption = {"fn": handlers.caption, "inputs": pick("pixel_values"), "outputs": pick("caption"), **model}
    no_results = {
        "fn": handlers.forget,
        "outputs": pick("pixel_values scores large_scores bars code choice tokens caption large_bars"),
        **at_once,
    }
    # the file itself, neither checked nor decoded by Gradio: `read_upload` does the one, and its size comes first
    read = {"fn": handlers.read, "inputs": pick("photo"), "outputs": pick("pixel_values"), "preprocess": False, **model}
    load = {"fn": handlers.fetch, "inputs": pick("url"), "outputs": pick("photo pixel_values"), **private}

    parts["photo"].clear(**no_results)
    parts["photo"].upload(**no_results).then(**read).success(**classify).then(**caption)
    parts["url"].submit(**no_results).then(**load).success(**classify).then(**caption)
    gr.on([parts["run"].click, parts["labels"].submit, parts["template"].submit], **classify)
    parts["run_large_set"].click(
        handlers.classify_large_set,
        pick("pixel_values template weight"),
        pick("large_scores large_bars"),
        **model,
    )
    always = {**at_once, "trigger_mode": "always_last"}
    parts["weight"].change(handlers.rank, pick("scores weight"), pick("bars code"), **always)
    parts["weight"].change(handlers.rank_large_set, pick("large_scores weight"), pick("large_bars"), **always)
    parts["choice"].input(handlers.explain, pick("scores choice"), pick("tokens"), **always)


def _theme() -> gr.themes.Base:
    # Gradio's file of weight 600, its theme's own, lacks most letters.
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    theme = gr.themes.Default(primary_hue="teal", font=[font, "ui-sans-serif", "sans-serif"])
    return theme.set(  # enough contrast for small and for white text
        block_info_text_color="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )


async def _refuse_url(url: str, cache_dir: str | Path) -> str:
    raise gr.Error("Photos are uploaded, or loaded from the URL box.", print_exception=False)


def launch(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "auto",
    open_browser: bool = False,
) -> None:
    """Serves the demo until it is interrupted.

    Args:
        model: a folder, or the name of a repository on the Hub.
        host: the address to listen on; by default only this machine can connect.
        port: the first free one from 7860 on if not given.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError, OSError: as `Captioner`, and where the port is taken.
    """
    app = build_app(model, device)
    warnings.simplefilter("ignore", IGCaptionerWarning)  # the page tells visitors; on this side they would fill a log
    url = serve(app, host, port, open_browser)
    # As Ctrl+C: Gradio then deletes the uploads. Docker and systemd stop a server by SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    print(f"The demo is at {url} (Ctrl+C stops it)", flush=True)
    app.block_thread()


def serve(app: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False) -> str:
    """Starts the server, in the background and with its limits. Returns the URL; `app.close()` stops it."""
    # A client may name a URL instead of an uploaded file. Gradio would load any number of bytes from it.
    gradio.processing_utils.async_ssrf_protected_download = _refuse_url
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=MAX_BYTES,
        share=False,
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        theme=_theme(),
        css=CSS,
    )
    return url
