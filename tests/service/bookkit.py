"""A key book on SQLite with a local root, and marked texts, for tests below HTTP."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from filigrane.custody.hierarchy import KeySpec
from filigrane.embedding import LanguageModel, Logits, embed
from filigrane.foreign import ForeignKey
from filigrane.keys import Key, _Secret
from filigrane.kms.local import LocalRoot
from filigrane.schemes import from_tag
from filigrane.service.detecting import Detector
from filigrane.service.receipts import Receipts
from filigrane.service.tokenizing import Tokenizers
from filigrane.store.access import Access
from filigrane.store.database import Database, migrate
from filigrane.store.keys import KeyBook
from filigrane.store.log import Log
from filigrane.store.records import VersionRecord
from filigrane.toy import ZipfModel

TENANT = "acme"
MODEL = "toy"


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = datetime(2027, 1, 4, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def monotonic(self) -> float:
        return self.now.timestamp()

    def pass_by(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass
class Book:
    """What a detector stands on. tenant: whose keys `make` makes."""

    database: Database
    kms: LocalRoot
    keybook: KeyBook
    access: Access
    log: Log
    receipts: Receipts
    detector: Detector
    clock: Clock

    def make(
        self,
        name: str,
        scheme: str | None = "gumbel",
        *,
        profile: str | None = None,
        slots: int = 4,
        tokenizer: str | None = None,
        tenant: str = TENANT,
        model: str = MODEL,
        promote: bool = True,
    ) -> VersionRecord:
        spec = KeySpec(
            tenant=tenant,
            name=name,
            model=model,
            scheme=None if profile else scheme,
            profile=profile,
            slots=slots,
            tokenizer_sha256=tokenizer,
        )
        record = self.keybook.create(spec, actor="test")
        if not promote:
            return record
        return self.keybook.promote(tenant, name, record.number, actor="test")

    def take(self, name: str, profile: str, key: ForeignKey) -> VersionRecord:
        spec = KeySpec(
            tenant=TENANT, name=name, model=MODEL, profile=profile, source="imported", slots=1
        )
        record = self.keybook.import_key(spec, key, actor="test")
        return self.keybook.promote(TENANT, name, record.number, actor="test")

    def write(self, record: VersionRecord, n: int, seed: int) -> npt.NDArray[np.int64]:
        """n ids of a toy model of 256 tokens, marked with a version's key."""
        key = self.keybook.key_of(record)
        assert isinstance(key, Key)
        assert record.spec.scheme is not None
        return marked(key, record.spec.scheme, n, seed)


def marked(key: Key, scheme: str, n: int, seed: int) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    prompt = np.array([1, 2, 3])
    return embed(ZipfModel(256, 1.0), prompt, n, key, from_tag(scheme), rng=rng).tokens


def letters(ids: npt.NDArray[np.int64]) -> str:
    """A text whose bytes are these ids, all below 128."""
    return bytes(ids.astype(np.uint8)).decode("ascii")


def marked_letters(key: Key, scheme: str, n: int, seed: int) -> str:
    """A text of n printable ASCII characters, marked byte by byte."""
    rng = np.random.default_rng(seed)
    return letters(embed(Letters(), np.array([65]), n, key, from_tag(scheme), rng=rng).tokens)


class Letters(LanguageModel):
    """A model over bytes that writes lower-case letters and spaces, all about equally likely."""

    vocab_size = 256

    def prefill(self, prompts: Sequence[npt.NDArray[np.int64]]) -> tuple[Logits, None]:
        return np.tile(_LETTERS, (len(prompts), 1)), None

    def step(self, tokens: npt.NDArray[np.int64], cache: None) -> tuple[Logits, None]:
        return np.tile(_LETTERS, (len(tokens), 1)), None


_LETTERS = np.full(256, -40.0, dtype=np.float32)
_LETTERS[97:123] = 0.0
_LETTERS[32] = 1.0


@contextmanager
def open_book(folder: Path, *tenants: str) -> Iterator[Book]:
    url = f"sqlite:///{folder / 'book.db'}"
    migrate(url)
    kms = LocalRoot.create(folder / "root.key", _Secret("a passphrase of tests"))
    clock = Clock()
    database = Database.open(url, clock=clock)
    try:
        keybook = KeyBook(database, kms)
        for tenant in tenants or (TENANT,):
            keybook.create_tenant(tenant, actor="test")
        log = Log(database, kms)
        receipts = Receipts(log, kms, clock=clock)
        detector = Detector(
            keybook, Tokenizers(), receipts=receipts, clock=clock.monotonic, revalidate_s=0.0
        )
        yield Book(
            database=database,
            kms=kms,
            keybook=keybook,
            access=Access(database),
            log=log,
            receipts=receipts,
            detector=detector,
            clock=clock,
        )
    finally:
        database.close()
        kms.close()
