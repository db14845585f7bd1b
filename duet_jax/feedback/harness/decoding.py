"""What a generation request of the harness asks for, in our terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from duet_jax.errors import ConfigError
from duet_jax.models.sampling import GREEDY, Sampling

# The harness's own default, where a task says nothing.
MAX_NEW_TOKENS = 256
# The names by which tasks call the most new tokens; the first that is there counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What sampling obeys, and the value by which tasks switch it off, where that is not one of ours.
SAMPLING = {"temperature": None, "top_k": 0, "top_p": None, "min_p": None}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How one group of requests is decoded; hashable, so that equal requests share batches.

    Attributes:
      sampling: `GREEDY`, or how the next token is drawn.
      max_new_tokens: of a reply.
      stop_strings: text before which a reply ends.
    """

    sampling: Sampling
    max_new_tokens: int
    stop_strings: tuple[str, ...]

    @classmethod
    def read(cls, arguments: Mapping[str, Any], eos: str, max_length: int) -> Decoding:
        """Reads a task's `generation_kwargs` as the harness's Hugging Face model does.

        Without `do_sample` a temperature above 0 samples; with `do_sample: false` no temperature counts. On purpose
        unlike it: top-k is off unless the task sets it, where transformers cuts at 50, and what we cannot do is an
        error, where transformers' warning is easily missed.

        Args:
          arguments: of the request.
          eos: the end of text, spelled out: a reply that spells it ends there too.
          max_length: most tokens of a prompt and its reply.

        Raises:
          ConfigError: an argument is unknown or out of range, or leaves no room for a prompt.
        """
        rest = dict(arguments)
        given = [value for name in LENGTHS if (value := rest.pop(name, None)) is not None]
        until, do_sample = rest.pop("until", None) or [], rest.pop("do_sample", None)
        numbers = {name: value for name, off in SAMPLING.items() if (value := rest.pop(name, None)) not in (None, off)}
        unknown = [name for name, value in rest.items() if (name, value) != ("num_beams", 1)]
        if unknown:
            known = ", ".join(("until", "do_sample", *LENGTHS, *SAMPLING))
            raise ConfigError(f"generation_kwargs has {', '.join(unknown)}, which we cannot do; we know {known}.")
        most = int(given[0]) if given else MAX_NEW_TOKENS
        if not 1 <= most < max_length:
            raise ConfigError(
                f"generation_kwargs asks for {most} new tokens (max_gen_toks, without it {MAX_NEW_TOKENS}), but prompt "
                f"and reply together may have {max_length}; set max_gen_toks below that in a task file."
            )
        temperature = float(numbers.pop("temperature", 0.0))
        if do_sample and temperature <= 0:
            raise ConfigError(f"generation_kwargs samples at temperature {temperature}; it must be above 0.")
        sampling = GREEDY
        if temperature > 0 and do_sample is not False:
            try:
                sampling = Sampling(temperature=temperature, **numbers)
            except ValueError as error:
                raise ConfigError(f"In generation_kwargs {error}") from error
        texts = [until] if isinstance(until, str) else list(until)
        return cls(sampling, most, tuple(text for text in dict.fromkeys([*texts, eos]) if text))
