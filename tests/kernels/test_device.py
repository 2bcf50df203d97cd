"""Where kernels run: the interpreter's choice, a missing Triton, facts of devices; helpers that mend Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from parity import DTYPES, name_of

from kernels import device as devices
from kernels.op import cast, dot, fma, tl, triton

ROOT = Path(__file__).resolve().parents[2]


def _python(script: str, **environment: str) -> str:
    """What `script` prints in a process of its own in which no GPU is seen and TRITON_INTERPRET is as told."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "KERNELS_DEBUG")}
    environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN_EACH = """
import json, os, sys, torch
for place, (script, environment) in enumerate(json.load(sys.stdin)):
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, script
        continue
    os.environ |= environment
    os.dup2(os.open(str(place), os.O_WRONLY | os.O_CREAT), 1)
    exec(script, {"__name__": "__main__"})
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """By name, what each of SCRIPTS prints in a process of its own: forked, so that PyTorch is imported once.

    As _python; nothing but PyTorch is imported, and Triton is not.
    """
    folder = tmp_path_factory.mktemp("said")
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "KERNELS_DEBUG")}
    environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command, scripts = [sys.executable, "-c", RUN_EACH], json.dumps(list(SCRIPTS.values()))
    done = subprocess.run(
        command, input=scripts, capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {name: (folder / str(place)).read_text() for place, name in enumerate(SCRIPTS)}


CALL = """
import torch
x = torch.arange(24.0).reshape(3, 8)
try:
    y = kernels.layer_norm(x, 8)
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (8,)), atol=1e-6)
    print("ran")
except RuntimeError as error:
    print(error)
"""
OPTIMIZER = """
import sys, torch
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
assert "triton" in sys.modules, "building an optimizer no longer imports Triton: this test tests nothing"
"""


WITHOUT_TRITON = """
import sys; sys.modules['triton'] = None
import kernels, torch
assert not kernels.device.HAS_TRITON
x = torch.ones(2, 3, 4)
kernels.reference.layer_norm(x, 4); kernels.reference.scaled_dot_product_attention(x, x, x)
kernels.reference.cross_entropy(x[0], torch.tensor([0, 1, 2]))
import kernels.catalogue
target = torch.tensor([0, 1, 2])
for call in (lambda: kernels.layer_norm(x, 4), lambda: kernels.scaled_dot_product_attention(x, x, x),
             lambda: kernels.cross_entropy(x[0], target)):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
SCRIPTS = {  # name -> (script, environment)
    "no GPU": ("import kernels" + CALL, {}),
    "optimizer first": (OPTIMIZER + "import kernels" + CALL, {}),
    "optimizer first, interpreter asked for": (OPTIMIZER + "import kernels" + CALL, {"TRITON_INTERPRET": "1"}),
    "too late": ("import os, triton; os.environ['TRITON_INTERPRET'] = '1'\nimport kernels" + CALL, {}),
    "no interpreter": ("import kernels; assert not kernels.device.INTERPRETED" + CALL, {"TRITON_INTERPRET": "0"}),
    "no Triton": (WITHOUT_TRITON, {}),
}  # fmt: skip


@pytest.mark.interpreter
def test_without_a_gpu_the_interpreter_is_chosen():
    assert _python("import kernels" + CALL) == "ran\n"


@pytest.mark.interpreter
def test_so_it_is_when_pytorch_is_imported_first(said):
    assert said["no GPU"] == "ran\n"


@pytest.mark.interpreter
def test_an_optimizer_built_first_is_told_of(said):
    """Triton was imported as a compiler, and half of it stays so: refused, with what to set."""
    says = said["optimizer first"]
    assert "TRITON_INTERPRET=1" in says and "import kernels" in says and "ran" not in says


@pytest.mark.interpreter
def test_an_optimizer_built_first_is_no_matter_when_the_interpreter_was_asked_for(said):
    assert said["optimizer first, interpreter asked for"] == "ran\n"


@pytest.mark.interpreter
def test_the_interpreter_asked_for_too_late_is_told_of(said):
    says = said["too late"]
    assert "before TRITON_INTERPRET was chosen" in says and "TRITON_INTERPRET=1" in says


def test_no_interpreter_is_obeyed(said):
    says = said["no interpreter"]
    assert "TRITON_INTERPRET=1" in says and "ran" not in says


def test_without_triton(said):
    """Importing and the reference work; calling a kernel says what to install."""
    assert said["no Triton"].count("pip install triton") == 3


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("arch", "tiles"),
    [
        ("sm_80", "sm_80"), ("sm_86", "sm_89"), ("sm_89", "sm_89"), ("sm_90", "sm_90"), ("sm_100", "sm_100"),
        ("sm_103", "sm_100"), ("sm_120", "sm_89"), ("sm_121", "sm_89"), ("gfx90a", "gfx942"), ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)  # fmt: skip
def test_every_architecture_has_a_row_of_tiles_and_is_compiled_for_itself(arch, tiles):
    assert devices.Device(arch, 100, 99 * 1024).tiles == tiles
    target = devices.target(arch)
    assert target.arch == arch and target.tiles == tiles
    assert target.shared_memory == devices.TARGETS[arch if arch in devices.TARGETS else tiles].shared_memory


