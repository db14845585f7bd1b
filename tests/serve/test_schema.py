"""The description of the server's API and the server agree, by requests that schemathesis makes of the description."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

REPORT = "/api/ratings"
BEGIN = "/api/conversations"
MESSAGE, RATE = f"{BEGIN}/{{conversation}}/messages", f"{BEGIN}/{{conversation}}/ratings"


@pytest.fixture(scope="module")
def served(tmp_path_factory, make_house, people_config) -> Any:
    house = make_house(tmp_path_factory.mktemp("described") / "study", people_config())
    with pytest.MonkeyPatch.context() as patch:
        # Nobody is too fast; `test_refusals` knows who is.
        patch.setattr("duet_jax.serve.limits.Rate.wait", lambda self, visitor: 0.0)
        tester = house.client()
        document = tester.get("/openapi.json").json()
        for found in document["paths"].values():
            # Who may come is tested by itself; here everybody has what it takes.
            del found["post"]["security"]
        schema = schemathesis.openapi.from_dict(document)
        schema.app = house.app
        yield house, tester, schema


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (BEGIN, "positive"),
        *((path, mode) for path in (REPORT, MESSAGE, RATE) for mode in ("positive", "negative")),
    ],
)
def test_what_is_described_is_taken_and_answered_so(served: Any, path: str, mode: str) -> None:
    house, tester, schema = served
    place = f"{BEGIN}/{tester.post(BEGIN, json={}).json()['conversation']}"
    tester.post(f"{place}/messages", json={"text": "x"})
    headers = {"authorization": f"Bearer {house.tokens.trial(0)}", "origin": "http://testserver"}
    statuses = set()

    @settings(max_examples=40)
    @given(case=schema[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def check(case: Any) -> None:
        sent = case.body
        if path in (MESSAGE, RATE):
            case.path_parameters["conversation"] = place.rpartition("/")[2]
        if mode == "positive" and isinstance(sent, dict):
            # What no schema says: which trials and answers there are, and that names are printable.
            for name in ("key", "rater", "item"):
                if not (sent.get(name) or "").isprintable():
                    sent[name] = "name"
            sent |= {REPORT: {"trial": 0.0}, RATE: {"answer": "0"}, MESSAGE: {"text": "x"}}[path]
        found = case.call(headers=headers, cookies=dict(tester.cookies), base_url="http://testserver")
        statuses.add(found.status_code)
        case.validate_response(found)

    check()
    if mode == "positive":
        # 409: a key that has been sent with another rating.
        assert statuses - {409} == {201 if path == BEGIN else 200}
    else:
        assert max(statuses) < 500
