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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from ..input_rules import IGCaptionerWarning
from .examples import LABEL_OF, example_photos
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
from .page import (
    CSS,
    MAX_SHOWN,
    caption_view,
    header,
    label_bars,
    note,
    placeholder,
    stale_note,
    threshold_note,
    token_view,
)
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
PREVIEW_PIXELS = 800  # of the longer side
CHOICE = "Which words does the image support?"
RANK = "Rank them"
NO_RESULT = placeholder("Choose a photo, or one of the examples: scores of your labels appear here.")
NO_CAPTION = placeholder("The caption of your photo appears here.")
NO_LARGE_RESULT = placeholder("Not computed for this photo yet.")
# On a phone the results are below the inputs, out of sight.
SHOW_RESULTS = "() => { if (innerWidth <= 640) document.getElementById('results').scrollIntoView() }"


def shows_errors(handler: Callable) -> Callable:
    """Turns `InputError` of a handler, or of what it awaits, into a message on the page."""

    def shown(error: InputError) -> gr.Error:
        return gr.Error(html.escape(str(error)), duration=None, print_exception=False)

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
        self.captioner = captioner
        self.lanes = Lanes()
        self.examples = example_photos()

    @shows_errors
    def read(self, upload: dict[str, Any] | None) -> tuple[Tensor, PIL.Image.Image]:
        """`pixel_values` of an uploaded file, as Gradio describes it, and its preview."""
        if upload is None:
            raise InputError("Choose a photo first.")
        content = read_upload(upload.get("path"), gradio.utils.get_upload_folder())
        return self._decode(content)[1:]

    @shows_errors
    async def fetch(self, url: str) -> tuple[PIL.Image.Image, Tensor, PIL.Image.Image]:
        """Fetches the photo at a URL, and makes its `pixel_values` and its preview."""
        return await asyncio.to_thread(self._decode, await fetch(url))

    def read_example(self, index: int) -> tuple[PIL.Image.Image, Tensor, PIL.Image.Image]:
        """An example photo, its `pixel_values` and its preview."""
        photo = self.examples[index]
        with self.lanes.enter():
            return photo, self.captioner.read(photo), _preview(photo)

    def _decode(self, content: bytes) -> tuple[PIL.Image.Image, Tensor, PIL.Image.Image]:
        with self.lanes.enter():  # one photo at a time is decoded
            photo = open_photo(content)
            return photo, self.captioner.read(photo), _preview(photo)

    def restore(self, preview: PIL.Image.Image | None) -> PIL.Image.Image | None:
        """Preview in place of a photo that was refused: the one before it, whose results are still there."""
        return preview

    def forget(self) -> tuple:
        """No results to be kept, and none to be shown: what a new photo begins with."""
        choice = gr.Dropdown(choices=[], value=None, visible=False)
        return None, None, None, NO_RESULT, "", choice, "", NO_CAPTION, NO_LARGE_RESULT, "", ""

    def forget_photo(self) -> tuple:
        """No photo, and no results."""
        return None, None, *self.forget()

    @shows_errors
    def classify(
        self, pixel_values: Tensor | None, text: str, sentences: str, prior_weight: float, picked: str | None = None
    ) -> tuple:
        """Scores to be kept; bars, code, choice of labels and tokens to be shown."""
        labels = parse_labels(text)
        templates = parse_templates(sentences)
        check_number(labels, templates)
        check_characters(labels, templates)
        with self.lanes.enter(len(labels) * len(templates)):
            scores = self.captioner.classify(_chosen(pixel_values), labels, templates)
        return scores, *self.rank(scores, prior_weight, picked)

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

    def rank(self, scores: Scores | None, prior_weight: float, picked: str | None = None) -> tuple[str, str, Any, str]:
        """Bars, code, choice of labels and tokens at a prior weight, from scores that are there.

        The tokens are those of the label that the visitor `picked`, or else of the best one.
        """
        if scores is None:
            return NO_RESULT, "", gr.Dropdown(visible=False), ""
        bars = _bars(scores, prior_weight)
        if scores.num_cut:
            bars += note(f"{scores.num_cut} texts were cut: the model reads {self.captioner.max_tokens} tokens.")
        label = picked if picked in scores.labels else scores.ranked(prior_weight, 1)[0].label
        choice = gr.Dropdown(choices=list(scores.labels), value=label, visible=True)
        return bars, as_code(self.captioner.name, scores, prior_weight), choice, self.explain(scores, label)

    def rank_large_set(self, scores: Scores | None, prior_weight: float) -> str:
        if scores is None:
            return NO_LARGE_RESULT
        return _bars(scores, prior_weight)

    def changed(self, scores: Scores | None, large_scores: Scores | None, text: str, sentences: str) -> tuple[str, str]:
        """Notes that labels, and the large set, were scored with other inputs than those on the page."""
        changed = []
        if scores is not None and _differs(scores.labels, parse_labels, text):
            changed.append("labels")
        if scores is not None and _differs(scores.templates, parse_templates, sentences):
            changed.append("sentence")
        is_stale = large_scores is not None and _differs(large_scores.templates, parse_templates, sentences)
        both = " and ".join(changed).capitalize()
        return stale_note(both, "Classify"), stale_note("Sentence" if is_stale else "", RANK)

    def pick(self, scores: Scores | None, label: str | None) -> tuple[str, str | None]:
        """The tokens of the label that a visitor picked, and the label, to be kept."""
        return self.explain(scores, label), label

    def remember(self, text: str) -> str:
        """Labels that were classified, for this browser's next visit."""
        return text

    def remembered(self, text: str | None) -> Any:
        """Labels of this browser's last visit, if there are any."""
        return text if text and isinstance(text, str) else gr.skip()

    def explain(self, scores: Scores | None, label: str | None) -> str:
        """The tokens of a label's text."""
        if scores is None or not scores.tokens or label not in scores.labels:
            return ""
        view = token_view(self.captioner.pieces(scores.tokens[scores.labels.index(label)]))
        if len(scores.templates) > 1:
            view += note(f"In the first of {len(scores.templates)} sentences; the bars show means over all of them.")
        return view


