import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.training.losses import normalize

WEIGHTS = np.ones((4, 8), np.float32)
WEIGHTS[:, -1] = 0  # no target behind the last token
WEIGHTS[1, 3:] = 0  # a short row
WEIGHTS[2] = 0  # masked by the instance filter
CE = np.random.default_rng(0).random((4, 8)).astype(np.float32)


def loss(mode, ranks=1, weights=WEIGHTS):
    return float((np.asarray(normalize(jnp.asarray(weights), mode, ranks)) * CE).sum())


def test_global_tokens_is_the_mean_over_tokens():
    np.testing.assert_allclose(loss("global_tokens"), CE[WEIGHTS > 0].mean(), rtol=1e-6)


def test_legacy_positions_divides_by_all_positions():
    np.testing.assert_allclose(loss("legacy_positions"), CE[WEIGHTS > 0].sum() / 32, rtol=1e-6)


def test_per_instance_is_a_mean_of_means():
    means = [CE[i][WEIGHTS[i] > 0].mean() for i in (0, 1, 3)]
    np.testing.assert_allclose(loss("per_instance"), np.mean(means), rtol=1e-6)


def test_per_rank_tokens_is_olmo_cores_mean_of_rank_means():
    # Rank r holds rows r, r + 2, …; a masked row's tokens stay in its rank's divisor.
    ranks = []
    for rows in ([0, 2], [1, 3]):
        total = sum(CE[i][WEIGHTS[i] > 0].sum() for i in rows)
        ranks.append(total / sum(WEIGHTS[i].sum() if WEIGHTS[i].any() else 8 for i in rows))
    np.testing.assert_allclose(loss("per_rank_tokens", 2), np.mean(ranks), rtol=1e-6)


@pytest.mark.parametrize(
    "mode", ["global_tokens", "per_rank_tokens", "per_instance", "legacy_positions"]
)
def test_a_batch_without_tokens_gives_zero(mode):
    # Known fault: a rank whose rows are all masked divided by zero.
    assert loss(mode, 4, np.zeros_like(WEIGHTS)) == 0.0
    one_rank_empty = WEIGHTS.copy()
    assert np.isfinite(loss(mode, 4, one_rank_empty))
