"""A page that shows which tokens a run dropped, and when: one HTML file that needs no network.

The page is page.html with the traces put in as data. The text of a model or a prompt is untrusted.
It goes in as JSON without any `<`, and the page's script shows it as text nodes only. The content
security policy of the page allows its own script and style, by their hashes, and nothing else.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from ..errors import UserError, write_whole
from .trace import Trace

TEMPLATE = Path(__file__).with_name("page.html")


def page(traces: list[Trace]) -> str:
    """The HTML of one trace, or of two to compare. Raises UserError for a trace without sequences,
    and for two traces of different prompts or different numbers of layers."""
    runs = [trace.data for trace in traces]
    if not all(run["sequences"] for run in runs):
        raise UserError("this trace holds no sequence; record a run with it first")
    prompts = [
        [one["token_ids"][: one["prompt_tokens"]] for one in run["sequences"]] for run in runs
    ]
    if prompts.count(prompts[0]) < len(prompts) or len({run["layers"] for run in runs}) > 1:
        raise UserError("two traces should have the same prompts and the same number of layers")
    html = TEMPLATE.read_text(encoding="utf-8")
    # json.dumps writes ASCII, so U+2028 and lone surrogates are escapes already.
    shown = [run | {"policy": _shown(run["policy"])} for run in runs]
    data = json.dumps(shown, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
    for kind, tag in (("style", "style"), ("script", "script")):
        code = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    return html.replace("{{policy}}", policy, 1).replace("{{traces}}", data, 1)


def _shown(options: dict) -> dict:
    """The options of a policy; a budget that is a share as the command line writes it, 25%."""
    budget = options.get("budget")
    if isinstance(budget, float) and 0 < budget <= 1:
        return options | {"budget": f"{100 * budget:.12g}%"}
    return options


def write_page(traces: list[Trace], path: Path) -> None:
    """Writes the page to a file. Raises UserError as `page` does, or if it cannot be written."""
    write_whole(path, page(traces))
