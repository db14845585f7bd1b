"""Our model as the lm-evaluation-harness sees one: text requests in, log-likelihoods and replies out.

The conventions are those of the harness's own Hugging Face model (`lm_eval.models.huggingface.HFLM`, 0.4.13), so that
both give the same numbers on the same weights: how context and continuation are split into tokens, what begins a
text, which end is cut, where a reply stops.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from duet_jax.data import Encoded
from duet_jax.errors import DataError, ModelError
from duet_jax.feedback.deployed import Deployed, Engine
from duet_jax.feedback.harness.decoding import Decoding
from duet_jax.feedback.harness.scoring import score_continuations

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ImportError(
        "duet_jax.feedback.harness.model needs lm_eval; install it with: pip install 'duet_jax[eval]'."
    ) from error

# Marks the end of a message that is to be continued, as transformers does it, so that what the template adds after it
# can be cut off.
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


class HarnessModel(TemplateLM):
    """A deployed model behind the harness's interface, for `lm_eval.evaluate` and `lm_eval.simple_evaluate`.

    Attributes:
      engine: its tokenizer; its buckets are the lengths that requests are padded to, and the last is the most tokens
        that the model is given: what is longer loses its beginning.
      model: what is scored. Without one every request is read and checked, and answered with -1 or an empty text.
      batch_size: requests in a forward pass.
      seed: of requests that sample.
    """

    def __init__(self, engine: Engine, model: Deployed | None, *, batch_size: int = 8, seed: int = 0):
        super().__init__()
        self.engine = engine
        self.model = None if model is None else dataclasses.replace(model, engine=engine)
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer = engine.model.tokenizer
        if not self.tokenizer.eos_ids:
            raise ModelError(f"The model {engine.model.source} has no end-of-text token, which benchmarks need.")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or else the end of text."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.engine.buckets[-1]

    @property
    def tokenizer_name(self) -> str:
        return self.engine.model.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, by default after BOS where the model expects it and the text does not begin with it."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = self.tokenizer.add_bos and not (prefix and string.startswith(prefix))
        return self.tokenizer.encode(string, add_special=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` it ends inside the last message, to be continued.

        Where the template refuses it, it is rendered without system messages.
        """
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += _CONTINUE
        try:
            text = self.tokenizer.render_chat(messages, add_generation_prompt)
        except ModelError:
            kept = [message for message in messages if message["role"] != "system"]
            if len(kept) == len(messages):
                raise
            text = self.tokenizer.render_chat(kept, add_generation_prompt)
        if add_generation_prompt:
            return text
        before, after = text[: (end := text.rindex(_CONTINUE.strip()))], text[end:]
        return before if after.startswith(_CONTINUE) else before.rstrip()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation after its context the log-likelihood in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of `max_length` with one token of context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(i)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [value for value, _ in self._loglikelihood_tokens(windows)])
        return sums.tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not 1 <= len(ids) <= self.max_length:
                raise DataError(
                    f"The continuation {continuation[:60]!r} of {context[-60:]!r} has {len(ids)} tokens; it must have "
                    f"1 to {self.max_length}."
                )
        if self.model is None:
            return [(-1.0, False)] * len(requests)
        return score_continuations(self.model, [pair for _, *pair in requests], self.batch_size)  # type: ignore[misc]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Each context's reply, without special tokens, cut before the first stop string."""
        eos = self.tokenizer.decode([self.eot_token_id], skip_special=False)
        groups: dict[Decoding, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[Decoding.read(request.args[1], eos, self.max_length)].append(i)
        replies = [""] * len(requests)
        for decoding, members in groups.items():
            prompts = self._prompts([requests[i].args[0] for i in members], self.max_length - decoding.max_new_tokens)
            if self.model is not None:
                for i, text in zip(members, self._generate(self.model, prompts, decoding), strict=True):
                    replies[i] = text
        return replies

    def _prompts(self, contexts: Sequence[str], longest: int) -> Encoded:
        rows = tuple(np.array(self.tok_encode(text)[-longest:], np.int32) for text in contexts)
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        return Encoded(rows, lengths, tuple(map(str, range(len(rows)))))

    def _generate(self, model: Deployed, prompts: Encoded, decoding: Decoding) -> list[str]:
        found = model.sample(
            prompts,
            decoding.sampling,
            samples=1,
            max_new_tokens=decoding.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
            stop_strings=decoding.stop_strings,
        )
        replies = []
        for ids, length in zip(found.ids[:, 0], found.lengths[:, 0], strict=True):
            # Decoded apart from its prompt, as transformers does: some tokenizers then drop a space at the beginning.
            reply = self.tokenizer.decode(ids[:length].tolist())
            for text in decoding.stop_strings:
                reply = reply.split(text)[0]
            replies.append(reply)
        return replies
