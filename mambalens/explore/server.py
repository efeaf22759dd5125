"""The server behind the page: files of the page, questions to the models."""

from __future__ import annotations

import json
import logging
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mambalens.explore.answers import READINGS, Answers, Dropped, Question, options
from mambalens.explore.line import Line
from mambalens.explore.security import Guard, new_token
from mambalens.explore.state import WORDS, Loaded, State
from mambalens.hooks.errors import MambalensError

HOST = "127.0.0.1"
WRONG = "Something went wrong here. The terminal that runs mambalens explore says what; ask something else."
"""What a page is told of an error that is not the person's."""
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_log = logging.getLogger(__name__)


def application(answers: Answers, loaded: Loaded, token: str, port: int) -> ASGIApp:
    """The page's files and what it asks, behind its guard.

    Args:
        answers: who answers.
        loaded: how the models were asked for.
        token: the first part of every path.
        port: where the server listens.
    """
    line = Line()

    async def file(request: Request) -> Response:
        name = request.path_params.get("name") or "explore.html"
        kind = _KINDS.get(name[name.rfind(".") :])
        # One part of a path, and only of what is carried: no name leads elsewhere.
        known = {one.name: one for one in (files("mambalens.explore") / "templates").iterdir()}
        if kind is None or name not in known:
            return Response("There is nothing here.", 404, media_type="text/plain")
        return Response(known[name].read_bytes(), media_type=kind)

    async def about(told: Mapping[str, Any], request: Request) -> Any:
        return answers.about()

    async def search(told: Mapping[str, Any], request: Request) -> Any:
        words = told.get("words", "")
        if not isinstance(words, str) or len(words) > WORDS:
            raise MambalensError(f"A search has at most {WORDS} characters.")
        return {"facts": answers.search(words)}

    async def opened(told: Mapping[str, Any], request: Request) -> Any:
        return {"state": State.of_link(told.get("link")).json}

    async def code(told: Mapping[str, Any], request: Request) -> Any:
        state = State.read(told.get("state"))
        return {"python": loaded.python(state), "command": loaded.command(state), "link": state.link}

    async def ask(told: Mapping[str, Any], request: Request) -> Any:
        reading, model, page = (told.get(name) for name in ("reading", "model", "page"))
        if not isinstance(reading, str) or reading not in READINGS:
            raise MambalensError(f"{str(reading)[:40]!r} is nothing that can be asked.")
        if not isinstance(model, str) or not isinstance(page, str) or len(page) > 64:
            raise MambalensError("A question names its model and its page.")
        state, more = State.read(told.get("state")), options(reading, told)
        return await line.ask(
            (page, reading, model),
            lambda gone: READINGS[reading](answers, Question(state, model, gone), **more),
            request.is_disconnected,
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        line.close()

    verbs = {"about": about, "search": search, "open": opened, "code": code, "ask": ask}
    routes = [Route(f"/{name}", _answered(verb), methods=["POST"]) for name, verb in verbs.items()]
    pages = [Route("/", file, methods=["GET"]), Route("/{name}", file, methods=["GET"])]
    return Guard(Starlette(routes=[*routes, *pages], lifespan=lifespan), token, port)


def _answered(verb: Callable[[Mapping[str, Any], Request], Any]) -> Callable[[Request], Any]:
    """A verb whose errors are sentences.

    They come with status 200: they are answers to a person, and a browser writes every other status to its console.
    """

    async def endpoint(request: Request) -> Response:
        body = await request.body()
        try:
            told = json.loads(body)
            if not isinstance(told, dict):
                raise MambalensError("A question is a JSON object.")
            return JSONResponse(await verb(told, request))
        except Dropped:
            return JSONResponse({"dropped": True})
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return JSONResponse({"error": "A question is JSON."}, 400)
        except MambalensError as error:
            return JSONResponse({"error": str(error)})
        except Exception:
            _log.exception("A question was not answered.")
            return JSONResponse({"error": WRONG}, 500)

    return endpoint


def serve(
    answers: Answers, loaded: Loaded, state: State | None, port: int, browser: bool, say: Callable[[str], None]
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        answers: who answers.
        loaded: how the models were asked for.
        state: what the page shows first.
        port: where to listen; 0: any free port.
        browser: open the page in a browser.
        say: hears the page's address.

    Raises:
        MambalensError: if the port is taken.
    """
    import uvicorn

    token = new_token()
    with socket.socket() as listening:
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise MambalensError(f"Port {port} cannot be used ({error.strerror}): leave --port out.") from None
        # A browser that is quicker than the server waits in the socket.
        listening.listen()
        bound = listening.getsockname()[1]
        address = f"http://{HOST}:{bound}/{token}/" + (f"#{state.link}" if state is not None else "")
        say(f"The page: {address}\nCtrl+C ends it.")
        if browser:
            webbrowser.open(address)
        config = uvicorn.Config(
            application(answers, loaded, token, bound), log_level="warning", server_header=False,
            limit_concurrency=200, timeout_graceful_shutdown=2,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])
