"""Tensors in safetensors files of bounded size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LIMIT = 5 * 10**9
"""Bytes of one file, and so of what a writer gathers before it writes; as Hugging Face's default."""


def split_files(stem: str, sizes: dict[str, int], limit: int | None = None) -> dict[str, list[str]]:
    """File name → names of its tensors: `stem.safetensors`, or `stem-00001-of-0000N.safetensors` …"""
    limit = limit or LIMIT
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)}


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it, not even a serving engine


def write_index(path: Path, groups: dict[str, list[str]], total: int) -> None:
    """Hugging Face's `model.safetensors.index.json`."""
    weights = {name: file for file, names in groups.items() for name in names}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=1) + "\n")


class Reader:
    """The tensors of some safetensors files, one at a time."""

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = lambda name: name) -> None:
        self._files = [safe_open(file, framework="pt") for file in files]
        self._where = {rename(name): (file, name) for file in self._files for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → shape and type; reads no data."""
        empty = {name: file.get_slice(key) for name, (file, key) in self._where.items()}
        return {name: (tuple(part.get_shape()), _DTYPES[part.get_dtype()]) for name, part in empty.items()}

    def read(self, name: str) -> torch.Tensor:
        file, key = self._where[name]
        return file.get_tensor(key)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
