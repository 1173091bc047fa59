"""Every provider does the same thing, against the real system."""

import base64
import io
import logging
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from secrets import token_bytes

import pytest

import kmskit
from filigrane.errors import KmsError, KmsUnavailable, SecretLeakError
from filigrane.keys import _Secret
from filigrane.kms.base import KeyManagement
from filigrane.kms.blobs import MAX_BYTES, MAX_CONTEXT, head_of

pytestmark = pytest.mark.parametrize("system", kmskit.PROVIDERS, indirect=True)

MESSAGE = b"filigrane/v1/tenant\x00\x04acme"
CONTEXT = b"acme.chat@3"


def recovered(kms: KeyManagement, patience: float = 10.0) -> bytes:
    """The MAC, as soon as the system answers again."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return kms.mac(1, MESSAGE).reveal()
        except KmsUnavailable:
            assert time.monotonic() < deadline, "the provider does not come back"
            time.sleep(0.05)


@contextmanager
def away(leave: Callable[[], None], come_back: Callable[[], None]) -> Iterator[None]:
    leave()
    try:
        yield
    finally:
        come_back()


def calls(kms: KeyManagement, blob: bytes) -> list[Callable[[], object]]:
    return [
        lambda: kms.mac(1, MESSAGE),
        kms.versions,
        lambda: kms.wrap(_Secret(b"data"), CONTEXT),
        lambda: kms.unwrap(blob, CONTEXT),
        kms.rotate,
    ]


def test_a_new_root_has_version_1_and_says_what_protects_it(system: kmskit.System) -> None:
    system.renew()
    assert system.kms.versions() == (1,)
    assert system.kms.provider == system.provider
    assert len(system.kms.protection) > 20


def test_a_mac_is_a_function_of_version_and_message(system: kmskit.System) -> None:
    first = system.kms.mac(1, MESSAGE).reveal()
    assert len(first) == 32
    assert system.kms.mac(1, MESSAGE).reveal() == first
    assert system.again().mac(1, MESSAGE).reveal() == first
    others = {system.kms.mac(1, MESSAGE + bytes([n])).reveal() for n in range(4)}
    assert len(others | {first}) == 5
    _, other_root = system.fresh()
    assert other_root.mac(1, MESSAGE).reveal() != first


def test_old_versions_stay_after_rotation(system: kmskit.System) -> None:
    system.renew()
    other = system.again()
    macs = [system.kms.mac(1, MESSAGE).reveal()]
    blobs = [system.kms.wrap(_Secret(b"under 1"), CONTEXT)]
    for version in (2, 3):
        assert system.kms.rotate() == version
        macs.append(system.kms.mac(version, MESSAGE).reveal())
        blobs.append(system.kms.wrap(_Secret(f"under {version}".encode()), CONTEXT))
    assert len(set(macs)) == 3
    # Whoever had it open before sees the new versions too: they are asked of the system.
    for kms in (system.kms, other, system.again()):
        assert kms.versions() == (1, 2, 3)
        assert [kms.mac(version, MESSAGE).reveal() for version in (1, 2, 3)] == macs
        for version, blob in enumerate(blobs, 1):
            assert kms.unwrap(blob, CONTEXT).reveal() == f"under {version}".encode()


@pytest.mark.parametrize("version", [0, -1, 44, 1_000_000])
def test_a_version_that_is_not_there_is_refused(system: kmskit.System, version: int) -> None:
    with pytest.raises(KmsError, match="version") as caught:
        system.kms.mac(version, MESSAGE)
    assert not isinstance(caught.value, KmsUnavailable)


def test_what_is_wrapped_opens_in_its_context_only(system: kmskit.System) -> None:
    blob = system.kms.wrap(_Secret(b"a data key"), CONTEXT)
    assert b"a data key" not in blob
    assert system.kms.wrap(_Secret(b"a data key"), CONTEXT) != blob
    assert system.kms.unwrap(blob, CONTEXT).reveal() == b"a data key"
    for context in (b"acme.chat@2", b"acme.chat@33", b"x", CONTEXT + b"\x00"):
        with pytest.raises(KmsError, match="another context") as caught:
            system.kms.unwrap(blob, context)
        assert not isinstance(caught.value, KmsUnavailable)
    _, other_root = system.fresh()
    with pytest.raises(KmsError):
        other_root.unwrap(blob, CONTEXT)


def test_what_is_wrapped_and_then_altered_does_not_open(system: kmskit.System) -> None:
    blob = system.kms.wrap(_Secret(b"a data key"), CONTEXT)
    places = sorted({0, 3, 4, 5, 8, 9, len(blob) // 2, len(blob) - 1})
    damaged = [blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :] for at in places]
    damaged += [blob[:at] for at in (0, 3, 5, 6, 9, 12, len(blob) - 1)] + [blob + b"0"]
    for bad in damaged:
        with pytest.raises(KmsError) as caught:
            system.kms.unwrap(bad, CONTEXT)
        assert not isinstance(caught.value, KmsUnavailable)
    assert system.kms.unwrap(blob, CONTEXT).reveal() == b"a data key"


def test_another_providers_blob_is_named(system: kmskit.System) -> None:
    for name in kmskit.PROVIDERS:
        if name != system.provider:
            with pytest.raises(KmsError, match=f"wrapped by {name}"):
                system.kms.unwrap(head_of(name) + bytes(64), CONTEXT)


@pytest.mark.parametrize("size", [1, 16, MAX_BYTES])
def test_sizes_that_are_taken(system: kmskit.System, size: int) -> None:
    data = bytes(n & 255 for n in range(size))
    assert len(system.kms.mac(1, data).reveal()) == 32
    context = bytes(n & 255 for n in range(min(size, MAX_CONTEXT)))
    blob = system.kms.wrap(_Secret(data), context)
    assert system.kms.unwrap(blob, context).reveal() == data


@pytest.mark.parametrize("size", [0, MAX_BYTES + 1])
def test_sizes_that_are_refused(system: kmskit.System, size: int) -> None:
    with pytest.raises(KmsError, match="4096"):
        system.kms.mac(1, bytes(size))
    with pytest.raises(KmsError, match="4096"):
        system.kms.wrap(_Secret(bytes(size)), CONTEXT)
    blob = system.kms.wrap(_Secret(b"data"), CONTEXT)
    for context in (b"", bytes(MAX_CONTEXT + 1)):
        with pytest.raises(KmsError, match="a context has"):
            system.kms.wrap(_Secret(b"data"), context)
        with pytest.raises(KmsError, match="a context has"):
            system.kms.unwrap(blob, context)


def test_a_system_that_is_gone_is_unavailable_and_comes_back(system: kmskit.System) -> None:
    system.renew()
    before = system.kms.mac(1, MESSAGE).reveal()
    blob = system.kms.wrap(_Secret(b"data"), CONTEXT)
    with away(system.stop, system.start):
        for call in calls(system.kms, blob):
            start = time.monotonic()
            with pytest.raises(KmsUnavailable):
                call()
            assert time.monotonic() - start < system.timeout_s + 5
        with pytest.raises(KmsUnavailable):
            system.again()
    assert recovered(system.kms) == before
    assert system.kms.versions() == (1,), "a rotation that failed must not have happened"
    assert system.kms.unwrap(blob, CONTEXT).reveal() == b"data"
    assert system.kms.rotate() == 2


def test_a_system_that_hangs_is_unavailable_in_time(system: kmskit.System) -> None:
    before = system.kms.mac(1, MESSAGE).reveal()
    blob = system.kms.wrap(_Secret(b"data"), CONTEXT)
    with away(system.hang, system.resume):
        for call in calls(system.kms, blob)[:2]:
            start = time.monotonic()
            with pytest.raises(KmsUnavailable):
                call()
            assert time.monotonic() - start < system.timeout_s + 5
    assert recovered(system.kms) == before
    assert system.kms.unwrap(blob, CONTEXT).reveal() == b"data"


def test_who_has_no_rights_is_refused_not_told_to_wait(system: kmskit.System) -> None:
    with pytest.raises(KmsError) as caught, system.denied() as kms:
        kms.mac(1, MESSAGE)
    assert not isinstance(caught.value, KmsUnavailable)
    assert len(system.kms.mac(1, MESSAGE).reveal()) == 32


def test_threads_share_a_root(system: kmskit.System) -> None:
    expected = system.kms.mac(1, MESSAGE).reveal()

    def work(number: int) -> None:
        for step in range(5):
            assert system.kms.mac(1, MESSAGE).reveal() == expected
            data, context = f"{number}/{step}".encode(), f"c{number}".encode()
            assert (
                system.kms.unwrap(system.kms.wrap(_Secret(data), context), context).reveal() == data
            )

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result(timeout=60)


def test_rotations_at_once_make_versions_of_their_own(system: kmskit.System) -> None:
    system.renew()
    roots = [system.again() for _ in range(3)]
    barrier = threading.Barrier(3)

    def work(kms: KeyManagement) -> int | None:
        barrier.wait(timeout=30)
        try:
            return kms.rotate()
        except KmsUnavailable:
            return None  # may be told to try again, and then nothing has been made

    with ThreadPoolExecutor(3) as pool:
        made = [version for version in pool.map(work, roots) if version is not None]
    if system.provider != "transit":  # older servers do not say which version they made
        assert len(set(made)) == len(made)
    versions = system.kms.versions()
    assert set(made) <= set(versions) and versions == tuple(range(1, len(versions) + 1))
    macs = [[kms.mac(version, MESSAGE).reveal() for version in versions] for kms in roots]
    assert macs[0] == macs[1] == macs[2] and len(set(macs[0])) == len(versions)
    assert system.kms.rotate() == versions[-1] + 1


def test_no_secret_shows(system: kmskit.System, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = io.StringIO()
    kms = system.again()
    mac = kms.mac(1, MESSAGE)
    canary = _Secret(token_bytes(24))  # not a literal: tracebacks show lines of this file
    blob = kms.wrap(canary, CONTEXT)
    kms.unwrap(blob, CONTEXT)
    made: list[object] = [kms, mac, kms.protection, kms.versions]
    refused: list[Callable[[], object]] = [
        lambda: kms.unwrap(blob, b"other"),
        lambda: kms.mac(77, MESSAGE),
        lambda: pickle.dumps(kms),
    ]

    def note(call: Callable[[], object]) -> None:
        try:
            call()
        except (KmsError, SecretLeakError, TypeError) as error:
            made.append(error)
            frames = traceback.TracebackException.from_exception(error, capture_locals=True)
            said.write("".join(frames.format()))
        else:
            raise AssertionError("this should have been refused")

    for call in refused:
        note(call)
    with away(system.stop, system.start):
        note(lambda: kms.wrap(canary, CONTEXT))
        note(lambda: kms.mac(1, MESSAGE))
    recovered(kms)
    for thing in made:
        said.write(f"{thing!r} {thing!s}\n")
    said.write(caplog.text)
    shown = said.getvalue()
    for secret in (system.secret().encode(), mac.reveal(), canary.reveal()):
        for form in (
            secret.decode("latin-1"),
            secret.hex(),
            base64.b64encode(secret).decode(),
            repr(secret)[2:-1],
        ):
            assert form not in shown, "a secret is in an error, a repr or a log"


def test_a_closed_one_says_so(system: kmskit.System) -> None:
    kms = system.again()
    kms.close()
    kms.close()
    for call in calls(kms, head_of(system.provider) + bytes(64))[:3]:
        with pytest.raises(KmsError, match="closed"):
            call()
    assert len(system.kms.mac(1, MESSAGE).reveal()) == 32
