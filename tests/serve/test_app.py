"""The application: what it does for testers, the owner and programs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from duet_jax.serve.telling import tell
from tests.serve.talk import ORIGIN, ask


def test_a_tester_talks_and_rates(house: Any) -> None:
    client = house.client()
    conversation, lines = ask(client, "hello")
    assert lines == [{"text": "You said "}, {"text": "hello"}, {"answer": "0"}]
    place = f"/api/conversations/{conversation}/ratings"
    assert client.post(place, json={"key": "k", "stars": 4, "answer": "0"}).json() == {"new": True, "ratings": 1}
    # Sent again it counts once; changed, it takes the place of the first.
    assert client.post(place, json={"key": "k", "stars": 4, "answer": "0"}).json() == {"new": False, "ratings": 1}
    assert client.post(place, json={"key": "l", "stars": 2, "answer": "0"}).json() == {"new": True, "ratings": 1}
    (vote,) = house.ratings.votes()
    assert (vote.stars, vote.words, vote.source) == (2, 3, "page")
    assert vote.trial in (0, 1) and 0 <= vote.seconds < 60
    assert client.get("/api/status").json() == {"ratings": 1}
    for key in ("", "x" * 65, 7, None):
        assert client.post(place, json={"key": key, "stars": 4, "answer": "0"}).status_code == 422
    # Another tester's key may be the same.
    other = house.client()
    begun, _ = ask(other, "hello")
    vote = {"key": "k", "stars": 1, "answer": "0"}
    assert other.post(f"/api/conversations/{begun}/ratings", json=vote).json() == {"new": True, "ratings": 1}
    _, lines = ask(client, "again", conversation)
    assert lines[-1] == {"answer": "1"}


def test_nobody_sees_which_mixture_they_talk_to_and_both_are_drawn(house: Any) -> None:
    drawn = set()
    for _ in range(3):
        client = house.client()
        for _ in range(8):
            begun = client.post("/api/conversations", json={})
            if begun.status_code == 429:
                break
            assert set(begun.json()) == {"conversation"}
            conversation = begun.json()["conversation"]
            if ask_and_rate(client, conversation):
                drawn |= {vote.trial for vote in house.ratings.votes()}
    assert drawn == {0, 1}
    page = client.get("/").text
    assert "trial" not in page.lower() and "mixture" not in page.lower()


def ask_and_rate(client: Any, conversation: str) -> bool:
    if client.post(f"/api/conversations/{conversation}/messages", json={"text": "x"}).status_code == 429:
        return False
    vote = {"key": conversation, "stars": 3, "answer": "0"}
    return client.post(f"/api/conversations/{conversation}/ratings", json=vote).status_code == 200


def test_a_conversation_is_its_testers_own(house: Any) -> None:
    conversation, _ = ask(house.client(), "mine")
    other = house.client()
    assert other.post(f"/api/conversations/{conversation}/messages", json={"text": "x"}).status_code == 404
    vote = {"key": "k", "stars": 1, "answer": "0"}
    assert other.post(f"/api/conversations/{conversation}/ratings", json=vote).status_code == 404


def test_ratings_come_from_programs_with_the_trials_token(house: Any) -> None:
    client = house.client(None)
    headers = {"authorization": f"Bearer {house.tokens.trial(1)}"}
    vote = {"key": "k", "trial": 1, "stars": 5, "rater": "somebody", "item": "page 7", "seconds": 3.5, "words": 20}
    assert client.post("/api/ratings", json=vote, headers=headers).json() == {"new": True}
    assert client.post("/api/ratings", json=vote, headers=headers).json() == {"new": False}
    changed = client.post("/api/ratings", json={**vote, "stars": 1}, headers=headers)
    assert changed.status_code == 409 and "key of its own" in changed.json()["error"]
    assert client.post("/api/ratings", json={**vote, "trial": 0}, headers=headers).status_code == 401
    assert [vote.stars for vote in house.ratings.votes()] == [5]
    house.study.tell(1, 5.0, ratings=[0, 0, 0, 0, 1])
    closed = client.post("/api/ratings", json={**vote, "key": "later"}, headers=headers)
    assert closed.status_code == 409 and "completed" in closed.json()["error"]


def test_a_full_queue_and_a_closed_trial_answer_politely(house: Any) -> None:
    client = house.client()
    conversation, _ = ask(client, "x")
    place = f"/api/conversations/{conversation}/messages"
    house.parrot.busy = True
    full = client.post(place, json={"text": "x"})
    assert full.status_code == 503 and int(full.headers["retry-after"]) > 0 and "try again" in full.json()["error"]
    house.parrot.busy = False
    # The message that was refused is none of the conversation.
    assert ask(client, "y", conversation)[1][-1] == {"answer": "1"}
    house.parrot.open = ()
    assert client.post(place, json={"text": "x"}).status_code == 410
    # What was answered may still be rated, until the trial is told.
    vote = {"key": "k", "stars": 1, "answer": "0"}
    ratings = f"/api/conversations/{conversation}/ratings"
    assert client.post(ratings, json=vote).json() == {"new": True, "ratings": 1}
    none = client.post("/api/conversations", json={})
    assert none.status_code == 503 and "retry-after" in none.headers


@pytest.mark.parametrize("kept", [False, True])
def test_conversations_are_in_memory_only_unless_the_page_says_so(
    tmp_path, make_house, people_config, caplog, kept: bool
) -> None:
    house = make_house(tmp_path / "study", people_config(), keep_conversations=kept)
    client, secret = house.client(), "a secret that nobody else may read"
    with caplog.at_level("DEBUG"):
        conversation, _ = ask(client, secret)
        client.post(
            f"/api/conversations/{conversation}/ratings", json={"key": "k", "stars": 1, "answer": "0"}
        ).raise_for_status()
        house.client("owner").get("/api/owner/summary").raise_for_status()
    written = [path for path in (tmp_path / "study").rglob("*") if path.is_file() and secret in path.read_text()]
    assert [path.name for path in written] == (["conversations.jsonl"] if kept else [])
    if kept:
        assert written[0].stat().st_mode & 0o077 == 0
        ask(client, "more", conversation)
        rows = [json.loads(line) for line in written[0].read_text().splitlines()]
        assert [(row["answer"], len(row["messages"])) for row in rows] == [("0", 2), ("1", 2)]
        # An answer that cannot be kept is an answer all the same.
        written[0].unlink()
        written[0].mkdir()
        assert ask(client, "most", conversation)[1][-1] == {"answer": "2"}
        assert "conversations.jsonl cannot be written" in caplog.text
    page = client.get("/").text
    assert ("kept by the owner" in page) is kept and ("never stored" in page) is not kept
    assert secret not in caplog.text


def test_a_whole_conversation_is_rated_where_that_is_wanted(tmp_path, make_house, people_config) -> None:
    house = make_house(tmp_path / "study", people_config(per="conversation", stars=2))
    client = house.client()
    conversation, _ = ask(client, "one two")
    ask(client, "three", conversation)
    place = f"/api/conversations/{conversation}/ratings"
    assert client.post(place, json={"key": "a", "stars": 2, "answer": "0"}).status_code == 422
    assert client.post(place, json={"key": "a", "stars": 3}).status_code == 422
    assert client.post(place, json={"key": "a", "stars": 2}).json() == {"new": True, "ratings": 1}
    (vote,) = house.ratings.votes()
    assert vote.item == conversation and vote.words == 7


def test_the_owner_sees_ratings_excludes_raters_and_tells(house: Any) -> None:
    client = house.client("owner")
    for i in range(8):
        headers = {"authorization": f"Bearer {house.tokens.trial(i % 2)}"}
        for rater, stars in (("even", 2 + i % 2 + i // 4), ("careless", 5)):
            vote = {"key": f"{rater}{i}", "trial": i % 2, "stars": stars, "rater": rater, "item": str(i)}
            client.post("/api/ratings", json=vote, headers=headers).raise_for_status()
    found = client.get("/api/owner/summary").json()
    assert [trial["count"] for trial in found["trials"]] == [8, 8]
    assert found["trials"][1]["estimate"] > found["trials"][0]["estimate"] and found["trials"][1]["best"]
    assert found["trials"][0]["needed"] is None or found["trials"][0]["needed"] > 0
    doubts = {rater["name"]: rater["doubt"] for rater in found["raters"]}
    assert doubts == {"even": "", "careless": "always the same"}
    assert client.post("/api/owner/raters", json={"rater": "careless", "excluded": True}).status_code == 200
    assert client.post("/api/owner/raters", json={"rater": "nobody", "excluded": True}).status_code == 422
    found = client.get("/api/owner/summary").json()
    assert [trial["counts"] for trial in found["trials"]] == [[0, 2, 2, 0, 0], [0, 0, 2, 2, 0]]
    assert client.post("/api/owner/tell", json={"trial": 1}).json()["feedback"]["ratings"] == [0, 0, 2, 2, 0]
    assert house.study.trials()[1].feedback["value"] == 3.5
    assert client.post("/api/owner/tell", json={"trial": 1}).status_code == 409
    assert client.post("/api/owner/tell", json={"trial": 7}).status_code == 409
    assert client.post("/api/owner/tell", json={"trial": "1"}).status_code == 422
    # One file of ratings has both, and the exclusion may be taken back.
    assert client.post("/api/owner/raters", json={"rater": "careless", "excluded": False}).status_code == 200
    assert len(house.ratings.votes()) == 16


def test_the_description_is_of_what_there_is(house: Any) -> None:
    client = house.client(None)
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    served = {(path, "POST") for path in document["paths"]}
    inner = house.app._app._app
    known = {(route.path, method) for route in inner.routes for method in route.methods}
    assert served <= known
    stars = document["paths"]["/api/ratings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert stars["properties"]["stars"]["maximum"] == 5


def test_votes_on_a_told_trial_are_refused_and_those_sent_again_are_not(house: Any) -> None:
    client = house.client()
    conversation, _ = ask(client, "x")
    place = f"/api/conversations/{conversation}/ratings"
    vote = {"key": "k", "stars": 4, "answer": "0"}
    assert client.post(place, json=vote).json() == {"new": True, "ratings": 1}
    (known,) = house.ratings.votes()
    # The models' engine does not know yet that the trial is told.
    tell(house.study, house.ratings, known.trial)
    late = client.post(place, json={**vote, "key": "later", "stars": 1})
    assert late.status_code == 410 and "takes no more ratings" in late.json()["error"]
    # The word of thanks was lost, and the page sends the rating again.
    assert client.post(place, json=vote).json() == {"new": False, "ratings": 1}
    assert [vote.stars for vote in house.ratings.votes()] == [4]
    headers = {"authorization": f"Bearer {house.tokens.trial(known.trial)}"}
    again = {"key": known.key, "trial": known.trial, "stars": 4, "rater": known.rater, "item": known.item}
    assert client.post("/api/ratings", json=again, headers=headers).json() == {"new": False}


def test_a_lost_connection_does_not_lock_the_conversation(house: Any) -> None:
    client = house.client()
    conversation = client.post("/api/conversations", json={}).json()["conversation"]
    path = f"/api/conversations/{conversation}/messages"
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    house.parrot.silent = True

    async def go_away() -> None:
        asked, gone = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not asked.is_set():
                asked.set()
                return {"type": "http.request", "body": b'{"text": "x"}', "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 200
                gone.set()

        headers = [("host", "testserver"), ("content-type", "application/json"), ("cookie", cookies)]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in [*headers, *ORIGIN.items()]],
            "server": ("testserver", 80),
            "client": ("testclient", 1),
        }
        await house.app(scope, receive, send)
        # What the engine hands out before it sees that nobody listens; there is no last text.
        house.parrot.tickets[0].on_text("late", False)
        await asyncio.sleep(0.01)

    asyncio.run(go_away())
    assert house.parrot.tickets[0].cancelled
    house.parrot.silent = False
    assert ask(client, "again", conversation)[1][-1] == {"answer": "0"}
