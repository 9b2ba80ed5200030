"""What a checkpoint consists of, and its files: JSON, texts, and weights in one file or several."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Weights = dict[str, NDArray[np.float32]]
StoredDtype = Literal["F32", "BF16"]

BYTES_PER_VALUE: Final[dict[StoredDtype, int]] = {"F32": 4, "BF16": 2}
ALIGNMENT_BYTES: Final = 8


@dataclass(frozen=True)
class Checkpoint:
    """A model before it is written.

    Attributes:
        tokenizer: becomes `tokenizer.json`.
        settings: contents of the other JSON files, by name.
        texts: contents of text files, by name.
        weights: every tensor by its released name, float32.
        dtype: in which the weights are stored.
        shards: files that the weights are spread over where nobody says otherwise.
    """

    tokenizer: Tokenizer
    settings: dict[str, dict[str, object]]
    texts: dict[str, str]
    weights: Weights
    dtype: StoredDtype
    shards: int = 1


def noise(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard normal values from a generator that `name` seeds."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, shards: int) -> None:
    """Write the files of `checkpoint` into `folder`, which exists, its weights into `shards` files."""
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    for name, text in checkpoint.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, content in checkpoint.settings.items():
        write_json(folder / name, content)
    write_weights(folder, checkpoint.weights, checkpoint.dtype, shards)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write one JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(folder: Path, weights: Weights, dtype: StoredDtype, shards: int) -> None:
    """Write `model.safetensors`, or its shards and the index that says where each tensor is."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    places: dict[str, str] = {}
    for number, part in enumerate(split_weights(weights, shards), start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / name, part, dtype)
        places |= dict.fromkeys(part, name)
    total = sum(values.size for values in weights.values()) * BYTES_PER_VALUE[dtype]
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def split_weights(weights: Weights, shards: int) -> Iterator[Weights]:
    """Yield the tensors in their order, in `shards` parts of about equal size."""
    parts: list[Weights] = [{} for _ in range(shards)]
    total = sum(values.size for values in weights.values())
    before = 0
    for name, values in weights.items():
        parts[before * shards // total][name] = values
        before += values.size
    yield from parts


def write_safetensors(path: Path, weights: Weights, dtype: StoredDtype) -> None:
    """Write one file of weights, tensors in the order of their names.

    The library writes what numpy can hold, and numpy has no bfloat16; float32 files equal the library's to the byte.
    """
    data = {name: stored_bytes(weights[name], dtype) for name in sorted(weights)}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in data.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(weights[name].shape),
            "data_offsets": [offset, offset + len(values)],
        }
        offset += len(values)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data.values()))


def stored_bytes(values: NDArray[np.float32], dtype: StoredDtype) -> bytes:
    """Return little-endian float32, or its upper halves rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    if dtype == "BF16":
        bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    data: bytes = bits.tobytes()
    return data
