"""Texts that begin alike as trees of tokens, and trees as arrays of few shapes: what `branches` reads.

What all texts of a tree begin with is its trunk, a row of a pass. The rest is laid out in chunks of one size, texts in
the order of their tokens, so that neighbours share what they can within a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

# Tokens of a chunk, of which a cheap one is taken; more, by factors of 2, only where a text needs them.
CHUNKS = (64, 128, 256)
# Tokens that a program costs, in passes: so many take as long as compiling another.
PROGRAM = 2
# Of layouts that cost so many times the cheapest at most, the first one is taken, so that the parts of a long work,
# each laid out by itself, take the same one and its programs.
NEAR = 1.05
# Eighths of a pass that are trunks at most, of which a cheap one is taken.
SHARES = (1, 2, 3, 4, 5, 6, 7)
# Trunks are padded to a multiple of so many tokens at least, longer ones to an eighth of a power of two.
STEP = 32


class Chunk(NamedTuple):
    """Branches of one trunk; Q tokens, M texts that end in them.

    Attributes:
      tokens: int32 `[Q]`, each after the one that it follows in its texts.
      positions: int32 `[Q]`, of each token in its texts.
      last: int32 `[Q]`, the last place in the chunk that sees each token: from the token to there, all texts go on
        from it.
      ends: int64 `[M]`, places of the texts' last tokens.
      texts: int64 `[M]`, numbers of the texts.
    """

    tokens: np.ndarray
    positions: np.ndarray
    last: np.ndarray
    ends: np.ndarray
    texts: np.ndarray


class Tree(NamedTuple):
    """Texts that begin alike.

    Attributes:
      trunk: int32 `[T]`, at least one token: what all of them begin with.
      texts: numbers of the texts that end with the trunk.
      chunks: the rest of the others.
    """

    trunk: np.ndarray
    texts: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk."""
        return max((len(chunk.tokens) for chunk in self.chunks), default=0)


class Pass(NamedTuple):
    """What goes through the network at once: B trunks of T tokens and C chunks of Q; E places are read.

    Attributes:
      trunks: int32 `[B, T]`.
      chunks: int32 `[C, Q]`.
      positions: int32 `[C, Q]`.
      last: int32 `[C, Q]`, see `Chunk`; of padding, its own place.
      owners: int32 `[C]`, the trunk of each chunk.
      shared: int32 `[C]`, tokens of that trunk.
      places: int32 `[E]`, of tokens, those of all trunks counted first.
      texts: int64, numbers of the texts that end at the first places.
    """

    trunks: np.ndarray
    chunks: np.ndarray
    positions: np.ndarray
    last: np.ndarray
    owners: np.ndarray
    shared: np.ndarray
    places: np.ndarray
    texts: np.ndarray


class Shape(NamedTuple):
    """Of a pass: trunks, their tokens, chunks, theirs, and places; a program is compiled for each."""

    trunks: int
    length: int
    chunks: int
    width: int
    places: int

    @property
    def tokens(self) -> int:
        return self.trunks * self.length + self.chunks * self.width


def plan(texts: Sequence[np.ndarray], groups: Sequence[int], batch_tokens: int, pad_id: int) -> list[Pass]:
    """Passes that read all texts, in a layout with few tokens, padding included, and few programs.

    It depends on these texts alone, not on what was read before, so that work that was killed ends with the same
    numbers.

    Args:
      texts: int32 `[length]` each, at least one token.
      groups: which group each belongs to; texts of two groups share nothing.
      batch_tokens: of a pass, about; a longer tree makes a pass by itself.
      pad_id: of padding.
    """
    layouts = []
    for size in CHUNKS:
        laid_out = trees(texts, groups, size)
        layouts += [_batches(laid_out, size, share, batch_tokens) for share in SHARES]
    costs = [_cost([shape for _, shape in found], batch_tokens) for found in layouts]
    cheap = next(found for found, cost in zip(layouts, costs, strict=True) if cost <= NEAR * min(costs))
    return [_pass(chosen, shape, pad_id) for chosen, shape in cheap]


