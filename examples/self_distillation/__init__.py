"""Self-distillation in one Megatron job: the teacher is the student's own checkpoint, which sees the solution."""
