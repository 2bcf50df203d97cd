"""Write text with a trained model: `python generate.py --help`."""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

from minigpt import commands, errors

if __name__ == "__main__":
    errors.door(commands.generate)
