"""Files that last: JSON and tensors, each on the disk before anybody relies on it, and checksums that prove them whole.

Nothing that is read here can run code.
"""

import hashlib
import json
import os
import platform
import re
import stat
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import Damaged, UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The version of what a folder of such files holds; a reader refuses a newer one."""

SEAL = "checksums.json"
"""The file that names every other one with its SHA-256."""

_LIBRARIES = ("torch", "triton", "numpy", "safetensors")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON values, and wait until they are on the disk. Raises ValueError for NaN and infinity."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises Damaged when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged")
    return value


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name as safetensors, and wait until they are on the disk."""
    from safetensors.torch import save_file  # with it comes PyTorch, which preparing a text does without

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        # safetensors tells the system's errors in words of its own, the number among them.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error
    sync(path)


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors in a file, by name, on the CPU. Raises Damaged when they cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that compute and store."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # there is no Triton on macOS and Windows
            continue
    return found


def seal(folder: Path) -> None:
    """Write the checksums of every file in `folder` beside them, and wait until all of it is on the disk."""
    (folder / SEAL).unlink(missing_ok=True)
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    value = {"format": FORMAT, "versions": versions(), "files": files}
    write_json(folder / SEAL, value | {"checksum": _digest(value)})
    # safetensors makes its files for their owner alone; the others followed the umask
    mode = stat.S_IMODE((folder / SEAL).stat().st_mode)
    for name in files:
        (folder / name).chmod(mode)
    sync(folder)


def verify(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Hold the files in `folder` to their checksums, those in `leave_out` excepted; the checksums by name.

    Raises Damaged when one is missing or has changed, and UserError when a newer version has written them.
    """
    value = read_json(folder / SEAL)
    files, version = value.get("files"), value.get("format")
    stored = value.pop("checksum", None)
    if stored != _digest(value) or not isinstance(files, dict) or not isinstance(version, int):
        raise Damaged(f"{folder / SEAL} is damaged")
    if version > FORMAT:
        raise UserError(
            f"{folder} was written by a newer minigpt (format {version}, and this one reads up to {FORMAT}): "
            "update minigpt"
        )
    for name in files.keys() - set(leave_out):
        try:
            found = _sha256(folder / name)
        except FileNotFoundError:
            raise Damaged(f"{folder / name} is missing") from None
        except OSError as error:
            raise Damaged(f"{folder / name} is damaged ({error})") from None
        if found != files[name]:
            raise Damaged(f"{folder / name} is damaged, its SHA-256 is not the stored one")
    return files


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
