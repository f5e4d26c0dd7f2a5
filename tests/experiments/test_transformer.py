"""The character transformer: what it sees, and the text that it is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.problems.transformer import (
    FUNCTIONS,
    LENGTH,
    PROBLEM,
    _rotate,
    load_data,
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(FUNCTIONS.init)(jax.random.key(0))


def test_a_character_sees_those_before_it_only(params):
    characters = jax.random.randint(jax.random.key(1), (LENGTH,), 0, 128)
    changed = characters.at[40].add(1)
    apply = jax.jit(FUNCTIONS.apply)
    before, after = (apply(params, text) for text in (characters, changed))
    np.testing.assert_array_equal(before[:40], after[:40])
    assert (jnp.abs(before[40:] - after[40:]).max(axis=1) > 0).all()


def test_rotary_scores_depend_on_distances_alone():
    queries, keys = jax.random.normal(jax.random.key(0), (2, 1, 1, 16))
    rotated_queries = _rotate(jnp.tile(queries, (10, 1, 1)))[:, 0]
    rotated_keys = _rotate(jnp.tile(keys, (10, 1, 1)))[:, 0]
    scores = rotated_queries @ rotated_keys.T
    for distance in (0, 3):
        diagonal = jnp.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4)
    assert abs(scores[0, 0] - scores[0, 3]) > 1e-3
    # A rotation keeps lengths.
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated_keys, axis=1), jnp.linalg.norm(keys), rtol=1e-5
    )


def test_rotation_at_the_first_position_is_none():
    vectors = jax.random.normal(jax.random.key(0), (4, 2, 16))
    np.testing.assert_array_equal(_rotate(vectors)[0], vectors[0])


def test_embedding_and_head_are_one_parameter(params):
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert shapes.count((128, 64)) == 1
    assert not any(128 in shape for shape in shapes if shape != (128, 64))


def test_text_is_split_by_topic_into_characters():
    data = load_data(None)
    for part in (data.training, data.test):
        assert part.shape[1:] == (LENGTH + 1,)
        assert part.dtype == jnp.int32
        assert int(part.min()) >= 0
        assert int(part.max()) < 128
    assert len(data.training) > 5 * len(data.test) > 500
    text = "".join(map(chr, np.asarray(data.training[:50]).ravel()))
    assert text.count("e") > text.count("q")
    assert not {row.tobytes() for row in np.asarray(data.test)} & {
        row.tobytes() for row in np.asarray(data.training)
    }


def test_untrained_loss_is_near_that_of_a_guess(params):
    loss, metrics = jax.jit(PROBLEM.evaluate)(params, load_data(None).training[0])
    assert abs(float(loss) - np.log(128)) < 1.0
    assert 0.0 <= float(metrics["accuracy"]) <= 1.0
