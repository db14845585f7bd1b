"""Stop strings are found in the text, however it is cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_jax.models.stops import stop_table, text

TOKENS = (b"", b"a", b"b", b"ab", b"ba", b"aab", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"\n", b"b\na")


def stopped_at(table, ids: list[int]) -> int | None:
    """How many tokens it took."""
    state = 0
    for count, token in enumerate(ids, 1):
        state = table[state, token]
        if state == len(table) - 1:
            return count
    return None


def by_text(stops: tuple[str, ...], ids: list[int]) -> int | None:
    for count in range(1, len(ids) + 1):
        data = b"".join(TOKENS[i] for i in ids[:count])
        if any(stop.encode() in data for stop in stops):
            return count
    return None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3).map(tuple),
    st.lists(st.integers(0, len(TOKENS) - 1), max_size=12),
)
def test_the_table_stops_where_the_text_first_holds_a_stop_string(stops, ids):
    count = stopped_at(stop_table(stops, TOKENS), ids)
    assert count == by_text(stops, ids)
    data = b"".join(TOKENS[i] for i in ids)
    reply = text(ids, TOKENS, stops)
    if count is None:
        assert reply == data.decode(errors="replace")
    else:
        assert not any(stop in reply for stop in stops)
        assert data.startswith(reply.encode()) or "\ufffd" in reply


def test_the_first_of_several_cuts():
    assert text([3, 9, 1, 3], TOKENS, ("\n", "aa")) == "ab"
    assert text([3, 1, 3], TOKENS, ("ba", "bb")) == "a"


def test_few_shapes_for_many_stop_strings():
    assert {stop_table(("a" * n,), TOKENS).shape[0] for n in range(1, 31)} == {4, 8, 16, 32}
    assert stop_table((), TOKENS).shape[0] == 2


def test_nothing_is_no_stop_string():
    with pytest.raises(ValueError, match="empty"):
        stop_table(("a", ""), TOKENS)
