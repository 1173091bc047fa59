"""Keys: derivations against hashlib and hmac, the text form, files, and what must never show."""

import copy
import hashlib
import hmac
import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import filigrane.keys as keys_module
from filigrane.errors import FiligraneError, KeyFormatError, SchemeError, SecretLeakError
from filigrane.keys import Key, MarkingKey, UserKey, UserKeys

VECTORS = Path(__file__).parent.parent / "vectors"
LABEL = "gumbel/4"
SECRET = hashlib.sha256(b"filigrane tests").digest()
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")


def _verifier():
    spec = importlib.util.spec_from_file_location("verify", VECTORS / "verify.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERIFY = _verifier()


def text_of(secret: bytes = SECRET, name: str = "alpha", slots: int = 8) -> str:
    return VERIFY.derive(secret, name, slots, [], [])["text"]


def key_of(secret: bytes = SECRET, name: str = "alpha", slots: int = 8) -> Key:
    return Key.from_text(text_of(secret, name, slots))


def expand(key: bytes, info: bytes) -> bytes:
    return hmac.digest(key, info + b"\x01", "sha256")


def user_bytes(secret: bytes, label: str, slot: int, index: int) -> bytes:
    info = b"filigrane/v1/users" + len(label.encode()).to_bytes(2, "big") + label.encode()
    parent = expand(secret, info + bytes([slot]))
    return expand(parent, b"filigrane/v1/user" + index.to_bytes(8, "big"))


def as_hex(words: np.ndarray) -> list[str]:
    assert words.dtype == np.uint32
    return [row.astype("<u4").tobytes().hex() for row in words]


# --- known answers ---------------------------------------------------------------------------


def test_vectors_are_what_the_standard_library_derives():
    report = VERIFY.verify(VECTORS / "v1" / "keys.json")
    assert report.problems == [] and report.checked > 300


def test_the_verifier_sees_one_changed_digit(tmp_path):
    good = (VECTORS / "v1" / "keys.json").read_text("utf-8")
    bad = tmp_path / "keys.json"
    fingerprint = json.loads(good)["cases"][0]["fingerprint"]
    bad.write_text(good.replace(fingerprint, fingerprint[:-1] + "x"), "utf-8")
    assert len(VERIFY.verify(bad).problems) == 1


@pytest.mark.parametrize("case", json.loads((VECTORS / "v1" / "keys.json").read_text())["cases"])
def test_keys_give_the_vectors(case):
    key = Key.from_text(case["text"])
    assert (key.name, key.slots) == (case["name"], case["slots"])
    assert key.fingerprint == case["fingerprint"]
    assert key.export_text() == case["text"]
    for mark in case["marks"]:
        assert as_hex(key.prf_keys(mark["label"])) == mark["scheme_keys"]
        for user in mark["users"]:
            index = int(user["index"])
            assert key.user(index).name == user["name"]
            assert as_hex(key.user(index).prf_keys(mark["label"])) == user["keys"]
            users = key.users(range(index, index + 1))
            assert as_hex(users.prf_keys(mark["label"])[0]) == user["keys"]


# --- batches of users ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "count", "slots"),
    # Around the lane count, across the carries inside the index, and at the very last index.
    [(0, 1, 8), (5, 31, 1), (0, 32, 3), (7, 33, 2), (250, 100, 2), (2**8 - 3, 6, 1)]
    + [(2**n - 40, 80, 1) for n in (16, 24, 32, 40, 48, 56, 63)]
    + [(2**64 - 65, 65, 2), (123456789, 1000, 1)],
)
def test_batches_equal_hmac(first, count, slots):
    users = key_of(slots=slots).users(range(first, first + count))
    got = users.prf_keys(LABEL)
    assert got.shape == (count, slots, 8)
    wanted = b"".join(
        user_bytes(SECRET, LABEL, slot, first + i) for i in range(count) for slot in range(slots)
    )
    assert got.astype("<u4").tobytes() == wanted
    for slot in range(slots):
        words = users.prf_key_words(LABEL, slot)
        assert words.flags.c_contiguous and words.dtype == np.uint32
        np.testing.assert_array_equal(words, got[:, slot].T)


