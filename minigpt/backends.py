"""The flag: which implementation of attention, layer norm and loss the model calls.

`MINIGPT_KERNELS` (or `--kernels`, which wins) names one backend for every op, `triton`, or one per op,
`attention=triton,layer_norm=torch`; ops that are not named follow `auto`. What was asked for by name is what runs, or
an error says why it cannot: nothing falls back silently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table

import kernels
import kernels.device
import kernels.reference

from .errors import UserError
from .linear import linear

OPS = ("attention", "layer_norm", "loss")
BACKENDS = ("eager", "torch", "triton")
AUTO = "auto"


def unpack(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, (B, H, T, D) each, as views of (B, T, 3, H, D)."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    return query, key, value


class Torch:
    """PyTorch's own functions, and in them what it has no fused function for."""

    layer_norm = staticmethod(F.layer_norm)

    @staticmethod
    def scaled_dot_product_attention_qkvpacked(qkv, dropout_p=0.0, is_causal=False):
        query, key, value = unpack(qkv)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=is_causal)
        return out.transpose(1, 2)

    @staticmethod
    def decode_attention(query, key_cache, value_cache, lengths):
        """As kernels.decode_attention, of lengths from 1 on; what lies in the slots beyond must be finite."""
        filled = torch.arange(key_cache.shape[2], device=lengths.device) < lengths[:, None]
        return F.scaled_dot_product_attention(query, key_cache, value_cache, attn_mask=filled[:, None, None])

    @staticmethod
    def add_layer_norm(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
        total = residual + input
        return F.layer_norm(total, normalized_shape, weight, bias, eps), total

    @staticmethod
    def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, **options):
        return F.cross_entropy(linear(input, linear_weight, linear_bias), target, **options)


# Which functions of a backend each op of the flag stands for: field of Backends -> name.
_FUNCTIONS = {
    "attention": {"attention": "scaled_dot_product_attention_qkvpacked", "decode": "decode_attention"},
    "layer_norm": {"layer_norm": "layer_norm", "add_layer_norm": "add_layer_norm"},
    "loss": {"loss": "linear_cross_entropy"},
}
_NAMESPACES = {"eager": kernels.reference, "torch": Torch, "triton": kernels}
_MEANINGS = {
    "eager": "plain PyTorch arithmetic",
    "torch": "PyTorch's fused functions",
    "triton": "our Triton kernels",
}


class Choice(NamedTuple):
    """What one op runs on, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Backends:
    """The functions that the model calls, with the signatures that `kernels` gives them.

    attention(qkv, *, dropout_p=0.0, is_causal=False): (B, T, 3, H, D) -> (B, T, H, D)
    decode(query, key_cache, value_cache, lengths): (B, H, 1, D), (B, H, slots, D) twice, (B,) -> (B, H, 1, D)
    layer_norm(input, normalized_shape, weight, bias, eps): (..., C) -> (..., C)
    add_layer_norm(input, residual, normalized_shape, weight, bias, eps): (..., C) twice -> their sum's norm, their sum
    loss(input, head_weight, targets, *, linear_bias=None, ignore_index=-100): (N, C), (V, C), (N,) int64 -> ()
    """

    attention: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    layer_norm: Callable[..., torch.Tensor]
    add_layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    loss: Callable[..., torch.Tensor]
    choices: dict[str, Choice]
    interpreted: bool

    @property
    def names(self) -> dict[str, str]:
        """Op -> backend, as the summary of a run holds it."""
        return {op: choice.backend for op, choice in self.choices.items()}

    @property
    def warning(self) -> str | None:
        """One loud line when Triton's interpreter runs the kernels, else None."""
        if not self.interpreted:
            return None
        return "Triton kernels run in Triton's INTERPRETER here: it checks that they are correct, and it is very slow"

    def table(self) -> Table:
        """The table that training prints first: each op, what it runs on, and why."""
        table = Table(title="kernels", title_justify="left")
        for heading in ("op", "backend", "why"):
            table.add_column(heading)
        for op, choice in self.choices.items():
            table.add_row(op, choice.backend, choice.reason)
        return table


def parse_request(request: str | None) -> dict[str, str]:
    """Op -> what was asked for it (a backend, or `auto`), from the flag's text; None or "" asks for `auto`.

    Raises UserError for an unknown op or backend, listing the right ones.
    """
    request = (request or "").strip().lower() or AUTO
    if "=" not in request:
        return dict.fromkeys(OPS, _known_backend(request))
    asked = dict.fromkeys(OPS, AUTO)
    named = set()
    for part in request.split(","):
        op, _, backend = (piece.strip() for piece in part.partition("="))
        if op not in OPS:
            raise UserError(f"unknown op {op!r} in kernels {request!r}: the ops are {', '.join(OPS)}")
        if op in named:
            raise UserError(f"op {op!r} is named twice in kernels {request!r}")
        named.add(op)
        asked[op] = _known_backend(backend)
    return asked


def will_interpret(request: str | None, device: torch.device) -> bool:
    """Whether some op that `request` names would run in Triton's interpreter on `device`."""
    return (
        "triton" in parse_request(request).values()
        and kernels.device.INTERPRETED
        and kernels.device.why_not(device) is None
    )


def resolve(request: str | None, device: torch.device) -> Backends:
    """The functions to call for `request` (the flag's text, or None) on tensors of `device`.

    Raises UserError for unknown names, and when a kernel was asked for that cannot run there.
    """
    asked = parse_request(request)
    choices = {op: _choose(backend, device) for op, backend in asked.items()}
    functions = {
        field: getattr(_NAMESPACES[choice.backend], name)
        for op, choice in choices.items()
        for field, name in _FUNCTIONS[op].items()
    }
    return Backends(**functions, choices=choices, interpreted=will_interpret(request, device))


def _known_backend(name: str) -> str:
    if name not in (AUTO, *BACKENDS):
        raise UserError(
            f"unknown kernels {name!r}: choose {AUTO}, {', '.join(BACKENDS)}, or one per op such as attention=triton"
        )
    return name


def _choose(backend: str, device: torch.device) -> Choice:
    if backend == AUTO:
        # A kernel becomes the default of a device only once a stored measurement says that it is right and faster.
        return Choice("torch", "no GPU" if device.type == "cpu" else "no measurement on a GPU is stored yet")
    if backend == "triton" and (reason := kernels.device.why_not(device)) is not None:
        raise UserError(f"kernels=triton cannot run on {device}: {reason}")
    return Choice(backend, f"asked for: {_MEANINGS[backend]}")
