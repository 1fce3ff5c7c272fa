"""``/chameleon/``: the live page, one packaged file that reads the JSON endpoints beside it."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response
from fastapi.responses import HTMLResponse

PAGE_FILE = Path(__file__).with_name("live_page.html")


class LivePage:
    """The page and the headers that keep it to itself: only its own script and style run, and it reaches only the
    server that it came from."""

    def __init__(self) -> None:
        self._html = PAGE_FILE.read_text(encoding="utf-8")
        policy = {
            "default-src": "'none'",
            "script-src": _hash_of("script", self._html),
            "style-src": _hash_of("style", self._html),
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self._headers = {
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }

    def response(self) -> Response:
        """The page."""
        return HTMLResponse(self._html, headers=self._headers)

    def asking_for_key(self, response: Response) -> Response:
        """``response``; a 401 also has the browser ask for the key."""
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="chameleon-ray: any user name, the admin key"'
        return response


def _hash_of(tag: str, html: str) -> str:
    """The source expression of a Content-Security-Policy that allows the page's only element of that name."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
