"""A mini-GPT that anyone can train in one command, on Triton kernels behind a flag.

What computes with PyTorch here imports `kernels` before it makes an optimizer: where there is no GPU that chooses
Triton's interpreter, which is possible only until somebody imports Triton.
"""
