"""Data, model and compiled training, as a configuration names them: what studies and selections share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from duet_jax import models
from duet_jax.config import DataConfig, DomainConfig, MeshConfig, ModelConfig, SelectorConfig, TrainingConfig
from duet_jax.data import Domain, Encoded, Example, load_examples
from duet_jax.data.characters import CharacterTokenizer
from duet_jax.data.texts import taken
from duet_jax.data.token_files import PART
from duet_jax.distributed.mesh import make_mesh
from duet_jax.distributed.place import place, row_parts
from duet_jax.distributed.processes import SILENCE, lead, several
from duet_jax.distributed.target import platform
from duet_jax.errors import ConfigError, DataError
from duet_jax.feedback import Engine
from duet_jax.feedback.rewards import Reward, build_reward, of_parts
from duet_jax.influence.given import external_samples
from duet_jax.models import llama
from duet_jax.models import lora as adapters
from duet_jax.reading import describe, encode_all, rows_left
from duet_jax.selection import Asked, Pool, Scores, load_utilities, score_with_details
from duet_jax.training.sft import Trainer

# Of a model that is taken as it is, nothing of its training is read but that adapters leave the base in memory.
_UNTRAINED = TrainingConfig(learning_rate=1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """What a selector scores for, read and checked before there is a model.

    Attributes:
      targets: named sets of examples; none: the held-out ones of each domain.
      reward: of replies to them, for a selector that has the model answer.
      asked: what it answers, all sets one after the other: the very objects that the reward knows.
    """

    targets: tuple[tuple[str, Sequence[Example]], ...]
    reward: Reward | None = None
    asked: tuple[Example, ...] = ()

    def sets(self, domains: Sequence[Domain]) -> tuple[tuple[str, Sequence[Example]], ...]:
        """The targets, or the held-out examples of the domains."""
        return self.targets or tuple((domain.name, domain.validation) for domain in domains)


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """Domains, the base model and its training.

    Attributes:
      domains: as they were read.
      train: training examples of each, as tokens.
      model: the base model; without parameters under full training, which reads them anew each time.
      chat: whether prompts go through the chat template.
      max_length: tokens at which examples are cut.
      trainer: compiled training.
      engine: compiled scoring and generation.
      folder: where tokens of many examples are kept; None: in memory.
    """

    domains: list[Domain]
    train: tuple[Encoded, ...]
    model: models.Model
    chat: bool
    max_length: int
    trainer: Trainer
    engine: Engine
    folder: Path | None = None

    def encode(self, examples: Sequence[Example], name: str) -> Encoded:
        """Examples as tokens; for all processes to call."""
        return self._encode([(name, examples)], self.folder if len(examples) > PART else None)[0]

    def _encode(self, named: Sequence[tuple[str, Sequence[Example]]], folder: Path | None) -> tuple[Encoded, ...]:
        return encode_all(named, self.model.tokenizer, chat=self.chat, max_length=self.max_length, folder=folder)

    def utilities(
        self,
        selector: SelectorConfig,
        goal: Goal,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
        on_progress: Callable[[str, int, int], None],
    ) -> tuple[np.ndarray, ...]:
        """Utilities float64 `[examples]` of each domain's training examples; see `scores`."""
        return self.scores(selector, goal, folder, seed, say, on_progress).utilities

    def scores(
        self,
        selector: SelectorConfig,
        goal: Goal,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
        on_progress: Callable[[str, int, int], None],
    ) -> Scores:
        """Utilities of all training examples, and what they are made of; kept in `folder`.

        Raises:
          DataError: a file of utilities is wrong, or a domain has no held-out example that it needs.
          FeedbackError: a reply cannot be rewarded.
        """
        if selector.scores:
            asked = self._asked(selector, goal, say)
            return score_with_details(self.pool(goal, asked, seed, say, on_progress), selector, folder)
        found = []
        for domain, encoded in zip(self.domains, self.train, strict=True):
            kind, path = selector.kind, selector.path
            every = lead(load_utilities, kind, domain.name, domain.train, path=path, cache_folder=folder)
            found.append(every[rows_left(domain.train, encoded)])
        return Scores(tuple(found), {})

    def pool(
        self,
        goal: Goal,
        asked: Asked | None,
        seed: int,
        say: Callable[[str], None],
        on_progress: Callable[[str, int, int], None],
    ) -> Pool:
        """What is scored, and what scoring needs; targets and held-out examples are prompts alone where it is asked."""

        def read(examples: Sequence[Example], name: str) -> Encoded:
            return self.encode(examples, name) if asked is None else self.engine.encode_prompts(examples)

        return Pool(
            names=tuple(domain.name for domain in self.domains),
            train=self.train,
            validation=tuple(read(d.validation, f"{d.name} (validation)") for d in self.domains),
            targets=tuple((name, read(examples, name)) for name, examples in goal.targets),
            trainer=self.trainer,
            fingerprint=self.model.fingerprint,
            seed=seed,
            say=say,
            on_progress=on_progress,
            asked=asked,
            examples=self.kept,
            engine=self.engine,
        )

    @property
    def kept(self) -> tuple[Sequence[Example], ...]:
        """The domains' training examples less those that were left out because of their length."""
        return tuple(taken(d.train, rows_left(d.train, e)) for d, e in zip(self.domains, self.train, strict=True))

    def _asked(self, selector: SelectorConfig, goal: Goal, say: Callable[[str], None]) -> Asked | None:
        if goal.reward is None:
            return None
        examples = goal.asked
        external, policy = None, selector.policy
        if policy is not None and policy.external is not None:
            ids = [example.id for example in examples]
            repeated = next((name for i, name in enumerate(ids) if name in ids[:i]), None)
            if repeated is not None:
                raise DataError(
                    f"{policy.external}: two prompts have the id '{repeated}', so their replies are mixed up."
                )
            prompts, tokenizer = self.engine.encode_prompts(examples), self.model.tokenizer
            external = external_samples(policy.external, prompts, tokenizer, policy.max_new_tokens)
            if cut := int(np.count_nonzero(~external.ended)):
                say(
                    f"{policy.external}: {cut} of {external.ended.size} replies are cut at {policy.max_new_tokens} "
                    f"tokens, for the reward too; raise selector.policy.max_new_tokens to have them whole"
                )
        return Asked(self.engine, examples, goal.reward, external)


