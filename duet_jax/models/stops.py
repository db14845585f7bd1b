"""Stop strings on the device: exact on the text, whatever tokens it is made of.

Every token is known as the bytes that it adds to a text. The automaton of Aho and Corasick (1975) finds the stop
strings in a stream of bytes; run over the bytes of every token from every of its states, it becomes a table from state
and token to state, which a step of generation looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=32)
def stop_table(stop_strings: tuple[str, ...], token_bytes: tuple[bytes, ...]) -> np.ndarray:
    """Transitions of the search for stop strings, token by token.

    Args:
      stop_strings: none of them empty.
      token_bytes: what each token adds to a text.

    Returns:
      int32 `[states, vocab]`. State 0 is the beginning; the last state is that a stop string has been completed, and is
      never left. Without stop strings there is no way to it. The number of states is a power of two, so that few
      programs are compiled.

    Raises:
      ValueError: an empty stop string.
    """
    if "" in stop_strings:
        raise ValueError("a stop string is empty; it must have at least one character.")
    goto, matched = _automaton([string.encode() for string in stop_strings])
    states = len(goto)
    done = 2 ** int(np.ceil(np.log2(states + 1))) - 1
    lengths = np.array([len(word) for word in token_bytes])
    # By length: in each round of the loop, the tokens that still have bytes are the first ones.
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    words = np.zeros((len(token_bytes), max(lengths.max(initial=0), 1)), np.uint8)
    for row, token in enumerate(order):
        words[row, : falling[row]] = np.frombuffer(token_bytes[token], np.uint8)
    goto = np.concatenate([goto, np.full((done + 1 - states, 256), done)])
    goto[:states][matched[goto[:states]]] = done
    table = np.empty((done + 1, len(token_bytes)), np.int32)
    for state in range(done + 1):
        reached = np.full(len(token_bytes), state)
        for place in range(words.shape[1]):
            left = int(np.searchsorted(-falling, -place))
            reached[:left] = goto[reached[:left], words[:left, place]]
        table[state, order] = reached
    return table


def _automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Aho and Corasick's algorithms 2 and 4: transitions `[states, 256]`, and which states complete a string.

    The second array has a place for the state "completed", which is none of them.
    """
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for string in strings:
        state = 0
        for byte in string:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    goto = np.zeros((len(children), 256), np.int64)
    failure = np.zeros(len(children), np.int64)
    waiting = [0]
    for state in waiting:
        if state:
            goto[state] = goto[failure[state]]
            ends[state] |= ends[failure[state]]
        for byte, child in children[state].items():
            failure[child] = goto[failure[state], byte] if state else 0
            goto[state, byte] = child
            waiting.append(child)
    return goto, np.array(ends)


def text(ids: Sequence[int], token_bytes: Sequence[bytes], stop_strings: Sequence[str]) -> str:
    """The text of a reply, cut before the first stop string; bytes that are no UTF-8 become replacement marks."""
    data = b"".join(token_bytes[i] for i in ids)
    found = [place for place in (data.find(string.encode()) for string in stop_strings) if place >= 0]
    return data[: min(found)].decode(errors="replace") if found else data.decode(errors="replace")
