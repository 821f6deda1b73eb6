"""The demo: distils SmolLM2 into a shallower model on mathematical reasoning, with two Megatron jobs."""
