"""Which answers of a teacher are new."""

from __future__ import annotations

from duet_jax.curation.hard_examples import novel

WORDS = [f"w{i}" for i in range(20)]


def test_only_what_differs_enough_is_new() -> None:
    known = [" ".join(WORDS)]
    # 19 common words of 20 and 20: F = .95, which is not above .95; with a word more of 21 and 20 it is 40 / 41.
    at_limit, above = " ".join([*WORDS[:19], "x"]), " ".join([*WORDS, "x"])
    assert novel([at_limit, above], known, 0.95) == [0]
    assert novel([at_limit, above], known, 0.94) == []
    assert novel(["W0, w1", "other words here", "Other words, here."], ["w0 w1"], 0.95) == [1]
    assert novel(["", "short"], known, 0.95) == [0, 1]


def test_equal_texts_without_latin_words_are_not_new() -> None:
    assert novel(["\u6570\u5b66", "\u79d1\u5b66", "\u79d1\u5b66"], ["\u6570\u5b66"], 0.95) == [1]
