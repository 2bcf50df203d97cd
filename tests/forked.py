"""Programs in processes of their own that need not import PyTorch and Triton again: forked from one that has.

No GPU is seen there, and whether kernels are compiled or interpreted is chosen. `run` is subprocess.run of such a
Python, but for what is looked at while Python and PyTorch start: variables as PYTHONIOENCODING come too late.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = {  # by TRITON_INTERPRET
    "0": ("profiling.resources", "profiling.emulate", "profiling.host", "profiling.trace", "triton.compiler"),
    "1": ("kernels.catalogue", "minigpt.trainer", "minigpt.prompting"),
}


def run(
    *arguments: str, interpret: str = "0", cwd: Path = ROOT, timeout: int = 600, **environment: str
) -> subprocess.CompletedProcess:
    """`python arguments...`, which are -c SCRIPT, -m MODULE or a file, and its own.

    `interpret` is TRITON_INTERPRET while Triton and the kernels are imported; `environment` may have another one for
    processes that it starts. A process that takes longer than `timeout` seconds is killed: its status is that of
    SIGALRM.
    """
    with tempfile.TemporaryDirectory() as folder:
        server = _server(interpret)
        wanted = {"arguments": arguments, "environment": environment, "folder": folder, "timeout": timeout}
        wanted["cwd"] = str(cwd)
        server.stdin.write(json.dumps(wanted) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        said = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, status, *said)


@functools.cache
def _server(interpret: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, str(Path(__file__))], cwd=ROOT, env=environment, **pipes)
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve() -> None:
    for name in IMPORTED[os.environ["TRITON_INTERPRET"]]:
        importlib.import_module(name)
    for line in sys.stdin:
        wanted = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        signal.alarm(wanted["timeout"])
        os.environ |= wanted["environment"]
        os.chdir(wanted["cwd"])
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(Path(wanted["folder"], name), os.O_WRONLY | os.O_CREAT), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os._exit(_status(*wanted["arguments"]))


def _status(what: str, *arguments: str) -> int:
    """Be that program; its exit status."""
    try:
        if what == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif what == "-m":
            sys.argv = [arguments[0], *arguments[1:]]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [what, *arguments]
            sys.path.insert(0, str(Path(what).parent))
            runpy.run_path(what, run_name="__main__")
        status = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        status = 0 if left.code is None else left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()
