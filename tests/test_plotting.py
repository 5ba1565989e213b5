"""Figures: described, legible on both pages, and alone on the page."""

import base64
import io
import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from colorspacious import cspace_convert, deltaE
from PIL import Image

from companion import plotting


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """What was displayed, in order; the style is that of the book."""
    displayed = []
    monkeypatch.setattr(plotting, "display", lambda content, **_: displayed.append(content))
    with plt.rc_context():
        plotting.use_style()
        yield displayed
    assert not plt.get_fignums(), "a figure was left open"


def a_figure(slope=1.0):
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, slope], label="line")
    axes.set_xlabel("time $t$")
    axes.legend()
    return figure


def test_figure_has_caption_and_alternative_text(shown):
    plotting.show(a_figure(), caption="It <em>rises</em>.", alt='A line that "rises".')
    page = BeautifulSoup(shown[0]["text/html"], "html.parser")
    assert page.figcaption.get_text() == "It rises."
    assert page.find(role="img")["aria-label"] == 'A line that "rises".'
    assert shown[0]["text/plain"] == '[figure] A line that "rises".'
    assert "image/png" not in shown[0]


def test_figure_takes_the_ink_of_the_page_and_styles_nothing_else(shown):
    plotting.show(a_figure(), caption="A line.", alt="A line.")
    svg = shown[0]["text/html"]
    assert "currentColor" in svg
    assert plotting._INK not in svg
    assert "<style" not in svg
    assert "#000000" not in svg


def test_figures_of_a_page_share_no_identifier(shown):
    plotting.show(a_figure(1), caption="Up.", alt="A line that rises.")
    plotting.show(a_figure(-1), caption="Down.", alt="A line that falls.")
    plotting.show_slider(
        (a_figure(k) for k in range(3)), ["a", "b", "c"], name="case", caption="All.", alt="Three lines."
    )
    pages = [BeautifulSoup(content["text/html"], "html.parser") for content in shown]
    identifiers = [tag["id"] for page in pages for tag in page.find_all(id=True)]
    assert len(identifiers) == len(set(identifiers)) > 20
    references = {tag["xlink:href"] for page in pages for tag in page.find_all("use")}
    assert references <= {f"#{identifier}" for identifier in identifiers}


def test_panels_that_are_alike_share_no_identifier_either(shown):
    figure, panels = plt.subplots(1, 2)
    for axes in panels:
        axes.imshow([[0, 1], [2, 3]])
    plotting.show(figure, caption="Twice the same.", alt="Two equal heat maps.")
    page = BeautifulSoup(shown[0]["text/html"], "html.parser")
    identifiers = [tag["id"] for tag in page.find_all(id=True)]
    assert len(identifiers) == len(set(identifiers))
    assert len(page.find_all("image")) == 2


def test_card_is_a_light_png(shown):
    plotting.show(a_figure(), caption="A line.", alt="A line.", card=True)
    picture = base64.b64decode(shown[0]["image/png"])
    image = Image.open(io.BytesIO(picture))
    assert image.format == "PNG"
    assert len(image.getcolors()) <= 64


def test_slider_shows_its_first_frame_and_names_all(shown):
    plotting.show_slider(
        (a_figure(k) for k in range(3)), ["t = 0", "t = 1", "t = 2"], name="time", caption="C.", alt="A."
    )
    page = BeautifulSoup(shown[0]["text/html"], "html.parser")
    frames = page.find_all(attrs={"data-label": True})
    assert [frame["data-label"] for frame in frames] == ["t = 0", "t = 1", "t = 2"]
    assert [frame.has_attr("hidden") for frame in frames] == [False, True, True]
    assert page.input["max"] == "2"
    assert page.output.get_text() == "t = 0"


def example(x: int) -> int:
    """Square a number.

    Everything after the first line is left out.
    """
    return x**2


def test_source_keeps_only_the_first_line_of_a_docstring(shown):
    plotting.show_source(example)
    assert shown[0].data == '```python\ndef example(x: int) -> int:\n    """Square a number."""\n    return x**2\n```'


def contrast(color: str, page: str) -> float:
    """The contrast ratio of WCAG 2."""
    weights = [0.2126, 0.7152, 0.0722]
    first, second = sorted(
        np.dot(cspace_convert([int(c[i : i + 2], 16) for i in (1, 3, 5)], "sRGB255", "sRGB1-linear"), weights)
        for c in (color, page)
    )
    return (second + 0.05) / (first + 0.05)


@pytest.mark.parametrize("name", plotting.PALETTE)
@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
def test_colours_stand_out_from_light_and_dark_pages(name, page):
    assert contrast(plotting.PALETTE[name], page) >= 3


@pytest.mark.parametrize("blindness", ["protanomaly", "deuteranomaly", "tritanomaly"])
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(plotting.PALETTE, 2)))
def test_colours_differ_for_colour_blind_readers(first, second, blindness):
    space = {"name": "sRGB1+CVD", "cvd_type": blindness, "severity": 100}
    seen = [
        np.clip(
            cspace_convert([int(plotting.PALETTE[n][i : i + 2], 16) / 255 for i in (1, 3, 5)], space, "sRGB1"), 0, 1
        )
        for n in (first, second)
    ]
    assert deltaE(*seen, input_space="sRGB1") > 10


def test_bad_input_is_named():
    figure = a_figure()
    with pytest.raises(ValueError, match="alt must be a sentence that says what to see, got ' '"):
        plotting.show(figure, caption="A line.", alt=" ")
    with pytest.raises(ValueError, match="caption must be"):
        plotting.show(figure, caption="", alt="A line.")
    plt.close(figure)
    with pytest.raises(ValueError, match="got 2 labels for 1 figures"):
        plotting.show_slider([a_figure()], ["a", "b"], name="case", caption="A line.", alt="A line.")


def test_pixels_inside_a_figure_keep_their_colours_in_a_palette(shown):
    figure, axes = plt.subplots(figsize=(2, 2))
    values = np.linspace(0, 1, 64).reshape(8, 8)
    axes.imshow(values, cmap="viridis", interpolation="nearest")
    plotting.show(figure, caption="Pixels.", alt="Pixels.")
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", shown[0]["text/html"])
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert image.mode == "P"
    kept = {tuple(colour) for colour in np.asarray(image.convert("RGBA"))[..., :3].reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in plt.cm.viridis(values.ravel(), bytes=True)[:, :3].tolist()} <= kept


def test_many_colours_of_a_figure_become_256_close_ones():
    generator = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 40 * 40).reshape(40, 40, 1) + generator.uniform(-5, 5, (40, 40, 3))
    pixels = smooth.clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    png = base64.b64encode(buffer.getvalue()).decode()
    image = Image.open(io.BytesIO(base64.b64decode(plotting._paletted(png))))
    assert image.mode == "P"
    assert abs(np.asarray(image.convert("RGB")).astype(int) - pixels).max() <= 16
