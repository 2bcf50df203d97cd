"""The memory of one of W GPUs in a training step, by formula; the symbols are those of profiling.scaling.

Every tensor that backward keeps is counted from the model's shapes. The moments at which memory can be highest are
few, and the peak is the highest of them. profiling.estimate, which does run the step under fake tensors, is what the
tests hold this to.
"""

from collections.abc import Iterable
from dataclasses import replace

from kernels.linear_cross_entropy import chunk_rows
from profiling.cuda_rules import GRANULARITY
from profiling.scaling import Shapes, Step, all_shapes, attention_shapes, count, mlp_shapes, root_shapes, whole

CATEGORIES = (
    "parameters", "gradients", "optimizer state", "batch", "gathered", "bf16 copies", "activations", "temporaries"
)  # fmt: skip
"""Where a byte belongs. gathered: what fsdp has whole or under way; bf16 copies: autocast's, of the weights."""


# ---------------------------------------------------------------- activations


def kept_by_block(step: Step) -> int:
    """Bytes that backward keeps of a block: n ((8 + 10 s) C + 16 + 4 H), and 2 n C of dropout's masks.

    The residual stream twice in fp32; two norms' outputs, q, k, v, attention's output and MLP's hidden layer (before
    GELU) in the products' dtype; two norms' mean and rstd; attention's log-sum-exp.
    """
    model, n = step.model, step.rows
    masks = 2 * n * model.n_embd * (model.dropout > 0)
    return n * ((8 + 10 * step.width) * model.n_embd + 16 + 4 * model.n_head) + masks


def kept_at_border(step: Step) -> int:
    """Bytes of what goes from block to block, all that is kept of it with checkpointing: n C (4 + s)."""
    return step.rows * step.model.n_embd * (4 + step.width)


def kept_by_embedding(step: Step) -> int:
    """Bytes of the residual stream before the first block, and of dropout's mask: 4 n C (+ n C)."""
    return step.rows * step.model.n_embd * (5 if step.model.dropout > 0 else 4)


def _kept(step: Step, blocks: int) -> int:
    """Bytes kept while backward is in the block number `blocks`, counted from 1, or computes it again."""
    stream = 4 * step.rows * step.model.n_embd
    if step.checkpointing:  # the first block's own stream begins with the embedding's
        return (
            kept_by_embedding(step) + (blocks - 1) * kept_at_border(step) + kept_by_block(step) - stream * (blocks == 1)
        )
    return kept_by_embedding(step) + blocks * kept_by_block(step) - stream


def _kept_at_loss(step: Step) -> int:
    """Bytes kept at the end of forward, without the loss's own."""
    n, C, L = step.rows, step.model.n_embd, step.model.n_layer
    last = n * (step.width * C + 8)  # the last norm's output or its gradient, mean and rstd
    if step.checkpointing:
        return kept_by_embedding(step) + (L - 1) * kept_at_border(step) + 4 * n * C + last
    return kept_by_embedding(step) + L * kept_by_block(step) + last


# ---------------------------------------------------------------- the moments of a step


def memory(step: Step) -> dict[str, dict[str, int]]:
    """Bytes by category at each moment that can be the highest of a step."""
    L = step.model.n_layer
    moments = {"loss, forward": _loss_forward(step), "loss, backward": _loss_backward(step)}
    if step.backend == "torch":  # our loss is the head's product too
        moments["backward of the head"] = _head_backward(step)
    for block in {L, max(1, L - 1), min(2, L), 1}:
        moments[f"backward of block {block}"] = _block_backward(step, block)
        if step.parallel == "fsdp":
            moments[f"backward of block {block}'s attention"] = _attention_backward(step, block)
            moments[f"backward of block {block}'s query, key and value"] = _projection_backward(step, block)
    moments["backward of the embedding"] = _embedding_backward(step)
    moments["AdamW"] = _moment(step, gradients=_gradients(step, 0, root=True))
    return moments


def peak(step: Step) -> tuple[str, dict[str, int]]:
    """The moment of the most memory, and the bytes by category there."""
    return max(memory(step).items(), key=lambda moment: sum(moment[1].values()))


