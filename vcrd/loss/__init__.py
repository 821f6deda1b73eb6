"""The loss: `api` calibrates a divergence by the validity of both models' proposals; `reference` is its truth.

A call passes through these modules in this order. `api` (or `fused_head`) takes the arguments, and a `config` that was
checked before; `checks` checks the tensors on every rank alike; `divergence` computes statistics, divergence and
gradient with the kernels of `ops`, from the teacher's logits as `teacher_blocks` makes them; `judge` finds
what a teacher that knows more thinks of both actions, if there is one; `validity` turns the statistics into weights.
"""
