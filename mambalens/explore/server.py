"""The server behind the page: its files, and questions to models that may still be loading."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mambalens.explore.line import Dropped, Line
from mambalens.explore.security import Guard, new_token
from mambalens.hooks.errors import MambalensError
from mambalens.html.modules import named

if TYPE_CHECKING:
    from mambalens.explore.questions import Questions

HOST = "127.0.0.1"
WRONG = "Something went wrong here. The terminal that runs mambalens explore says what; ask something else."
"""What a page is told of an error that is not the person's."""
GRACE = 1.5
"""Seconds in which a page may still hear why models did not load."""
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_log = logging.getLogger(__name__)


class Loading:
    """Models that are loaded in a thread of their own, so that the page is up before them.

    Args:
        load: loads them; it is given who hears what it does.
    """

    def __init__(self, load: Callable[[Callable[[str], None]], Questions]) -> None:
        self.does = "starting"
        self.questions: Questions | None = None
        self.error: BaseException | None = None
        self.failed: Callable[[], None] = lambda: None
        """Called when they cannot be loaded."""
        self._load = load

    def begin(self) -> None:
        """Load, in the background: a thread that the process does not wait for."""
        threading.Thread(target=self._run, name="loading", daemon=True).start()

    def _run(self) -> None:
        # What is imported here stays: to look through it for garbage again and again takes a seventh of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            self.questions = self._load(self._says)
        except BaseException as error:
            self.error = error
            self.failed()
        finally:
            gc.freeze()  # nor in the middle of a click
            if collects:
                gc.enable()

    def _says(self, what: str) -> None:
        self.does = what


def application(loading: Loading, token: str, port: int) -> ASGIApp:
    """The page's files and what it asks, behind its guard.

    Args:
        loading: who answers, now or soon.
        token: the first part of every path.
        port: where the server listens.
    """
    line = Line()

    async def file(request: Request) -> Response:
        name = request.path_params.get("name") or "explore.html"
        kind = _KINDS.get(name[name.rfind(".") :])
        found = named(name, "mambalens.explore")
        if kind is None or found is None:
            return Response("There is nothing here.", 404, media_type="text/plain")
        return Response(found.read_bytes(), media_type=kind)

    async def answer(told: Mapping[str, Any], request: Request) -> dict[str, Any]:
        if loading.error is not None:
            raise loading.error if isinstance(loading.error, MambalensError) else MambalensError(WRONG)
        if loading.questions is None:
            return {"loading": loading.does}
        asking, page = loading.questions.understand(told), told.get("page", "")
        if asking.model is None:
            return asking.run(threading.Event())
        if not isinstance(page, str) or len(page) > 64:
            raise MambalensError("A question names its page.")
        return await line.ask((page, asking.reading, asking.model), asking.run, request.is_disconnected)

    async def ask(request: Request) -> Response:
        """Errors of a person come with status 200: a browser writes every other one to its console."""
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody hears
        try:
            told = json.loads(body)
            if not isinstance(told, dict):
                raise MambalensError("A question is a JSON object.")
            return JSONResponse(await answer(told, request))
        except (Dropped, asyncio.CancelledError):  # cancelled where the server ends before the answer is there
            return JSONResponse({"dropped": True})
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return JSONResponse({"error": "A question is JSON."}, 400)
        except MambalensError as error:
            return JSONResponse({"error": str(error)})
        except Exception:
            _log.exception("A question was not answered.")
            return JSONResponse({"error": WRONG}, 500)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        line.close()

    pages = [Route("/", file, methods=["GET"]), Route("/{name}", file, methods=["GET"])]
    routes = [Route("/ask", ask, methods=["POST"]), *pages]
    return Guard(Starlette(routes=routes, lifespan=lifespan), token, port)


def serve(loading: Loading, begin_with: str, port: int, browser: bool, say: Callable[[str], None]) -> None:
    """Serve the page until the process is interrupted.

    Args:
        loading: the models.
        begin_with: link of the state that the page shows first, or ''.
        port: where to listen; 0: any free port.
        browser: open the page in a browser.
        say: hears the page's address.

    Raises:
        MambalensError: if the port is taken, or what loading raises.
    """
    import uvicorn

    token = new_token()
    with socket.socket() as listening:
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "ports go to 65,535"
            raise MambalensError(f"Port {port} cannot be used ({why}): leave --port out.") from None
        # A browser that is quicker than the server waits in the socket.
        listening.listen()
        bound = listening.getsockname()[1]
        address = f"http://{HOST}:{bound}/{token}/" + (f"#{begin_with}" if begin_with else "")
        say(f"The page: {address}\nCtrl+C ends it.")
        config = uvicorn.Config(
            application(loading, token, bound), log_level="warning", server_header=False, limit_concurrency=200,
            timeout_graceful_shutdown=2, ws="none",
        )  # fmt: skip
        server = uvicorn.Server(config)

        async def run() -> None:
            loop = asyncio.get_running_loop()

            def end() -> None:
                server.should_exit = True

            def failed() -> None:
                loop.call_soon_threadsafe(loop.call_later, GRACE, end)

            loading.failed = failed
            loading.begin()
            await server.serve(sockets=[listening])

        if browser:
            webbrowser.open(address)
        asyncio.run(run())
    if loading.error is not None:
        raise loading.error
