"""A mini-GPT that anyone can train in one command, on Triton kernels behind a flag.

Importing `kernels` comes first, before anything of ours or PyTorch's optimizers: where there is no GPU it chooses
Triton's interpreter, which is possible only until somebody imports Triton.
"""

import kernels  # noqa: F401
