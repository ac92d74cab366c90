"""Which files a browser can have: those that were made for its visitor, and no other of the server.

gradio hands out every file of its folder to all who name it, uploads included. Here uploads stay
unserved, and what a visitor is shown lies in a folder with a name that only this visitor is told.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

SERVED = "visitors"
REFUSED = b"There is no such file here."


def new_visitor_folder(folder: Path) -> Path:
    """A new folder in the page's folder, under a name that cannot be guessed."""
    made = folder / SERVED / secrets.token_hex(16)
    made.mkdir(parents=True, mode=0o700)
    return made


class OnlyFilesOfVisitors:
    """ASGI middleware that answers 403 to requests for files outside of visitors' folders.

    Args:
        app: what answers everything else.
        folder: the page's folder.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path) -> None:
        self.app = app
        self.served = folder / SERVED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "/file=" in scope["path"]:
            wanted = Path(os.path.realpath(scope["path"].split("/file=", 1)[1]))
            if not wanted.is_relative_to(self.served):
                headers = [(b"content-type", b"text/plain")]
                await send({"type": "http.response.start", "status": 403, "headers": headers})
                await send({"type": "http.response.body", "body": REFUSED})
                return
        await self.app(scope, receive, send)
