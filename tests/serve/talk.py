"""How a tester's page talks to the application."""

from __future__ import annotations

import json
from typing import Any

ORIGIN = {"origin": "http://testserver"}


def ask(client: Any, text: str, conversation: str | None = None) -> tuple[str, list[dict]]:
    """The conversation, and the lines of the answer."""
    if conversation is None:
        begun = client.post("/api/conversations", json={})
        assert begun.status_code == 201, begun.text
        conversation = begun.json()["conversation"]
    answer = client.post(f"/api/conversations/{conversation}/messages", json={"text": text})
    assert answer.status_code == 200, answer.text
    return conversation, [json.loads(line) for line in answer.text.splitlines()]
