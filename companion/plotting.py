"""What the reader sees: one style for figures, figures with caption and alt text, animations, and source code.

Figures are shown as SVG whose ink is ``currentColor``: text and axes take the colour of the page, light or dark.
The colours of ``PALETTE`` keep a contrast of at least 3:1 with both, and differ for colour-blind readers.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import html
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from PIL import Image

PALETTE = {
    "blue": "#0d57e5",
    "orange": "#d87d05",
    "green": "#18a95e",
    "violet": "#bc73bf",
    "grey": "#777777",
}
COLUMN = 7.2  # width of the text column in inches, so that a figure is shown at the size it was drawn for
_INK = "#010203"  # stands for the page's text colour: no figure uses it otherwise

_STYLE = {
    "figure.dpi": 100,
    "figure.figsize": (COLUMN, 3.2),
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.prop_cycle": mpl.cycler(color=PALETTE.values(), linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "image.cmap": "viridis",
    "svg.fonttype": "path",
    "svg.hashsalt": "linear-lens",
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
            "patch.edgecolor",
        ),
        _INK,
    ),
}


def use_style() -> None:
    """Set the book's style; a tutorial does so once, in its set-up cell."""
    plt.rcParams.update(_STYLE)


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an inline SVG in the page's ink, with identifiers that no other figure of the page has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", "\n", svg).replace(_INK, "currentColor")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # A style sheet inside the SVG would style the whole page, and glyphs have no colour of their own: attributes do.
    svg = svg.replace("<svg ", '<svg fill="currentColor" stroke-linejoin="round" stroke-linecap="butt" ', 1)
    svg = re.sub(r"(?<=data:image/png;base64,)[\sA-Za-z0-9+/=]+", lambda pixels: _paletted(pixels[0]), svg)
    return re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)


def _paletted(png: str) -> str:
    """The same picture with at most 256 colours, where that is lighter and no transparency is in the way."""
    image, buffer = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA"), io.BytesIO()
    colours, index = np.unique(np.asarray(image).reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(index.reshape(image.height, image.width).astype(np.uint8), "P")
        image.putpalette(colours.tobytes(), "RGBA")
    elif colours[:, 3].min() == 255:
        image = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(buffer, "png", optimize=True)
    return min(png, base64.b64encode(buffer.getvalue()).decode(), key=len)


def _described(caption: str, alt: str) -> str:
    """Check both texts, and return a short name for the figure made from them."""
    for name, text in (("caption", caption), ("alt", alt)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must be a sentence that says what to see, got {text!r}")
    return "f" + hashlib.sha256((caption + alt).encode()).hexdigest()[:8]


def show(figure: Figure, *, caption: str, alt: str, card: bool = False) -> None:
    """Show a figure with its caption and alternative text, and close it.

    Parameters
    ----------
    figure
        What to show; it is drawn at its own size and shrinks with a narrow page.
    caption
        What the reader should see in the figure, shown below it.
    alt
        What the figure shows, for those who cannot see it.
    card
        True for the one figure of a tutorial that becomes its picture in the gallery.

    Raises
    ------
    ValueError
        If ``caption`` or ``alt`` is empty.
    """
    name = _described(caption, alt)
    picture = f'<div role="img" aria-label="{html.escape(alt)}">{_svg(figure, name)}</div>'
    bundle = {
        "text/html": f'<figure class="lens">{picture}<figcaption>{caption}</figcaption></figure>',
        "text/plain": f"[figure] {alt}",
    }
    if card:
        bundle["image/png"] = _picture(figure)
    plt.close(figure)
    display(bundle, raw=True)


def _picture(figure: Figure) -> str:
    """A small picture of the figure in black on white, for the gallery; 64 colours make it four times lighter."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", dpi=72)
    Image.open(drawn).convert("RGB").quantize(64).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def show_slider(figures: Iterable[Figure], labels: Sequence[str], *, name: str, caption: str, alt: str) -> None:
    """Show figures one at a time, with a slider and a button that plays them; nothing moves by itself.

    Parameters
    ----------
    figures
        The frames, all of one size; each is closed once it is drawn, so a generator keeps memory low.
    labels
        What distinguishes each frame, for example ``"t = 2.5"``.
    name
        What the slider changes, for example ``"time"``.
    caption, alt
        As for :func:`show`.

    Raises
    ------
    ValueError
        If a text is empty, or ``labels`` and ``figures`` differ in number.
    """
    prefix = _described(caption, alt)
    pictures = []
    for number, figure in enumerate(figures):
        pictures.append(_svg(figure, f"{prefix}-{number}"))
        plt.close(figure)
    if len(pictures) != len(labels):
        raise ValueError(f"labels must name every figure, got {len(labels)} labels for {len(pictures)} figures")
    frames = [
        f'<div data-label="{html.escape(label)}"{" hidden" if number else ""}>{picture}</div>'
        for number, (label, picture) in enumerate(zip(labels, pictures, strict=True))
    ]
    page = _SLIDER.format(
        frames="".join(frames),
        alt=html.escape(alt),
        caption=caption,
        name=html.escape(name),
        first=html.escape(labels[0]),
        last=len(frames) - 1,
    )
    display({"text/html": page, "text/plain": f"[figure with slider] {alt}"}, raw=True)


_SLIDER = """<figure class="lens slider"><div role="img" aria-label="{alt}">{frames}</div>
<div class="controls"><button type="button">Play</button>
<label>{name} <input type="range" min="0" max="{last}" value="0"></label> <output>{first}</output></div>
<figcaption>{caption}</figcaption>
<script>
(() => {{
  const figure = document.currentScript.parentElement, frames = figure.querySelectorAll("[data-label]");
  const [button, range, output] = ["button", "input", "output"].map((tag) => figure.querySelector(tag));
  let timer = null;
  const pause = () => {{ clearInterval(timer); timer = null; button.textContent = "Play"; }};
  const turn = (number) => {{
    frames.forEach((frame, k) => {{ frame.hidden = k !== number; }});
    range.value = number;
    output.value = frames[number].dataset.label;
    if (number === frames.length - 1) pause();
  }};
  range.oninput = () => {{ pause(); turn(Number(range.value)); }};
  button.onclick = () => {{
    if (timer) return pause();
    if (Number(range.value) === frames.length - 1) turn(0);
    timer = setInterval(() => turn(Number(range.value) + 1), 250);
    button.textContent = "Pause";
  }};
}})();
</script></figure>"""


def show_source(function: Callable) -> None:
    """Show the source of a function or class, highlighted, with only the first line of each docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    lines = source.splitlines()
    for node in reversed([n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]):
        text = ast.get_docstring(node)
        if text:
            docstring = node.body[0]
            summary = " " * docstring.col_offset + '"""' + text.splitlines()[0] + '"""'
            lines[docstring.lineno - 1 : docstring.end_lineno] = [summary]
    display(Markdown("```python\n" + "\n".join(lines) + "\n```"))
