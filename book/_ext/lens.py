"""What the book adds to Sphinx: the gallery, the scoreboard, and pages that load nothing they do not need."""

from __future__ import annotations

import base64
import html
import re
from collections import Counter
from pathlib import Path

import nbformat
import yaml
from docutils import nodes
from jupyter_cache import get_cache
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from companion import claims

logger = logging.getLogger(__name__)


def tutorials(app: Sphinx) -> list[str]:
    """The documents that are tutorials, in the order of the table of contents."""
    toc = yaml.safe_load(Path(app.config.external_toc_path).read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [name for name in chapters if Path(app.srcdir, f"{name}.ipynb").exists()]


def opening(app: Sphinx, docname: str) -> tuple[str, str]:
    """Title and first paragraph of a tutorial."""
    first = nbformat.read(Path(app.srcdir, f"{docname}.ipynb"), as_version=4).cells[0].source
    title, sentence = first.split("\n\n")[:2]
    return title.removeprefix("# ").strip(), " ".join(sentence.split())


def card_picture(app: Sphinx, docname: str) -> bytes | None:
    """The picture that the tutorial's figure with ``card=True`` left in the cache of executed notebooks."""
    cache = get_cache(app.env.mystnb_config.execution_cache_path)
    try:
        record = cache.match_cache_file(str(Path(app.srcdir, f"{docname}.ipynb")))
    except KeyError:
        return None
    for cell in cache.get_cache_bundle(record.pk).nb.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}) and 'class="lens"' in output.data.get("text/html", ""):
                return base64.b64decode(output.data["image/png"])
    return None


class Gallery(SphinxDirective):
    """One card per tutorial, of one theme (the argument) or of the whole book."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        theme = f"{self.arguments[0]}/" if self.arguments else ""
        found = [name for name in tutorials(self.env.app) if name.startswith(theme)]
        if not found:
            return [nodes.paragraph(text="No tutorial of this theme is published yet.")]
        cards = []
        for docname in found:
            title, sentence = opening(self.env.app, docname)
            link = self.env.app.builder.get_relative_uri(self.env.docname, docname)
            static = self.env.app.builder.get_relative_uri(self.env.docname, "_static").removesuffix(".html")
            picture = f"{static}/gallery/{docname.replace('/', '-')}.png"
            cards.append(
                f'<li><a href="{link}"><img src="{picture}" alt="" loading="lazy">'
                f"<strong>{html.escape(title)}</strong></a><p>{html.escape(sentence)}</p></li>"
            )
        return [nodes.raw("", f'<ul class="gallery">{"".join(cards)}</ul>', format="html")]


class Scoreboard(SphinxDirective):
    """All claims of all tutorials, read from the committed contract cells."""

    def run(self) -> list[nodes.Node]:
        app = self.env.app
        order = {name: position for position, name in enumerate(tutorials(app))}
        try:
            reports = sorted(claims.read_reports(app.srcdir), key=lambda report: order[report.tutorial])
        except ValueError as error:
            raise self.error(str(error)) from error
        links = [
            f'<a href="{app.builder.get_relative_uri(self.env.docname, report.tutorial)}">'
            f"{html.escape(opening(app, report.tutorial)[0])}</a>"
            for report in reports
        ]
        rows = [claim for report in reports for claim in report.claims]
        verdicts = Counter(claim.verdict for claim in rows)
        summary = nodes.paragraph(
            text=f"{len(reports)} tutorials, {len(rows)} rows: {verdicts['holds']} hold, {verdicts['fails']} fail, "
            f"{verdicts['not at this scale']} do not reproduce at this scale. "
            f"{sum(claim.control for claim in rows)} of the rows are negative controls."
        )
        return [summary, nodes.raw("", claims.claims_table(reports, links), format="html")]


def configure(app: Sphinx, config: Config) -> None:
    """Show repository and launch buttons only where the book has a home; never load Thebe."""
    options = config.html_theme_options
    has_home = bool(options.get("repository_url"))
    options.update(use_repository_button=has_home, use_issues_button=has_home, use_fullscreen_button=False)
    options["footer_content_items"] = ["copyright.html", "extra-footer.html"]
    if not has_home:
        options["launch_buttons"] = {}
    config.html_context["default_mode"] = "auto"
    config.mathjax_path = "mathjax/startup.js"
    for listeners in app.events.listeners.values():
        listeners[:] = [entry for entry in listeners if not entry.handler.__module__.startswith("sphinx_thebe")]
    app.registry.css_files[:] = [entry for entry in app.registry.css_files if "thebe" not in entry[0]]


def share_letters(body: str) -> str:
    """Keep the outline of each letter once for all figures of a page, not once in each: that halves most pages."""
    name = r"f[0-9a-f]{8}(?:-\d+)?-((?:[A-Z]\w+-)+[0-9a-f]+)"
    outline = re.compile(rf'<path id="{name}"((?: d="[^"]*")? transform="scale[^"]*"/>)')
    letters = {found[1]: f'<path id="{found[1]}"{found[2]}' for found in outline.finditer(body)}
    body = re.sub(rf'href="#{name}"', r'href="#\1"', outline.sub("", body))
    shared = (
        f'<svg width="0" height="0" style="position: absolute" aria-hidden="true"><defs>{"".join(letters.values())}'
    )
    return f"{shared}</defs></svg>{body}" if letters else body


def mend(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    """Make pages lighter, and give the entries of the bibliography a role that is not deprecated."""
    if "body" in context:
        context["body"] = share_letters(context["body"]).replace('role="doc-biblioentry"', 'role="listitem"')


def write_pictures(app: Sphinx, exception: Exception | None) -> None:
    """Write the pictures of the gallery beside the other static files."""
    if exception or app.builder.format != "html":
        return
    folder = Path(app.outdir, "_static", "gallery")
    folder.mkdir(parents=True, exist_ok=True)
    for docname in tutorials(app):
        if (picture := card_picture(app, docname)) is None:
            logger.warning("no figure with card=True was executed, the gallery has no picture", location=docname)
        else:
            (folder / f"{docname.replace('/', '-')}.png").write_bytes(picture)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("gallery", Gallery)
    app.add_directive("scoreboard", Scoreboard)
    app.connect("config-inited", configure, priority=900)
    app.connect("html-page-context", mend)
    app.connect("build-finished", write_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
