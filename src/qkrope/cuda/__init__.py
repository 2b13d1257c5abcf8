"""The CUDA backend: compile (NVRTC, disk cache) and launch."""
