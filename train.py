"""Train a mini-GPT: `python train.py --help`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

from minigpt import errors, trainer

if __name__ == "__main__":
    errors.door(trainer.run_train)
