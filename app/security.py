"""Access control for every route of the page.

A web site must not be able to reach this page through the person's browser. Gradio 6.31 accepts any
`Host` (DNS rebinding) and uploads from any `Origin`. This middleware refuses both, requires the
password if one is set, limits the size of requests, lets only known routes through, and sends
headers that keep served files inert.
"""

import base64
import ipaddress
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import accounts, gradio_compat
from app.gradio_compat import SCRIPT_ROUTE, UPLOAD_ROUTE, VIEW_CALL_ROUTE

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
OWN_ROUTES = ("/thumb/", "/mask/", "/datasetfile/", "/runfile/", "/previewfile/")
"""The routes of `app.server` that serve files of datasets and runs."""
FILE_ROUTES = (*gradio_compat.FILE_ROUTES, *OWN_ROUTES)

BODY_LIMIT = 2 * 1024**2
"""Bytes of a request with captions or settings."""
VIEW_LIMIT = 16 * 1024**2
"""Bytes that a view may send: enough for a list of 20,000 dropped files with long names."""
UPLOAD_LIMIT = 8 * 1024**3
"""Bytes of one drop. A single file has a smaller limit (`server.MAX_UPLOAD`)."""
DISK_RESERVE = 512 * 1024**2
"""Bytes that an upload must leave on the disk, for a running training."""
WRONG_PASSWORD_DELAY = 0.5
"""Seconds before the answer to a wrong password, to slow down guessing."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""Gradio needs inline scripts. Requests to other hosts are blocked."""


def is_loopback(host: str) -> bool:
    """Returns whether an address reaches only this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware around the whole application.

    `passwords` contains passwords by name, or is None if no password is required. Uploads must
    leave space on the disk of the folder `disk`. `separate` gives each person separate folders.
    """

    def __init__(
        self,
        app: ASGIApp,
        passwords: Mapping[str, str] | None = None,
        disk: Path | None = None,
        separate: bool = False,
    ):
        self.app = app
        self.passwords = passwords
        self.disk = disk
        self.separate = separate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            # The page uses no websockets.
            return await send({"type": "websocket.close", "code": 1008})
        refusal = await self._refusal(scope)
        if refusal is not None:
            return await refusal(scope, receive, _with_headers(scope, send))
        if self.separate:
            name = self._signed_in(Headers(scope=scope).get("authorization", ""))
            scope[accounts.SCOPE_KEY] = name
            accounts.user.set(name)
        # Gradio streams uploads to the disk. All other bodies are read into memory.
        is_upload = scope["path"].startswith(UPLOAD_ROUTE)
        limited = receive if is_upload else _limited(receive, _limit(scope["path"]))
        try:
            await self.app(scope, limited, _with_headers(scope, send))
        except BodyTooLarge:
            await PlainTextResponse("The request is too large.", 413)(
                scope, receive, _with_headers(scope, send)
            )

    async def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        """Returns the answer to a request that must not go through, or None."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._is_known(host):
            return PlainTextResponse("This address does not belong to LoRA Atelier.", 421)
        if self.passwords is not None and not self._signed_in(headers.get("authorization", "")):
            await anyio.sleep(WRONG_PASSWORD_DELAY)
            return PlainTextResponse(
                "This page requires a user name and a password.",
                401,
                {"www-authenticate": 'Basic realm="LoRA Atelier", charset="UTF-8"'},
            )
        if _is_foreign(scope["method"], headers, host):
            return PlainTextResponse("A request from another web site was refused.", 403)
        if not _is_known_route(path):
            return PlainTextResponse("Not found", 404)
        return self._size_refusal(
            path, headers.get("content-length", "" if scope["method"] == "POST" else "0")
        )

    def _is_known(self, host: str) -> bool:
        """Returns whether a `Host` header names this machine.

        Without a password only loopback names do. With one, any IP address and the host name do
        too, because DNS rebinding needs a domain name.
        """
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name.lower() in LOOPBACK:
            return True
        if self.passwords is None:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
            return True
        except ValueError:
            own = socket.gethostname().lower()
            return name.lower() in {own, f"{own}.local", socket.getfqdn().lower()}

    def _signed_in(self, header: str) -> str:
        """Returns the name of the person, or "" if name and password do not match.

        An unknown name takes as long as a wrong password.
        """
        kind, _, given = header.partition(" ")
        try:
            name, _, password = (
                base64.b64decode(given, validate=True).decode("utf-8").partition(":")
            )
        except ValueError:
            return ""
        known = (self.passwords or {}).get(name, "")
        is_right = secrets.compare_digest(password.encode(), known.encode())
        return name if kind.lower() == "basic" and known and is_right else ""

    def _size_refusal(self, path: str, length: str) -> PlainTextResponse | None:
        has_length = length.isascii() and length.isdigit()
        size = int(length) if has_length else 0
        if not path.startswith(UPLOAD_ROUTE):
            if size > _limit(path):
                return PlainTextResponse("The request is too large.", 413)
            return None
        if not has_length:
            return PlainTextResponse("An upload needs a Content-Length header.", 411)
        if size > UPLOAD_LIMIT:
            return PlainTextResponse(
                f"The upload is larger than {UPLOAD_LIMIT >> 30} GB. Drop the images in parts.",
                413,
            )
        if self.disk is not None and shutil.disk_usage(self.disk).free < size + DISK_RESERVE:
            return PlainTextResponse(
                "The disk is nearly full. Free some space, then add the images again.", 507
            )
        return None


def _is_foreign(method: str, headers: Headers, host: str) -> bool:
    """Returns whether another site made the browser send this request.

    Following a link to the page is allowed.
    """
    site = headers.get("sec-fetch-site", "none")
    if site in ("cross-site", "same-site"):
        return not (
            method == "GET"
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
    origin = headers.get("origin")
    return (
        method not in ("GET", "HEAD")
        and origin is not None
        and origin.split("://", 1)[-1].lower() != host.lower()
    )


def _is_known_route(path: str) -> bool:
    return path.startswith((*OWN_ROUTES, SCRIPT_ROUTE)) or gradio_compat.is_open(path)


class BodyTooLarge(Exception):
    """The body is larger than its limit, whatever Content-Length the request declared."""


def _limit(path: str) -> int:
    return VIEW_LIMIT if path.startswith(VIEW_CALL_ROUTE) else BODY_LIMIT


def _limited(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise BodyTooLarge
        return message

    return limited


def _with_headers(scope: Scope, send: Send) -> Send:
    is_file = scope["path"].startswith(FILE_ROUTES)

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers["content-security-policy"] = (
                "sandbox; default-src 'none'" if is_file else PAGE_POLICY
            )
        await send(message)

    return sending
