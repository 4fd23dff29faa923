"""JSON, certificates and plotly.js inside HTML pages: what figures and pages share."""

import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.store import intact, tables

# In JSON these stand only inside strings, so escaping them leaves the value alone; unescaped they
# could end a script element, open a comment in one, or end a line in old parsers.
UNSAFE = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def script_json(obj: Any) -> str:
    """Canonical JSON that is safe as the text of a script element; NaN becomes null."""
    text = json.dumps(
        _finite(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.translate(str.maketrans(UNSAFE))


def _finite(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {str(k): _finite(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(v) for v in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def stamp(page: str, certificate: dict) -> str:
    """The page with its certificate, not yet sealed, before </body>; `content` is of the rest."""
    content = hashlib.sha256(page.encode()).hexdigest()
    made = intact.to_seal(certificate | {"content": content})
    mark = (
        f'<script type="application/json" class="retrace-provenance">{script_json(made)}</script>'
    )
    before, after = page.rsplit("</body>", 1)
    return f"{before}{mark}</body>{after}"


def write_page(path: str | Path, page: str, certificate: dict) -> None:
    """Write an HTML page with its certificate, whole or not at all."""
    # a lone surrogate out of a broken corpus cannot be encoded
    page = page.encode("utf-8", "replace").decode()
    tables.write_sealed(path, stamp(page, certificate))


def plotly_js() -> str:
    """plotly.js out of the Python package."""
    return files("plotly").joinpath("package_data/plotly.min.js").read_text("utf-8")
