"""Requests for examples like those that a model gets wrong, and what becomes of the answers.

LLM2LLM (Lee et al. 2024, arXiv 2403.15042): a student is trained on the data so far and asked for it, and a teacher
writes one new example like each that the student got wrong. Only examples of the original data are asked for: those
that the teacher wrote itself would lead further and further away. One round is one curation; its grown data is the data
of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from duet_jax.config import HardExamplesConfig
from duet_jax.curation.bench import Bench, Curated, Marked, lines, read_answers
from duet_jax.data import Example
from duet_jax.data.example import any_chat, as_row, plain_text
from duet_jax.errors import DataError
from duet_jax.feedback.rewards.text import rouge_l_of_words, words

REQUEST = """A student got the example below wrong. Write one new example for the student to learn from: of the same \
kind and about as hard, but with other content, and with a correct response.

[Prompt]
{prompt}

[Right response]
{response}

[The student's response]
{reply}

Answer in the same form: [Prompt] and the new prompt, then [Right response] and its response."""


def novel(new: Sequence[str], known: Sequence[str], rouge_l: float) -> list[int]:
    """Rows of new texts that equal or resemble no known one, nor a new one that was taken before.

    Args:
      new: texts.
      known: texts.
      rouge_l: the F1 of ROUGE-L (`best_rouge_l`) above which two texts are alike.
    """
    taken, rows, exact = [words(text) for text in known], [], set(known)
    for row, text in enumerate(new):
        own = words(text)
        # The common part is no longer than the shorter text: most pairs differ too much in length to be compared.
        near = (other for other in taken if 2 * min(len(own), len(other)) > rouge_l * (len(own) + len(other)))
        # ROUGE-L knows the words of few alphabets, so that equal texts of others are found by themselves.
        if text not in exact and not any(rouge_l_of_words(own, other) > rouge_l for other in near):
            rows.append(row)
            taken.append(own)
            exact.add(text)
    return rows


def curate(bench: Bench, config: HardExamplesConfig) -> Curated:
    """Asks the model for its own training data.

    Files: requests.jsonl, rows of an `id` and a `prompt` for a teacher, with the example it is about. With
    `config.answers`: grown.jsonl, all examples and the accepted new ones; dropped.jsonl, the others.

    Raises:
      DataError: an answer belongs to no request or lacks its text, or a prompt does not fit the model.
      FeedbackError: a reply cannot be rewarded.
    """
    (domain,) = bench.domains
    asked = [example for example in domain.train if not example.meta.get(config.augmented)]
    if not asked:
        raise DataError(f"domain '{domain.name}': every row is marked '{config.augmented}', so none can be asked for.")
    wrong = {one.example.id: one for one in bench.marked(asked, config, "replies") if not one.right}
    requests = [
        {
            "id": identifier,
            "prompt": REQUEST.format(
                prompt=plain_text(one.example.prompt), response=one.example.response, reply=one.reply
            ),
            "seed_prompt": plain_text(one.example.prompt),
            "seed_response": one.example.response,
            "reply": one.reply,
        }
        for identifier, one in wrong.items()
    ]
    files = {"requests.jsonl": lines(requests)}
    summary = f"{len(wrong)} of {len(asked)} original examples are wrong"
    if config.answers is None:
        return Curated(files, summary)
    answers = _answers(config.answers, wrong, domain.train, config.augmented)
    rows = novel([_text(example) for example in answers], [_text(example) for example in domain.train], config.rouge_l)
    grown = [*domain.train, *(answers[row] for row in rows)]
    chat = any_chat(grown)
    files["grown.jsonl"] = lines(as_row(example, chat=chat) for example in grown)
    files["dropped.jsonl"] = lines(
        as_row(example, chat=False) for row, example in enumerate(answers) if row not in set(rows)
    )
    return Curated(files, f"{summary}; {len(rows)} of {len(answers)} answers are new")


def _text(example: Example) -> str:
    return f"{plain_text(example.prompt)}\n{example.response}"


def _answers(path: str, known: Mapping[str, Marked], existing: Sequence[Example], augmented: str) -> list[Example]:
    found, taken = [], {example.id for example in existing}
    for identifier, row in read_answers(path, known, "hard_examples.answers"):
        texts = [row.columns.get(name) for name in ("prompt", "response")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"hard_examples.answers: {row.where} needs the texts 'prompt' and 'response'.")
        prompt, response = map(str, texts)
        number = 1
        while f"{identifier}+{number}" in taken:
            number += 1
        taken.add(f"{identifier}+{number}")
        meta = {augmented: True, "seed": identifier}
        found.append(Example(f"{identifier}+{number}", prompt, response, meta=meta))
    return found
