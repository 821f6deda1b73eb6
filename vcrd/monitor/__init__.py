"""What a run records of itself: telemetry of each rank, the GPU as NVML sees it, the files of records, and the advice
that follows from who waited for whom. Knows neither Megatron nor the loss."""