def _moment(step: Step, **found: int) -> dict[str, int]:
    """A moment's bytes: what is always there, and what was found."""
    shapes, parts = all_shapes(step.model), step.gpus if step.parallel == "fsdp" else 1
    stored = _stored(shapes, parts)
    always = {
        "parameters": stored,
        "optimizer state": 2 * stored + GRANULARITY * len(shapes),
        "batch": 16 * step.rows + 4 * step.model.block_size * step.model.n_embd * (step.model.position != "learned"),
    }
    named = {name.replace("_", " "): size for name, size in found.items()}
    return {name: (always | named).get(name, 0) for name in CATEGORIES}


def _gradients(step: Step, block: int, *, mlp: bool = False, root: bool = False) -> int:
    """Bytes of gradients once backward has done all blocks after number `block`, counted from 1.

    `mlp`: and that block's MLP; `root`: and the rest.

    ddp has them all from the beginning, in its buckets, and so has whoever accumulates, from the second pass on.
    """
    model, parts = step.model, step.gpus if step.parallel == "fsdp" else 1
    if step.passes > 1 or step.parallel == "ddp":
        return _stored(all_shapes(model), parts)
    of_block = _stored(attention_shapes(model) + mlp_shapes(model), parts)
    more = mlp * _stored(mlp_shapes(model), parts) + root * _stored(root_shapes(model), parts)
    return (model.n_layer - block) * of_block + more


def _copies(step: Step, blocks: int, *, forward: bool = False) -> int:
    """Bytes of the weights that autocast has cast, of so many blocks; fsdp's parts come in the products' dtype.

    In forward all of them are there. Backward keeps three products' of four: the last makes its copy again.
    """
    if step.width == 4 or step.parallel == "fsdp":
        return 0
    if forward:
        return 2 * blocks * count(attention_shapes(step.model) + mlp_shapes(step.model))
    return 16 * (min(1, blocks) if step.checkpointing else blocks) * step.model.n_embd**2


def _head(step: Step) -> int:
    """Elements of the head's weight, V C."""
    return step.model.vocab_size * step.model.n_embd


def _gathered(step: Step, *, attention: int = 0, mlp: int = 0, root: int = 4) -> int:
    """Bytes of what fsdp has whole or under way: so many for each element of a block's two parts and of the root."""
    if step.parallel != "fsdp":
        return 0
    model = step.model
    groups = ((attention_shapes, attention), (mlp_shapes, mlp), (root_shapes, root))
    return sum(size * whole(shapes(model), step.gpus) for shapes, size in groups)


