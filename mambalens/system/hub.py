"""Whether the Hugging Face hub answers: asked once, so that nothing waits for retries."""

from __future__ import annotations

PATIENCE = 5.0
"""Seconds to wait for the hub's first answer."""


def unreachable() -> str:
    """Why the hub cannot be used now; '' if it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # whatever the HTTP library in use raises
        return f"the hub cannot be reached: {str(error) or type(error).__name__}"
    return ""
