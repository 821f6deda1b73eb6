"""The demo: distil a shallower SmolLM2 from the real one on mathematical reasoning, with two Megatron jobs."""