def _loss_forward(step: Step) -> dict[str, int]:
    n, C, V, s = step.rows, step.model.n_embd, step.model.vocab_size, step.width
    copy = 2 * _head(step) * (s == 2)
    if step.backend == "torch":  # logits, log-probabilities, and those in fp32
        own = n * V * (2 * s if s == 4 else 2 * s + 4) + 4 * n * C * (s == 2)
    else:  # the norm's output beside its gradient, the weight's gradient, a chunk of logits
        own = s * n * C + 4 * n + 4 * _head(step) + chunk_rows(n, C, V, s) * -(-V // 16) * 16 * s
    return _moment(
        step,
        gradients=_gradients(step, step.model.n_layer),
        gathered=_gathered(step, mlp=s),
        bf16_copies=_copies(step, step.model.n_layer, forward=True) + copy,
        activations=_kept_at_loss(step),
        temporaries=own + s * n * C,  # the last branch
    )


def _loss_backward(step: Step) -> dict[str, int]:
    n, C, V, s = step.rows, step.model.n_embd, step.model.vocab_size, step.width
    if step.backend == "torch":  # log-probabilities, those in fp32, their gradient (in fp32 another for the logits)
        own, copy = n * V * (12 if s == 4 else 10), 2 * _head(step) * (s == 2)
    else:  # the gradients that forward made, and their multiples
        own, copy = s * n * C + 8 * _head(step), 0
    return _moment(
        step,
        gradients=_gradients(step, step.model.n_layer),
        gathered=_gathered(step, mlp=s),
        bf16_copies=_copies(step, 0 if step.checkpointing else step.model.n_layer) + copy,
        activations=_kept_at_loss(step),
        temporaries=own,
    )


def _head_backward(step: Step) -> dict[str, int]:
    n, C, V, s = step.rows, step.model.n_embd, step.model.vocab_size, step.width
    return _moment(
        step,
        gradients=_gradients(step, step.model.n_layer),
        gathered=_gathered(step, mlp=s),
        bf16_copies=_copies(step, 0 if step.checkpointing else step.model.n_layer),
        activations=_kept_at_loss(step),
        # of the logits, of the head's input, of its weight in both dtypes
        temporaries=s * n * (V + C) + (6 if s == 2 else 4) * _head(step),
    )


def _block_backward(step: Step, block: int) -> dict[str, int]:
    """The backward pass of GELU in a block's MLP, counted from 1: the widest of a block."""
    n, C, s = step.rows, step.model.n_embd, step.width
    grown = step.passes > 1 or step.parallel == "ddp"
    alone = step.model.tied_head or step.parallel == "fsdp" or not grown  # not yet added to what there is
    dropout = step.model.dropout > 0
    weights = (s if step.parallel == "fsdp" else 4) * 4 * C * C
    before = 4 if block < step.model.n_layer else 0  # the reduction under way of the attention after it
    return _moment(
        step,
        gradients=_gradients(step, block),
        gathered=_gathered(step, mlp=s, attention=s + before),
        bf16_copies=_copies(step, block),
        activations=_kept(step, block) - n * C * dropout,  # the last mask has been used
        # of the stream and the branch, of the down projection, of GELU and its input; and the head's
        temporaries=n * C * (4 + s * (s == 2 or dropout)) + weights + 8 * s * n * C + 4 * _head(step) * alone,
    )


def _before_attention(step: Step, block: int) -> int:
    """Bytes kept while backward is in a block's attention, of what comes before it: all up to its first norm."""
    n, C = step.rows, step.model.n_embd
    before = (block - 1) * (kept_at_border(step) if step.checkpointing else kept_by_block(step))
    own = step.width * n * C + 4 * n * C * (step.checkpointing and block > 1)
    return kept_by_embedding(step) + before + own


def _attention_backward(step: Step, block: int) -> dict[str, int]:
    """Under fsdp the MLP is still being reduced then, and the next one, if any, is already on its way."""
    n, C, s = step.rows, step.model.n_embd, step.width
    flash = 4 * n * C * (s == 2 and step.backend == "torch")  # its sums of the queries' gradients
    return _moment(
        step,
        gradients=_gradients(step, block, mlp=True),
        gathered=_gathered(step, attention=s, mlp=s * (block > 1) + 4),
        activations=_before_attention(step, block) + 4 * s * n * C + 4 * n * step.model.n_head,
        # of the stream, of attention's output, of query, key and value; of a quarter of the weights; the head's
        temporaries=4 * n * C + 4 * s * n * C + flash + s * C * C + 4 * _head(step),
    )


def _projection_backward(step: Step, block: int) -> dict[str, int]:
    n, C, s = step.rows, step.model.n_embd, step.width
    return _moment(
        step,
        gradients=_gradients(step, block, mlp=True),
        gathered=_gathered(step, attention=2 * s, mlp=s * (block > 1) + 4),
        activations=_before_attention(step, block),
        temporaries=4 * n * C + 4 * s * n * C + 4 * _head(step),
    )


def _embedding_backward(step: Step) -> dict[str, int]:
    tied = 4 * _head(step) * step.model.tied_head
    table = 4 * _head(step)
    # fsdp: the root whole with its gradients
    return _moment(
        step,
        gradients=_gradients(step, 0, root=step.passes > 1),
        gathered=_gathered(step, root=8, attention=4),
        temporaries=4 * step.rows * step.model.n_embd + tied + table * (step.parallel != "fsdp"),
    )


def _stored(shapes: Shapes, gpus: int) -> int:
    """Bytes in fp32, as PyTorch's allocator hands them out."""
    return sum(-(-4 * count([shape], gpus) // GRANULARITY) * GRANULARITY for shape in shapes)


def fewest_gpus(step: Step, limit: float, candidates: Iterable[int]) -> int | None:
    """The fewest GPUs of `candidates` on which the step's peak is at most `limit` bytes; None: on none."""
    for gpus in sorted(candidates):
        if sum(peak(replace(step, gpus=gpus, parallel=step.parallel if gpus > 1 else "none"))[1].values()) <= limit:
            return gpus
    return None
