"""Train a mini-GPT: `python train.py --help`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

from minigpt import config, errors, trainer


def main() -> None:
    """Train as the command line says."""
    trainer.train(config.parse())


if __name__ == "__main__":
    errors.door(main)