@settings(max_examples=30, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=32),
    label=st.text(min_size=1, max_size=50),
    first=st.integers(0, 2**64 - 40),
    data=st.data(),
)
def test_batches_equal_single_users(secret, label, first, data):
    key = key_of(secret, slots=2)
    start = data.draw(st.integers(0, 40))
    stop = data.draw(st.integers(start, 40))
    users = key.users(range(first, first + 40))
    got = users.prf_keys(label, start, stop)
    assert got.shape == (stop - start, 2, 8)
    for i in range(start, stop):
        np.testing.assert_array_equal(got[i - start], users[i].prf_keys(label))
    if start < stop:
        assert got[0, 1].astype("<u4").tobytes() == user_bytes(secret, label, 1, first + start)


def test_the_last_index_and_the_empty_range():
    key = key_of()
    last = key.users(range(2**64 - 1, 2**64))
    assert last.prf_keys(LABEL, 1, 1).shape == (0, 8, 8)
    assert last.prf_key_words(LABEL, 0, 1).shape == (8, 0)
    np.testing.assert_array_equal(last.prf_keys(LABEL)[0], key.user(2**64 - 1).prf_keys(LABEL))
    everyone = key.users(2**64)
    tail = everyone.prf_keys(LABEL, 2**64 - 1, 2**64)
    np.testing.assert_array_equal(tail, last.prf_keys(LABEL))
    for empty in (key.users(0), key.users(range(9, 3))):
        assert len(empty) == 0 and list(empty) == []
        assert empty.prf_keys(LABEL).shape == (0, 8, 8)


