"""A small mixture of experts that routes as DeepSeek-V3 does, trained for minutes on the text at hand.

It stands in for R1's routers, which no small machine can run. It has sigmoid scores, groups of experts of which a token
may use some, and a correction bias that balances load without an auxiliary loss (arXiv 2408.15664). By default it has
R1's 256 experts in 8 groups, of which a token uses 4, and 8 experts per token. It learns far less than R1; we do not
know how closely its routing resembles R1's. Tensors carry their shape in their name: B windows, S tokens per window, T
tokens, V vocabulary, H hidden size, E experts, G groups of M experts, K experts chosen, L layers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from corpus import KINDS, Document, Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from reshard.model.routing import Routing

R1_ROUTING = Routing(
    num_experts=256,
    top_k=8,
    scoring="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_group=8,
    topk_group=4,
)
ALIGNMENT = 8  # grouped_mm needs each group padded to a multiple of so many bf16 rows
Log = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its training; the first layer is dense, as R1's first three are."""

    vocabulary: int = 8192
    hidden: int = 512
    heads: int = 8
    layers: int = 5
    intermediate: int = 64  # width of an expert; the shared expert and the dense layer are wider
    window: int = 512  # tokens
    windows: int = 64  # per training step
    traced_windows: int = 256  # held out, of each kind
    text_bytes: int = 24 << 20  # of each kind
    learning_rate: float = 1e-3
    bias_speed: float = 1e-3
    routing: Routing = R1_ROUTING


SMALL = Shape(512, 64, 2, 3, 16, 64, 16, 32, 1 << 18)


@dataclass(frozen=True)
class Trace:
    """The routing of held-out text of one kind: windows in the order of the text."""

    experts_LTK: Tensor  # logical
    weights_LTK: Tensor
    hidden_LTH: Tensor  # the routers' inputs, for the first tokens only


@dataclass(frozen=True)
class Trained:
    """A trained model's routers, their routing of held-out text of each kind, and a report of the training."""

    routing: Routing
    gates: dict[str, Tensor]
    traces: dict[str, Trace]
    report: dict[str, Any]


