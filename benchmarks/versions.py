"""`python -m benchmarks.versions`: what this machine is and has, as JSON."""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import json

from benchmarks import machine

if __name__ == "__main__":
    print(json.dumps(machine.describe(), indent=1))