def test_kernel_matches_across_threads_and_wide_batches():
    """Four threads write quarters of one output: the kernel keeps no state of its own."""
    users = key_of(slots=1).users(20_000)
    wanted = users.prf_keys(LABEL)
    parts: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        parts[i] = users.prf_keys(LABEL, 5000 * i, 5000 * (i + 1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.concatenate([parts[i] for i in range(4)]), wanted)
    sample = range(0, 20_000, 997)
    assert [as_hex(wanted[i])[0] for i in sample] == [
        user_bytes(SECRET, LABEL, 0, i).hex() for i in sample
    ]


def test_batches_are_fast():
    """Over twice as fast as one hmac call each; measured it is 10 to 20 times, less on a busy day.

    Compared with hmac and not with a clock, so that a slow machine slows both.
    """
    users = key_of(slots=1).users(50_000)
    users.prf_keys(LABEL, 0, 100)
    batch, single = [], []
    for _ in range(3):
        start = time.perf_counter()
        users.prf_keys(LABEL)
        middle = time.perf_counter()
        for i in range(10_000):
            hmac.digest(SECRET, i.to_bytes(8, "big"), "sha256")
        batch.append((middle - start) / 50_000)
        single.append((time.perf_counter() - middle) / 10_000)
    assert 2 * min(batch) < min(single)


# --- near keys, slots, labels, users are unrelated -------------------------------------------


def test_near_keys_labels_slots_and_users_share_nothing():
    """Every word differs, and about half the bits: 32 bytes are 256 coin flips, 128 +- 6 sd 8."""

    def bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.bitwise_count(a ^ b).reshape(-1, 8).sum(axis=1, dtype=np.int64)

    base = key_of()
    words = base.prf_keys(LABEL)
    for bit in (0, 7, 100, 255):
        near = bytearray(SECRET)
        near[bit // 8] ^= 1 << (bit % 8)
        other = key_of(bytes(near))
        assert other.fingerprint != base.fingerprint and other != base
        assert not np.isin(other.prf_keys(LABEL), words).any()
        assert np.all(np.abs(bits(other.prf_keys(LABEL), words) - 128) < 48)
        users = bits(other.user(3).prf_keys(LABEL), base.user(3).prf_keys(LABEL))
        assert np.all(np.abs(users - 128) < 48)
    seen = [words, base.prf_keys("gumbel/5"), base.prf_keys("gumbel/40")]
    seen += [base.user(i).prf_keys(LABEL) for i in (0, 1, 2**32)]
    rows = np.concatenate(seen)
    assert len(np.unique(rows)) == rows.size
    distances = bits(rows[:, None, :].repeat(len(rows), 1), rows[None].repeat(len(rows), 0))
    assert np.all(np.abs(distances[distances > 0] - 128) < 56)


def test_fewer_slots_are_the_first_of_more_and_the_name_does_not_enter():
    many, few = key_of(slots=64, name="b"), key_of(slots=3)
    np.testing.assert_array_equal(many.prf_keys(LABEL)[:3], few.prf_keys(LABEL))


@pytest.mark.parametrize("label", ["", "x" * 201, "é" * 101, "\ud800"])
def test_labels_out_of_range(label):
    key = key_of()
    for call in (key.prf_keys, key.user(0).prf_keys, key.users(5).prf_keys):
        with pytest.raises(SchemeError, match="label"):
            call(label)


def test_labels_of_full_length_and_other_types():
    assert key_of().prf_keys("é" * 100).shape == (8, 8)
    for label in (b"gumbel/4", None, 4):
        with pytest.raises(TypeError, match="label"):
            key_of().prf_keys(label)


# --- the shape of the classes ----------------------------------------------------------------


def test_generate_uses_the_system_source_only(monkeypatch):
    asked = []

    def token_bytes(n: int) -> bytes:
        asked.append(n)
        return SECRET

    monkeypatch.setattr("secrets.token_bytes", token_bytes)
    assert Key.generate("alpha") == key_of()
    assert asked == [32]
    monkeypatch.undo()
    a, b = Key.generate("a", slots=1), Key.generate("a", slots=1)
    assert a != b and a.fingerprint != b.fingerprint


def test_there_is_no_other_way_to_make_one():
    for make in (Key, UserKey, UserKeys):
        with pytest.raises(TypeError):
            make()
    with pytest.raises(TypeError):
        Key(SECRET)
    with pytest.raises(TypeError):
        Key.generate()


@pytest.mark.parametrize("name", ["", " a", "-a", "a b", "a:b", "é", "a\n", "a" * 65, "a/1"])
def test_generate_refuses_names(name):
    with pytest.raises(KeyFormatError, match="name"):
        Key.generate(name)


@pytest.mark.parametrize("slots", [0, -1, 65, 2**70])
def test_generate_refuses_slots(slots):
    with pytest.raises(KeyFormatError, match="slots"):
        Key.generate("a", slots=slots)


@pytest.mark.parametrize("bad", [True, np.True_, 1.0, "1", None])
def test_integers_are_integers(bad):
    key = key_of()
    users = key.users(10)
    for call in (
        lambda: Key.generate("a", slots=bad),
        lambda: key.user(bad),
        lambda: key.users(bad),
        lambda: users[bad],
        lambda: users.name(bad),
        lambda: users.prf_keys(LABEL, bad),
        lambda: users.prf_key_words(LABEL, bad),
    ):
        with pytest.raises(TypeError, match="int"):
            call()
    with pytest.raises(TypeError):
        Key.generate(7)


def test_numpy_integers_are_integers():
    key = key_of()
    assert key.user(np.uint64(2**64 - 1)) == key.user(2**64 - 1)
    assert len(key.users(np.int32(7))) == 7
    assert type(key.user(np.uint8(3)).index) is int


def test_indices_out_of_range():
    key = key_of()
    for index in (-1, 2**64):
        with pytest.raises(ValueError, match="range"):
            key.user(index)
    for which in (-1, range(-1, 5), range(5, 2**64 + 1), range(0, 10, 2), range(10, 0, -1)):
        with pytest.raises(ValueError, match=r"use|they are"):
            key.users(which)
    users = key.users(10)
    for start, stop in ((-1, 5), (0, 11), (6, 5), (11, None)):
        with pytest.raises(IndexError, match="<= 10"):
            users.prf_keys(LABEL, start, stop)
    for slot in (-1, 8):
        with pytest.raises(IndexError, match="slot"):
            users.prf_key_words(LABEL, slot)
    for position in (10, -11):
        with pytest.raises(IndexError):
            users[position]
        with pytest.raises(IndexError):
            users.name(position)


def test_users_are_a_lazy_sequence():
    key = key_of()
    users = key.users(range(1000, 2000))
    assert isinstance(users[0], UserKey) and isinstance(users[0], MarkingKey)
    assert (len(users), users.slots, users.root, users.indices) == (1000, 8, key, range(1000, 2000))
    assert users.name(5) == users[5].name == "alpha/1005" and users[-1].index == 1999
    assert users[10:20] == key.users(range(1010, 1020)) and users[10:20][0].index == 1010
    assert [user.index for user in users[:3]] == [1000, 1001, 1002]
    assert key.user(1005) in users and key.user(5) not in users and "alpha/1005" not in users
    assert key_of(name="b").user(1005) not in users
    assert users != key.users(1000) and hash(users[:5]) == hash(key.users(range(1000, 1005)))
    assert len(key.users(10**15)) == 10**15
    with pytest.raises(ValueError, match="step"):
        users[::2]


def test_equality_and_hash():
    key, same = key_of(), key_of()
    assert key == same and hash(key) == hash(same) and key is not same
    assert key.user(1) == same.user(1) and hash(key.user(1)) == hash(same.user(1))
    others = [key_of(slots=7), key_of(name="b"), key_of(bytes(32)), key.user(1), "alpha", None]
    assert all(key != other for other in others)
    assert key.user(1) not in (key.user(2), key_of(bytes(32)).user(1), key)
    assert len({key, same, key.user(1), same.user(1), *others}) == 7


def test_keys_cannot_change():
    key = key_of()
    for thing in (key, key.user(1), key.users(3)):
        for name in ("name", "slots", "_Key__secret", "fresh"):
            with pytest.raises(AttributeError):
                setattr(thing, name, "b")
        with pytest.raises(AttributeError):
            del thing.slots
        with pytest.raises(TypeError):
            vars(thing)
        assert not hasattr(thing, "__dict__")
    words = key.prf_keys(LABEL)
    words[:] = 0  # the caller's own copy
    assert key.prf_keys(LABEL).any()


def test_copies_are_the_key_itself_and_pickles_are_refused():
    key = key_of()
    for thing in (key, key.user(1), key.users(3)):
        assert copy.copy(thing) is thing and copy.deepcopy(thing) is thing
        assert copy.deepcopy([thing])[0] is thing
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(SecretLeakError, match="export_text"):
                pickle.dumps(thing, protocol)
        for method in ("__reduce__", "__getstate__"):
            with pytest.raises(SecretLeakError):
                getattr(thing, method)()
    with pytest.raises(SecretLeakError):
        pickle.dumps(key._Key__secret)


# --- nothing shows the secret ----------------------------------------------------------------


def traces(secret: bytes = SECRET, name: str = "alpha", slots: int = 8) -> list[str]:
    """What a spill would look like: every form of the secret, its pieces and its children."""
    body = text_of(secret, name, slots).rsplit(":", 1)[1]
    forms = [secret.hex(), secret.hex().upper(), repr(secret)[2:-1]]
    children = [user_bytes(secret, LABEL, 0, 5)]
    children.append(bytes.fromhex(as_hex(key_of(secret, name, slots).prf_keys(LABEL))[0]))
    forms += [repr(child)[2:-1] for child in children] + [child.hex() for child in children]
    forms += [body[i : i + 12] for i in range(0, 44, 11)]
    forms += [form.upper() for form in forms[-4:]] + [secret.hex()[i : i + 16] for i in (0, 32)]
    return [*forms, str(np.frombuffer(children[1], "<u4")[0])]


def assert_clean(shown: str) -> None:
    assert [form for form in traces() if form in shown] == []


def report(action: Callable[[], object], expected: type[BaseException]) -> str:
    """The fullest traceback Python can print: local variables, causes and contexts included."""
    try:
        action()
    except expected as error:
        out = io.StringIO()
        chain: BaseException | None = error
        while chain is not None:
            # The first frame is this one; the test's own variables are not the library's business.
            trace = chain.__traceback__.tb_next if chain is error else chain.__traceback__
            shown = traceback.TracebackException(type(chain), chain, trace, capture_locals=True)
            # The lambda's frame holds what the test closed over.
            shown.stack[:] = [f for f in shown.stack if f.filename != __file__]
            out.write("".join(shown.format()))
            out.write(repr(chain.args))
            chain = chain.__cause__ or chain.__context__
        return out.getvalue()
    raise AssertionError("nothing was raised")


def test_repr_and_str_show_public_things_only():
    key = key_of()
    assert repr(key) == f"<Key alpha slots=8 fingerprint={key.fingerprint}>"
    shown = []
    for thing in (key, key.user(5), key.users(range(5, 9)), key._Key__secret):
        shown += [repr(thing), str(thing), f"{thing}", f"{[thing]}", ascii(thing)]
        if thing is not key._Key__secret:
            shown += [repr(getattr(thing, name)) for name in dir(thing)]
    assert_clean("\n".join(shown))


def broken_texts() -> dict[str, str]:
    """Each mistake and a word that only its message holds."""
    text = text_of()
    head, body = text.rsplit(":", 1)
    return {
        "there is no key here": "\n# only a comment\n",
        "keys here": f"{text}\n{text_of(bytes(32))}\n",
        "lines here": f"{text[:60]}\n{text[60:]}",
        "not a key": text.replace("filigrane", "filigree"),
        "format version": text.replace("-1:", "-2:"),
        "3 fields": f"filigrane-key-1:alpha:{body}",
        "is not a name": text.replace("alpha", "al pha"),
        "slots": text.replace(":8:", ":65:"),
        "character 5 of": f"{head}:{body[:4]}1{body[5:]}",
        "cut short": text[:-3],
        "too long": text + "a",
        "checksum": f"{head}:{'b' if body[0] == 'a' else 'a'}{body[1:]}",
    }


@pytest.mark.parametrize("message", broken_texts())
def test_every_typo_has_its_own_message_and_none_shows_the_body(message, tmp_path):
    bad = broken_texts()[message]
    with pytest.raises(KeyFormatError, match=message) as caught:
        Key.from_text(bad)
    others = [other for other in broken_texts() if other != message]
    assert not any(other in str(caught.value) for other in others if other != "slots")
    shown = report(lambda: Key.from_text(bad), KeyFormatError)
    assert "held = <secret>" in shown
    assert_clean(shown)
    path = tmp_path / "bad.key"
    path.write_text(bad)
    path.chmod(0o600)
    shown = report(lambda: Key.load(path), KeyFormatError)
    assert message in shown and "read = <secret>" in shown
    assert_clean(shown)


def test_more_typos():
    text, (head, body) = text_of(), text_of().rsplit(":", 1)
    cases = {
        text.upper(): "not a key",
        head + ":" + body.upper(): "lower case",
        text.replace(":8:", ":0:"): "slots",
        text.replace(":8:", ":08:"): "slots",
        text.replace(":8:", ":٨:"): "slots",
        text.replace(":8:", ":7:"): "checksum",
        text.replace("alpha", "alphb"): "checksum",
        text.replace("alpha", ""): "name",
        text.replace("alpha", "a" * 65): "name",
        text.replace("alpha", "alph\N{CYRILLIC SMALL LETTER A}"): "name",
        text + ":": "5 fields",
        head + ":": "cut short",
        head + ": " + body: "character 1 ",
        "filigrane-key-": "format version",
        "": "no key here",
    }
    for bad, message in cases.items():
        with pytest.raises(KeyFormatError, match=message):
            Key.from_text(bad)
    for bad in (text.encode(), None, 5, Path("x")):
        with pytest.raises(TypeError, match="str"):
            Key.from_text(bad)
        assert_clean(report(lambda bad=bad: Key.from_text(bad), TypeError))


def test_a_fault_anywhere_inside_shows_nothing(monkeypatch, tmp_path):
    """Whatever breaks while the secret is in use, the frames above it hold it wrapped."""

    class Fault(Exception):
        pass

    def fail(*args: object, **kwargs: object) -> object:
        raise Fault

    key, text, path = key_of(), text_of(), tmp_path / "k"
    key.save(path)
    actions = {
        "text": lambda: Key.from_text(text),
        "load": lambda: Key.load(path),
        "derive": lambda: key.prf_keys(LABEL),
        "user": lambda: key.user(5).prf_keys(LABEL),
        "users": lambda: key.users(9).prf_keys(LABEL),
        "words": lambda: key.users(9).prf_key_words(LABEL, 0),
        "export": lambda: key.export_text(),
        "save": lambda: key.save(tmp_path / "k2"),
    }
    places = {
        "hashlib.sha256": {"text", "load", "export", "save"},
        "hmac.compare_digest": {"text", "load"},
        "base64.b32decode": {"text", "load"},
        "base64.b32encode": {"export", "save"},
        "os.fsync": {"save"},
        "os.fstat": {"load"},
        "numpy.frombuffer": {"derive", "user", "users", "words"},
        "numpy.empty": {"users", "words"},
        "filigrane.kernels.hkdf.expand_users": {"users", "words"},
        "cryptography.hazmat.primitives.kdf.hkdf.HKDFExpand": {
            "text", "load", "derive", "user", "users", "words",
        },
    }  # fmt: skip
    for place, reached in places.items():
        for name in reached:
            with monkeypatch.context() as patch:
                patch.setattr(place, fail)
                shown = report(actions[name], Fault)
            assert "keys.py" in shown
            assert_clean(shown)
    for action, expected in (
        (lambda: key.prf_keys(""), SchemeError),
        (lambda: key.user(-1), ValueError),
        (lambda: key.users(9).prf_keys(LABEL, 3, 99), IndexError),
        (lambda: key.users(10**17).prf_keys(LABEL), Exception),
        (lambda: pickle.dumps(key), SecretLeakError),
        (lambda: key.save(path), KeyFormatError),
        (lambda: setattr(key, "name", "b"), AttributeError),
    ):
        assert_clean(report(action, expected))


# --- text and files --------------------------------------------------------------------------


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True)
SPACE = st.text(" \t\r\n", max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), NAMES, st.integers(1, 64), SPACE, SPACE)
def test_text_round_trip(secret, name, slots, before, after):
    text = text_of(secret, name, slots)
    key = Key.from_text(f"{before}{text}{after}")
    assert (key.name, key.slots, key.export_text()) == (name, slots, text)
    assert key.prf_keys(LABEL)[0].astype("<u4").tobytes() == expand(
        secret, b"filigrane/v1/mark\0\x08" + LABEL.encode() + b"\0"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 57), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_any_changed_character_is_seen(place, letter):
    """Every one of them, the spare bits of the last character included."""
    head, body = text_of().rsplit(":", 1)
    changed = body[:place] + letter + body[place + 1 :]
    if changed == body:
        assert Key.from_text(f"{head}:{changed}") == key_of()
    else:
        with pytest.raises(KeyFormatError, match="checksum"):
            Key.from_text(f"{head}:{changed}")


