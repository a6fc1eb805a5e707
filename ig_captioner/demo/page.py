"""Figures of the web demo as HTML of bars and of tokens, and their style. No Gradio, no JavaScript.

Everything that comes from a visitor or a model is escaped, characters without a shape are made visible, and text of
either direction stays inside its own box.
"""

import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ..installed import DEFAULT_CHECKPOINT
from .scores import Caption, Piece, RankedLabel


MAX_SHOWN = 20  # labels
NATS_OF_FULL_COLOUR = 2.0
CONTROL_PICTURES = 0x2400  # U+2400 shows U+0000, and so on up to the space
# One rule for all pictures, docs/draw_trie.py included: the image makes a text likelier, or less likely.
LIKELIER, LESS_LIKELY = "#3182ce", "#ed8936"
FLOOR = 1.05  # of the lowest log-likelihood: its bar is short, not missing
PAPER = "https://arxiv.org/abs/2311.17072"
HUB = "https://huggingface.co/"

CSS = (
    f".gradio-container {{ --ig-likelier: {LIKELIER}; --ig-less-likely: {LESS_LIKELY}; }}"
    + """
.gradio-container { --ig-quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.ig-head h1 { margin: 0 0 .2em; font-size: 1.6rem; }
.ig-head p { margin: 0; max-width: 62rem; }
.ig-formula { font-family: var(--font-mono); white-space: nowrap; }
.ig-note { color: var(--ig-quiet); font-size: .85rem; margin: .6rem 0 0; }
.ig-empty { color: var(--ig-quiet); padding: 2rem 0; text-align: center; }
.ig-row { display: grid; grid-template-columns: minmax(6rem, 1.1fr) 1.3fr 1fr 1fr 1fr; column-gap: .9rem;
  align-items: center; padding: .3rem 0; border-bottom: 1px solid var(--border-color-primary); }
.ig-titles { font-size: .8rem; color: var(--ig-quiet); }
.ig-label { overflow-wrap: anywhere; font-weight: 600; }
.ig-cell { display: flex; align-items: center; gap: .45rem; min-width: 0; }
.ig-number { flex: 0 0 3.2rem; text-align: right; font-size: .85rem; font-variant-numeric: tabular-nums; }
.ig-track { position: relative; flex: 1 1 0; min-width: 2rem; height: 1rem; }
.ig-bar { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.ig-zero { position: absolute; top: -.15rem; bottom: -.15rem; width: 1px; background: var(--body-text-color-subdued); }
.ig-bar { background: var(--body-text-color-subdued); opacity: .4; }
.ig-score .ig-bar, .ig-gain .ig-bar { background: var(--ig-likelier); }
.ig-gain .ig-bar.ig-below { background: var(--ig-less-likely); }
.ig-best .ig-bar { opacity: 1; }
.ig-score .ig-number { order: -1; flex-basis: 2.6rem; font-size: 1rem; }
.ig-best .ig-number { font-weight: 700; }
.ig-stale { margin: 0; padding: .4rem .7rem; border-left: 3px solid var(--ig-less-likely); font-weight: 600; }
.ig-name { display: none; }
.ig-tokens { display: flex; flex-wrap: wrap; gap: .35rem .3rem; align-items: flex-start; padding: .4rem 0; }
.ig-token { display: inline-flex; flex-direction: column; align-items: center; max-width: 100%; }
.ig-token.ig-joined { margin-left: -.3rem; }
.ig-token bdi { padding: .15rem .4rem; border-radius: 4px; overflow-wrap: anywhere; font-size: 1.05rem; }
.ig-token small { font-variant-numeric: tabular-nums; color: var(--ig-quiet); }
.ig-end bdi { font-style: italic; }
.ig-quote { font-size: 1.25rem; margin: .4rem 0; overflow-wrap: anywhere; }
.gradio-container .ig-table { border: 0; margin-top: .4rem; font-variant-numeric: tabular-nums; }
.gradio-container .ig-table :is(tr, th, td) { border: 0; }
.gradio-container .ig-table :is(th, td) { padding: .1rem 1rem .1rem 0; text-align: right; font-weight: 400; }
.gradio-container .ig-table th:first-child { text-align: left; font-weight: 600; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  .ig-titles { display: none; }
  .ig-row { grid-template-columns: 1fr 1fr; column-gap: .6rem; row-gap: .15rem; padding: .5rem 0; }
  .ig-cell { grid-column: 1 / -1; }
  .ig-cell.ig-score { grid-row: 1; grid-column: 2; }
  .ig-name { display: inline; flex: 0 0 4.4rem; font-size: .8rem; color: var(--ig-quiet); }
  .ig-score .ig-name { display: none; }
  .ig-head p:first-of-type { display: none; }
  #photo { height: 170px !important; }
  #labels textarea { height: 5.2rem !important; }
  #inputs { gap: .5rem; }
  #labels [data-testid="block-info"] + div, #template [data-testid="block-info"] + div { display: none; }
  #examples .gallery { flex-wrap: nowrap; }
}
#url input { border: 1px solid var(--border-color-primary); border-radius: var(--input-radius); }
#examples .gallery-item .container { width: 4rem; height: 3.2rem; }
#examples .gallery-item img { width: 100%; height: 100%; object-fit: cover; }
#stale:not(:has(.ig-stale)), #large-stale:not(:has(.ig-stale)) { display: none; }
#photo .wrap:has(> .error), #results .wrap:has(> .error) { display: none; } /* the message says more */
"""
)

