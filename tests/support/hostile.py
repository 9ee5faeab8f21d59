"""A small, sound checkpoint and every way to damage it that we could think of.

`write_base` writes a DeepSeek-V3-shaped model of three shards in a few kilobytes, with a writer of its own, so that
nothing of the package is needed to build what the package is tested with. `ATTACKS` is a table: each row damages a
fresh copy of that model in one way and lists what the error line cannot do without, such as the damaged file's name,
the tensor's name, or the offending value. Found another way? Add a row; `test_refusals.py` runs all of them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

EXPERTS = 8
DTYPE_BYTES = {"BF16": 2, "F32": 4, "I64": 8, "U8": 1}

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))
SHARD = SHARDS[1]  # where most attacks strike: all of layer 1, the first MoE layer
LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.3.up_proj.weight"
GATE = f"{LAYER}.mlp.gate.weight"
BIAS = f"{LAYER}.mlp.gate.e_score_correction_bias"


class Tensor(NamedTuple):
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]
Header = dict[str, Any]
Damage = Callable[[Path], object]


# ---------------------------------------------------------------------------------------------------------------------
# The sound checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def base_config(hidden: int = 16, inner: int = 8) -> dict[str, Any]:
    """The `config.json` of the base model: the keys of DeepSeek-V3's own, with small numbers."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 2 * inner,
        "kv_lora_rank": 4,
        "max_position_embeddings": 128,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": inner,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 4,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 4,
        "vocab_size": 32,
    }


