"""Triton kernels for CUDA GPUs of compute capability 8.0 and up; nothing is imported here, so Triton stays optional."""
