"""What happens in a long run, for logs and for programs: quiet unless somebody listens.

Events go through `logging` under the name 'mambalens' (level INFO); `mambalens sweep --json` prints them, one object a
line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

log = logging.getLogger("mambalens")
log.addHandler(logging.NullHandler())


def tell(event: str, **about: Any) -> None:
    """Something happened: 'model', 'block', 'result', ..."""
    words = " ".join(f"{key}={value}" for key, value in about.items())
    log.info("%s %s", event, words, extra={"event": {"event": event, "time": round(time.time(), 3), **about}})


class JsonLines(logging.Handler):
    """Prints events as JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one, if it is an event."""
        event = getattr(record, "event", None)
        if event is not None:
            print(json.dumps(event), file=sys.stdout, flush=True)


def print_json() -> None:
    """From now on events are printed, and nothing else is logged."""
    log.handlers = [JsonLines()]
    log.setLevel(logging.INFO)
    log.propagate = False
