"""The application: what it refuses, from strangers, other sites, the hasty and the malformed."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.serve.talk import ORIGIN, ask

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from duet_jax.serve.app import LARGEST_BODY  # noqa: E402
from duet_jax.serve.limits import Rate  # noqa: E402

SCRIPT = "<script>alert(1)</script>"


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


def test_made_up_cookies_are_no_raters(house: Any) -> None:
    client = house.client()
    (name,) = (name for name in client.cookies if name.startswith("duet_rater"))
    for forged in ("f" * 32, f"{'f' * 32}.{'0' * 40}", client.cookies[name][:-1], ""):
        client.cookies.set(name, forged, domain="testserver.local", path="/")
        refused = client.post("/api/conversations", json={})
        assert refused.status_code == 403 and "open the page first" in refused.json()["error"]
    assert client.get("/").status_code == 200
    assert client.post("/api/conversations", json={}).status_code == 201
