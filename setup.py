"""Installs `kernels` and `minigpt`. Benchmarks and profiling run from the checkout."""

from setuptools import setup

TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3",
    "hypothesis>=6.100",
    "expecttest>=0.3",
    "transformers>=5",
    "ruff",
]

setup(
    name="minigpt-kernels",
    version="0.1.0",
    description="A mini-GPT whose attention, layer norm and cross-entropy are Triton kernels behind a flag",
    license="MIT",
    python_requires=">=3.11,<3.15",
    packages=["kernels", "minigpt", "minigpt.experiments"],
    package_data={"kernels": ["tiles/*.json"], "minigpt": ["pages/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",  # a CPU build of torch does not bring it
        "numpy>=1.26",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "tyro>=0.9",
        "rich>=13",
    ],
    extras_require={"test": TEST, "watch": ["tensorboard", "wandb"], "bpe": ["tokenizers>=0.20"], "web": ["gradio>=6"]},
)
