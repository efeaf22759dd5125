"""`mambalens explore` as it is run: the page is there before the models, and what is done to it does not end it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mambalens import Lens
from mambalens.explore.state import Cut, State

MODEL = "atlas-mamba1"
PERU = State("The capital of Peru is", "Peru", "Lima", (MODEL,))
PATIENCE = 120
"""Seconds, where many tests share few cores."""


def begin(command: list[str]) -> subprocess.Popen[str]:
    """A process that hears Ctrl+C, also where the tests run in the background, which may be told to ignore it."""

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=hear)


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address that it says."""
    command = [sys.executable, "-W", "ignore", "-m", "mambalens", "explore", "--no-browser", *arguments]
    process = begin(command)
    assert process.stderr is not None
    found = re.search(r"http://\S+", process.stderr.readline())
    assert found is not None
    return process, found[0].partition("#")[0]


def loaded(address: str) -> dict[str, Any]:
    """What the models are, once they are there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        told = httpx.post(f"{address}ask", json={"verb": "about"}, timeout=PATIENCE).json()
        if "loading" not in told:
            return told  # type: ignore[no-any-return]
        time.sleep(0.1)
    raise AssertionError("the models have not loaded")


def ask(state: State, reading: str = "predict", **more: Any) -> dict[str, Any]:
    return {"verb": "ask", "reading": reading, "page": "p", "model": MODEL, "state": state.json, **more}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process, address = start(MODEL)
    # The page comes before the models: torch takes seconds to import.
    page = httpx.get(address, timeout=PATIENCE)
    assert page.status_code == 200 and "page.js" in page.text
    assert httpx.post(f"{address}ask", json={"verb": "about"}, timeout=PATIENCE).json()["loading"]
    assert [model["name"] for model in loaded(address)["models"]] == [MODEL]
    yield address
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in said


def test_fifty_clicks_a_second_for_ten_seconds_end_in_the_last_ones_answer(address: str) -> None:
    layers = [tuple(range(last % 12 + 1)) for last in range(500)]
    states = [replace(PERU, cuts=(Cut((3, 4), (5,), of, "both"),)) for of in layers]

    async def storm() -> tuple[list[Any], float]:
        # Unlimited: httpx may keep the place of a connection whose request was cancelled.
        async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:
            begun, sent = time.monotonic(), []
            for number, state in enumerate(states):
                if sent:
                    sent[-1].cancel()  # as the page does: its connection closes
                sent.append(asyncio.ensure_future(client.post(f"{address}ask", json=ask(state))))
                await asyncio.sleep(max(0.0, begun + (number + 1) / 50 - time.monotonic()))
            last = time.monotonic()
            found = await asyncio.gather(*sent, return_exceptions=True)
            return found, time.monotonic() - last

    found, waited = asyncio.run(storm())
    lens = Lens.load(MODEL)
    with lens.hooks.knockout([3, 4], [5], list(layers[-1]), path="both"):
        (batch,) = lens.batches([lens.prompt(PERU.fact)])
        expected = float(lens.last_logits(batch)[0].softmax(-1)[batch.targets[0]])
    assert found[-1].status_code == 200 and found[-1].json()["answer"]["prob"] == pytest.approx(expected, rel=1e-5)
    assert all(isinstance(one, asyncio.CancelledError) or one.status_code == 200 for one in found)
    assert waited < PATIENCE / 10


def test_a_tab_that_is_closed_in_the_middle_of_a_run_leaves_the_models_to_others(address: str) -> None:
    long = State(" ".join(["Peru"] * 60) + ", the capital is", "", "Lima", (MODEL,))
    place = urlsplit(address)
    assert place.hostname is not None
    body = httpx.Request("POST", f"{address}ask", json=ask(long, "flow")).content
    lines = [f"POST {place.path}ask HTTP/1.1", f"Host: {place.netloc}", "Content-Type: application/json", f"Content-Length: {len(body)}"]  # fmt: skip
    with socket.create_connection((place.hostname, place.port)) as tab:
        tab.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        time.sleep(0.5)  # it has begun
    told = httpx.post(f"{address}ask", json={**ask(PERU), "page": "other"}, timeout=PATIENCE).json()
    assert told["answer"]["prob"] > 0.9


def test_half_a_request_and_noise_are_refused_and_the_next_one_is_answered(address: str) -> None:
    place = urlsplit(address)
    head = (
        f"POST {place.path}ask HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\nContent-Length: 90"
    )
    half = f'{head}\r\n\r\n{{"verb":'.encode()
    for noise in (half, b"\x00\xff" * 500, b"GET / HTTP/9.9\r\n\r\n", b"POST " + b"/x" * 40_000, b"GET / HTTP/1.1\r\nHost: \r\nHost: a\r\n\r\n"):  # fmt: skip
        with socket.create_connection((place.hostname, place.port), timeout=PATIENCE) as tab:  # type: ignore[arg-type]
            tab.sendall(noise)
            tab.shutdown(socket.SHUT_WR)
            said = tab.recv(10_000)
        assert not said or said.startswith(b"HTTP/1.1 4")
    large = {"verb": "code", "state": {"prompt": "x" * 1_000_000}}
    assert httpx.post(f"{address}ask", json=large, timeout=PATIENCE).status_code == 413
    assert httpx.get(f"http://{place.netloc}/", timeout=PATIENCE).status_code == 403
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        assert httpx.post(f"{address}ask", json={"verb": "about"}, headers=headers, timeout=PATIENCE).status_code == 403
    assert httpx.post(f"{address}ask", json=ask(PERU), timeout=PATIENCE).json()["answer"]["prob"] > 0.9


def test_nobody_listens_but_on_the_loopback(address: str) -> None:
    own = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in own - {"127.0.0.1"}:
        if not host.startswith("127."):
            with pytest.raises(OSError, match=""):
                socket.create_connection((host, urlsplit(address).port), timeout=5)


def test_models_that_cannot_be_loaded_are_said_in_the_page_and_end_the_command() -> None:
    process, address = start("atlas-mamba7")
    try:
        assert "did you mean 'atlas-mamba" in loaded(address)["error"]
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 2 and "mambalens: 'atlas-mamba7' is no folder" in said and "Traceback" not in said


def test_the_command_ends_without_a_traceback_in_the_middle_of_a_question() -> None:
    process, address = start(MODEL)
    loaded(address)
    long = replace(PERU, prompt="The capital of Peru is " * 20 + "The capital of Peru is")  # many seconds of cuts
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, f"{address}ask", json=ask(long, "routes"), timeout=PATIENCE)
        time.sleep(0.5)
        assert not asked.done()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
        assert asked.result().json() == {"dropped": True}
    assert process.returncode == 130 and "Traceback" not in said


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "mambalens", "explore", MODEL, "--no-browser", "--port", str(taken.getsockname()[1])]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ})
    assert found.returncode == 2 and "cannot be used" in found.stderr and "loading" not in found.stderr


def test_a_port_that_there_is_not_is_said_too() -> None:
    command = [sys.executable, "-m", "mambalens", "explore", MODEL, "--no-browser", "--port", "80000"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert found.returncode == 2 and "Port 80000 cannot be used (ports go to 65,535)" in found.stderr


def test_the_state_of_a_command_line_is_the_state_of_its_page() -> None:
    cut = Cut((3, 4), (5,), tuple(range(12)), "both", "slow")
    options = [
        "--prompt",
        PERU.prompt,
        "--subject",
        "Peru",
        "--target",
        "Lima",
        "--cut",
        cut.text,
        "--ablation",
        "mean",
    ]
    command = [sys.executable, "-m", "mambalens", "explore", "--no-browser", *options, MODEL]
    process = begin(command)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split()[-1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
    assert State.of_link(address.partition("#")[2]) == replace(PERU, models=(), cuts=(cut,), ablation="mean")
