"""What the offline pages share: templates, their security policy, and plotly.js.

A page is one file. It loads nothing, and its policy lets only its own scripts run, each named by
its sha256: text of a corpus or a model that came to lie in the page as markup could do nothing.
"""

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.claims.summary import MEANINGS, OTHERS
from pipeline.store import provenance
from pipeline.store.embed import plotly_js, script_json

TEMPLATES = Path(__file__).parent / "templates"
POLICY = "@POLICY@"  # stands in base.html until the page's scripts are known
SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)


@cache
def environment() -> Any:
    """Jinja with escaping on, and undefined names as errors."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"script_json": safe_json, "number": number, "id": anchor}
    env.filters |= {"breakable": breakable, "prose": prose}
    env.globals |= {"source": source, "others": OTHERS, "meanings": MEANINGS}
    return env


def render(template: str, **context: Any) -> str:
    """A page, with the policy that allows its scripts and nothing else."""
    page = environment().get_template(template).render(**context)
    return page.replace(POLICY, policy(SCRIPT.findall(page)), 1)


def policy(scripts: list[str]) -> str:
    """The Content-Security-Policy of a page with these inline scripts."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in dict.fromkeys(hashes)) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def source(name: str) -> Any:
    """A file of templates/, or 'plotly.min.js', as it stands: our own code, never data."""
    from markupsafe import Markup

    return Markup(plotly_js() if name == "plotly.min.js" else (TEMPLATES / name).read_text("utf-8"))


def safe_json(obj: Any) -> Any:
    """JSON for a script element."""
    from markupsafe import Markup

    return Markup(script_json(obj))


def safe(markup: str) -> Any:
    """Markup that we made, such as a thumb: no text of a figure, a card or a corpus is in it."""
    from markupsafe import Markup

    return Markup(markup)


def number(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits; an integer whole; other text as it is."""
    if value is None or value == "":
        return "–"
    try:
        x = float(value)
    except (TypeError, ValueError):
        return str(value)
    if x.is_integer() and abs(x) < 1e15:
        return f"{x:,.0f}".replace("-", "−")
    return f"{x:.{digits}g}".replace("-", "−")


def breakable(text: str, after: str = "._") -> Any:
    """A dotted name, or a path, that may break after some of its characters."""
    from markupsafe import Markup, escape

    return Markup(re.sub(rf"([{after}])", r"\1<wbr>", str(escape(text))))


def prose(text: str) -> Any:
    """Text of a card, with `code` between backticks."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def anchor(text: str) -> str:
    """Text as the id of an element."""
    return re.sub(r"[^\w-]+", "-", text)


DRAW = [Path(__file__).parent / f"templates/{name}.js" for name in ("walk", "play", "draw")]


def write(out: str | Path, draw: Iterable[str | Path] = DRAW) -> None:
    """Write figures.js, its certificate in a comment at the end.

    Args:
        draw: our drawing code, in this order.
    """
    from pipeline.job import source
    from pipeline.store import embed, intact, tables

    text = "\n".join([embed.plotly_js(), *(Path(f).read_text("utf-8") for f in draw), ""])
    made = provenance.certificate("figures_js", {}, source.job_code("figures_js"), [])
    made = intact.to_seal(made | {"content": hashlib.sha256(text.encode()).hexdigest()})
    mark = embed.script_json(made).replace("*/", "*\\/")
    tables.write_sealed(out, f"{text}/*retrace-provenance {mark}*/\n")


PLOT = re.compile(r'<script type="application/json" class="retrace-plot">(.*?)</script>', re.S)
SECOND_HAND = {  # where the paper's number was read, if not in the paper: a tag, what it means
    "R-copy": ("transcription", "read in a transcription of the article"),
    "N": ("second-hand", "read in a note that quotes the paper, not in the paper itself"),
    "M": ("from memory", "not looked up in the paper"),
}


def licences(certificates: list[dict]) -> list[str]:
    """What the weights and the text must be credited to: every licence and attribution."""
    out = []
    for c in certificates:
        said = [str(c[k]) for k in ("attribution", "licence") if c.get(k)]
        if said:
            out.append(f"{c['stage'].capitalize()}: {'; '.join(said)}.".replace("..", "."))
    return list(dict.fromkeys(out))