TITLES = {"ig-score": "score", "ig-gain": "IG", "ig-caption": "log P(T|I)", "ig-prior": "log P(T)"}


def visible(text: str) -> str:
    """Escaped for HTML, with characters that have no shape replaced by a picture, or by their number."""

    def shape(character: str) -> str:
        if ord(character) < ord(" "):
            return chr(CONTROL_PICTURES + ord(character))
        is_shapeless = unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
        return f"[U+{ord(character):04X}]" if is_shapeless else character

    return html.escape("".join(map(shape, text)))


def number(value: float, sign: str = "") -> str:
    """Two digits; what rounds to zero has no sign."""
    return f"{round(value, 2) or 0.0:{sign if round(value, 2) else ''}.2f}".replace("-", "&minus;")


def header(model: str, in_short: str | None) -> str:
    """The head of the page, in HTML: what the demo does, and which checkpoint it asks."""
    name = visible(Path(model).name if Path(model).is_dir() else model)
    if model == DEFAULT_CHECKPOINT:
        name += ", which comes with the package"
    about = f" {visible(in_short)}" if in_short else ""
    links = [_link(PAPER, "Paper")]
    if not Path(model).is_dir():
        links.append(_link(HUB + quote(model), "Model card"))
    return f"""\
<div class="ig-head"><h1>ig_captioner</h1><p>An image captioner as a zero-shot classifier. It ranks your labels by
information gain, <span class="ig-formula">IG = log P(T|I) &minus; &alpha; &middot; log P(T)</span>: how
much likelier the photo makes the text. &alpha; is the prior weight; 0 is the plain captioner.</p>
<p class="ig-note"><b>Model: {name}.</b>{about} {" &middot; ".join(links)}</p></div>"""


def _link(url: str, text: str) -> str:
    return f'<a href="{html.escape(url)}" target="_blank" rel="noopener noreferrer">{text}</a>'


def note(content: str) -> str:
    """A remark, in HTML."""
    return f'<p class="ig-note">{content}</p>'


def stale_note(changed: str, button: str) -> str:
    """Says that results are those of other inputs than the page shows, in HTML; nothing if nothing has `changed`."""
    return f'<p class="ig-stale" role="status">{changed} changed: press {button}.</p>' if changed else ""


def placeholder(content: str) -> str:
    """HTML for the place of a result that is not there yet."""
    return f'<div class="ig-empty">{content}</div>'


# Labels


def label_bars(rows: Sequence[RankedLabel], num_labels: int, prior_weight: float, temperature: float = 1.0) -> str:
    """Four bars per label, best label first; `rows` are those to be shown of `num_labels`.

    In every column a longer bar, or one further right, is a higher value. log P(T|I) and log P(T) share a scale, which
    ends at 0 and begins below the lowest of them.
    """
    floor = FLOOR * min(min(row.caption_log_likelihood, row.prior_log_likelihood) for row in rows)
    gains = [row.information_gain for row in rows]
    low = min(0.0, *gains)
    high = max(0.0, *gains)
    best_gain = max(gains)
    best_caption = max(row.caption_log_likelihood for row in rows)
    lines = [_titles()]
    for row in rows:
        caption = row.caption_log_likelihood
        prior = row.prior_log_likelihood
        gain = row.information_gain
        sign = "ig-below" if gain < 0 else ""
        is_best = gain == best_gain
        cells = [
            _cell("ig-score", f"{row.score:.0%}", _bar(0, row.score, 0, 1), is_best),
            _cell("ig-gain", number(gain), _bar(min(0, gain), max(0, gain), low, high, sign, zero=True), is_best),
            _cell("ig-caption", number(caption), _bar(floor, caption, floor, 0), caption == best_caption),
            _cell("ig-prior", number(prior), _bar(floor, prior, floor, 0)),
        ]
        label = f'<div class="ig-label" role="rowheader"><bdi>{visible(row.label)}</bdi></div>'
        lines.append(f'<div class="ig-row" role="row">{label}{"".join(cells)}</div>')
    table = f'<div role="table" aria-label="Labels by information gain">{"".join(lines)}</div>'
    hidden = f" The best {len(rows)} of {num_labels:,} labels." if len(rows) < num_labels else ""
    divided = "IG" if temperature == 1 else f"IG / {temperature:g}, the checkpoint's temperature,"
    return table + note(
        f"Longer is higher, but for orange, which goes down from 0. IG = log P(T|I) &minus; {prior_weight:g} &middot; "
        "log P(T), in nats; blue: the photo makes the text likelier; orange: less likely. "
        "Bold: the highest IG and log P(T|I). "
        f"Score: softmax of {divided} over all labels." + hidden
    )