def load_goal(
    selector: SelectorConfig, specs: Sequence[DomainConfig], domains: Sequence[Domain], seed: int, folder: Path
) -> Goal:
    """Reads the selector's targets and builds its reward.

    Args:
      selector: which.
      specs: configurations of the domains.
      domains: whose held-out examples are scored for where there are no targets.
      seed: of subsamples.
      folder: for the cache of rewards.

    Raises:
      DataError: a target cannot be read.
      FeedbackError: the reward cannot be built, or an example lacks what it needs.
    """
    goal = Goal(tuple((spec.name, tuple(load_examples(spec, seed=seed))) for spec in selector.targets))
    if selector.kind != "nice":
        return goal
    parts = []
    for spec, (_, examples) in zip(selector.targets or specs, goal.sets(domains), strict=True):
        config = spec.reward or selector.reward
        assert config is not None
        # Those of a file are made anew whenever they are read.
        parts.append((build_reward(config, folder / "rewards"), tuple(examples)))
        parts[-1][0].check(parts[-1][1])
    asked = tuple(example for _, examples in parts for example in examples)
    return dataclasses.replace(goal, reward=of_parts(parts), asked=asked)


def load(
    config: ModelConfig,
    data: DataConfig,
    training: TrainingConfig | None,
    domains: list[Domain],
    others: Sequence[Example],
    seed: int,
    say: Callable[[str], None],
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] = (),
    folder: Path | None = None,
) -> Loaded:
    """Loads the model and turns the domains into tokens.

    Args:
      config: of the model.
      data: how examples are cut.
      training: of the model; None: it is taken as it is.
      domains: as `reading.load_all` read them.
      others: examples that the model will see besides; a model from scratch knows their characters.
      seed: of a model from scratch.
      say: is given one line of news at a time.
      mesh: how the devices are arranged; None: it is chosen, of as many of them as share the rows of a batch evenly.
      devices: that the work is spread over; none: it is done on the default one.
      folder: where tokens are kept; None: in memory.

    Raises:
      ConfigError, DataError, ModelError: the first mistake found.
    """
    training = training or dataclasses.replace(_UNTRAINED, batch_size=math.lcm(8, len(devices) or 1))
    if training.online is not None:
        raise ConfigError("training.online is of the rounds of a study; leave it out.")

    # A training that is to read the base again must not keep the texts, which a model with a tokenizer does not need.
    texts = ([], ()) if config.scratch is None else (domains, others)

    def read() -> models.Model:
        # What many devices hold together may be more than one of them can.
        with nullcontext() if len(devices) < 2 else jax.default_device(jax.local_devices(backend="cpu")[0]):
            return _load_model(config, data, training, *texts, seed)

    model = read()
    check_layers(model, training, [training.lora.layers or ()])
    size = sum(x.size for x in jax.tree.leaves(model.params)) / 1e6
    say(f"model: {model.source}, {size:.1f} M parameters, computing in {config.dtype}")
    spread = mesh_of(mesh, devices, model, training)
    if spread is not None:
        axes = " · ".join(f"{name} {size}" for name, size in spread.shape.items())
        shared = f" of {jax.process_count()} processes; if one is lost, all end in {SILENCE} s" if several() else ""
        say(f"mesh: {axes}, {spread.size} of {len(devices)} devices{shared}")
    elif len(devices) > 1:
        field = "batch_size" if training.micro_batch_size is None else "micro_batch_size"
        say(
            f"mesh: none, 1 of {len(devices)} devices; a training.{field} that is a multiple of {len(devices)} uses all"
        )

    def put(params: llama.Params) -> llama.Params:
        # Of many devices one is left: what was read on the host goes there.
        return jax.device_put(params, devices[0]) if spread is None and len(devices) > 1 else place(spread, params)

    model = dataclasses.replace(model, params=put(model.params))
    resident: llama.Params | None = model.params
    if training.method == "full":
        # Each round changes the parameters in place; the next one reads them anew rather than that two copies
        # are kept.
        model, resident = dataclasses.replace(model, params={}), None

    def load_base() -> llama.Params:
        if resident is not None:
            return resident
        return put(read().params)

    chat = config.chat
    if chat is None:
        chat = model.tokenizer.chat_template is not None
    buckets = tuple(data.buckets)
    if buckets[-1] > model.config.max_length:
        raise ConfigError(
            f"data.max_length is {buckets[-1]}, but the model {model.source} takes at most "
            f"{model.config.max_length} tokens; lower data.max_length and data.buckets."
        )
    trainer = Trainer(
        model=model.config,
        load_base=load_base,
        settings=training,
        buckets=buckets,
        pad_id=model.tokenizer.pad_id,
        compute_dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        mesh=spread,
    )
    engine = Engine(model, chat, buckets, trainer.compute_dtype, spread)
    loaded = Loaded(domains, (), model, chat, data.max_length, trainer, engine, folder)
    train = loaded._encode([(domain.name, domain.train) for domain in domains], folder)
    for domain, encoded in zip(domains, train, strict=True):
        say(describe(domain, encoded, data.max_length))
    return dataclasses.replace(loaded, train=train)