def trees(texts: Sequence[np.ndarray], groups: Sequence[int], size: int) -> list[Tree]:
    """Lays texts out as trees, those of a group together where that spares tokens.

    Args:
      texts, groups: as of `plan`.
      size: tokens of a chunk. Where the rest of a text is longer, its tree has chunks of as many times twice that.
    """
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    found = []
    for numbers in members.values():
        # Bytes of this order compare as the ids do.
        ordered = sorted(numbers, key=lambda number: texts[number].astype(">u4").tobytes())
        for own in _split(texts, ordered, size):
            shared = _common(texts[own[0]], texts[own[-1]])
            ended = tuple(number for number in own if len(texts[number]) == shared)
            room = _doubled(size, max(len(texts[number]) for number in own) - shared)
            chunks = tuple(_chunks(texts, own[len(ended) :], shared, room))
            found.append(Tree(texts[own[0]][:shared], ended, chunks))
    return found


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens with which two texts begin alike; of texts in order, all between them do."""
    most = min(len(one), len(other))
    differ = one[:most] != other[:most]
    return int(differ.argmax()) if differ.any() else most


def _doubled(size: int, least: int) -> int:
    """The size, or as many times twice that as it takes."""
    while size < least:
        size *= 2
    return size


def _split(texts: Sequence[np.ndarray], ordered: list[int], size: int) -> Iterator[list[int]]:
    """Texts in order, apart where what parts of them share is more than what all do, and no chunk holds the rest."""
    shared = _common(texts[ordered[0]], texts[ordered[-1]])
    parts = [list(own) for _, own in groupby(ordered, lambda number: texts[number][shared : shared + 1].tolist())]
    within = sum(_common(texts[own[0]], texts[own[-1]]) - shared for own in parts if len(own) > 1)
    rest = sum(len(texts[number]) - shared for number in ordered)
    if len(parts) > 1 and (not shared or (rest > size and within > shared * (len(parts) - 1))):
        for own in parts:
            yield from _split(texts, own, size)
    else:
        yield ordered


def _chunks(texts: Sequence[np.ndarray], numbers: Sequence[int], shared: int, size: int) -> Iterator[Chunk]:
    """What follows the first `shared` tokens of texts in order."""
    start = 0
    while start < len(numbers):
        tokens, positions, last = (np.zeros(size, np.int32) for _ in range(3))
        path, before, used = np.zeros(0, np.int64), texts[numbers[start]][:shared], 0
        ends: list[int] = []
        for number in numbers[start:]:
            text = texts[number]
            known = _common(before, text)
            more = np.arange(used, used + len(text) - known)
            if used + len(more) > size:
                break
            path, before, used = np.concatenate([path[: known - shared], more]), text, used + len(more)
            tokens[more], positions[more] = text[known:], np.arange(known, len(text))
            last[path] = used - 1
            ends.append(int(path[-1]))
        taken = np.array(numbers[start : start + len(ends)])
        yield Chunk(tokens[:used], positions[:used], last[:used], np.array(ends), taken)
        start += len(ends)


def _cost(shapes: Sequence[Shape], batch_tokens: int) -> int:
    """Tokens of passes, with those that their programs take as long as."""
    return sum(shape.tokens for shape in shapes) + PROGRAM * batch_tokens * len(set(shapes))


def _batches(laid_out: Sequence[Tree], size: int, share: int, batch_tokens: int) -> list[tuple[list[Tree], Shape]]:
    """Trees by pass, and the shape of each."""

    def width_of(tree: Tree) -> int:
        return _doubled(size, tree.longest) if tree.chunks else 0

    found = []
    ordered = sorted(laid_out, key=lambda tree: (-width_of(tree), -len(tree.trunk)))
    for width, own in groupby(ordered, width_of):
        of_trunks = batch_tokens * share // 8 if width else batch_tokens
        least = max((batch_tokens - of_trunks) // width, 1) if width else 0
        pieces = [piece for tree in own for piece in _pieces(tree, least)]
        while pieces:
            length = _padded(len(pieces[0].trunk))
            rows = max(of_trunks // length, 1)
            most = max((batch_tokens - rows * length) // width, least) if width else 0
            taken = count = 0
            while taken < min(rows, len(pieces)) and count + len(pieces[taken].chunks) <= most:
                count += len(pieces[taken].chunks)
                taken += 1
            found.append((pieces[:taken], _shape(pieces[:taken], rows, length, most, width)))
            pieces = pieces[taken:]
    if len(found) == 1:
        ((chosen, shape),) = found
        rows = min(_power(len(chosen)), shape.trunks)
        count = min(_power(sum(len(tree.chunks) for tree in chosen)), shape.chunks)
        found = [(chosen, _shape(chosen, rows, shape.length, count, shape.width))]
    return found


def _shape(chosen: Sequence[Tree], rows: int, length: int, count: int, width: int) -> Shape:
    """Of a pass of these trees: a text may end at every token of a chunk and with a trunk; equal ones may be any
    number."""
    ends = sum(len(tree.texts) + sum(len(chunk.texts) for chunk in tree.chunks) for tree in chosen)
    return Shape(rows, length, count, width, max(rows + count * width, _power(ends)))


def _pieces(tree: Tree, most: int) -> list[Tree]:
    """A tree with more chunks than a pass has, as several with its trunk."""
    if len(tree.chunks) <= most:
        return [tree]
    starts = range(0, len(tree.chunks), most)
    return [Tree(tree.trunk, () if at else tree.texts, tree.chunks[at : at + most]) for at in starts]


def _power(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(count - 1, 0).bit_length()


def _padded(length: int) -> int:
    step = max(STEP, _power(length) // 8)
    return -(-length // step) * step


def _pass(chosen: Sequence[Tree], shape: Shape, pad_id: int) -> Pass:
    size = (shape.chunks, shape.width)
    trunks, chunks = np.full(shape[:2], pad_id, np.int32), np.full(size, pad_id, np.int32)
    positions, last = np.zeros(size, np.int32), np.tile(np.arange(shape.width, dtype=np.int32), (shape.chunks, 1))
    owners, shared = np.zeros(shape.chunks, np.int32), np.zeros(shape.chunks, np.int32)
    places: list[int] = []
    texts: list[int] = []
    number = 0
    for row, tree in enumerate(chosen):
        trunks[row, : len(tree.trunk)] = tree.trunk
        places += [row * shape.length + len(tree.trunk) - 1] * len(tree.texts)
        texts += tree.texts
        for chunk in tree.chunks:
            used = len(chunk.tokens)
            chunks[number, :used], positions[number, :used] = chunk.tokens, chunk.positions
            last[number, :used] = chunk.last
            owners[number], shared[number] = row, len(tree.trunk)
            places += (trunks.size + number * shape.width + chunk.ends).tolist()
            texts += chunk.texts.tolist()
            number += 1
    read = np.pad(np.array(places, np.int32), (0, shape.places - len(places)))
    return Pass(trunks, chunks, positions, last, owners, shared, read, np.array(texts, np.int64))