def choose(scores_TE: Tensor, correction_E: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Choose experts as a group-limited router does: a group's score is the sum of its two best scores.

    Parameters:
        scores_TE: sigmoid of the logits
        correction_E: correction bias, added to the scores for choosing, not to the weights

    Returns:
        experts_TK, weights_TK: the best expert first
    """
    grouped_TGM = (scores_TE + correction_E).unflatten(1, (routing.n_group, -1))
    best_TG = grouped_TGM.topk(2, dim=2).values.sum(dim=2).topk(routing.topk_group, dim=1).indices
    open_TG = torch.zeros_like(grouped_TGM[:, :, 0], dtype=torch.bool).scatter(1, best_TG, True)
    compared_TE = grouped_TGM.masked_fill(~open_TG.unsqueeze(2), float("-inf")).flatten(1)
    experts_TK = compared_TE.topk(routing.top_k, dim=1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    return experts_TK, weights_TK / weights_TK.sum(dim=1, keepdim=True) * routing.routed_scaling_factor


class Gate(nn.Module):
    """A router that keeps each expert's load in its last batch, from which `balance` adjusts the correction bias."""

    correction_E: Tensor
    load_E: Tensor

    def __init__(self, hidden: int, routing: Routing) -> None:
        super().__init__()
        experts, self.routing = routing.num_experts, routing
        self.weight_EH = nn.Parameter(torch.randn(experts, hidden) / math.sqrt(hidden))
        self.register_buffer("correction_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts))

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts: experts_TK, weights_TK."""
        with torch.autocast(hidden_TH.device.type, enabled=False):
            scores_TE = functional.linear(hidden_TH.float(), self.weight_EH).sigmoid()
        experts_TK, weights_TK = choose(scores_TE, self.correction_E, self.routing)
        with torch.no_grad():
            self.load_E.zero_().index_add_(0, experts_TK.flatten(), torch.ones_like(weights_TK).flatten())
        return experts_TK, weights_TK

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Raise the correction bias of experts with less than the mean load, lower the others'."""
        self.correction_E += speed * (self.load_E.mean() - self.load_E).sign()


class Mlp(nn.Module):
    """A SwiGLU MLP."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """The output, [T, H]."""
        return self.down(swiglu(self.up(hidden_TH)))


class Moe(nn.Module):
    """Routed experts and a shared expert."""

    def __init__(self, hidden: int, intermediate: int, routing: Routing) -> None:
        super().__init__()
        experts, self.routing = routing.num_experts, routing
        self.gate = Gate(hidden, routing)
        self.shared = Mlp(hidden, 4 * intermediate)
        self.up_EIH = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden) / math.sqrt(hidden))
        self.down_EHI = nn.Parameter(torch.randn(experts, hidden, intermediate) / math.sqrt(intermediate))

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """The output, [T, H]."""
        experts_TK, weights_TK = self.gate(hidden_TH)
        row_of_TK, ends_E, rows = sorted_rows(experts_TK, self.routing.num_experts)
        pairs_PH = _narrow(hidden_TH).repeat_interleave(self.routing.top_k, dim=0)
        sorted_RH = pairs_PH.new_zeros(rows, hidden_TH.shape[1]).index_copy(0, row_of_TK.flatten(), pairs_PH)
        outputs_RH = multiply(swiglu(multiply(sorted_RH, self.up_EIH, ends_E)), self.down_EHI, ends_E)
        outputs_TKH = outputs_RH.index_select(0, row_of_TK.flatten()).unflatten(0, row_of_TK.shape)
        routed_TH = (weights_TK.unsqueeze(1).to(outputs_TKH.dtype) @ outputs_TKH).squeeze(1)
        return routed_TH + self.shared(hidden_TH)


def swiglu(both_TI: Tensor) -> Tensor:
    """Apply SwiGLU to gate and up projections that lie side by side."""
    gate_TI, up_TI = both_TI.chunk(2, dim=1)
    return functional.silu(gate_TI) * up_TI


def sorted_rows(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, int]:
    """The row of each (token, expert) pair after sorting pairs by expert and padding each expert's rows.

    Returns:
        row_of_TK; ends_E, the end of each expert's rows (the last expert's is the number of rows); the number of rows
    """
    flat_P = experts_TK.flatten()
    rows = len(flat_P) + ALIGNMENT * num_experts  # enough for any padding: the CPU need not wait for the counts
    rows += -rows % ALIGNMENT
    count_E = torch.zeros(num_experts, dtype=torch.long, device=flat_P.device).index_add_(0, flat_P, flat_P * 0 + 1)
    ends_E = ((count_E.clamp(min=1) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT).cumsum(0)  # no expert's rows are empty
    ends_E[-1] = rows
    shift_E = ends_E.roll(1) - count_E.cumsum(0).roll(1)  # by how many rows padding moves each expert's
    shift_E[0] = 0
    order_P = flat_P.argsort(stable=True)
    row_of_P = torch.empty_like(flat_P)
    row_of_P[order_P] = torch.arange(len(flat_P), device=flat_P.device) + shift_E[flat_P[order_P]]
    return row_of_P.view_as(experts_TK), ends_E.to(torch.int32), rows


def multiply(sorted_RA: Tensor, weights_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows with its weights, [R, B]: one kernel on a GPU, a loop elsewhere."""
    if sorted_RA.is_cuda:
        return functional.grouped_mm(_narrow(sorted_RA), _narrow(weights_EBA).transpose(1, 2), offs=ends_E)
    pieces = sorted_RA.tensor_split(ends_E[:-1].tolist())
    return torch.cat([rows @ weights.T for rows, weights in zip(pieces, weights_EBA, strict=True)])


def _narrow(tensor: Tensor) -> Tensor:
    """The tensor in bf16 on a GPU, where experts compute in bf16; unchanged elsewhere."""
    return tensor.bfloat16() if tensor.is_cuda else tensor


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """The output, [B, S, H]."""
        split = self.into(hidden_BSH).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        mixed = functional.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(vectors: Tensor) -> Tensor:
    """Apply rotary positions; the last two dimensions are position and size, whose first half pairs with the second."""
    length, size = vectors.shape[-2:]
    rates = 10000 ** -torch.linspace(0, 1, size // 2 + 1, device=vectors.device)[:-1]
    angles = torch.arange(length, device=vectors.device).unsqueeze(1) * rates
    one, other = vectors.chunk(2, dim=-1)
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class Block(nn.Module):
    """Attention, then `mlp`: dense or MoE."""

    def __init__(self, shape: Shape, *, dense: bool) -> None:
        super().__init__()
        self.attention = Attention(shape.hidden, shape.heads)
        moe = (shape.hidden, shape.intermediate, shape.routing)
        self.mlp = Mlp(shape.hidden, 4 * shape.hidden) if dense else Moe(*moe)
        self.norms = nn.ModuleList([nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)])

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """The output, [B, S, H]."""
        hidden_BSH = hidden_BSH + self.attention(self.norms[0](hidden_BSH))
        return hidden_BSH + self.mlp(self.norms[1](hidden_BSH).flatten(0, 1)).view_as(hidden_BSH)


class Decoder(nn.Module):
    """The model: token ids [B, S] to logits [B, S, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList([Block(shape, dense=layer == 0) for layer in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden_BSH = self.embed(ids_BS)
        for block in self.blocks:
            hidden_BSH = block(hidden_BSH)
        return self.head(self.norm(hidden_BSH))

    def gates(self) -> dict[str, Gate]:
        """The routers by their names in a checkpoint."""
        return {
            f"model.layers.{number}.mlp.gate": block.mlp.gate
            for number, block in enumerate(self.blocks)
            if isinstance(block.mlp, Moe)
        }

    def loss(self, ids_BS: Tensor) -> Tensor:
        """Mean nats per token, without the first token of each window."""
        with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=ids_BS.is_cuda):
            logits_BSV = self(ids_BS[:, :-1])
        return functional.cross_entropy(logits_BSV.flatten(0, 1).float(), ids_BS[:, 1:].flatten())


def train(documents: Sequence[Document], shape: Shape, seconds: float, device: torch.device, log: Log) -> Trained:
    """Train a model on the documents for `seconds`, then record its routing of the held-out documents."""
    tokenizer = Tokenizer([document.text for document in documents if not document.held_out], shape.vocabulary)
    streams = {
        (kind, held_out): _stream(documents, tokenizer, kind, held_out) for kind in KINDS for held_out in (False, True)
    }
    sizes = {f"{kind}, {'held out' if out else 'training'}": len(ids_T) for (kind, out), ids_T in streams.items()}
    log("tokens: " + "; ".join(f"{name} {size:,}" for name, size in sizes.items()))
    stream_T = torch.cat([ids_T for (_, held_out), ids_T in streams.items() if not held_out])
    model = Decoder(shape).to(device)
    curve = _descend(model, stream_T.to(device), shape, seconds, log)
    held_out = {kind: _windows(streams[kind, True], shape).to(device) for kind in KINDS}
    held_out = {kind: ids_NS for kind, ids_NS in held_out.items() if len(ids_NS)}
    report: dict[str, Any] = {
        "shape": asdict(shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": sizes,
        "tokens_trained_on": len(curve) and curve[-1][0] * shape.windows * shape.window,
        "loss_by_step": curve,
        "held_out": {kind: _held_out(model, stream_T, ids_NS, shape) for kind, ids_NS in held_out.items()},
    }
    traces = {kind: _trace(model, ids_NS, shape) for kind, ids_NS in held_out.items()}
    for kind, trace in traces.items():
        report["held_out"][kind]["busiest_expert_over_mean_by_layer"] = [
            _skew(row_TK, shape.routing.num_experts) for row_TK in trace.experts_LTK
        ]
    gates = {}
    for name, gate in model.gates().items():
        gates[f"{name}.weight"] = gate.weight_EH.detach().cpu()
        gates[f"{name}.e_score_correction_bias"] = gate.correction_E.cpu()
    return Trained(shape.routing, gates, traces, report)


def _stream(documents: Sequence[Document], tokenizer: Tokenizer, kind: str, held_out: bool) -> Tensor:
    """All tokens of a kind, either held out or not, [T]."""
    chosen = [document.text for document in documents if (document.kind, document.held_out) == (kind, held_out)]
    return torch.tensor([token for text in chosen for token in tokenizer.encode(text + b"\n\n")], dtype=torch.long)


def _windows(ids_T: Tensor, shape: Shape) -> Tensor:
    """The first windows of a stream, [N, S]."""
    number = min(shape.traced_windows, len(ids_T) // shape.window)
    return ids_T[: number * shape.window].view(number, shape.window)


def _descend(model: Decoder, stream_T: Tensor, shape: Shape, seconds: float, log: Log) -> list[tuple[int, float]]:
    """Train; return (step, mean loss of ten steps). The learning rate depends on elapsed time, so that it ends low."""
    optimizer = torch.optim.AdamW(model.parameters(), shape.learning_rate, (0.9, 0.95), fused=stream_T.is_cuda)
    within_S = torch.arange(shape.window, device=stream_T.device)
    curve: list[tuple[int, float]] = []
    losses: list[Tensor] = []
    started = logged = time.monotonic()
    while (elapsed := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = shape.learning_rate * min(1.0, 20 * elapsed + 0.01, 0.55 + 0.45 * math.cos(math.pi * elapsed))
        first_B = torch.randint(len(stream_T) - shape.window, (shape.windows, 1), device=stream_T.device)
        loss = model.loss(stream_T[first_B + within_S])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for gate in model.gates().values():
            gate.balance(shape.bias_speed)
        losses.append(loss.detach())
        if len(losses) == 10:  # wait for the GPU: the loop would run far ahead of it and misjudge the time
            curve.append(((curve[-1][0] if curve else 0) + 10, torch.stack(losses).mean().item()))
            losses.clear()
            if time.monotonic() - logged > 10 or len(curve) == 1:
                logged = time.monotonic()
                log(f"training: step {curve[-1][0]}, loss {curve[-1][1]:.3f}")
    return curve


@torch.no_grad()
def _held_out(model: Decoder, stream_T: Tensor, ids_NS: Tensor, shape: Shape) -> dict[str, Any]:
    """Nats per token on held-out text, for this model and for one that knows only each token's frequency."""
    losses = [model.loss(ids_BS).item() * len(ids_BS) for ids_BS in ids_NS.split(shape.windows)]
    count_V = torch.bincount(stream_T, minlength=shape.vocabulary).double() + 1
    surprise_V = -(count_V / count_V.sum()).log()
    return {
        "loss": sum(losses) / len(ids_NS),
        "unigram_loss": surprise_V[ids_NS[:, 1:].cpu()].mean().item(),
    }


def _skew(experts_TK: Tensor, num_experts: int) -> float:
    count_E = torch.bincount(experts_TK.flatten(), minlength=num_experts).double()
    return (count_E.max() / count_E.mean()).item()


@torch.no_grad()
def _trace(model: Decoder, ids_NS: Tensor, shape: Shape, hidden_tokens: int = 4096) -> Trace:
    """Record the routing of windows of one kind."""
    gates = list(model.gates().values())
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in gates]
    hooks = [
        gate.register_forward_hook(
            lambda _, given, chosen, rows=rows: rows.append(
                (chosen[0].short().cpu(), chosen[1].cpu(), given[0][:hidden_tokens].bfloat16().cpu())
            )
        )
        for gate, rows in zip(gates, seen, strict=True)
    ]
    with torch.autocast(ids_NS.device.type, torch.bfloat16, enabled=ids_NS.is_cuda):
        for ids_BS in ids_NS.split(shape.windows):
            model(ids_BS)
    for hook in hooks:
        hook.remove()
    experts_LTK = torch.stack([torch.cat([experts_TK for experts_TK, _, _ in rows]) for rows in seen])
    weights_LTK = torch.stack([torch.cat([weights_TK for _, weights_TK, _ in rows]) for rows in seen])
    return Trace(experts_LTK.long(), weights_LTK, torch.stack([rows[0][2] for rows in seen]))


def save_gates(trained: Trained, path: str) -> None:
    """Write the routers as a checkpoint holds them, and their inputs for held-out text of each kind."""
    from safetensors.torch import save_file

    tensors = dict(trained.gates)
    names = [name.removesuffix(".weight") for name in trained.gates if name.endswith(".weight")]
    for kind, trace in trained.traces.items():
        for name, hidden_TH in zip(names, trace.hidden_LTH, strict=True):
            tensors[f"{name}.input.{kind}"] = hidden_TH.contiguous()
    save_file(tensors, path, {"routing": json.dumps(asdict(trained.routing))})
