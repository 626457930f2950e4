"""A page in a real browser without a screen: what its scripts leave in the document, what they say on the console, how it looks."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: chromium is not installed")
"""For tests that open a page."""

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)

NARROWEST = 500
"""No window of the browser is narrower: below, the page is put into a frame."""


@dataclass(frozen=True)
class Seen:
    """A page that was opened.

    Attributes:
        dom: The document after its scripts ran, as HTML.
        console: What they said.
        answer: What the script of the test returned.
    """

    dom: str
    console: list[str]
    answer: Any


def visit(page: str, folder: Path, script: str = "return null", *, width: int = 1400, address: str = "") -> Seen:
    """Open a page, then run the body of a function in it and take what it returns, by way of JSON."""
    file = folder / "visited.html"
    tail = (
        f'<script>{{const answer = (() => {{ {script} }})(); const told = document.createElement("pre"); told.id = "answer";'
        "told.textContent = JSON.stringify(answer); window.top.document.body.append(told);}</script>"
    )
    head, _, end = page.rpartition("</body>")
    file.write_text(framed(f"{head}{tail}</body>{end}", width), encoding="utf-8")
    done = _chromium(folder, width, "--dump-dom", f"{file.as_uri()}{address}")
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answer is not None, (console, done.stderr[-2000:])
    return Seen(done.stdout, console, json.loads(html.unescape(answer[1])))


def framed(page: str, width: int) -> str:
    """The page itself, or one that shows it as narrow as that."""
    if width >= NARROWEST:
        return page
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}"></iframe>'
    return f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}</body>'


def picture(page: str, folder: Path, *, width: int = 1400, dark: bool = False) -> list[bytes]:
    """The page as it looks: rows of RGB or RGBA bytes, as PNG filters them, the filter's number first."""
    file, shot = folder / "pictured.html", folder / "pictured.png"
    file.write_text(page, encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _chromium(folder, width, *theme, f"--screenshot={shot}", file.as_uri())
    data = shot.read_bytes()
    at, packed, header = 8, b"", (0, 0)
    while at < len(data):
        (length,), sort = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        header = struct.unpack(">II", body[:8]) if sort == b"IHDR" else header
        packed += body if sort == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(packed)
    line = len(raw) // header[1]
    return [raw[i : i + line] for i in range(0, len(raw), line)]


def _chromium(folder: Path, width: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = folder / "profile"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},900", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done
