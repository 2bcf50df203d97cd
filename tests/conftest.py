"""What every test shares: the interpreter's choice, the device, the skips that are allowed, the parity table."""

import fnmatch
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks and profiling run from the checkout, they are not installed
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # what is cached knows nothing of a fake that changed
# numpy's products in Triton's interpreter are too small for threads, which wait for each other in loops
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

EMULATED = os.environ.get("KERNELS_EMULATE", "")  # run kernels as compiled for this target, on an emulated GPU
if EMULATED:
    os.environ |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}

import kernels  # noqa: E402, I001 - before anything that imports Triton

import pytest  # noqa: E402
import torch  # noqa: E402

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
RATIOS = pytest.StashKey[dict]()
SKIPPED = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--measure-caps",
        metavar="FILE",
        help="hold the parity tests to no cap, and write caps from their errors, as tests/kernels/caps.json has them",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: needs Triton's interpreter in a process of its own")
    config.addinivalue_line("markers", "interpreted: runs kernels on the CPU: needs the interpreter in this process")
    if EMULATED:
        _emulate()
    config.stash[RATIOS] = {}
    config.stash[SKIPPED] = []
    if worker := getattr(config, "workerinput", None):
        if config.getoption("--measure-caps"):
            raise pytest.UsageError("--measure-caps needs every ratio in one process: leave out -n")
        torch.set_num_threads(max(1, _cores() // worker["workercount"]))


def _emulate() -> None:
    if not kernels.device.HAS_TRITON:
        raise pytest.UsageError("KERNELS_EMULATE needs Triton to compile the kernels: pip install triton")
    from profiling.emulator.driver import emulate

    try:
        emulate(EMULATED)
    except ValueError as error:
        raise pytest.UsageError(f"KERNELS_EMULATE={EMULATED}: {error}") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means: a process for each core, two of which may share one that is physical."""
    return min(8, _cores())


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let each process take a stretch of tests, and steal from others in the end: in turns, as it is else, a module's
    fixtures would be made in all of them."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items):
    no_gpu = None if torch.cuda.is_available() and not kernels.device.INTERPRETED else "needs a CUDA GPU"
    # without a GPU the interpreter is what is tested: there a misfit is a failure
    misfit = None if kernels.device.HAS_TRITON else "Triton is not installed"
    if torch.cuda.is_available() and not misfit:
        misfit = kernels.device.interpreter_misfit()
    compiled = None
    if (torch.cuda.is_available() or EMULATED) and not kernels.device.INTERPRETED:
        compiled = "kernels are compiled for the GPU here: TRITON_INTERPRET=1 pytest runs it"
    for item in items:
        for marker, reason in (("gpu", no_gpu), ("interpreter", misfit), ("interpreted", misfit or compiled)):
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU in Triton's interpreter."""
    chosen = torch.device("cuda" if torch.cuda.is_available() and not kernels.device.INTERPRETED else "cpu")
    refusal = kernels.device.why_not(chosen)
    if not kernels.device.HAS_TRITON:
        pytest.skip("Triton is not installed")
    assert refusal is None, refusal
    return chosen


@pytest.fixture(scope="session")
def ratios(request) -> dict:
    """(op, dtype, quantity) -> {"max": (ratio, case), "rms": ..., "error_max": ..., "error_rms": ...}, the largest."""
    return request.config.stash[RATIOS]


# ---------------------------------------------------------------- what may skip


def _allowed() -> list[tuple[str, str]]:
    lines = (line.strip() for line in ALLOWED_SKIPS.read_text().splitlines())
    return [tuple(part.strip() for part in line.split("|", 1)) for line in lines if line and not line.startswith("#")]


def _note_skip(config, report):
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    allowed = any(fnmatch.fnmatch(report.nodeid, where) and fnmatch.fnmatch(reason, why) for where, why in _allowed())
    if not allowed:
        config.stash[SKIPPED].append((report.nodeid, reason))


class _Skips:
    """Collects the skips that no line of allowed_skips.txt covers; the reports' hooks are not given the config."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        _note_skip(self.config, report)

    def pytest_collectreport(self, report):
        _note_skip(self.config, report)


def pytest_sessionstart(session):
    session.config.pluginmanager.register(_Skips(session.config), "allowed-skips")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first one tells
        stash = session.config.stash
        session.config.workeroutput |= {"ratios": list(stash[RATIOS].items()), "skipped": stash[SKIPPED]}
    elif session.config.stash[SKIPPED] and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Take over what one of several processes has found, when it ends."""
    told = getattr(node, "workeroutput", {})
    ratios, skipped = node.config.stash[RATIOS], node.config.stash[SKIPPED]
    for key, worst in told.get("ratios", []):
        known = ratios.setdefault(tuple(key), worst)
        known |= {name: max(known[name], value) for name, value in worst.items()}
    skipped += [found for found in map(tuple, told.get("skipped", [])) if found not in skipped]


# ---------------------------------------------------------------- what is printed at the end


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[RATIOS]
    if table:
        terminalreporter.section("parity: error / what the numerics contract allows, the worst case of each")
        terminalreporter.write_line(f"{'op':<40}{'dtype':<10}{'quantity':<10}{'max':>6}  {'case':<28}{'RMS':>6}  case")
        for (op, dtype, quantity), worst in sorted(table.items()):
            (high, high_case), (rms, rms_case) = worst["max"], worst["rms"]
            line = f"{op:<40}{dtype:<10}{quantity:<10}{high:>6.2f}  {high_case:<28}{rms:>6.2f}  {rms_case}"
            terminalreporter.write_line(line)
    if config.stash[SKIPPED]:
        terminalreporter.section("skipped, and not in tests/allowed_skips.txt: this run fails")
        for nodeid, reason in config.stash[SKIPPED]:
            terminalreporter.write_line(f"{nodeid} | {reason}", red=True)