def test_why_not_names_the_device():
    assert "mps" in devices.why_not(torch.device("mps"))


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "refused"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.5.2", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.5.2", False)],
)
def test_an_interpreter_that_numpy_has_left_behind_is_told_of(triton_version, numpy_version, refused, monkeypatch):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    monkeypatch.setattr(devices, "INTERPRETED", True)
    monkeypatch.setattr(devices, "_ASKED", True)
    devices.interpreter_misfit.cache_clear()
    try:
        said = devices.why_not(torch.device("cpu"))
        assert "Triton 3.6.0" in said and 'pip install "numpy<2.4"' in said if refused else said is None
    finally:
        devices.interpreter_misfit.cache_clear()


@pytest.mark.parametrize(
    ("capability", "refused"), [((7, 5), True), ((8, 0), False), ((8, 6), False), ((12, 0), False)]
)
def test_a_gpu_that_triton_does_not_support_is_told_of(capability, refused, monkeypatch):
    """On one of 7.5 attention's backward kernels ask for more shared memory than there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "ACME T-4")
    devices._too_old.cache_clear()
    try:
        said = devices.why_not(torch.device("cuda"))
        assert "ACME T-4 has compute capability 7.5" in said and "8.0" in said if refused else said is None
    finally:
        devices._too_old.cache_clear()


def test_tf32_is_as_pytorch_is_set():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, allowed in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(setting)
            assert devices.allow_tf32(torch.zeros(1)) == allowed
            assert not devices.allow_tf32(torch.zeros(1, dtype=torch.bfloat16))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("owner", ["torch.backends", "torch.backends.cuda.matmul"])
def test_tf32_is_as_pytorchs_newer_settings_have_it(owner, precision):
    """In a process of its own: PyTorch takes no older setting back after them."""
    told = f"import kernels, torch; {owner}.fp32_precision = {precision!r}"
    done = forked.run("-c", f"{told}\nprint(kernels.device.allow_tf32(torch.zeros(1)))", interpret="1")
    assert done.stdout == f"{precision == 'tf32'}\n", done.stderr


@pytest.mark.gpu
def test_facts_of_the_gpu():
    facts = devices.facts(torch.device("cuda"))
    assert facts.processors > 1 and facts.shared_memory >= 64 * 1024 and facts.tiles in devices.TARGETS


# ---------------------------------------------------------------- helpers that mend the interpreter


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < n)
    tl.store(y_ptr + places, cast(x, y_ptr.dtype.element_ty), mask=places < n)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + columns[None, :])
    c = tl.load(c_ptr + rows[:, None] * N + columns[None, :])
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], dot(a, b, c, "ieee"))


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    a, b, c = tl.load(a_ptr + places), tl.load(b_ptr + places), tl.load(c_ptr + places)
    tl.store(c_ptr + places, fma(a, b, c))


def _floats() -> torch.Tensor:
    """Every fp32 sign and exponent with the mantissas where rounding turns, and a hundred thousand more."""
    turns = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF, 0x18000]
    turns += [0x18001, 0x1FFFF, 0x28000, 0x38000, 0x7F7FFF, 0x7F8000, 0x7F8001, 0x7FEFFF, 0x7FF000, 0x7FFFFF]
    bits = (torch.arange(512)[:, None] << 23) + torch.tensor(turns)[None, :]
    more = torch.randint(0, 1 << 32, (100_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([bits.flatten(), more]).to(torch.uint32).view(torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy says so where a GPU would be silent
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cast_rounds_to_nearest_even_as_pytorch_does(dtype, device):
    x = _floats().to(device)
    y = torch.empty_like(x, dtype=dtype)
    _cast_kernel[(triton.cdiv(x.numel(), 1 << 16),)](x, y, x.numel(), BLOCK=1 << 16)
    expected = x.to(dtype)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    numbers = ~expected.isnan()
    assert torch.equal(y[numbers].view(bits), expected[numbers].view(bits))
    assert torch.equal(y.isnan(), expected.isnan()), "what is not a number stays so"


@pytest.mark.parametrize("start", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cast_between_any_two(start, dtype, device):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device, start)
    y = torch.empty_like(x, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel(), BLOCK=1024)
    assert torch.equal(y, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dot_multiplies_values_and_adds_in_fp32(dtype, device):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 16, 32, 64
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (k, n)))
    c = torch.randn(m, n, generator=generator).to(device)
    exact = c.double() + a.double() @ b.double()
    _dot_kernel[(1,)](a, b, c, M=m, N=n, K=k)
    torch.testing.assert_close(c.double(), exact, rtol=0.0, atol=2e-5)


def test_fma_is_near_the_exact_result(device):
    a, b = (torch.randn(1024, generator=torch.Generator().manual_seed(s)).to(device) for s in (0, 1))
    c = -a * b + 1e-3
    exact = a.double() * b.double() + c.double()
    _fma_kernel[(1,)](a, b, c, BLOCK=1024)
    # one rounding at most for each of the product and the sum
    torch.testing.assert_close(c.double(), exact, rtol=0.0, atol=float((a * b).abs().max()) * 2**-23)
