"""Write one HTML page from a stage's template: the report of a run, the inspection of a dataset.

The stages' templates extend `page.html.j2`, which holds the style, the script under the charts, and nothing else.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.formatting import count, duration, percent, share, short, size_text
from clipkit.storage.files import write_beside


def write_page(path: Path, package: str, template: str, contents: Mapping[str, Any]) -> Path:
    """Write the page of `template` in `package`. Text is escaped; the filters are those of numbers, sizes and times.

    Raises UserError when jinja2 (extra `report`) isn't installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError("a page needs jinja2: pip install 'clipkit[report]'") from error
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(each, ".") for each in (package, "clipkit.page")])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "short": short, "size": size_text, "share": share}
    environment.filters |= {"duration": duration, "count": count}
    page = environment.get_template(template).render(**contents)
    with write_beside(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def data_url(picture: bytes | None) -> str:
    """A small picture of `thumbnail`'s as an address that holds it; "" for none."""
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}" if picture else ""