def test_spare_bits_must_be_zero():
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    text = text_of()
    for extra in (1, 2, 3):
        with pytest.raises(KeyFormatError, match="checksum"):
            Key.from_text(text[:-1] + alphabet[alphabet.index(text[-1]) + extra])


def test_save_and_load(tmp_path):
    key, path = key_of(), tmp_path / "alpha.key"
    key.save(path)
    assert Key.load(path) == key and Key.load(str(path)) == key
    *comments, line = path.read_text().splitlines()
    assert line == key.export_text()
    header = "\n".join(comments)
    assert all(comment.startswith("# ") for comment in comments)
    for word in ("alpha", "8 slots", key.fingerprint, "keep secret"):
        assert word in header
    assert any(part[:2] == "20" and len(part) == 11 for part in header.split())
    assert_clean(header)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Key.load(path) == key  # as a Windows editor would have saved it


@POSIX
def test_saved_files_are_private_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        key_of().save(tmp_path / "k")
    finally:
        os.umask(old)
    assert (tmp_path / "k").stat().st_mode & 0o7777 == 0o600


def test_save_never_overwrites(tmp_path):
    path = tmp_path / "k"
    path.write_text("mine")
    with pytest.raises(KeyFormatError, match="never overwritten"):
        key_of().save(path)
    assert path.read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFormatError, match="never overwritten"):
        key_of().save(link)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(KeyFormatError, match="directory"):
        key_of().save(tmp_path / "no" / "k")


