"""`python -m benchmarks.first_kernel`: every op once, forward and backward, held to the truth. Status 1 if all fail.

The first thing to run on a new GPU: where no op is right, no other number means anything. One that is wrong is told
here, and by parity and each benchmark of it.
"""

import kernels  # noqa: F401, I001  first: it chooses Triton's interpreter where there is no GPU

import torch

from benchmarks import machine, problems, providers, suite
from kernels import catalogue


def main() -> int:
    """Check the smallest real case of each op, in fp32; print a line for each."""
    failures = 0
    for op in catalogue.OPS:
        case = problems.small_cases(op)[0]
        problem = problems.Problem(op, case, torch.float32, machine.here().torch_device)
        fields, _ = suite.judge(providers.PROVIDERS["triton"], problem, problems.Checker(problem))
        right = "error_over_allowed" in fields
        failures += not right
        said = f"right, error {fields['error_over_allowed']:.2f} of what is allowed" if right else fields["reason"]
        print(f"{op.name}, {problem.shape}: {said}", flush=True)
    return int(failures == len(catalogue.OPS))


if __name__ == "__main__":
    raise SystemExit(main())
