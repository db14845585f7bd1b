"""The description of the endpoint for ratings from elsewhere, and of those that the page uses, in OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from duet_jax import __version__
from duet_jax.serve.chat import LONGEST_KEY, LONGEST_MESSAGE
from duet_jax.serve.ratings import LONGEST_NAME, MOST_SECONDS, MOST_WORDS

ERROR = {
    "description": "Refused; the sentence says why.",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
        }
    },
}


def describe(stars: int) -> dict[str, Any]:
    """The document of a study whose best rating is `stars`."""
    # Of printable characters alone, which no pattern says that all programs read alike.
    name = {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME}
    star = {"type": "integer", "minimum": 1, "maximum": stars}
    vote = {
        "type": "object",
        "additionalProperties": False,
        "required": ["key", "trial", "stars"],
        "properties": {
            "key": {**name, "description": "Of your own; sent again, a rating with the same key counts once."},
            "trial": {"type": "integer", "minimum": 0},
            "stars": {**star, "description": "Higher is better."},
            "rater": {**_nullable(name), "description": "A pseudonym, if you have one."},
            "item": {
                **_nullable(name),
                "description": "What was rated. A later rating of it by the same rater replaces the earlier.",
            },
            "seconds": {
                "type": ["number", "null"],
                "minimum": 0,
                "exclusiveMaximum": MOST_SECONDS,
                "description": "From the first word to the rating.",
            },
            "words": {
                "type": ["integer", "null"],
                "minimum": 0,
                "exclusiveMaximum": MOST_WORDS,
                "description": "Of what was rated.",
            },
        },
    }
    conversation = {"name": "conversation", "in": "path", "required": True, "schema": {"type": "string"}}
    rating = _object(
        ("key", "stars"), key={**name, "maxLength": LONGEST_KEY}, stars=star, answer={"type": ["string", "null"]}
    )
    message = _object(("text",), text={"type": "string", "minLength": 1, "maxLength": LONGEST_MESSAGE})
    new = _object(("new",), new={"type": "boolean"}, ratings={"type": "integer"})
    return {
        "openapi": "3.1.0",
        "info": {"title": "duet serve", "version": __version__, "description": "Ratings of the trials of a study."},
        "paths": {
            "/api/ratings": {
                "post": _operation(
                    "Report a rating of a trial", vote, "200", new, security=[{"trial": []}], also=("401", "409", "429")
                )
            },
            "/api/conversations": {
                "post": _operation(
                    "Begin a conversation with the model of an open trial",
                    None,
                    "201",
                    _object(("conversation",), conversation={"type": "string"}),
                    also=("429", "503"),
                )
            },
            "/api/conversations/{conversation}/messages": {
                "parameters": [conversation],
                "post": _operation(
                    "Send a message; the answer is streamed as lines of JSON",
                    message,
                    "200",
                    None,
                    also=("404", "409", "410", "429", "503"),
                ),
            },
            "/api/conversations/{conversation}/ratings": {
                "parameters": [conversation],
                "post": _operation(
                    "Rate an answer or a conversation", rating, "200", new, also=("404", "409", "410", "429")
                ),
            },
        },
        "components": {
            "securitySchemes": {
                "trial": {"type": "http", "scheme": "bearer", "description": "The trial's token, in the owner's view."},
                "tester": {"type": "apiKey", "in": "cookie", "name": "duet_tester", "description": "From the link."},
            }
        },
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _operation(
    summary: str,
    given: dict[str, Any] | None,
    status: str,
    answer: dict[str, Any] | None,
    *,
    also: tuple[str, ...],
    security: list[dict[str, list]] | None = None,
) -> dict[str, Any]:
    content = {"application/x-ndjson": {}} if answer is None else {"application/json": {"schema": answer}}
    refused = dict.fromkeys(sorted({"400", "403", "413", "415", "422", *also}), ERROR)
    operation: dict[str, Any] = {
        "summary": summary,
        "security": security or [{"tester": []}],
        "responses": {status: {"description": "Done.", "content": content}, **refused},
    }
    if given is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": given}}}
    return operation