def mesh_of(
    config: MeshConfig | None,
    devices: Sequence[jax.Device],
    model: models.Model,
    training: TrainingConfig,
    device_bytes: int | None = None,
) -> Mesh | None:
    """The mesh of a job; None where one device does all of it. `device_bytes` is of devices that cannot be asked.

    Raises:
      ConfigError: the mesh is not made for these devices, this model, or this training.
    """
    if not devices:
        return None
    field = "batch_size" if training.micro_batch_size is None else "micro_batch_size"
    rows = getattr(training, field)
    if config is None and not several():
        devices = devices[: math.gcd(len(devices), rows)]
    mesh = make_mesh(config, devices, _state_bytes(model, training), device_bytes=device_bytes)
    if rows % row_parts(mesh):
        raise ConfigError(
            f"training.{field} is {rows}; it must be a multiple of {row_parts(mesh)}, the devices along data and fsdp "
            f"of the mesh."
        )
    heads, tensor = model.config.num_kv_heads, mesh.shape["tensor"]
    if heads % tensor:
        raise ConfigError(f"mesh.tensor is {tensor}; it must divide the {heads} key and value heads of {model.source}.")
    return None if mesh.size == 1 else mesh


def _state_bytes(model: models.Model, training: TrainingConfig) -> int:
    """What a training keeps: of what is trained also gradients and both moments, all float32."""
    if training.method == "full":
        return 16 * sum(x.size for x in jax.tree.leaves(model.params))
    chosen = adapters.LoraConfig(training.lora.rank, targets=tuple(training.lora.targets))
    factors = jax.eval_shape(lambda: adapters.init(model.config, chosen, key=jax.random.key(0)).factors)
    base = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.params))
    return base + 16 * sum(x.size for x in jax.tree.leaves(factors))


def check_layers(model: models.Model, training: TrainingConfig, chosen: Iterable[Sequence[int]]) -> None:
    """Raises a ConfigError if layers that may get adapters are not those of the model."""
    last = model.config.num_layers - 1
    for layers in chosen if training.method == "lora" else ():
        if max(layers, default=0) > last:
            raise ConfigError(
                f"training.lora.layers may be {list(layers)}, but the layers of {model.source} are 0 to {last}."
            )


def base_dtype(config: ModelConfig, training: TrainingConfig) -> Any:
    """Of a base model's parameters. Under LoRA they are only multiplied with, and kept in the dtype of products.

    XLA's CPU compiler widens whole stacks of bfloat16 before it slices a layer, so there float32 is smaller.
    """
    narrow = training.method == "lora" and platform() != "cpu"
    return jnp.dtype(config.dtype if narrow else "float32")


def _load_model(
    config: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    domains: Sequence[Domain],
    others: Sequence[Example],
    seed: int,
) -> models.Model:
    if config.source is not None:
        return models.load(config.source, dtype=base_dtype(config, training))
    scratch = config.scratch
    assert scratch is not None
    trained_on = (part for domain in domains for part in (domain.train, domain.validation))
    tokenizer = CharacterTokenizer.from_examples(chain(*trained_on, others))
    shape = llama.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_layers=scratch.num_layers,
        num_heads=scratch.num_heads,
        num_kv_heads=scratch.num_kv_heads,
        head_dim=scratch.hidden_size // scratch.num_heads,
        max_length=data.max_length,
    )
    params = llama.init(shape, key=jax.random.key(seed))
    fingerprint = models.fingerprint(shape, params)
    return models.Model(shape, params, tokenizer, "from scratch", fingerprint)
