"""The door of the page: what Gradio leaves open on a local server is closed here, for every route.

A web page elsewhere must not be able to reach this one through the person's browser. Gradio 6.31 accepts any
`Host` (DNS rebinding) and uploads from any `Origin`; this middleware refuses both, asks for the password
where one is set, bounds the size of requests, and sends the headers that keep served files inert.
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

from app import accounts as workspace

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
UPLOAD = "/gradio_api/upload"
VIEW_CALL = "/gradio_api/component_server"
FILE_ROUTES = (
    "/gradio_api/file=",
    "/gradio_api/file/",
    "/file=",
    "/thumb/",
    "/mask/",
    "/datasetfile/",
    "/runfile/",
    "/previewfile/",
)
CLOSED_ROUTES = (
    "/monitoring",
    "/gradio_api/monitoring",
    "/openapi.json",
    "/gradio_api/openapi.json",
    "/docs",
    "/redoc",
    "/run-history",
)
BODY_LIMIT = 2 * 1024**2  # captions and settings
VIEW_LIMIT = (
    16 * 1024**2
)  # what a view sends, at most the list of 20,000 dropped files with long names
UPLOAD_LIMIT = 8 * 1024**3  # of one drop; a file has a smaller one (server.MAX_UPLOAD)
DISK_RESERVE = 512 * 1024**2  # an upload may not take the last of the disk from a running training
WRONG_PASSWORD_DELAY = 0.5  # seconds; slows guessing
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)  # Gradio needs inline scripts; nothing may leave this host


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware around the whole application. `accounts` are passwords by name, or None where none is asked for."""

    def __init__(
        self,
        app: ASGIApp,
        accounts: Mapping[str, str] | None = None,
        disk: Path | None = None,
        separate: bool = False,
    ):
        self.app = app
        self.accounts = accounts
        self.disk = disk
        self.separate = separate
        """Whether each person has folders of their own."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})  # the page uses none
        refusal = await self._refusal(scope)
        if refusal is not None:
            return await refusal(scope, receive, _with_headers(scope, send))
        if self.separate:
            scope[workspace.SCOPE_KEY] = self._signed_in(
                Headers(scope=scope).get("authorization", "")
            )
            workspace.user.set(scope[workspace.SCOPE_KEY])
        limited = (
            receive
            if scope["path"].startswith(UPLOAD)
            else _limited(receive, _limit(scope["path"]))
        )
        try:
            await self.app(scope, limited, _with_headers(scope, send))
        except BodyTooLarge:
            await PlainTextResponse("The request is too large.", 413)(
                scope, receive, _with_headers(scope, send)
            )

    async def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._is_known(host):
            return PlainTextResponse("This address does not belong to LoRA Atelier.", 421)
        if self.accounts is not None and not self._signed_in(headers.get("authorization", "")):
            await anyio.sleep(WRONG_PASSWORD_DELAY)
            return PlainTextResponse(
                "A user name and password are needed.",
                401,
                {"www-authenticate": 'Basic realm="LoRA Atelier", charset="UTF-8"'},
            )
        if _is_foreign(scope["method"], headers, host):
            return PlainTextResponse("A request from another web site was refused.", 403)
        if path.startswith(CLOSED_ROUTES):
            return PlainTextResponse("Not found", 404)
        return self._size_refusal(
            path, headers.get("content-length", "" if scope["method"] == "POST" else "0")
        )

    def _is_known(self, host: str) -> bool:
        """Loopback names; with a password also any plain IP address and this machine's own name, which rebinding cannot use."""
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name.lower() in LOOPBACK:
            return True
        if self.accounts is None:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
            return True
        except ValueError:
            own = socket.gethostname().lower()
            return name.lower() in {own, f"{own}.local", socket.getfqdn().lower()}

    def _signed_in(self, header: str) -> str:
        """The name of the person, "" for nobody. Takes as long for a name that does not exist."""
        kind, _, given = header.partition(" ")
        try:
            name, _, password = (
                base64.b64decode(given, validate=True).decode("utf-8").partition(":")
            )
        except ValueError:
            return ""
        known = (self.accounts or {}).get(name, "")
        is_right = secrets.compare_digest(password.encode(), known.encode())
        return name if kind.lower() == "basic" and known and is_right else ""

    def _size_refusal(self, path: str, length: str) -> PlainTextResponse | None:
        is_said = length.isascii() and length.isdigit()
        size = int(length) if is_said else 0
        if not path.startswith(UPLOAD):
            return (
                PlainTextResponse("The request is too large.", 413) if size > _limit(path) else None
            )
        if not is_said:
            return PlainTextResponse("An upload must say its size.", 411)
        if size > UPLOAD_LIMIT:
            return PlainTextResponse(
                f"More than {UPLOAD_LIMIT >> 30} GB at once; drop the pictures in several parts.",
                413,
            )
        if self.disk is not None and shutil.disk_usage(self.disk).free < size + DISK_RESERVE:
            return PlainTextResponse(
                "The disk is nearly full; make room before adding pictures.", 507
            )
        return None


def _is_foreign(method: str, headers: Headers, host: str) -> bool:
    """Whether another site made the browser send this. A link that is followed to the page itself is welcome."""
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


class BodyTooLarge(Exception):
    """More came than the request said, or it did not say."""


def _limit(path: str) -> int:
    return VIEW_LIMIT if path.startswith(VIEW_CALL) else BODY_LIMIT


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
