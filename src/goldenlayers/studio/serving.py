"""The page handed out: to this machine alone unless it is told otherwise, to nobody by way of
another site's page, and nothing beside what the page needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import ipaddress
import os
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from goldenlayers.errors import UserError
from goldenlayers.shown import warn

if TYPE_CHECKING:
    from goldenlayers.studio.workbench import Workbench

LARGEST = 100_000
"""Bytes of a request, a hundred times what the page sends."""

# What the page asks for. Gradio has far more: uploads, files, a proxy, ways to change the page.
_GET = (
    r"/|/config|/theme\.css|/favicon\.ico|/(assets|static)/.+|/gradio_api/(info|startup-events"
    r"|queue/data|heartbeat/\w+)|/download/[0-9a-f]{32}/(all|[0-9]{1,6})/[a-z]{1,8}"
)
_POST = r"/gradio_api/(queue/join|cancel|reset)/?"
_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' "
    "data:; worker-src 'self' blob:; object-src 'none'; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Lets a request through to ``app`` only if this page's own tab may have made it.

    A page of another site cannot post here (its ``Origin`` is another), nor read by a name of its
    own that leads to this machine (DNS rebinding: its ``Host`` is that name). Source: the Fetch
    standard, and the advice of MDN on both.
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no web sockets
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        why = self._refused(scope, headers)
        if why:
            await _plain(send, *why)
            return
        if scope["path"].startswith("/gradio_api/heartbeat/"):
            # A browser keeps six connections to a server, for all tabs: the one of a tab's results,
            # which stays open, tells as well whether the tab is there.
            await _plain(send, 204, "")
            return
        left = LARGEST

        async def counted() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                return {"type": "http.disconnect"}
            return message

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                theirs = [
                    (n, v) for n, v in message["headers"] if n.decode().lower() not in _HEADERS
                ]
                ours = [(n.encode(), v.encode()) for n, v in _HEADERS.items()]
                message = {**message, "headers": [*theirs, *ours]}
            await send(message)

        await self.app(scope, counted, marked)

    def _refused(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and words for a request that is not let through."""
        path, method = scope["path"], scope["method"]
        host = headers.get("host", "")
        if not self.knows(host):
            return 421, "This page is not served under that name."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "Another site may not ask here."
        site = headers.get("sec-fetch-site", "none")
        opened = path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not (opened and method == "GET"):
            return 403, "Another site may not ask here."
        allowed = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(method)
        if allowed is None or not re.fullmatch(allowed, path):
            return 404, "There is no such page."
        if not re.fullmatch("[0-9]{0,18}", length := headers.get("content-length", "0")):
            return 400, "The request has no length."
        if int(length or 0) > LARGEST:
            return 413, "The request is too large."
        return None

    def knows(self, host: str) -> bool:
        """Whether a ``Host`` names this server: localhost, the host it was given, or an address;
        where only this machine is served, a loopback one.
        """
        name = (urlsplit(f"//{host}").hostname or "") if re.fullmatch(r"[\w.:\[\]-]+", host) else ""
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _plain(send: Any, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})


def refuse_missing() -> None:
    """Refuse to begin where Gradio is not installed.

    Raises:
        UserError: it is not.
    """
    # Before it is imported: nothing is told to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the studio needs Gradio, which cannot be imported here ({error})",
            fix="pip install 'goldenlayers[studio]'",
        ) from None


def application(bench: Workbench, host: str) -> Guard:
    """The whole page as an ASGI application."""
    from fastapi import FastAPI
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, Response

    from goldenlayers.studio.page import mounted

    inner = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    async def download(request: Any) -> Response:
        key, which, kind = (request.path_params[name] for name in ("key", "which", "kind"))
        number = None if which == "all" else int(which)
        try:
            name, content = await run_in_threadpool(bench.session(key).download, number, kind)
        except UserError as error:
            told = f"<p>{html.escape(str(error))}</p><p><a href='/'>Back</a>"
            return HTMLResponse(f"<!doctype html><title>golden studio</title>{told}", 400)
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    inner.add_route("/download/{key}/{which}/{kind}", download)
    return Guard(mounted(inner, bench), host)


def bound(host: str = "127.0.0.1", port: int = 7860) -> socket.socket:
    """The socket to serve the page at: taken early, so that no model is loaded for nothing.

    Raises:
        UserError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"the page cannot be served at {host}, port {port} ({error.strerror or error})",
            fix="Give another --port" if is_loopback(host) else "Give another --host or --port",
        ) from None
    return listening


def serve(
    bench: Workbench,
    listening: socket.socket,
    *,
    host: str = "127.0.0.1",
    on_ready: Callable[[str, Callable[[], None]], object] = lambda url, stop: None,
) -> None:
    """Hand out the page until Ctrl-C.

    Args:
        bench: the model.
        listening: from :func:`bound`; closed at the end.
        host: the address it was bound to, which the page is served under.
        on_ready: called with the page's address, and with what ends the serving.

    Raises:
        UserError: Gradio is missing.
    """
    refuse_missing()
    import uvicorn

    if not is_loopback(host):
        warn(
            f"the page is served at {host}: whoever reaches this machine can use the model, and no "
            "password is asked"
        )
    config = uvicorn.Config(
        application(bench, host), log_level="error", access_log=False, timeout_graceful_shutdown=1,
        server_header=False, ws="none",
    )  # fmt: skip
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    shown_host = f"[{host}]" if ":" in host else host
    with listening, contextlib.suppress(KeyboardInterrupt):  # the usual end
        on_ready(f"http://{shown_host}:{listening.getsockname()[1]}/", stop)
        asyncio.run(server.serve(sockets=[listening]))
