"""An analysis as one HTML page that needs nothing else: no network, no other file, no library.

`page.html` is the page without its data. The data is put in as the JSON that `analyze --json` prints, and drawn by the
page's own script, which makes text of every name: what a checkpoint calls things is never read as HTML. A content
security policy lets the browser run that script and load nothing, whatever else should come to be in the file.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import asdict
from pathlib import Path

from .._version import __version__
from ..checkpoint.source import find_source
from ..commands.analyze import Analysis
from ..errors import OutputError
from ..execute.reflink import refuse_inside
from .report import WHERE, compare, describe_analysis, headlines, typical_batch

_TEMPLATE = Path(__file__).with_name("page.html")


def refuse_page(out: Path, src: str | Path) -> None:
    """OutputError where no page may be written to `out`: it is there already, or lies in the checkpoint `src`."""
    root = find_source(src)
    folders = [str(found.relative_to(root)) for found in root.rglob("*") if found.is_dir()] if root.is_dir() else []
    refuse_inside(out, root, folders, "--html")
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out}: is there already; remove it, or choose another name")


def write_page(analysis: Analysis, out: Path) -> None:
    """Write the page; OutputError where `out` is there already or lies in the checkpoint."""
    refuse_page(out, analysis.path)
    content = render(analysis)
    try:
        # names of files need not be Unicode
        file = out.open("x", encoding="utf-8", errors="replace")
    except FileExistsError as error:
        raise OutputError(f"{out}: is there already; remove it, or choose another name") from error
    try:
        with file:
            file.write(content)
    except OSError:
        out.unlink()
        raise


def render(analysis: Analysis) -> str:
    """The page as text."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    words = {
        "headlines": headlines(analysis),
        "compare": compare(analysis),
        "where": WHERE,
        "typical_batch": typical_batch(analysis),
        "version": __version__,
    }
    data = json.dumps({"analysis": asdict(analysis), "words": words}, default=str, separators=(",", ":"))
    values = {
        "title": html.escape(f"{analysis.path.absolute().name}: placements on {analysis.ep_size} EP ranks"),
        "script": _digest(template, "script"),
        "style": _digest(template, "style"),
        # inside a script element only "<" can end it or open a comment
        "data": data.replace("<", "\\u003c"),
        "text": html.escape("\n".join(describe_analysis(analysis, by_layer=True))),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _digest(template: str, element: str) -> str:
    """What a content security policy calls the content of the template's only `element` without attributes."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
