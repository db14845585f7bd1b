"""`duet serve`: the application on a socket, and what it prints when it starts."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path

from duet_jax.errors import ConfigError
from duet_jax.serve.opening import Opener
from duet_jax.serve.ratings import Ratings
from duet_jax.serve.telling import Rule, people_of
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study


def serve(
    folder: Path,
    *,
    host: str,
    port: int,
    rows: int,
    rule: Rule | None,
    keep_conversations: bool,
    say: Callable[[str], None],
) -> None:
    """Serves a study until it is interrupted.

    Args:
      folder: the study's directory.
      host: address to listen on; anything but loopback is reached by others, without encryption.
      port: to listen on; 0: any that is free.
      rows: replies of one model that are written at the same time.
      rule: when a trial is told by itself; None: when the owner says so.
      keep_conversations: whether conversations are written down.
      say: is given one line of news at a time.

    Raises:
      ConfigError: the extra `serve` is not installed.
      FeedbackError: people do not rate this study.
      StudyError: there is no such study, or its files cannot be used.
    """
    try:
        import uvicorn

        from duet_jax.serve.app import build
    except ModuleNotFoundError as error:
        raise ConfigError(f"duet serve needs the package {error.name}; install duet_jax[serve].") from None
    study = Study.open(folder)
    people_of(study.config)
    ratings, tokens = Ratings(study.folder), Tokens(study.folder)
    opener = Opener(study, ratings, rule, rows, say)
    application = build(study, ratings, opener, keep_conversations=keep_conversations)
    # Requests are not logged: their addresses hold tokens, and who writes what is nobody's business.
    config = uvicorn.Config(
        application,
        host,
        port,
        access_log=False,
        log_level="warning",
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    try:
        # Bound here, so that a port that is taken is one sentence, and a free one is known before it is printed.
        listener = config.bind_socket()
    except SystemExit:
        raise ConfigError(f"{host}:{port} cannot be listened on; give another --host or --port.") from None
    _announce(say, listener.getsockname()[:2], tokens, keep_conversations)
    opener.start()
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        opener.stop()


def _announce(say: Callable[[str], None], place: tuple[str, int], tokens: Tokens, keep: bool) -> None:
    host, port = place
    if not ipaddress.ip_address(host).is_loopback:
        say("anybody who reaches this machine can reach this server; put TLS before it, or use a tunnel")
    shown = f"[{host}]" if ":" in host else host
    say(f"testers: http://{shown}:{port}/?token={tokens.tester}")
    say(f"owner:   http://{shown}:{port}/owner?token={tokens.owner}")
    say("conversations are written to conversations.jsonl" if keep else "conversations are kept in memory only")