def test_a_failed_save_leaves_no_half_key(tmp_path, monkeypatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(KeyFormatError, match="No space"):
        key_of().save(tmp_path / "k")
    assert list(tmp_path.iterdir()) == []


def test_load_says_what_is_wrong_with_the_file(tmp_path):
    def made(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    line = text_of().encode()
    cases = {
        tmp_path / "none": "no such file",
        tmp_path: "directory",
        made("empty", b""): "empty",
        made("blank", b" \n\n"): "empty",
        made("comments", b"# one\n# two\n"): "no key here",
        made("latin", b"# caf\xe9\n" + line): "not a text file",
        made("binary", b"\0" * 100 + line): "not a text file",
        made("wide", text_of().encode("utf-16")): "not a text file",
        made("long", line + b"\n" * 70_000): "too long",
        made("two", line + b"\n# next\n" + text_of(bytes(32)).encode()): "2 keys",
        made("notes", line + b"\nmy first key\n"): "2 lines",
    }
    for path, message in cases.items():
        with pytest.raises(KeyFormatError, match=message) as caught:
            Key.load(path)
        assert str(path) in str(caught.value)
        assert caught.value.__context__ is None
        assert_clean(report(lambda path=path: Key.load(path), FiligraneError))
    with pytest.raises(TypeError):
        Key.load(None)


@POSIX
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o666])
def test_load_refuses_files_that_others_can_use(tmp_path, mode):
    path = tmp_path / "k"
    key_of().save(path)
    path.chmod(mode)
    with pytest.raises(KeyFormatError, match=f"{mode:04o}.*chmod 600 "):
        Key.load(path)
    for fine in (0o600, 0o400, 0o700):
        path.chmod(fine)
        assert Key.load(path) == key_of()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs to be two users")
