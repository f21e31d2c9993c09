"""Docstrings name things by Sphinx roles, which editors know: on the pages only the name is left of them."""

import re
from typing import Any

_ROLE = re.compile(r":\w+:<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """What mkdocs calls with each page."""
    return _ROLE.sub(r"<code>\1</code>", html)
