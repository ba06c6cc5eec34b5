"""Cross-entropy over a large vocabulary that holds the logits of a few tokens at a time."""

import functools

import jax
import jax.numpy as jnp

from olmo_jax.parallel.sharding import (
    BATCH_AXES,
    Axes,
    axis_index,
    axis_size,
    constrain,
    on_each_device,
    sum_gradient,
    summed,
)

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
    """(loss, parts) and, if `grad_dtype` is given, (dx, d_head).

    Each device works on its own tokens and columns, and the sums over devices come last: left to
    XLA, the gradient of the head would be summed over the mesh in every chunk.
    """
    with_grads = grad_dtype is not None
    w = constrain(head.astype(x.dtype), (None, "vocab"))  # gathered once, not in each chunk

    def here(x, w, targets, weights):
        tokens = x.shape[0] * x.shape[1]
        n = 1 if chunk is None else -(-tokens // chunk)
        columns = jnp.arange(w.shape[1]) + axis_index("tensor") * w.shape[1]

        def body(carry, inputs):
            (sums, dw), (x, targets, weights) = carry, inputs
            parts, dx, more = _of_chunk(
                x,
                targets,
                weights,
                w,
                columns,
                vocab_size,
                z_loss,
                grad_dtype if with_grads else None,
            )
            sums = jax.tree.map(jnp.add, sums, parts)
            return (sums, dw + more if with_grads else dw), dx

        zero = jnp.zeros((), jnp.float32)
        dw = jnp.zeros(w.shape, grad_dtype) if with_grads else zero
        chunks = [_in_chunks(a.reshape(tokens, *a.shape[2:]), n) for a in (x, targets, weights)]
        (sums, dw), dx = jax.lax.scan(body, ({"ce": zero, "z": zero}, dw), tuple(chunks))
        sums = summed(sums, *BATCH_AXES, "context")
        if dx is None:
            return (sums,)
        dx = dx.reshape(-1, dx.shape[-1])[:tokens].reshape(x.shape)
        return sums, summed(dx, "tensor"), sum_gradient(dw, 0)

    of_x: Axes = ("batch", "seq", None)
    into = of_x, (None, "vocab"), ("batch", "seq"), ("batch", "seq")
    out_of = ((), of_x, ("embed", "vocab")) if with_grads else ((),)
    sums, *grads = on_each_device(here, into, out_of, x, w, targets, weights)
    loss = sums["ce"] + (z_loss or 0.0) * sums["z"]
    return (loss, sums), tuple(grads)


def _of_chunk(x, targets, weights, w, columns, vocab_size, z_loss, grad_dtype):
    """Sums, dx (of these columns) and dw of tokens `x [n, d_model]` and `columns` of the head."""
    logits = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    scores = (columns < vocab_size)[None]
    logits = jnp.where(scores, logits, jnp.finfo(jnp.float32).min)
    top = logits.max(1, keepdims=True)
    if axis_size("tensor") > 1:
        top = jax.lax.pmax(top, "tensor")
    lse = top + jnp.log(summed(jnp.exp(logits - top).sum(1, keepdims=True), "tensor"))
    targets, weights = targets[:, None], weights[:, None]
    at = targets - columns[0]
    is_here = (at >= 0) & (at < columns.size)
    picked = jnp.take_along_axis(logits, jnp.clip(at, 0, columns.size - 1), axis=1)
    picked = summed(jnp.where(is_here, picked, 0.0), "tensor")
    parts = {"ce": jnp.sum(weights * (lse - picked)), "z": jnp.sum(weights * lse**2)}
    if grad_dtype is None:
        return parts, None, None
    scale = weights if z_loss is None else weights * (1.0 + 2.0 * z_loss * lse)
    of_target = jnp.where(columns[None] == targets, weights, 0.0)
    d_logits = (jnp.exp(logits - lse) * scale - of_target).astype(x.dtype)
    dw = jnp.matmul(x.T, d_logits, preferred_element_type=jnp.dtype(grad_dtype))
    return parts, d_logits @ w.T, dw


def _in_chunks(x: jax.Array, n: int) -> jax.Array:
    """`x [tokens, …]` as `n` chunks of one size, filled up with zeros: tokens without weight."""
    size = -(-len(x) // n)
    return jnp.pad(x, [(0, n * size - len(x)), *[(0, 0)] * (x.ndim - 1)]).reshape(
        n, size, *x.shape[1:]
    )


def _forward(x, head, targets, weights, vocab_size, z_loss, chunk, grad_dtype):
    out, grads = _run(x, head, targets, weights, vocab_size, z_loss, chunk, grad_dtype)
    # An empty slice carries the dtype of the head to the backward pass.
    return out, (*grads, head[:0])


def _backward(vocab_size, z_loss, chunk, grad_dtype, residuals, cotangents):
    dx, dw, like = residuals
    scale = cotangents[0]  # of the loss; its parts are for reports
    return (dx * scale).astype(dx.dtype), (dw * scale).astype(like.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
