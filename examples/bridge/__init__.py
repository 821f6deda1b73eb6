"""Distillation by Megatron-Bridge from Hugging Face checkpoints, and back to one."""
