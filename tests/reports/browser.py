"""A page in headless Chromium, driven by the program alone: what a script says of it, and what the console says."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# no sandbox: it cannot be had as root; the rest keeps the browser from calling home
_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"),
]


# a window is at least 500 px wide, a frame in it as narrow as a phone; the page tells its frame's parent
_WINDOW = """<meta name="color-scheme" content="light dark">
<iframe src="page.html" width="WIDTH" height="900"></iframe>
<script>onmessage = event => document.body.append(Object.assign(document.createElement("pre"),
{ textContent: event.data }));</script>"""
_PROBE = "<script>onload = () => parent.postMessage(JSON.stringify((() => { SCRIPT })()), '*');</script></body>"


def inspect_page(page: Path, script: str, *, width: int = 1280, dark: bool = False) -> tuple[Any, list[str]]:
    """What the JavaScript function body `script` returns after the page has loaded, and what the console says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "page.html").write_text(page.read_text().replace("</body>", _PROBE.replace("SCRIPT", script)))
        (folder / "window.html").write_text(_WINDOW.replace("WIDTH", str(width)))
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        command = [str(CHROMIUM), *_OPTIONS, scheme, "--window-size=1400,1000", f"--user-data-dir={folder}/profile"]
        command.append((folder / "window.html").as_uri())
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    console = re.findall(r"CONSOLE.*", result.stderr)
    said = re.search(r"<pre>(.*?)</pre>", result.stdout, re.S)
    if said is None:
        raise RuntimeError(f"the script did not end: {console}, {result.stderr[-500:]}")
    return json.loads(html.unescape(said[1])), console
