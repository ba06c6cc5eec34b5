"""Cross-entropy over a large vocabulary that holds the logits of a few tokens at a time."""

import functools

import jax
import jax.numpy as jnp

from olmo_jax.sharding import BATCH_AXES, axis_size, constrain

Sums = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    z_loss: float | None = None,
    chunk: int | None = None,
    grad_dtype: str = "float32",
) -> tuple[jax.Array, Sums]:
    """Weighted next-token loss from hidden states, without holding `[batch, seq, vocab]`.

    loss = Σ weights · (lse − logit of the target + z_loss · lse²), lse = logsumexp(logits) in fp32.
    Its gradients are made in the forward pass, chunk by chunk, so that no logits are kept or
    computed twice.

    Args:
      x: [batch, seq, d_model].
      head: [d_model, vocab_rows]; columns from `vocab_size` on never score.
      targets: [batch, seq] int32.
      weights: [batch, seq] fp32, 0 where there is no loss.
      vocab_size: columns that score.
      z_loss: coefficient of lse²; None for none.
      chunk: tokens per device whose logits exist at once; None for all.
      grad_dtype: in which the head's gradient is accumulated.

    Returns:
      loss, fp32 scalar, and its parts, not differentiable: `ce`, `z` (Σ weights · lse²), fp32.
    """
    return _run(x, head, targets, weights, vocab_size, z_loss, chunk, None)[0]


def _run(x, head, targets, weights, vocab_size, z_loss, chunk, grad_dtype):
    """(loss, parts) and, if `grad_dtype` is given, (dx, d_head)."""
    with_grads = grad_dtype is not None
    n = _n_chunks(x.shape, chunk)
    split = functools.partial(_split, n=n)
    w = constrain(head.astype(x.dtype), (None, "vocab"))  # gathered once, not in each chunk

    def body(carry, inputs):
        x, targets, weights = inputs
        sums, dw = carry
        logits = jnp.einsum("btd,dv->btv", x, w, preferred_element_type=jnp.float32)
        logits = constrain(logits, ("batch", "seq", "vocab"))
        if vocab_size < head.shape[1]:
            scores = jnp.arange(head.shape[1]) < vocab_size
            logits = jnp.where(scores[None, None], logits, jnp.finfo(jnp.float32).min)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        parts = {"ce": jnp.sum(weights * (lse - picked)), "z": jnp.sum(weights * lse**2)}
        sums = jax.tree.map(jnp.add, sums, parts)
        if not with_grads:
            return (sums, dw), None
        scale = weights if z_loss is None else weights * (1.0 + 2.0 * z_loss * lse)
        p = jnp.exp(logits - lse[..., None]) * scale[..., None]
        hit = jnp.arange(head.shape[1])[None, None] == targets[..., None]
        d_logits = (p - jnp.where(hit, weights[..., None], 0.0)).astype(x.dtype)
        dx = jnp.einsum("btv,dv->btd", d_logits, w)
        dtype = jnp.dtype(grad_dtype)
        dw = dw + jnp.einsum("btd,btv->dv", x, d_logits, preferred_element_type=dtype)
        return (sums, dw), dx

    zero = jnp.zeros((), jnp.float32)
    dw = jnp.zeros(head.shape, grad_dtype) if with_grads else zero
    carry, inputs = ({"ce": zero, "z": zero}, dw), (split(x), split(targets), split(weights))
    if n == 1:
        (sums, dw), dx = body(carry, jax.tree.map(lambda a: a[0], inputs))
    else:
        (sums, dw), dx = jax.lax.scan(body, carry, inputs)
        dx = None if dx is None else _join(dx)
    loss = sums["ce"] + (z_loss or 0.0) * sums["z"]
    return (loss, sums), (dx, dw)


def _n_chunks(shape: tuple[int, ...], chunk: int | None) -> int:
    """Chunks along the sequence: the fewest that hold at most `chunk` tokens per device."""
    batch, seq = shape[0] // axis_size(*BATCH_AXES), shape[1] // axis_size("context")
    if chunk is None or batch * seq <= chunk:
        return 1
    need = -(-batch * seq // chunk)
    return next((n for n in range(need, seq) if seq % n == 0), seq)


def _split(x: jax.Array, n: int) -> jax.Array:
    """[batch, seq, …] -> [n, batch, seq / n, …], strided, which keeps the shards of `seq` whole."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // n, n, *x.shape[2:]), 2, 0)


def _join(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _forward(x, head, targets, weights, vocab_size, z_loss, chunk, grad_dtype):
    out, grads = _run(x, head, targets, weights, vocab_size, z_loss, chunk, grad_dtype)
    # An empty slice carries the dtype of the head to the backward pass.
    return out, (*grads, head[:0])


def _backward(vocab_size, z_loss, chunk, grad_dtype, residuals, cotangents):
    dx, dw, like = residuals
    scale = cotangents[0]  # of the loss; its parts are for reports
    return (dx * scale).astype(dx.dtype), (dw * scale).astype(like.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
