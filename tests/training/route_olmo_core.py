"""Routes batches of tokens with OLMo-core's own router and losses.

Run by the tests with that package installed: `route_olmo_core.py FILE CASES`, where FILE holds
`x [batches, rows, seq, d_model]` and `router [n_experts, d_model]`; CASES is a list in JSON of
[bias_gamma, normalize_expert_weights, loss_div_factor], numbers or null. Prints as JSON, for each
case and batch, what came out, and the bias after it.
"""

import json
import sys

import numpy as np
import torch
from olmo_core.nn.moe.router import MoELinearRouter

TOP_K = 3


def route(
    batches: torch.Tensor,
    weight: torch.Tensor,
    gamma: float | None,
    norm: float | None,
    n_counted: int | None,
) -> list[dict]:
    """What comes out of each batch."""
    router = MoELinearRouter(
        d_model=weight.shape[1], num_experts=weight.shape[0], top_k=TOP_K,
        bias_gamma=gamma, normalize_expert_weights=norm,
        lb_loss_weight=0.01, z_loss_weight=0.001,
    )  # fmt: skip
    with torch.no_grad():
        router.weight.copy_(weight.reshape(-1))
    results = []
    for x in batches.clone():
        x.requires_grad_()
        router.zero_grad()
        weights, chosen, sizes, loss = router(x, loss_div_factor=n_counted)
        loss.backward()
        metrics = {name: value.item() for name, (value, _) in router.compute_metrics().items()}
        router.post_batch()
        results.append({
            "weights": weights.tolist(), "chosen": chosen.tolist(), "sizes": sizes.tolist(),
            "loss": loss.item(), "metrics": metrics, "dx": x.grad.tolist(),
            "drouter": router.weight.grad.reshape(weight.shape).tolist(),
            "bias": None if router.score_bias is None else router.score_bias.tolist(),
        })  # fmt: skip
    return results


def main(file: str, cases: str) -> None:
    """Route, and print."""
    with np.load(file) as arrays:
        batches, weight = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["router"])
    print(json.dumps([route(batches, weight, *case) for case in json.loads(cases)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