def tensor(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Tensor:
    """A tensor whose values are small, finite (read as BF16 or as F32), and the name's own."""
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    values = block(name)
    return Tensor(dtype, shape, (values * (size // len(values) + 1))[:size])


@functools.cache
def block(name: str) -> bytes:
    """4 KiB of such values."""
    draw = random.Random(name)
    return struct.pack("<2048H", *(draw.randrange(0x3C00, 0x3F00) for _ in range(2048)))


def base_tensors(hidden: int = 16, inner: int = 8) -> dict[str, Tensors]:
    """All tensors of the base model, file by file: layer 0 is dense, layers 1 and 2 are MoE."""

    def mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.down_proj.weight", (hidden, width)
        yield f"{prefix}.gate_proj.weight", (width, hidden)
        yield f"{prefix}.up_proj.weight", (width, hidden)

    def layer(number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        prefix = f"model.layers.{number}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_a_layernorm.weight", (4,)
        yield f"{prefix}.self_attn.kv_a_layernorm.weight", (4,)
        yield f"{prefix}.self_attn.q_a_proj.weight", (4, hidden)
        yield f"{prefix}.self_attn.q_b_proj.weight", (16, 4)
        yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (8, hidden)
        yield f"{prefix}.self_attn.kv_b_proj.weight", (16, 4)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, 8)
        if number == 0:
            yield from mlp(f"{prefix}.mlp", 2 * inner)
            return
        for expert in range(EXPERTS):
            yield from mlp(f"{prefix}.mlp.experts.{expert}", inner)
        yield from mlp(f"{prefix}.mlp.shared_experts", inner)
        yield f"{prefix}.mlp.gate.weight", (EXPERTS, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (EXPERTS,)

    first = [("model.embed_tokens.weight", (32, hidden)), *layer(0)]
    last = [*layer(2), ("model.norm.weight", (hidden,)), ("lm_head.weight", (32, hidden))]
    return {
        file: {name: tensor(name, shape, "F32" if name.endswith("bias") else "BF16") for name, shape in entries}
        for file, entries in zip(SHARDS, (first, list(layer(1)), last), strict=True)
    }


def write_base(folder: Path, hidden: int = 16, inner: int = 8) -> None:
    """Write the sound checkpoint: three shards, an index, a config, and two files that nobody has to understand."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(base_config(hidden, inner), indent=2))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}\n')
    (folder / "README.md").write_text("A model of no use.\n")
    write_shards(folder, base_tensors(hidden, inner))


def write_single_file(folder: Path) -> Path:
    """Write the same model as one `model.safetensors` without an index, and return that file."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(base_config(), indent=2))
    file = folder / "model.safetensors"
    file.write_bytes(pack({name: t for shard in base_tensors().values() for name, t in shard.items()}))
    return file


def write_shards(folder: Path, shards: dict[str, Tensors]) -> None:
    """Write these shards and the index that belongs to them."""
    for file, tensors in shards.items():
        (folder / file).write_bytes(pack(tensors))
    total = sum(len(t.data) for tensors in shards.values() for t in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def pack(tensors: Tensors) -> bytes:
    """The bytes of a safetensors file with these tensors, in this order."""
    header: Header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        begin, end = end, end + len(t.data)
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return join(text, b"".join(t.data for t in tensors.values()))


def join(header: bytes, data: bytes) -> bytes:
    """A safetensors file from its header's text and its data."""
    return struct.pack("<Q", len(header)) + header + data


def split(file: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header text and its data: what `join` undoes."""
    (length,) = struct.unpack_from("<Q", file)
    return file[8 : 8 + length], file[8 + length :]


def unpack(file: bytes) -> Tensors:
    """The tensors of a sound safetensors file."""
    text, data = split(file)
    header = json.loads(text)
    header.pop("__metadata__", None)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Ways to do damage. Each returns a function of the checkpoint's directory.
# ---------------------------------------------------------------------------------------------------------------------


def shard_bytes(edit: Callable[[bytes], bytes]) -> Damage:
    """Change the middle shard as bytes."""

    def damage(folder: Path) -> None:
        file = folder / SHARD
        file.write_bytes(edit(file.read_bytes()))

    return damage


def header_text(edit: Callable[[bytes], bytes]) -> Damage:
    """Change the middle shard's header as text; its length field and the data follow suit."""

    def change(file: bytes) -> bytes:
        text, data = split(file)
        return join(edit(text), data)

    return shard_bytes(change)


def header(edit: Callable[[Header], object]) -> Damage:
    """Change the middle shard's header as a JSON object, in place."""

    def change(text: bytes) -> bytes:
        value = json.loads(text)
        edit(value)
        return json.dumps(value).encode()

    return header_text(change)


def entry(**changes: Any) -> Damage:
    """Set fields of one tensor's header entry."""
    return header(lambda h: h[EXPERT].update(changes))


def entry_without(field: str) -> Damage:
    """Drop a field of one tensor's header entry."""
    return header(lambda h: h[EXPERT].pop(field))


def offsets(edit: Callable[[int, int], list[Any]]) -> Damage:
    """Set one tensor's offsets to what `edit` makes of its begin and end."""
    return header(lambda h: h[EXPERT].update(data_offsets=edit(*h[EXPERT]["data_offsets"])))


def raw_offset(literal: str) -> Damage:
    """Write the first tensor's begin, 0, as this literal: what `json` would never write."""
    return header_text(lambda text: text.replace(b'"data_offsets":[0,', b'"data_offsets":[' + literal.encode() + b","))


def extra_entry(name: str, dtype: str, shape: list[int], data: bytes = b"") -> Damage:
    """Add a tensor at the end of the middle shard, and to the index."""

    def damage(folder: Path) -> None:
        text, old = split((folder / SHARD).read_bytes())
        value = json.loads(text)
        value[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(old), len(old) + len(data)]}
        (folder / SHARD).write_bytes(join(json.dumps(value).encode(), old + data))
        index(lambda i: i["weight_map"].update({name: SHARD}))(folder)

    return damage


def shift_from_expert(h: Header, by: int) -> None:
    """Move one tensor and all that lie behind it."""
    start = h[EXPERT]["data_offsets"][0]
    for value in h.values():
        if "data_offsets" in value and value["data_offsets"][0] >= start:
            value["data_offsets"] = [offset + by for offset in value["data_offsets"]]


def leave_a_hole(file: bytes) -> bytes:
    """Two bytes before one tensor that belong to none; the file is as long as its last offset says."""
    text, data = split(file)
    value = json.loads(text)
    shift_from_expert(value, 2)
    return join(json.dumps(value).encode(), data + b"\0\0")


def overlap(file: bytes) -> bytes:
    """One tensor begins two bytes before its predecessor's end; the file is as long as its last offset says."""
    text, data = split(file)
    value = json.loads(text)
    shift_from_expert(value, -2)
    return join(json.dumps(value).encode(), data[:-2])


def oversized_header(file: bytes) -> bytes:
    """A header that is sound but for its length, one byte beyond the 100,000,000 that the format allows."""
    text, data = split(file)
    return join(text.ljust(100_000_001), data)


def text_of(name: str, text: str | bytes) -> Damage:
    """Replace a file's content."""
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def json_file(name: str, edit: Callable[[Any], object]) -> Damage:
    """Change a JSON file as a value, in place."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value, indent=2))

    return damage


def index(edit: Callable[[Any], object]) -> Damage:
    """Change the index, in place."""
    return json_file(INDEX, edit)


def mapped_to(value: Any) -> Damage:
    """Let the index name another file for one tensor."""
    return index(lambda i: i["weight_map"].update({EXPERT: value}))


def moved_to(where: str) -> Damage:
    """Move the middle shard there, and let the index say so."""

    def damage(folder: Path) -> None:
        target = folder / where
        target.parent.mkdir(exist_ok=True)
        (folder / SHARD).rename(target)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        moved = {name: where if file == SHARD else file for name, file in weight_map.items()}
        index(lambda i: i.update(weight_map=moved))(folder)

    return damage


def named_twice(folder: Path) -> None:
    """The index has one tensor's key twice, with two answers."""
    text = (folder / INDEX).read_text()
    line = f'"{EXPERT}": "{SHARD}"'
    (folder / INDEX).write_text(text.replace(line, f'{line}, "{EXPERT}": "{SHARDS[2]}"'))


def config(**changes: Any) -> Damage:
    """Set keys of the config."""
    return json_file(CONFIG, lambda c: c.update(changes))


def config_without(key: str) -> Damage:
    """Drop a key of the config."""
    return json_file(CONFIG, lambda c: c.pop(key))


def model(edit: Callable[[Tensors], object]) -> Damage:
    """Change layer 1's tensors; shard and index agree afterwards."""

    def damage(folder: Path) -> None:
        shards = {file: unpack((folder / file).read_bytes()) for file in SHARDS}
        edit(shards[SHARD])
        write_shards(folder, shards)

    return damage


def without(*parts: str) -> Damage:
    """Drop every tensor of layer 1 whose name contains one of these parts."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return model(edit)


def renamed_expert(old: str, new: str, keep: bool = False) -> Damage:
    """Give one of layer 1's experts another id, or a twin with another id."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if f".experts.{old}." in name]:
            tensors[name.replace(f".experts.{old}.", f".experts.{new}.")] = tensors[name]
            if not keep:
                del tensors[name]

    return model(edit)


def with_tensor(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Damage:
    """Add a tensor to layer 1's shard, or replace it by one of another shape."""
    return model(lambda tensors: tensors.update({name: tensor(name, shape, dtype)}))


def fused_with_an_expert_short(tensors: Tensors) -> None:
    """All of layer 1's experts in two tensors that hold 7 of them."""
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    for part, shape in (("gate_up_proj", (7, 16, 16)), ("down_proj", (7, 16, 8))):
        name = f"{LAYER}.mlp.experts.{part}"
        tensors[name] = tensor(name, shape)


def renamed_experts(pattern: str) -> Damage:
    """Name layer 1's experts by `pattern`, from id and projection; their shapes would fit fused experts."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            expert, projection = name.split(".experts.")[1].split(".")[:2]
            del tensors[name]
            new = f"{LAYER}.mlp.experts.{pattern.format(expert, projection)}"
            tensors[new] = tensor(new, (EXPERTS, 16))

    return model(edit)


def in_two_shards(folder: Path) -> None:
    """A tensor of layer 1 is in the last shard as well; the index knows only one of the two."""
    shards = {file: unpack((folder / file).read_bytes()) for file in SHARDS}
    shards[SHARDS[2]][EXPERT] = shards[SHARD][EXPERT]
    write_shards(folder, shards)
    mapped_to(SHARD)(folder)


def no_moe_layers(folder: Path) -> None:
    """A DeepSeek-V3 config over a model whose layers are all dense."""
    shards = {
        file: {name: t for name, t in unpack((folder / file).read_bytes()).items() if not is_moe(name)}
        for file in SHARDS
    }
    write_shards(folder, shards)


def is_moe(name: str) -> bool:
    """Whether this tensor of the base model is an expert's, a shared one's too, or a router's."""
    return "experts." in name or ".gate." in name


def dense_model(folder: Path) -> None:
    """A plain Llama, config and tensors."""
    no_moe_layers(folder)
    kept = {k: v for k, v in base_config().items() if "expert" not in k and "group" not in k and "topk" not in k}
    (folder / CONFIG).write_text(json.dumps(kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def replaced_by(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else where a file was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def removed(name: str) -> Damage:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def without_index_and_a_shard(folder: Path) -> None:
    """Remove the index, and the last of three numbered files."""
    (folder / INDEX).unlink()
    (folder / SHARDS[2]).unlink()


def stray_file(name: str, stray: str = "model-extra.safetensors") -> Damage:
    """Add a sound safetensors file with this one tensor, which the index does not name."""
    return lambda folder: (folder / stray).write_bytes(pack({name: tensor(name, (8, 16))}))


def source_is_a_file(folder: Path) -> None:
    """The source is a file, not a directory."""
    shutil.rmtree(folder)
    folder.write_text("not a directory")


def source_is_empty(folder: Path) -> None:
    """The source is a directory without a file."""
    shutil.rmtree(folder)
    folder.mkdir()


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """One way to damage the base model, and what the error line has to contain."""

    name: str
    damage: Damage
    says: tuple[str, ...] = ()
    # The fault lies in SHARD alone, so that the safetensors library has to refuse that file as well.
    in_shard: bool = False
    # Why the safetensors library reads what we refuse.
    library_reads_it: str | None = None
    # The checkpoint is sound as it is, and only renumbering its experts is out of the question.
    only_for_zigzag: bool = False

    def __str__(self) -> str:
        return self.name


def in_shard(name: str, damage: Damage, *says: str, library_reads_it: str | None = None) -> Attack:
    """An attack on the middle shard alone, whose name the error line must contain."""
    return Attack(name, damage, (SHARD, *says), in_shard=True, library_reads_it=library_reads_it)


NESTED = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5_000
KEY = f'"{EXPERT}"'.encode()

SHARD_ATTACKS = [
    in_shard("shard is empty", shard_bytes(lambda b: b"")),
    in_shard("shard of seven bytes", shard_bytes(lambda b: b[:7])),
    in_shard("shard cut within its header", shard_bytes(lambda b: b[:100])),
    in_shard("shard cut after its header", shard_bytes(lambda b: join(split(b)[0], b""))),
    in_shard("shard cut in half", shard_bytes(lambda b: b[: len(b) // 2])),
    in_shard("shard short of one byte", shard_bytes(lambda b: b[:-1])),
    in_shard("shard with one byte more", shard_bytes(lambda b: b + b"\0")),
    in_shard("shard of zeros", shard_bytes(lambda b: bytes(len(b)))),
    in_shard("shard of 0xff", shard_bytes(lambda b: b"\xff" * len(b))),
    in_shard("shard is a web page", shard_bytes(lambda b: b"<!DOCTYPE html><html>404</html>")),
    in_shard("shard is an LFS pointer", shard_bytes(lambda b: b"version https://git-lfs.github.com/spec/v1\n")),
    in_shard("header length of zero", shard_bytes(lambda b: bytes(8) + b[8:])),
    in_shard("header length beyond the file", shard_bytes(lambda b: struct.pack("<Q", len(b) - 7) + b[8:])),
    in_shard("header length of 2^63", shard_bytes(lambda b: struct.pack("<Q", 1 << 63) + b[8:])),
    in_shard(
        "header length one short", shard_bytes(lambda b: struct.pack("<Q", len(split(b)[0].rstrip()) - 1) + b[8:])
    ),
    in_shard("header longer than the format allows", shard_bytes(oversized_header), "100000001"),
    in_shard("header is not JSON", header_text(lambda t: b"{" + t)),
    in_shard("header is an array", header_text(lambda t: b"[" + t + b"]")),
    in_shard("header is null", header_text(lambda t: b"null")),
    in_shard("header is a string", header_text(lambda t: b'"header"')),
    in_shard("header is an empty object", header_text(lambda t: b"{}")),
    in_shard("header is not UTF-8", header_text(lambda t: t.replace(b"input_layernorm", b"input_\xff\xfe_norm"))),
    in_shard("header is UTF-16", header_text(lambda t: t.decode().encode("utf-16-le"))),
    in_shard("header with a byte order mark", header_text(lambda t: b"\xef\xbb\xbf" + t)),
    in_shard("header followed by more", header_text(lambda t: t + b"{}")),
    in_shard("header followed by NULs", header_text(lambda t: t + b"\0\0\0\0\0\0\0\0")),
    in_shard("header with a trailing comma", header_text(lambda t: t.rstrip()[:-1] + b",}")),
    in_shard("header with NaN", header_text(lambda t: t.replace(b'{"dtype"', b'{"note":NaN,"dtype"', 1))),
    in_shard("header with Infinity", header_text(lambda t: t.replace(b'{"dtype"', b'{"note":Infinity,"dtype"', 1))),
    in_shard("header with a bare control character", header_text(lambda t: t.replace(b"input_layer", b"input\nlayer"))),
    in_shard("header with a lone surrogate", header_text(lambda t: t.replace(b"input_layer", b"input\\ud800layer"))),
    in_shard("header nested 100000 deep", header_text(lambda t: b'{"note":' + NESTED.encode() + b"," + t[1:])),
    in_shard(
        "header after a space",
        header_text(lambda t: b" " + t),
        library_reads_it="the format's text asks for '{' as the first byte; the library does not check it",
    ),
    in_shard(
        "tensor twice in one header",
        header_text(lambda t: t.replace(KEY, KEY + b':{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},' + KEY)),
        EXPERT,
        library_reads_it="of two tensors with one name the library takes the last",
    ),
    in_shard("metadata is a list", header(lambda h: h.update(__metadata__=["pt"])), "__metadata__"),
    in_shard("metadata with a number", header(lambda h: h.update(__metadata__={"format": 1})), "__metadata__"),
    in_shard("metadata with null", header(lambda h: h.update(__metadata__={"format": None})), "__metadata__"),
    in_shard("metadata with an object", header(lambda h: h.update(__metadata__={"format": {}})), "__metadata__"),
    in_shard("tensor entry is null", header(lambda h: h.update({EXPERT: None})), EXPERT),
    in_shard("tensor entry is a number", header(lambda h: h.update({EXPERT: 5})), EXPERT),
    in_shard("tensor entry is empty", header(lambda h: h.update({EXPERT: {}})), EXPERT),
    in_shard("tensor without a dtype", entry_without("dtype"), EXPERT, "dtype"),
    in_shard("tensor without a shape", entry_without("shape"), EXPERT, "shape"),
    in_shard("tensor without offsets", entry_without("data_offsets"), EXPERT, "data_offsets"),
    in_shard("dtype unknown", entry(dtype="BF15"), EXPERT, "BF15"),
    in_shard("dtype in lower case", entry(dtype="bf16"), EXPERT, "bf16"),
    in_shard("dtype is a number", entry(dtype=16), EXPERT, "16"),
    in_shard("dtype is null", entry(dtype=None), EXPERT, "dtype"),
    in_shard("dtype is a list", entry(dtype=["BF16"]), EXPERT, "dtype"),
    in_shard("dtype larger than the data", entry(dtype="F32"), EXPERT, "F32"),
    in_shard("dtype smaller than the data", entry(dtype="F8_E4M3"), EXPERT, "F8_E4M3"),
    in_shard("shape is a number", entry(shape=128), EXPERT, "shape"),
    in_shard("shape is null", entry(shape=None), EXPERT, "shape"),
    in_shard("shape is an object", entry(shape={}), EXPERT, "shape"),
    in_shard("shape larger than the data", entry(shape=[9, 16]), EXPERT, "9"),
    in_shard("shape smaller than the data", entry(shape=[7, 16]), EXPERT, "7"),
    in_shard("shape is a scalar's", entry(shape=[]), EXPERT),
    in_shard("shape with a negative entry", entry(shape=[-8, -16]), EXPERT, "-8"),
    in_shard("shape with a fraction", entry(shape=[8.0, 16]), EXPERT, "8.0"),
    in_shard("shape with a string", entry(shape=["8", 16]), EXPERT, "shape"),
    in_shard("shape with a boolean", entry(shape=[True, 128]), EXPERT, "shape"),
    in_shard("shape with null", entry(shape=[None, 16]), EXPERT, "shape"),
    in_shard("shape with a list", entry(shape=[[8, 16]]), EXPERT, "shape"),
    in_shard("shape whose product overflows", entry(shape=[1 << 33, 1 << 33]), EXPERT, str(1 << 33)),
    in_shard("shape whose product wraps to zero", entry(shape=[1 << 32, 1 << 32]), EXPERT, str(1 << 32)),
    in_shard("shape whose size in bits overflows", entry(shape=[1 << 60]), EXPERT, str(1 << 60)),
    in_shard("shape entry beyond 64 bits", entry(shape=[1 << 64]), EXPERT, str(1 << 64)),
    in_shard("shape that overflows before its zero", extra_entry("x.void", "U8", [1 << 63, 4, 0]), "x.void"),
    in_shard("half a byte", extra_entry("x.half", "F4", [3], b"\0\0"), "x.half"),
    in_shard("offsets are null", entry(data_offsets=None), EXPERT, "data_offsets"),
    in_shard("offsets are one", offsets(lambda b, e: [b]), EXPERT, "data_offsets"),
    in_shard("offsets are three", offsets(lambda b, e: [b, e, e]), EXPERT, "data_offsets"),
    in_shard("offsets are an object", entry(data_offsets={"0": 0, "1": 1}), EXPERT, "data_offsets"),
    in_shard("offsets reversed", offsets(lambda b, e: [e, b]), EXPERT),
    in_shard("offsets negative", offsets(lambda b, e: [-b, e]), EXPERT),
    in_shard("offsets fractional", offsets(lambda b, e: [float(b), float(e)]), EXPERT),
    in_shard("offsets half a byte off", offsets(lambda b, e: [b + 0.5, e + 0.5]), EXPERT),
    in_shard("offsets are strings", offsets(lambda b, e: [str(b), str(e)]), EXPERT),
    in_shard("offsets are booleans", entry(data_offsets=[False, True]), EXPERT),
    in_shard("offset beyond 64 bits", offsets(lambda b, e: [b, e + (1 << 64)]), EXPERT),
    in_shard("offset near 2^64", offsets(lambda b, e: [b, (1 << 64) - 1]), EXPERT, str((1 << 64) - 1)),
    in_shard("offset of minus zero", raw_offset("-0")),
    in_shard("offset of 0e0", raw_offset("0e0")),
    in_shard("offset with a leading zero", raw_offset("00")),
    in_shard("offset of 5000 digits", raw_offset(DIGITS)),
    in_shard("offsets of two tensors overlap", shard_bytes(overlap), EXPERT),
    in_shard("offsets leave a hole", shard_bytes(leave_a_hole), EXPERT),
    in_shard("offsets do not start at zero", header(lambda h: h.pop(f"{LAYER}.input_layernorm.weight"))),
    in_shard("a tensor's entry is gone, its data not", header(lambda h: h.pop(EXPERT))),
    in_shard("two tensors share their data", header(lambda h: h.update({EXPERT: h[EXPERT.replace("3", "4")]}))),
    in_shard("a name that breaks the line", extra_entry("x\ny\x1b[31m", "BF15", [1], b"\0\0"), "BF15"),
    in_shard("a name of a megabyte", extra_entry("x" * 1_000_000, "BF15", [1], b"\0\0"), "BF15"),
]

FILE_ATTACKS = [
    Attack("source does not exist", shutil.rmtree),
    Attack("source is a file", source_is_a_file),
    Attack("source is empty", source_is_empty),
    Attack("shard absent", removed(SHARD), (SHARD,)),
    Attack("shard is a directory", replaced_by(SHARD, Path.mkdir), (SHARD,)),
    Attack("shard is a named pipe", replaced_by(SHARD, os.mkfifo), (SHARD,)),
    Attack("shard is a dangling symlink", replaced_by(SHARD, lambda p: p.symlink_to("nowhere")), (SHARD,)),
    Attack("shard is a symlink to itself", replaced_by(SHARD, lambda p: p.symlink_to(p.name)), (SHARD,)),
    Attack("no index, and a file less than the names say", without_index_and_a_shard, (SHARDS[2], "index")),
    Attack("stray file with an unknown tensor", stray_file("x.weight"), ("model-extra.safetensors",)),
    Attack("stray file with a tensor of the model", stray_file(EXPERT), ("model-extra.safetensors",)),
    Attack(
        "the weights once more, as vLLM would prefer them",
        stray_file("x", "consolidated.safetensors"),
        ("consolidated",),
    ),
]

INDEX_ATTACKS = [
    Attack("index is empty", text_of(INDEX, ""), (INDEX,)),
    Attack("index is not JSON", text_of(INDEX, "{'weight_map': {}}"), (INDEX,)),
    Attack("index is not UTF-8", text_of(INDEX, b'{"weight_map": {"\xff": "\xff"}}'), (INDEX,)),
    Attack("index is an array", text_of(INDEX, "[]"), (INDEX,)),
    Attack("index is null", text_of(INDEX, "null"), (INDEX,)),
    Attack("index nested 100000 deep", text_of(INDEX, NESTED), (INDEX,)),
    Attack("index with a number of 5000 digits", text_of(INDEX, f'{{"weight_map": {DIGITS}}}'), (INDEX,)),
    Attack("index is a directory", replaced_by(INDEX, Path.mkdir), (INDEX,)),
    Attack("index without weight_map", index(lambda i: i.pop("weight_map")), (INDEX, "weight_map")),
    Attack("weight_map is a list", index(lambda i: i.update(weight_map=[EXPERT])), (INDEX, "weight_map")),
    Attack("weight_map is null", index(lambda i: i.update(weight_map=None)), (INDEX, "weight_map")),
    Attack("weight_map is empty", index(lambda i: i.update(weight_map={})), ("index",)),
    Attack("index names a file one level up", moved_to(f"../{SHARD}"), (INDEX, f"../{SHARD}")),
    Attack("index names a file one level up, deviously", mapped_to(f"x/../../{SHARD}"), (INDEX, f"x/../../{SHARD}")),
    Attack("index names an absolute path", mapped_to(f"/{SHARD}"), (INDEX, f"/{SHARD}")),
    Attack("index names a file in a folder", moved_to(f"shards/{SHARD}"), (INDEX, f"shards/{SHARD}")),
    Attack("index names no file", mapped_to(""), (INDEX, EXPERT)),
    Attack("index names the directory", mapped_to("."), (INDEX, EXPERT)),
    Attack("index names the config", mapped_to(CONFIG), (CONFIG,)),
    Attack("index names a number", mapped_to(2), (INDEX, EXPERT, "2")),
    Attack("index names null", mapped_to(None), (INDEX, EXPERT)),
    Attack("index names a list of files", mapped_to([SHARD, SHARDS[2]]), (INDEX, EXPERT)),
    Attack("index names a file with a NUL", mapped_to("model\0.safetensors"), (INDEX,)),
    Attack("index names a file with a lone surrogate", mapped_to("model\ud800.safetensors"), (INDEX,)),
    Attack("index names a file with a line break", mapped_to("model\n.safetensors"), (INDEX,)),
    Attack("index names a file of 5000 letters", mapped_to("x" * 5_000), (INDEX,)),
    Attack("index names an absent file", mapped_to("absent.safetensors"), ("absent.safetensors",)),
    Attack("index names an absent tensor", index(lambda i: i["weight_map"].update({"x.ghost": SHARD})), ("x.ghost",)),
    Attack("index leaves a tensor out", index(lambda i: i["weight_map"].pop(EXPERT)), (EXPERT, SHARD)),
    Attack("index names the wrong shard", mapped_to(SHARDS[2]), (EXPERT, SHARDS[2])),
    Attack("index names a tensor twice", named_twice, (INDEX, EXPERT)),
    Attack("tensor in two shards", in_two_shards, (EXPERT, SHARDS[2])),
]

CONFIG_ATTACKS = [
    Attack("config absent", removed(CONFIG), (CONFIG,)),
    Attack("config is a directory", replaced_by(CONFIG, Path.mkdir), (CONFIG,)),
    Attack("config is a dangling symlink", replaced_by(CONFIG, lambda p: p.symlink_to("nowhere")), (CONFIG,)),
    Attack("config is empty", text_of(CONFIG, ""), (CONFIG,)),
    Attack("config is not JSON", text_of(CONFIG, "model_type: deepseek_v3"), (CONFIG,)),
    Attack("config is not UTF-8", text_of(CONFIG, b'{"model_type": "\xff"}'), (CONFIG,)),
    Attack("config is an array", text_of(CONFIG, "[]"), (CONFIG,)),
    Attack("config nested 100000 deep", text_of(CONFIG, NESTED), (CONFIG,)),
    Attack("no model type", config_without("model_type"), (CONFIG, "model_type")),
    Attack("model type is a number", config(model_type=3), (CONFIG, "model_type")),
    Attack("model type unknown", config(model_type="megamoe_9"), (CONFIG, "megamoe_9")),
    Attack(
        "model type unknown, its language model's known",
        config(model_type="megamoe_9_vl", text_config={"model_type": "deepseek_v3"}),
        (CONFIG, "megamoe_9_vl"),
    ),
    Attack(
        "model type known, its language model's unknown",
        config(text_config={"model_type": "megamoe_9_text"}),
        (CONFIG, "megamoe_9"),
    ),
    Attack(
        "language model of another family",
        config(text_config={"model_type": "glm4_moe"}),
        (CONFIG, "deepseek_v3", "glm4_moe"),
    ),
    Attack("more experts than there are", config(n_routed_experts=16), (CONFIG, "16", "8")),
    Attack("fewer experts than there are", config(n_routed_experts=4), (CONFIG, "4", "8")),
    Attack("expert count beyond all bounds", config(n_routed_experts=10**15), (CONFIG, str(10**15))),
    Attack("expert count zero", config(n_routed_experts=0), (CONFIG, "n_routed_experts", "0")),
    Attack("expert count negative", config(n_routed_experts=-8), (CONFIG, "n_routed_experts", "-8")),
    Attack("expert count a fraction", config(n_routed_experts=8.5), (CONFIG, "n_routed_experts", "8.5")),
    Attack("expert count a string", config(n_routed_experts="8"), (CONFIG, "n_routed_experts")),
    Attack("expert count true", config(n_routed_experts=True), (CONFIG, "n_routed_experts")),
    Attack("expert count a list", config(n_routed_experts=[8]), (CONFIG, "n_routed_experts")),
    Attack("two expert counts", config(num_experts=16), (CONFIG, "n_routed_experts", "num_experts", "16")),
    Attack("groups do not divide the experts", config(n_group=3, topk_group=2), (CONFIG, "n_group", "3")),
    Attack("more groups than experts", config(n_group=16), (CONFIG, "n_group", "16")),
    Attack("groups left unsaid, where engines assume eight", config_without("n_group"), (CONFIG, "n_group")),
    Attack("group count null, where engines assume eight", config(n_group=None), (CONFIG, "n_group")),
    Attack("picked groups left unsaid", config_without("topk_group"), (CONFIG, "topk_group")),
    Attack("scoring unknown", config(scoring_func="gumbel"), (CONFIG, "scoring_func", "gumbel")),
    Attack("scoring a number", config(scoring_func=7), (CONFIG, "scoring_func", "7")),
    Attack("method of choice unknown", config(topk_method="per_group"), (CONFIG, "topk_method", "per_group")),
    Attack("scaling factor a string", config(routed_scaling_factor="2.5"), (CONFIG, "routed_scaling_factor")),
    Attack(
        "groups said differently in the language model's config",
        config(n_group=1, topk_group=1, text_config={"n_group": 4, "topk_group": 2}),
        (CONFIG, "n_group", "4", "1"),
    ),
    Attack(
        "expert count said differently in the language model's config",
        config(llm_config={"num_experts": 4, "n_routed_experts": 4}),
        (CONFIG, "n_routed_experts"),
    ),
    Attack("groups under another key", config(num_expert_group=4), (CONFIG, "num_expert_group")),
    Attack("groups under DeepSeek's own key", config(n_limited_groups=2), (CONFIG, "n_limited_groups")),
    Attack(
        "group limits without groups, in a family that need not have any",
        config(model_type="deepseek_v2", topk_method="group_limited_greedy", n_group=None),
        (CONFIG, "n_group"),
    ),
    Attack("architectures a number", config(architectures=5), (CONFIG, "architectures"), only_for_zigzag=True),
    Attack(
        "architectures a string", config(architectures="DeepseekV3"), (CONFIG, "architectures"), only_for_zigzag=True
    ),
    Attack(
        "scaling factor beyond all numbers", config(routed_scaling_factor=10**400), (CONFIG, "routed_scaling_factor")
    ),
    Attack("no groups", config(n_group=0), (CONFIG, "n_group", "0")),
    Attack("group count negative", config(n_group=-4), (CONFIG, "n_group", "-4")),
    Attack("group count a fraction", config(n_group=4.5), (CONFIG, "n_group", "4.5")),
    Attack("group count a string", config(n_group="4"), (CONFIG, "n_group")),
    Attack("more groups picked than there are", config(topk_group=5), (CONFIG, "topk_group", "5")),
    Attack("no group picked", config(topk_group=0), (CONFIG, "topk_group", "0")),
    Attack("picked groups negative", config(topk_group=-2), (CONFIG, "topk_group", "-2")),
    Attack("picked groups a string", config(topk_group="2"), (CONFIG, "topk_group")),
    Attack("picked groups too small", config(topk_group=1, num_experts_per_tok=3), (CONFIG, "3")),
    Attack("more experts picked than there are", config(num_experts_per_tok=9), (CONFIG, "9", "8")),
    Attack("no expert picked", config(num_experts_per_tok=0), (CONFIG, "num_experts_per_tok", "0")),
    Attack("picked experts negative", config(num_experts_per_tok=-2), (CONFIG, "num_experts_per_tok", "-2")),
    Attack("picked experts a string", config(num_experts_per_tok="2"), (CONFIG, "num_experts_per_tok")),
    Attack(
        "ignore list that tells experts apart by a pattern",
        config(
            quantization_config={"quant_method": "compressed-tensors", "ignore": ["re:.*experts\\.(1|2)\\..*"]},
        ),
        (CONFIG, "(1|2)"),
        only_for_zigzag=True,
    ),
]

EXPERT_ATTACKS = [
    Attack("an expert missing", without(".experts.3."), (LAYER, "3")),
    Attack("the last expert missing", without(".experts.7."), (LAYER, "7")),
    Attack("an expert's down_proj missing", without(".experts.3.down_proj."), (LAYER, "3", "down_proj")),
    Attack("all experts of a layer missing", without(".experts."), (LAYER,)),
    Attack("expert id beyond the count", renamed_expert("7", "11", keep=True), (LAYER, "11")),
    Attack("expert id with a leading zero", renamed_expert("7", "07"), (LAYER, "07")),
    Attack("expert id with a twin of a leading zero", renamed_expert("7", "07", keep=True), (LAYER, "07")),
    Attack("expert id in other digits", renamed_expert("3", "\N{ARABIC-INDIC DIGIT THREE}"), (LAYER,)),
    Attack(
        "expert of another shape", with_tensor(f"{LAYER}.mlp.experts.5.up_proj.weight", (4, 32)), (SHARD, LAYER, "5")
    ),
    Attack("fused experts, one short", model(fused_with_an_expert_short), (LAYER, "7")),
    Attack("the projection before the expert's id", renamed_experts("{1}.{0}.weight"), (SHARD, "_proj.", "<id>")),
    Attack("the expert's id within a word", renamed_experts("expert_{0}.{1}.weight"), (SHARD, "expert_", "<id>")),
    Attack("the expert's id at the end", renamed_experts("{1}_{0}"), (SHARD, "_proj_", "<id>")),
    Attack("gate missing", without(".gate.weight"), (LAYER, "gate")),
    Attack("gate with a row too few", with_tensor(GATE, (7, 16)), (SHARD, GATE, "7")),
    Attack("gate with a row too many", with_tensor(GATE, (9, 16)), (SHARD, GATE, "9")),
    Attack("gate of one dimension too many", with_tensor(GATE, (8, 16, 1)), (SHARD, GATE)),
    Attack("gate is a scalar", with_tensor(GATE, ()), (SHARD, GATE)),
    Attack("bias too short", with_tensor(BIAS, (7,), "F32"), (SHARD, BIAS, "7")),
    Attack("bias too long", with_tensor(BIAS, (16,), "F32"), (SHARD, BIAS, "16")),
    Attack("bias is a matrix", with_tensor(BIAS, (1, 8), "F32"), (SHARD, BIAS)),
    Attack("unknown tensor beside the router", with_tensor(f"{LAYER}.mlp.gains.weight", (3,)), (SHARD, "gains")),
    Attack(
        "unknown tensor twice as long as experts are many", with_tensor(f"{LAYER}.mlp.gains", (16,)), (SHARD, "gains")
    ),
    Attack("token table beside the gate", with_tensor(f"{LAYER}.mlp.tid2eid", (32, 2), "I64"), (SHARD, "tid2eid")),
    Attack("router's bias outside the block", with_tensor(f"{LAYER}.router_bias", (8,)), (SHARD, "router_bias")),
    Attack("experts outside a block", with_tensor(f"{LAYER}.experts.0.weight", (8, 8)), (SHARD, f"{LAYER}.experts.0")),
    Attack(
        "experts below something else of that name",
        with_tensor("model.experts.layers.1.mlp.experts.0.up_proj.weight", (8, 8)),
        (SHARD, "model.experts.layers.1"),
    ),
    Attack("gate of a dtype that is not computed with", with_tensor(GATE, (8, 16), "U8"), (SHARD, GATE, "U8")),
    Attack("token table of floats", with_tensor(f"{LAYER}.mlp.gate.tid2eid", (32, 2), "F32"), (SHARD, "tid2eid")),
    Attack("two routers", with_tensor(f"{LAYER}.mlp.router.weight", (8, 16)), (SHARD, "router.weight", "gate.weight")),
    Attack("router with a scale", with_tensor(f"{LAYER}.mlp.gate.weight_scale", (8, 1)), (SHARD, "gate.weight_scale")),
    Attack("router packed", with_tensor(f"{LAYER}.mlp.gate.qweight", (2, 8)), (SHARD, "gate.qweight")),
    Attack("unknown tensor of experts", with_tensor(f"{LAYER}.mlp.statics_bias", (8,)), (SHARD, "mlp.statics_bias")),
    Attack("no MoE layer", no_moe_layers, ("expert",)),
    Attack("a dense model", dense_model),
]

ATTACKS = [*SHARD_ATTACKS, *FILE_ATTACKS, *INDEX_ATTACKS, *CONFIG_ATTACKS, *EXPERT_ATTACKS]
