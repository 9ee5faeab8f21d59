"""Maps tensors whose values are expert ids, such as `tid2eid` of DeepSeek-V4's hash layers."""

from __future__ import annotations

from collections.abc import Sequence


def map_expert_ids(data: bytearray, dtype: str, mapping: Sequence[int]) -> None:
    """Replace each id by `mapping[id]`, in place.

    Parameters:
        data: the tensor's bytes, little endian
        dtype: its safetensors dtype, an integer one
        mapping: [E], the new id of each expert

    Raises ValueError if an id is not in 0..E-1 or `dtype` cannot hold the new ids.

    """
    import torch

    dtypes = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    if dtype not in dtypes or len(mapping) - 1 > torch.iinfo(dtypes[dtype]).max:
        raise ValueError(f"expected expert ids from 0 to {len(mapping) - 1}, found a tensor of {dtype}")
    if not data:
        return
    ids = torch.frombuffer(data, dtype=dtypes[dtype])
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= len(mapping):
        raise ValueError(f"expected expert ids from 0 to {len(mapping) - 1}, found {low if low < 0 else high}")
    ids.copy_(torch.tensor(mapping)[ids.long()])
