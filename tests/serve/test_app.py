"""The application: what it does for testers, the owner and programs, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import string
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from duet_jax.serve.app import LARGEST_BODY  # noqa: E402
from duet_jax.serve.limits import Rate  # noqa: E402
from duet_jax.serve.telling import tell  # noqa: E402

ORIGIN = {"origin": "http://testserver"}
SCRIPT = "<script>alert(1)</script>"


def ask(client: Any, text: str, conversation: str | None = None) -> tuple[str, list[dict]]:
    """The conversation, and the lines of the answer."""
    if conversation is None:
        begun = client.post("/api/conversations", json={})
        assert begun.status_code == 201, begun.text
        conversation = begun.json()["conversation"]
    answer = client.post(f"/api/conversations/{conversation}/messages", json={"text": text})
    assert answer.status_code == 200, answer.text
    return conversation, [json.loads(line) for line in answer.text.splitlines()]


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


@pytest.mark.parametrize("given_token", [None, "", "wrong", "ü", "0" * 40])
def test_without_the_token_nothing_is_shown(house: Any, given_token: str | None) -> None:
    client = house.client(None)
    query = {} if given_token is None else {"token": given_token}
    for path in ("/", "/owner"):
        found = client.get(path, params=query)
        assert found.status_code == 403 and "A link is needed" in found.text
        assert house.tokens.tester not in found.text and not found.cookies
    for path in ("/api/status", "/api/owner/summary", "/owner/report"):
        assert client.get(path, params=query).status_code == 403
    for path in ("/api/conversations", "/api/owner/tell", "/api/owner/raters"):
        assert client.post(path, json={}, headers=ORIGIN).status_code == 403
    assert client.post("/api/ratings", json={"key": "k", "trial": 0, "stars": 1}).status_code == 401


def test_a_tester_is_no_owner(house: Any) -> None:
    client = house.client()
    assert client.get("/owner", params={"token": house.tokens.tester}).status_code == 403
    assert client.get("/api/owner/summary").status_code == 403
    assert client.post("/api/owner/tell", json={"trial": 0}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://elsewhere.example"},
        {"origin": "null"},
        {"origin": "http://testserver.elsewhere.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://testserver"},
        {},
    ],
)
def test_posts_from_other_sites_are_refused(house: Any, headers: dict[str, str]) -> None:
    client = house.client()
    del client.headers["origin"]
    found = client.post("/api/conversations", json={}, headers=headers)
    assert found.status_code == 403 and "does not come from the page" in found.json()["error"]


def test_a_program_from_another_site_is_refused_in_spite_of_its_token(house: Any) -> None:
    headers = {"authorization": f"Bearer {house.tokens.trial(0)}", "origin": "http://elsewhere.example"}
    found = house.client(None).post("/api/ratings", json={"key": "k", "trial": 0, "stars": 1}, headers=headers)
    assert found.status_code == 403 and not house.ratings.votes()


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


@pytest.mark.parametrize(
    "change",
    [
        {"stars": 0},
        {"stars": 6},
        {"stars": 2.5},
        {"stars": True},
        {"stars": "5"},
        {"stars": None},
        {"stars": 10**400},
        {"key": ""},
        {"key": "x" * 129},
        {"key": 1},
        {"key": "a\nb"},
        {"key": "\ud800"},
        {"rater": ""},
        {"rater": ["x"]},
        {"item": {}},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"words": 1.5},
        {"words": -1},
        {"more": 1},
        {SCRIPT: 1},
    ],
    ids=str,
)
def test_malformed_ratings_are_refused_in_one_sentence(house: Any, change: dict) -> None:
    headers = {"authorization": f"Bearer {house.tokens.trial(0)}", "content-type": "application/json"}
    text = json.dumps({"key": "k", "trial": 0, "stars": 1, **change})
    found = house.client(None).post("/api/ratings", content=text, headers=headers)
    assert found.status_code == 422 and found.json()["error"].endswith(".")
    assert not house.ratings.votes()


def test_bodies_that_are_huge_or_no_json_are_refused(house: Any) -> None:
    def sent(content: Any, kind: str = "application/json") -> int:
        # A new tester each time: who sends many messages is asked to wait.
        client = house.client()
        begun = client.post("/api/conversations", json={}).json()
        place = f"/api/conversations/{begun['conversation']}/messages"
        return client.post(place, content=content, headers={"content-type": kind}).status_code

    def parts() -> Any:
        for _ in range(LARGEST_BODY // 1024 + 1):
            yield b" " * 1024

    assert sent(b" " * (LARGEST_BODY + 1)) == sent(parts()) == 413
    for content in (b"", b"{", b"[]", b"7", b"\xff", b"[" * 50_000, b'{"text": 1' + b"0" * 5000 + b"}"):
        assert sent(content) == 400
    assert sent(b'{"text": "x"}', "text/plain") == sent(b"text=x", "application/x-www-form-urlencoded") == 415
    for text in ("", "  ", "x" * 4001, "\ud800", 7, None, ["x"]):
        assert sent(json.dumps({"text": text}).encode()) == 422
    assert sent(json.dumps({"text": "x" * 4000}).encode()) == 200


def test_script_in_messages_and_names_is_text(tmp_path, make_house, people_config) -> None:
    house = make_house(tmp_path / "study", people_config(instructions=f"Be kind. {SCRIPT}"))
    client = house.client()
    page = client.get("/")
    assert SCRIPT not in page.text and "&lt;script&gt;" in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "<script>" not in page.text and "onclick" not in page.text and "style=" not in page.text
    conversation, lines = ask(client, SCRIPT)
    assert lines[1] == {"text": SCRIPT}
    headers = {"authorization": f"Bearer {house.tokens.trial(0)}"}
    vote = {"key": SCRIPT, "trial": 0, "stars": 1, "rater": SCRIPT, "item": SCRIPT}
    assert client.post("/api/ratings", json=vote, headers=headers).status_code == 200
    summary = house.client("owner").get("/api/owner/summary")
    assert summary.headers["content-type"] == "application/json"
    assert [rater["name"] for rater in summary.json()["raters"]] == [SCRIPT]
    # Scripts build the page of text nodes alone.
    for name in ("chat.js", "owner.js"):
        script = client.get(f"/static/{name}").text
        assert "innerHTML" not in script and "eval" not in script and "document.write" not in script


def test_every_answer_is_marked(house: Any) -> None:
    client = house.client()
    for path in ("/", "/owner", "/openapi.json", "/nothing", "/static/nothing", "/static/..%2fapp.py", "/api/status"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    cookies = client.get("/", params={"token": house.tokens.tester}, follow_redirects=False).headers["set-cookie"]
    assert "HttpOnly" in cookies and "SameSite=lax" in cookies


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


def test_who_is_too_fast_is_asked_to_wait(house: Any) -> None:
    client = house.client()
    codes = [client.post("/api/conversations", json={}) for _ in range(12)]
    assert [found.status_code for found in codes[:10]] == [201] * 10
    assert codes[-1].status_code == 429 and int(codes[-1].headers["retry-after"]) >= 1
    assert house.client().post("/api/conversations", json={}).status_code == 201


def test_a_rate_is_a_burst_and_then_so_many_a_second() -> None:
    now = 0.0
    rate = Rate(0.5, 3, lambda: now)
    assert [rate.wait("a") for _ in range(3)] == [0.0] * 3
    assert rate.wait("a") == pytest.approx(2.0) and rate.wait("b") == 0.0
    now = 2.0
    assert rate.wait("a") == 0.0 and rate.wait("a") == pytest.approx(2.0)
    now = 1000.0
    assert [rate.wait("a") > 0 for _ in range(4)] == [False, False, False, True]


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


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory, make_house, people_config) -> Any:
    house = make_house(tmp_path_factory.mktemp("fuzzed") / "study", people_config())
    tester = house.client()
    return house, tester, house.client("owner"), ask(tester, "x")[0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["key", "trial", "stars", "rater", "item", "seconds", "words", "text", "answer", "excluded"])


@settings(max_examples=40)
@given(sent=st.dictionaries(names, values, max_size=7), path=st.integers(0, 5))
def test_whatever_is_sent_the_server_stands(fuzzed, sent: dict, path: int) -> None:
    house, tester, owner, conversation = fuzzed
    place, client = [
        ("/api/conversations", tester),
        (f"/api/conversations/{conversation}/messages", tester),
        (f"/api/conversations/{conversation}/ratings", tester),
        ("/api/ratings", owner),
        ("/api/owner/tell", owner),
        ("/api/owner/raters", owner),
    ][path]
    headers = {"authorization": f"Bearer {house.tokens.trial(0)}", "content-type": "application/json"}
    found = client.post(place, content=json.dumps(sent), headers=headers)
    assert found.status_code < 500
    if found.status_code >= 400:
        assert set(found.json()) == {"error"}


RIGHT = {
    "/api/conversations/{}/messages": {"text": "x"},
    "/api/conversations/{}/ratings": {"key": "k", "stars": 1, "answer": "0"},
    "/api/ratings": {"key": "k", "trial": 0, "stars": 1, "rater": "r", "item": "i", "seconds": 1.0, "words": 3},
    "/api/owner/tell": {"trial": 0},
    "/api/owner/raters": {"rater": "r", "excluded": True},
}


@settings(max_examples=40)
@given(one=st.sampled_from([(path, name) for path, sent in RIGHT.items() for name in sent]), value=values)
@example(one=("/api/conversations/{}/ratings", "answer"), value=[])
@example(one=("/api/conversations/{}/ratings", "answer"), value={})
def test_one_wrong_field_among_right_ones_is_refused(fuzzed, one: tuple[str, str], value: Any) -> None:
    house, _, owner, _ = fuzzed
    path, name = one
    # A new tester each time, who has not been too fast yet.
    tester = house.client()
    conversation, _ = ask(tester, "x")
    headers = {"authorization": f"Bearer {house.tokens.trial(0)}", "content-type": "application/json"}
    content = json.dumps({**RIGHT[path], name: value})
    client = owner if "owner" in path else tester
    found = client.post(path.format(conversation), content=content, headers=headers)
    assert found.status_code < 500
    if found.status_code >= 400:
        assert set(found.json()) == {"error"}
    if isinstance(value, list | dict):
        assert found.status_code == 422


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


def test_made_up_cookies_are_no_raters(house: Any) -> None:
    client = house.client()
    (name,) = (name for name in client.cookies if name.startswith("duet_rater"))
    for forged in ("f" * 32, f"{'f' * 32}.{'0' * 40}", client.cookies[name][:-1], ""):
        client.cookies.set(name, forged, domain="testserver.local", path="/")
        refused = client.post("/api/conversations", json={})
        assert refused.status_code == 403 and "open the page first" in refused.json()["error"]
    assert client.get("/").status_code == 200
    assert client.post("/api/conversations", json={}).status_code == 201


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
