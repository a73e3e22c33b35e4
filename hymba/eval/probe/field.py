"""The effective receptive field (paper, equation 5): how far back the last token looks.

    ERF = sum_n sum_h sum_s  2 M^h_n(S, s) (S - s) (N - n + 1)  /  (H N (N + 1))

N layers, H heads, S the last token, M^h_n(S, s) its weight on token s in layer n (n = 1 is the
first). 2 (N - n + 1) / (N (N + 1)) adds up to 1 and counts early layers more, since what they
gather every later one hands on. So it is a mean distance in tokens.

Ours to decide, because the paper does not say: meta tokens stand outside the text, a look at them
is no distance; in a layer with both branches the mean of attention's heads and the mean of the
SSM's channels count half each; a layer without a branch has nothing to add to that branch's field.
"""

from __future__ import annotations

from collections.abc import Sequence

Reach = dict[str, float]  # {branch: tokens back} of one layer


def weights(layers: int) -> list[float]:
    """How much each layer counts, first layer first; they add up to 1."""
    return [2 * (layers - index) / (layers * (layers + 1)) for index in range(layers)]


def field(layers: Sequence[Reach]) -> Reach:
    """{"both": ..., "attention": ..., "ssm": ...} in tokens, of the branches that there are."""
    each = weights(len(layers))
    both = [sum(reach.values()) / max(1, len(reach)) for reach in layers]
    found = {"both": sum(w * reach for w, reach in zip(each, both, strict=True))}
    for branch in ("attention", "ssm"):
        if any(branch in reach for reach in layers):
            found[branch] = sum(
                w * reach.get(branch, 0.0) for w, reach in zip(each, layers, strict=True)
            )
    return found
