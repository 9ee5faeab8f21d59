"""An analysis as one HTML page that needs no network, no other file and no library.

`page.html` is the page without its data. `render` inserts the analysis as the JSON that `analyze --json` prints of
it, and the page's own script draws it. The script inserts every name as text, so a checkpoint's names are never read
as HTML. A content security policy lets the browser run that one script and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from datetime import date
from pathlib import Path

from .._version import __version__
from .analysis import Analysis
from .report import WHAT_COUNTS, compare, describe_analysis, headlines, recommendation, times_note, typical_batch

_TEMPLATE = Path(__file__).with_name("page.html")


def render(analysis: Analysis, command: str = "") -> str:
    """The page as text; its last line names the version, today's date and the `command` that made it."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    words = {
        "headlines": headlines(analysis),
        "compare": compare(analysis),
        "where": WHAT_COUNTS,
        "times": times_note(analysis),
        "gpu": f"{analysis.gpu}: {analysis.gpu_source}",
        "typical_batch": typical_batch(analysis),
        "made": " · ".join(filter(None, (f"reshard {__version__}", date.today().isoformat(), command))),
    }
    data = json.dumps({"analysis": analysis.values, "words": words}, default=str, separators=(",", ":"))
    values = {
        "title": html.escape(f"{analysis.path.absolute().name}: placements on {analysis.ep_size} EP ranks"),
        "script": _digest(template, "script"),
        "style": _digest(template, "style"),
        # only "<" can end a script element or open a comment in it
        "data": data.replace("<", "\\u003c"),
        "text": html.escape("\n".join([*recommendation(analysis), "", *describe_analysis(analysis, by_layer=True)])),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _digest(template: str, element: str) -> str:
    """The hash that a content security policy wants for the template's only `element` without attributes."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