def threshold_note(best: RankedLabel, abstain_threshold: float | None) -> str:
    """Says what the pipeline would answer for a photo whose best label is `best`, if the checkpoint may abstain."""
    if abstain_threshold is None:
        return ""
    verb = "reaches" if best.information_gain >= abstain_threshold else "does not reach"
    return note(
        f"The pipeline answers &ldquo;none of these&rdquo; where no label reaches this checkpoint's threshold, IG "
        f"{number(abstain_threshold)}; here the best {verb} it. The scores are those of the labels only."
    )


def _titles() -> str:
    cells = "".join(f'<div role="columnheader">{title}</div>' for title in TITLES.values())
    return f'<div class="ig-row ig-titles" role="row"><div role="columnheader">label</div>{cells}</div>'


def _cell(name: str, value: str, bar: str, is_best: bool = False) -> str:
    best = " ig-best" if is_best else ""
    return (
        f'<div class="ig-cell {name}{best}" role="cell"><span class="ig-name">{TITLES[name]}</span>'
        f'<span class="ig-track">{bar}</span><span class="ig-number">{value}</span></div>'
    )


def _bar(start: float, end: float, low: float, high: float, name: str = "", zero: bool = False) -> str:
    """A bar from `start` to `end` on a track from `low` to `high`, and the line at 0."""
    span = (high - low) or 1.0
    left, width, line = (100 * part / span for part in (start - low, end - start, -low))
    bar = f'<span class="ig-bar {name}" style="left:{left:.2f}%;width:{width:.2f}%"></span>'
    return bar + (f'<span class="ig-zero" style="left:{line:.2f}%"></span>' if zero else "")


# Tokens


def token_view(pieces: Sequence[Piece]) -> str:
    """The pieces of a text, coloured by what the image adds to the log-probability of each; then their sum, a table."""
    gain = sum(piece.conditional - piece.unconditional for piece in pieces)
    chips = [_token(piece, is_joined=i > 0 and piece.text[:1].isalnum()) for i, piece in enumerate(pieces)]
    return (
        f'<div class="ig-tokens">{"".join(chips)}</div>'
        + note(
            "Under each token: log P(token|I) &minus; log P(token), in nats. Blue: the image makes it likelier; "
            f"orange: less likely. Their sum, {number(gain, '+')}, is IG at prior weight 1."
        )
        + _token_table(pieces)
    )


def _token(piece: Piece, is_joined: bool) -> str:
    """One piece; `is_joined` says that it goes on with the word before it."""
    difference = piece.conditional - piece.unconditional
    strength = 75 * min(1.0, abs(difference) / NATS_OF_FULL_COLOUR)
    colour = (
        f"color-mix(in srgb, var(--ig-{'likelier' if difference >= 0 else 'less-likely'}) {strength:.0f}%, transparent)"
    )
    names = "ig-token" + (" ig-end" if not piece.text else "") + (" ig-joined" if is_joined else "")
    return (
        f'<span class="{names}"><bdi style="background:{colour}">{_piece_name(piece)}</bdi>'
        f"<small>{number(difference, '+')}</small></span>"
    )


def _piece_name(piece: Piece) -> str:
    return visible(piece.text.strip() or piece.text) or "end"


def _token_table(pieces: Sequence[Piece]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in ("token", "log P(token|I)", "log P(token)", "difference"))
    rows = "".join(
        f"<tr><th><bdi>{_piece_name(piece)}</bdi></th><td>{number(piece.conditional)}</td>"
        f"<td>{number(piece.unconditional)}</td><td>{number(piece.conditional - piece.unconditional, '+')}</td></tr>"
        for piece in pieces
    )
    return f'<details><summary>Figures</summary><table class="ig-table"><tr>{titles}</tr>{rows}</table></details>'


def caption_view(caption: Caption, pieces: Sequence[Piece]) -> str:
    """A caption, how sure the model is of it, and its tokens."""
    text = caption.text or "(the model wrote nothing)"
    tokens = caption.tokens
    confidence = note(
        f"Confidence {tokens.confidence:.0%} per token (geometric mean of their probabilities under the image), "
        f"log P(T|I) {number(sum(tokens.conditional))}, log P(T) {number(sum(tokens.unconditional))}, "
        f"IG {number(tokens.information_gain, '+')} nats."
    )
    return f'<p class="ig-quote"><bdi>{visible(text)}</bdi></p>{confidence}{token_view(pieces)}'