def _bars(scores: Scores, prior_weight: float) -> str:
    rows = scores.ranked(prior_weight, MAX_SHOWN)
    bars = label_bars(rows, len(scores.labels), prior_weight, scores.temperature)
    return bars + threshold_note(rows[0], scores.abstain_threshold)


def _differs(used: Sequence[str], parse: Callable[[str], list[str]], text: str) -> bool:
    try:
        return list(used) != parse(text)
    except InputError:
        return True


def _preview(photo: PIL.Image.Image) -> PIL.Image.Image:
    preview = photo.copy()
    preview.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    return preview


def _chosen(pixel_values: Tensor | None) -> Tensor:
    if pixel_values is None:
        raise InputError("Choose a photo first.")
    return pixel_values


def build_app(model: str, device: str = "auto") -> gr.Blocks:
    """The page and its events, for a checkpoint (folder or Hub name). `launch` adds limits that the server keeps."""
    captioner = Captioner(model, device)
    with gr.Blocks(title="ig_captioner", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        handlers = Handlers(captioner)
        gr.HTML(header(captioner.name, captioner.in_short))
        with gr.Row():
            with gr.Column(scale=2, min_width=320, elem_id="inputs"):
                inputs = _add_inputs(captioner.templates, handlers.examples)
            with gr.Column(scale=3, min_width=320, elem_id="results"):
                outputs = _add_outputs(captioner)
        parts = {**inputs, **outputs}
        _connect_photo(handlers, parts)
        _connect_results(handlers, parts)
        app.load(handlers.remembered, parts["kept_labels"], parts["labels"], **AT_ONCE)
    return app


def _add_inputs(templates: list[str], examples: list[PIL.Image.Image]) -> dict[str, Any]:
    limits = f"{', '.join(FORMATS)}: up to {MAX_BYTES // 2**20} MiB and {MAX_PIXELS // 10**6} megapixels"
    lines = f"One per line, {MAX_LABELS:,} at most. A single line is split at its commas."
    photo = gr.Image(
        label="Photo",
        placeholder=f"# Drop, paste or choose a photo\n{limits}",
        sources=["upload", "clipboard"],
        format="png",
        height=270,
        buttons=[],
        alt_text="The photo to be classified",
        elem_id="photo",
    )
    thumbnails = gr.Dataset(
        label="Examples",
        components=[gr.Image(type="pil", format="jpeg", render=False)],
        samples=[[_preview(example)] for example in examples],
        type="index",
        elem_id="examples",
    )
    url = gr.Textbox(label="Photo from a URL", placeholder="https://...", submit_btn="Load", max_lines=1, elem_id="url")
    labels = gr.Textbox(
        "\n".join(LABEL_OF.values()), label="Labels", info=lines, lines=7, max_lines=12, elem_id="labels"
    )
    template = gr.Textbox(
        "\n".join(templates),
        label="Sentence",
        info="{} is where the label goes. Several, one per line, are averaged.",
        lines=len(templates),
        max_lines=4,
        elem_id="template",
    )
    return {
        "photo": photo,
        "examples": thumbnails,
        "url": url,
        "labels": labels,
        "template": template,
        "run": gr.Button("Classify", variant="primary", elem_id="run"),
        # in the browser's own storage; the secret hides nothing, it lets a restarted server read it
        "kept_labels": gr.BrowserState(storage_key="ig_captioner_labels", secret="ig_captioner"),
    }


def _add_outputs(captioner: Captioner) -> dict[str, Any]:
    names = ("pixel_values", "preview", "scores", "large_scores", "picked")
    states = {name: gr.State(time_to_live=KEPT_SECONDS) for name in names}
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
        stale = gr.HTML(elem_id="stale")
        bars = gr.HTML(NO_RESULT, elem_id="bars")
        choice = gr.Dropdown([], label=CHOICE, interactive=True, visible=False, elem_id="choice")
        tokens = gr.HTML(elem_id="tokens")
    with gr.Tab("Caption"):
        caption = gr.HTML(NO_CAPTION, elem_id="caption")
    with gr.Tab(f"{len(large_set())} names"):
        gr.HTML(
            note(f"{len(large_set())} everyday things, animals and foods: the names that the package's model knows.")
        )
        run_large_set = gr.Button(RANK, variant="primary", elem_id="run-large")
        large_stale = gr.HTML(elem_id="large-stale")
        large_bars = gr.HTML(NO_LARGE_RESULT, elem_id="large-bars")
    with gr.Tab("As code"):
        code = gr.Code(language="python", label="The same scores", wrap_lines=True, interactive=False, elem_id="code")
    shown = {"weight": weight, "bars": bars, "choice": choice, "tokens": tokens, "caption": caption, "code": code}
    large = {"run_large_set": run_large_set, "large_bars": large_bars}
    return {**states, **shown, **large, "stale": stale, "large_stale": large_stale}


# Events. Those that run the model wait for one another in `Lanes`.

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
MODEL = {**PRIVATE, "concurrency_id": "model", "concurrency_limit": MAX_WAITING}
AT_ONCE = {**PRIVATE, "show_progress": "hidden"}


def _pick(parts: dict[str, Any], names: str) -> list[Any]:
    return [parts[name] for name in names.split()]


def _event(handler: Callable, parts: dict[str, Any], inputs: str, outputs: str, **options: Any) -> dict[str, Any]:
    """Arguments of Gradio's listeners, with components by their names in `parts`."""
    return {"fn": handler, "inputs": _pick(parts, inputs), "outputs": _pick(parts, outputs), **options}


def _classify(handlers: Handlers, parts: dict[str, Any]) -> dict[str, Any]:
    inputs = "pixel_values labels template weight picked"
    return _event(handlers.classify, parts, inputs, "scores bars code choice tokens", **MODEL)


def _changed(handlers: Handlers, parts: dict[str, Any]) -> dict[str, Any]:
    inputs = "scores large_scores labels template"
    return _event(handlers.changed, parts, inputs, "stale large_stale", **AT_ONCE, trigger_mode="always_last")


def _connect_photo(handlers: Handlers, parts: dict[str, Any]) -> None:
    """A new photo is read, then classified and captioned. One that is refused leaves the page as it was."""
    results = "scores large_scores picked bars code choice tokens caption large_bars stale large_stale"
    no_results = _event(handlers.forget, parts, "", results, **AT_ONCE)
    no_photo = _event(handlers.forget_photo, parts, "", f"pixel_values preview {results}", **AT_ONCE)
    # the file itself, neither checked nor decoded by Gradio: `read_upload` does the one, and its size comes first
    read = _event(handlers.read, parts, "photo", "pixel_values preview", preprocess=False, **MODEL)
    load = _event(handlers.fetch, parts, "url", "photo pixel_values preview", **PRIVATE)
    example = _event(handlers.read_example, parts, "examples", "photo pixel_values preview", **MODEL)
    restore = _event(handlers.restore, parts, "preview", "photo", **AT_ONCE)
    caption = _event(handlers.caption, parts, "pixel_values", "caption", **MODEL)

    parts["photo"].clear(**no_photo)
    uploaded = parts["photo"].upload(**read)
    uploaded.failure(**restore)
    for photo in (uploaded, parts["url"].submit(**load), parts["examples"].click(**example)):
        classified = photo.success(**no_results).success(**_classify(handlers, parts))
        classified.success(None, js=SHOW_RESULTS)
        classified.then(**caption)


def _connect_results(handlers: Handlers, parts: dict[str, Any]) -> None:
    """Labels, sentence, slider and word picker."""
    texts = (parts["labels"], parts["template"])
    classify = _classify(handlers, parts)
    changed = _changed(handlers, parts)
    classified = gr.on([parts["run"].click, *(text.submit for text in texts)], **classify)
    classified.success(**changed)
    classified.success(**_event(handlers.remember, parts, "labels", "kept_labels", **AT_ONCE))
    classified.success(None, js=SHOW_RESULTS)
    gr.on([text.change for text in texts], **changed)

    inputs, outputs = "pixel_values template weight", "large_scores large_bars"
    large = _event(handlers.classify_large_set, parts, inputs, outputs, **MODEL)
    parts["run_large_set"].click(**large).success(**changed)

    always = {**AT_ONCE, "trigger_mode": "always_last"}
    rank = _event(handlers.rank, parts, "scores weight picked", "bars code choice tokens", **always)
    rank_large_set = _event(handlers.rank_large_set, parts, "large_scores weight", "large_bars", **always)
    parts["weight"].change(**rank)
    parts["weight"].change(**rank_large_set)
    parts["choice"].input(**_event(handlers.pick, parts, "scores choice", "tokens picked", **always))


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
    # As Ctrl+C: Gradio then deletes the uploads. Docker and systemd stop a server by SIGTERM. Passing the signal on as
    # SIGINT would not do: shells start what runs in the background with SIGINT ignored.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
