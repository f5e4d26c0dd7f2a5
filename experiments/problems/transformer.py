"""A small transformer that predicts the next character of Python's own manual.

Command     python -m experiments dissect transformer --batch-sizes 8 64
Time        about half an hour on two CPU cores; the smoke under five minutes
Result      docs/dissect.md

Data        `pydoc_data.topics`, the help texts that come with Python, English prose of
            about 465 000 characters, which change with Python's version (the record
            holds a digest); every tenth topic is for the test
Example     a sequence of 64 characters and the next one: characters within a sequence
            depend on each other, so the example, whose gradient has a variance, is the
            sequence
Network     two blocks of width 64 with four heads: causal attention with rotary
            positions, RMSNorm before each part, GELU, tied embedding and head
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dissect_optax.dissection import Data, Settings
from experiments.problems.problem import (
    ExperimentProblem,
    NetworkFunctions,
    loss_without_noise,
)

LENGTH = 64  # Characters in a sequence.
_ALPHABET = 128  # Plain text; other characters become one of their own.
_WIDTH, _HEADS, _BLOCKS = 64, 4, 2


def load_data(data_dir: Path | None) -> Data:
    """Sequences `[examples, 65]` of characters; `data_dir` is ignored."""
    del data_dir
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    parts = [texts[index::10] for index in range(10)]
    training = [text for part in parts[:9] for text in part]
    return Data(training=_sequences(training), test=_sequences(parts[9]))


def _sequences(texts: list[str]) -> jax.Array:
    """Texts cut into sequences that do not overlap, in random order."""
    codes = np.array([ord(character) for character in "\n\n".join(texts)], np.int32)
    codes = np.where(codes < _ALPHABET, codes, 0)
    count = len(codes) // (LENGTH + 1)
    sequences = codes[: count * (LENGTH + 1)].reshape(count, LENGTH + 1)
    return jnp.asarray(np.random.default_rng(0).permutation(sequences))


def _rotate(vectors: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021) of queries or keys `[length, heads, size]`."""
    length, _, size = vectors.shape
    frequencies = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.outer(jnp.arange(length), frequencies)[:, None, :]
    even, odd = jnp.split(vectors, 2, axis=-1)
    return jnp.concatenate(
        [
            even * jnp.cos(angles) - odd * jnp.sin(angles),
            odd * jnp.cos(angles) + even * jnp.sin(angles),
        ],
        axis=-1,
    )


class Block(nnx.Module):
    """Attention and a dense layer, each added to what comes in."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(_WIDTH, rngs=rngs)
        self.to_heads = nnx.Linear(_WIDTH, 3 * _WIDTH, use_bias=False, rngs=rngs)
        self.from_heads = nnx.Linear(_WIDTH, _WIDTH, use_bias=False, rngs=rngs)
        self.dense_norm = nnx.RMSNorm(_WIDTH, rngs=rngs)
        self.widen = nnx.Linear(_WIDTH, 4 * _WIDTH, use_bias=False, rngs=rngs)
        self.narrow = nnx.Linear(4 * _WIDTH, _WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Hidden vectors `[length, width]`."""
        heads = self.to_heads(self.attention_norm(hidden))
        heads = heads.reshape(-1, 3, _HEADS, _WIDTH // _HEADS)
        queries, keys, values = heads[:, 0], heads[:, 1], heads[:, 2]
        mixed = jax.nn.dot_product_attention(
            _rotate(queries), _rotate(keys), values, is_causal=True
        )
        hidden = hidden + self.from_heads(mixed.reshape(-1, _WIDTH))
        wide = jax.nn.gelu(self.widen(self.dense_norm(hidden)))
        return hidden + self.narrow(wide)


class Network(nnx.Module):
    """Embedding, blocks, and the embedding again."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(
            _ALPHABET,
            _WIDTH,
            embedding_init=nnx.initializers.normal(0.1),
            rngs=rngs,
        )
        # By name: a list of modules is stored differently by different Flax versions.
        for index in range(_BLOCKS):
            setattr(self, f"block{index}", Block(rngs))
        self.norm = nnx.RMSNorm(_WIDTH, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Logits `[length, 128]` of the characters after these `[length]`."""
        hidden = self.embedding(characters)
        for index in range(_BLOCKS):
            hidden = getattr(self, f"block{index}")(hidden)
        return self.embedding.attend(self.norm(hidden))


FUNCTIONS = NetworkFunctions(Network)


def evaluate(
    params: nnx.State, sequence: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of a sequence in nats per character, and its accuracy."""
    logits = FUNCTIONS.apply(params, sequence[:-1])
    following = sequence[1:]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, following)
    correct = jnp.argmax(logits, axis=-1) == following
    return jnp.mean(losses), {"accuracy": jnp.mean(correct.astype(jnp.float32))}


PROBLEM = ExperimentProblem(
    name="transformer",
    title="Character transformer",
    settings=Settings(steps=1000, batch_size=8, evaluation_interval=50, examples=1000),
    smoke=Settings(steps=10, batch_size=4, evaluation_interval=5, examples=16),
    init=FUNCTIONS.init,
    loss=loss_without_noise(evaluate),
    evaluate=evaluate,
    load_data=load_data,
    description={"network": "2 blocks of width 64, 4 heads, length 64; tied embedding"},
)
