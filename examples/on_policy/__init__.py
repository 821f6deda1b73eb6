"""On-policy distillation in one Megatron job: the student samples, a verifier scores, the teacher corrects."""
