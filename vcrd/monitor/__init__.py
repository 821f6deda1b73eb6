"""What a run records about itself: telemetry of each rank, readings of the GPU through NVML, and the files of records.
Also the advice that follows from which job waited for the other. This package knows neither Megatron nor the loss."""
