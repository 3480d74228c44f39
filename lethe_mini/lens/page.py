"""A page that shows what was forgotten, and when: one HTML file that needs no network.

The page is page.html, written by hand, with the traces put in as data. What a model or a prompt
said is untrusted: it goes in as JSON in which no `<` is left, comes out as text nodes alone, and
the page's content security policy runs no script but its own, known by its hash.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from ..errors import UserError
from .trace import Trace

TEMPLATE = Path(__file__).with_name("page.html")


def page(traces: list[Trace]) -> str:
    """The HTML of one trace, or of two to compare. Raises UserError if there is nothing to show, or
    the two do not go together: other prompts, or another number of layers."""
    runs = [trace.data for trace in traces]
    if not all(run["sequences"] for run in runs):
        raise UserError("this trace holds no sequence; record a run that gets past its prompt")
    prompts = [
        [one["token_ids"][: one["prompt_tokens"]] for one in run["sequences"]] for run in runs
    ]
    if prompts.count(prompts[0]) < len(prompts) or len({run["layers"] for run in runs}) > 1:
        raise UserError("only traces of the same prompts and the same number of layers compare")
    html = TEMPLATE.read_text(encoding="utf-8")
    # json.dumps leaves ASCII alone: U+2028 and lone surrogates are escapes already.
    data = json.dumps(runs, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
    for kind, tag in (("style", "style"), ("script", "script")):
        code = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    return html.replace("{{policy}}", policy, 1).replace("{{traces}}", data, 1)


def write_page(traces: list[Trace], path: Path) -> None:
    """Raises UserError as `page` does, or if the file cannot be written."""
    html = page(traces)
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
