"""The loss: `api` calibrates a divergence by the validity of both models' proposals; `reference` is its truth.

A call passes through these modules in this order. `api` (or `fused_head`) takes the arguments; `checks` and `agreement`
check them on every rank; `divergence` computes statistics, divergence and gradient with the kernels of `ops`;
`validity` turns the statistics into weights.
"""
