"""New examples of a task, written by the model that is to learn it.

SELF-GUIDE (Zhao et al. 2024, arXiv 2407.12874), section 3: from an instruction and a few examples the model writes new
inputs, each after other demonstrations from a growing list; then outputs to them, after the examples; what looks like
noise or is of an unusual length is left out. Here repeated inputs are left out too, before they become demonstrations.
The paper tunes the temperatures and prompts of each task; here they are settings, and one prompt serves all. Inputs
that the model wrote may be longer than the given ones: of a prompt's demonstrations, the last that do not fit are left
out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from duet_jax.config import SelfGuideConfig
from duet_jax.curation.bench import Bench, Curated, lines
from duet_jax.data import Encoded, Example, join
from duet_jax.errors import DataError
from duet_jax.models.sampling import Sampling

Item = TypeVar("Item")
# A field begins on a line of its own; what the model writes ends where the next one would.
STOP = ("\nInput:", "\nOutput:")


def input_prompt(instruction: str, inputs: Iterable[str]) -> str:
    """What a new input is written after."""
    shown = "".join(f"Input:\n{text}\n\n" for text in inputs)
    return f"{instruction}\n\nHere are inputs of this task.\n\n{shown}Input:"


def output_prompt(instruction: str, pairs: Iterable[tuple[str, str]], new: str) -> str:
    """What the output to an input is written after."""
    shown = "".join(f"Input:\n{text}\n\nOutput:\n{output}\n\n" for text, output in pairs)
    return f"{instruction}\n\n{shown}Input:\n{new}\n\nOutput:"


def within(lengths: Sequence[int] | np.ndarray, deviations: float) -> np.ndarray:
    """Which lengths lie in the window of mean +- `deviations` standard deviations (of these lengths), bool `[n]`."""
    lengths = np.asarray(lengths, np.float64)
    if not lengths.size:
        return np.zeros(0, bool)
    # Rounding must not leave out lengths that are all equal.
    return np.abs(lengths - lengths.mean()) <= deviations * lengths.std() + 1e-9


def is_noise(text: str, patterns: Sequence[str]) -> bool:
    """Whether a text is empty, or a pattern is found in it."""
    return not text.strip() or any(re.search(pattern, text) for pattern in patterns)


def curate(bench: Bench, config: SelfGuideConfig) -> Curated:
    """Lets the model write examples of the one domain.

    Files: synthetic.jsonl, new examples with `augmented` true; dropped.jsonl, what was left out, and why.

    Raises:
      DataError: a demonstration is a conversation, or demonstrations and an input do not fit.
    """
    (domain,) = bench.domains
    pairs = []
    for example in domain.train:
        if not isinstance(example.prompt, str):
            raise DataError(
                f"domain '{domain.name}': the example '{example.id}' is a conversation; demonstrations of self_guide "
                f"must be a text and its response."
            )
        pairs.append((example.prompt.strip(), example.response.strip()))
    # Before anything is written: the longest demonstrations, and an input of the greatest length.
    longest = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[-config.demonstrations :]
    if not _fits(bench, output_prompt(config.instruction, longest, ""), config.max_input_tokens):
        most = bench.student.engine.buckets[-1]
        raise DataError(
            f"self_guide: the instruction with {config.demonstrations} demonstrations and an input is longer than "
            f"data.max_length ({most} tokens); raise it, or lower self_guide.demonstrations."
        )
    dropped: list[dict] = []
    inputs = _inputs(bench, config, [text for text, _ in pairs], dropped)
    outputs = _outputs(bench, config, pairs, inputs)
    clean = []
    for text, output in zip(inputs, outputs, strict=True):
        if is_noise(output, config.noise):
            dropped.append({"prompt": text, "response": output, "reason": "noise in the output"})
        else:
            clean.append((text, output))
    fits = within([len(output.split()) for _, output in clean], config.deviations)
    dropped += [
        {"prompt": text, "response": output, "reason": "length of the output"}
        for (text, output), fit in zip(clean, fits, strict=True)
        if not fit
    ]
    kept = [pair for pair, fit in zip(clean, fits, strict=True) if fit]
    rows = [
        {"id": f"{domain.name}+{number}", "prompt": text, "response": output, "augmented": True}
        for number, (text, output) in enumerate(kept, start=1)
    ]
    files = {"synthetic.jsonl": lines(rows), "dropped.jsonl": lines(dropped)}
    return Curated(files, f"{len(rows)} new examples of {config.count} that were wanted; {len(dropped)} are left out")


def _inputs(bench: Bench, config: SelfGuideConfig, given: list[str], dropped: list[dict]) -> list[str]:
    """New inputs, written a batch at a time; those of one batch become demonstrations of the next."""
    found: list[str] = []
    seen, rng = set(given), np.random.default_rng([bench.seed, 0])
    for start in range(0, config.attempts, config.batch_size):
        if len(found) >= config.count:
            break
        listed = given + found
        prompts = [
            _prompt(bench, lambda shown: input_prompt(config.instruction, shown), _some(rng, config, listed))
            for _ in range(min(config.batch_size, config.attempts - start))
        ]
        texts = _write(bench, config, prompts, config.input_temperature, config.max_input_tokens, "inputs", start)
        for text in texts:
            reason = "noise in the input" if is_noise(text, config.noise) else "repeated" if text in seen else None
            if reason is not None:
                dropped.append({"prompt": text, "reason": reason})
            else:
                seen.add(text)
                found.append(text)
    # What the last batch has too many of.
    found = found[: config.count]
    fits = within([len(text.split()) for text in found], config.deviations)
    dropped += [
        {"prompt": text, "reason": "length of the input"} for text, fit in zip(found, fits, strict=True) if not fit
    ]
    return [text for text, fit in zip(found, fits, strict=True) if fit]


def _outputs(bench: Bench, config: SelfGuideConfig, pairs: list[tuple[str, str]], inputs: list[str]) -> list[str]:
    rng = np.random.default_rng([bench.seed, 1])
    prompts = [
        _prompt(
            bench,
            lambda shown, text=text: output_prompt(config.instruction, shown, text),  # type: ignore[misc]
            _some(rng, config, pairs),
        )
        for text in inputs
    ]
    return _write(bench, config, prompts, config.output_temperature, config.max_output_tokens, "outputs", -1)


def _fits(bench: Bench, prompt: str, more: int = 0) -> Encoded | None:
    """A prompt as tokens, if it and so many more fit."""
    engine = bench.student.engine
    encoded = engine.encode_prompts([Example("self_guide", prompt, "")])
    return None if encoded.truncated or encoded.lengths[0] + more > engine.buckets[-1] else encoded


def _prompt(bench: Bench, write: Callable[[list[Item]], str], items: list[Item]) -> Encoded:
    """What is written of the items as tokens, without the last ones that do not fit."""
    for count in range(len(items), -1, -1):
        encoded = _fits(bench, write(items[:count]))
        if encoded is not None:
            return encoded
    raise DataError("self_guide: an input that the model wrote does not fit; lower self_guide.max_input_tokens.")


def _some(rng: np.random.Generator, config: SelfGuideConfig, items: Sequence[Item]) -> list[Item]:
    """Demonstrations among the items, in random order."""
    return [items[row] for row in rng.permutation(len(items))[: config.demonstrations]]


def _write(
    bench: Bench,
    config: SelfGuideConfig,
    prompts: list[Encoded],
    temperature: float,
    max_new_tokens: int,
    name: str,
    number: int,
) -> list[str]:
    """What the model writes after prompts, without white space around it."""
    if not prompts:
        return []
    texts = bench.replies(
        join(prompts),
        Sampling(temperature),
        name,
        max_new_tokens=max_new_tokens,
        batch_size=config.batch_size,
        stop=STOP,
        seed=(bench.seed + number) % 2**31,
    )
    return [text.strip() for text in texts]