def test_files_that_an_orchestrator_mounts_can_be_read():
    """Owned by root, readable by the group of a process that is not root (mode 0440)."""
    nobody = 65534
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = os.path.join(folder, "a.key")
        os.chmod(folder, 0o755)
        key_of().save(path)

        def loads() -> bool:
            child = os.fork()
            if child == 0:
                status = 2
                try:
                    os.setgroups([])
                    os.setgid(nobody)
                    os.setuid(nobody)
                    status = 0 if Key.load(path) == key_of() else 2
                except KeyFormatError:
                    status = 1
                finally:
                    os._exit(status)
            return {0: True, 1: False}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]

        os.chown(path, 0, nobody)
        for mode, fine in [(0o440, True), (0o640, True), (0o460, False), (0o444, False)]:
            os.chmod(path, mode)
            assert loads() == fine, oct(mode)
        os.chown(path, nobody, nobody)  # its own file: then a group is others
        os.chmod(path, 0o440)
        assert not loads()
        os.chmod(path, 0o400)
        assert loads()


@POSIX
def test_load_reads_pipes_and_refuses_devices():
    read, write = os.pipe()
    os.write(write, text_of().encode())
    os.close(write)
    try:
        if os.path.exists(f"/dev/fd/{read}"):
            assert Key.load(f"/dev/fd/{read}") == key_of()
    finally:
        os.close(read)
    with pytest.raises(KeyFormatError, match="device"):
        Key.load("/dev/null")


# --- the module ------------------------------------------------------------------------------


def test_importing_keys_imports_nothing_heavy():
    code = (
        "import sys, filigrane.keys; "
        "print([m for m in ('numba', 'cryptography', 'torch', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hkdf_is_that_of_rfc_5869():
    """Appendix A.1's key and info, one block of it (the library asks for 32 bytes at most)."""
    prk = bytes.fromhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
    info = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")
    okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    assert keys_module._expand(keys_module._Secret(prk), info, 32).reveal().hex() == okm
    assert VERIFY.expand(prk, info).hex() == okm
    assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")


def test_words_do_not_show_themselves() -> None:
    key = key_of()
    words = key.prf_keys(LABEL)
    shown = [str(number) for number in np.asarray(words).ravel().tolist()]
    batch = key.users(5).prf_keys(LABEL)
    for secret in (words, words[0], batch, batch[2, 0], key.users(5).prf_key_words(LABEL, 0)):
        for text in (repr(secret), str(secret), f"{secret}", repr([secret])):
            assert "secret words" in text and not any(number in text for number in shown)
        with pytest.raises(SecretLeakError):
            pickle.dumps(secret)
