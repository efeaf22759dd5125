"""Who may ask: this machine's own browser, on a page that this run has opened; nobody else, and not too much."""

from __future__ import annotations

import hmac
import secrets

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 200_000
"""Bytes of a question."""
TOO_LONG = "This question is too long."
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """What nobody can guess."""
    return secrets.token_urlsafe(32)


class Guard:
    """Lets through what a page of this run asks.

    A page from elsewhere has no token; one that has got a name for this address (DNS rebinding) has another Host; one
    that posts here from its own origin has another Origin.

    Args:
        app: what answers.
        token: the first part of every path.
        port: where the server listens.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, guarded)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > LARGEST:
                raise HTTPException(413, TOO_LONG)
            return message

        await self.app({**scope, "path": scope["path"].removeprefix(f"/{self.token}")}, limited, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for a request that is not let through."""
        told: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            told.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host = told.get("host", [])
        if len(host) != 1 or host[0].lower() not in self.hosts:
            return 403, "This server answers at 127.0.0.1 alone."
        for origin in told.get("origin", []):
            if origin.lower() != f"http://{host[0].lower()}":
                return 403, "Another page may not ask here."
        posts = scope["method"] == "POST"
        if posts and any(site not in ("same-origin", "none") for site in told.get("sec-fetch-site", [])):
            return 403, "Another page may not ask here."
        given = scope["path"].split("/")[1]
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode()):
            return 403, "The address lacks this run's token: open the one that the command has printed."
        if scope["path"].count("/") < 2:
            return 404, "There is nothing here: the address ends with a slash."
        if not posts:
            return None
        if not told.get("content-type", [""])[0].startswith("application/json"):
            return 415, "A question is JSON."
        length = told.get("content-length", ["0"])[0]
        if not length.isdecimal() or int(length[:20]) > LARGEST:
            return 413, TOO_LONG
        return None
