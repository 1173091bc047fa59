"""Random lives of keys, against a model of what should happen, on every database and root.

FILIGRANE_SEQUENCES says how many sequences of steps each combination gets (1000 before a release).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import kmskit
import storekit
from filigrane.custody.hierarchy import KeySpec, key_id
from filigrane.custody.states import MOVES, State
from filigrane.errors import AlreadyExists, NotFound, StateError
from filigrane.foreign import ForeignKey, KeyForm
from filigrane.keys import Key
from filigrane.kms.base import KeyManagement
from filigrane.store.checking import log_pvalue
from filigrane.store.database import stamp

SEQUENCES = int(os.environ.get("FILIGRANE_SEQUENCES", "2"))
STEPS = 40
TENANT = "acme"
MODELS = ("small", "large")
KINDS = {
    "chat": KeySpec(tenant=TENANT, name="chat", model="small", scheme="gumbel", slots=2),
    "green": KeySpec(tenant=TENANT, name="green", model="large", scheme="greenlist:delta=8"),
    "vllm": KeySpec(tenant=TENANT, name="vllm", model="small", profile="vllm-gumbel"),
    "old": KeySpec(
        tenant=TENANT, name="old", model="large", scheme="gumbel", slots=3, source="imported"
    ),
    "older": KeySpec(
        tenant=TENANT, name="older", model="small", profile="vllm-gumbel", source="imported"
    ),
}
ENGINES = ("one", "two", "three", "four")
PENDING = (State.PRE_ACTIVE, State.ACTIVE)
ACTIONS = {
    "create": 3,
    "rotate": 4,
    "promote": 7,
    "withdraw": 2,
    "destroy": 2,
    "enrol": 3,
    "revoke": 1,
    "acknowledge": 8,
    "rotate_root": 1,
    "checkpoint": 1,
    "restore": 1,
}
"""How often each is tried. One rule draws them all: hypothesis would leave out half of the rules in
each run, and a life without engines or without promotions shows little."""
NEED_KEYS = {"promote", "withdraw", "destroy", "acknowledge"}


@dataclass(kw_only=True)
class Expected:
    """What the model knows of one version."""

    spec: KeySpec
    number: int
    state: State = State.PRE_ACTIVE
    compromised_since: datetime | None = None
    acknowledged: set[str] = field(default_factory=set)
    texts: list[npt.NDArray[np.int64]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return key_id(TENANT, self.spec.name, self.number)


class KeyLives(RuleBasedStateMachine):
    """Each step predicts from the model whether the store accepts it."""

    stores: storekit.Stores
    system: kmskit.System
    kms: KeyManagement

    @initialize(names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=2, unique=True))
    def begin(self, names: list[str]) -> None:
        # Few keys with many versions each.
        self.names = names
        if len(self.kms.versions()) > 12:
            # Where signatures are checked under every version, a root of thousands takes its time.
            type(self).kms = self.system.fresh()[1]
        self.store = self.stores.fresh(self.kms)
        self.store.keybook.create_tenant(TENANT, actor="operator")
        self.known: dict[str, list[Expected]] = {}
        self.engines: dict[str, str] = {}
        self.revoked: set[str] = set()
        self.revision = self.store.keybook.revision(TENANT)
        self.seed = 0

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        possible = [
            name
            for name, weight in ACTIONS.items()
            for _ in range(weight)
            if (self.all() or name not in NEED_KEYS) and (self.engines or name != "acknowledge")
        ]
        name = data.draw(st.sampled_from(possible))
        getattr(self, name)(data)

    def all(self) -> list[Expected]:
        return [version for versions in self.known.values() for version in versions]

    def waiting(self, version: Expected) -> set[str]:
        serving = {name for name, model in self.engines.items() if model == version.spec.model}
        return serving - self.revoked - version.acknowledged

    def text(self, version: Expected) -> npt.NDArray[np.int64]:
        self.seed += 1
        record = self.store.keybook.version(TENANT, version.id)
        return storekit.marked(self.store.keybook.key_of(record), version.spec, self.seed)

    def expect(
        self,
        accepted: bool,
        what: Callable[[], object],
        *errors: type[Exception],
        changes: bool = True,
    ) -> None:
        """Do it, see it accepted or refused, and the revision moved or not."""
        before = self.store.keybook.revision(TENANT)
        assert before == self.revision, "the revision moved without a change"
        if accepted:
            what()
        else:
            with pytest.raises(errors or (StateError,)):
                what()
        after = self.store.keybook.revision(TENANT)
        assert (after > before) == (accepted and changes)
        self.revision = after

    def create(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        spec, book = KINDS[name], self.store.keybook
        versions = self.known.setdefault(name, [])
        if spec.source == "derived":
            self.expect(not versions, lambda: book.create(spec, actor="ann"), AlreadyExists)
            if versions:
                return
        else:
            key: Key | ForeignKey = Key.generate("elsewhere", slots=spec.slots)
            if spec.profile is not None:
                number = int.from_bytes(os.urandom(8), "big")
                key = ForeignKey.from_text(str(number), KeyForm.UINT64)
            self.expect(True, lambda: book.import_key(spec, key, actor="ann"))
        versions.append(Expected(spec=spec, number=len(versions) + 1))

    def rotate(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*sorted(self.known) * 3, *self.names]))
        versions = self.known.get(name, [])
        there = bool(versions)
        allowed = there and KINDS[name].source == "derived"
        error = StateError if there else NotFound
        self.expect(allowed, lambda: self.store.keybook.rotate(TENANT, name, actor="ann"), error)
        if allowed:
            versions.append(Expected(spec=KINDS[name], number=len(versions) + 1))

    def promote(self, data: st.DataObject) -> None:
        fresh = [version for version in self.all() if version.state is State.PRE_ACTIVE]
        version = data.draw(st.sampled_from(self.all() + fresh * 3))
        allowed = State.ACTIVE in MOVES[version.state] and not self.waiting(version)
        name, number = version.spec.name, version.number
        self.expect(
            allowed,
            lambda: self.store.keybook.promote(TENANT, name, number, actor="ann"),
            *((StateError, NotFound) if version.state is State.DESTROYED else ()),
        )
        if allowed:
            for other in self.known[name]:
                if other.state is State.ACTIVE:
                    other.state = State.RETIRED
            version.state = State.ACTIVE
            version.texts.append(self.text(version))

    def withdraw(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from([State.RETIRED, State.COMPROMISED]))
        version = data.draw(st.sampled_from(self.all()))
        book, name, number = self.store.keybook, version.spec.name, version.number
        allowed = to in MOVES[version.state]
        if to is State.RETIRED:
            self.expect(allowed, lambda: book.retire(TENANT, name, number, actor="ann"))
        else:
            since, known = self.store.clock(), version.compromised_since
            if known is not None:
                # Moved back, or left where it is, which is refused.
                days = data.draw(st.sampled_from([0, 1]))
                since, allowed = known - timedelta(days=days), allowed and days > 0
            self.expect(
                allowed,
                lambda: book.compromise(TENANT, name, number, since=since, actor="ann"),
            )
        if allowed:
            version.state = to
            if to is State.COMPROMISED:
                version.compromised_since = since

    def destroy(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.all()))
        allowed = State.DESTROYED in MOVES[version.state]
        approval = self.store.approved(TENANT, version.id)
        name, number = version.spec.name, version.number
        self.expect(
            allowed,
            lambda: self.store.keybook.destroy(
                TENANT, name, number, actor="bob", approval=approval
            ),
        )
        if allowed:
            version.state = State.DESTROYED

    def enrol(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(ENGINES))
        model = data.draw(st.sampled_from(MODELS))
        fresh = name not in self.engines
        self.expect(
            fresh,
            lambda: self.store.access.enrol_engine(
                TENANT, name, [model], storekit.identity(), actor="ann"
            ),
            AlreadyExists,
        )
        if fresh:
            self.engines[name] = model

    def revoke(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(ENGINES))
        allowed = name in self.engines and name not in self.revoked
        self.expect(
            allowed,
            lambda: self.store.access.revoke_engine(TENANT, name, actor="ann"),
            StateError,
            NotFound,
        )
        if allowed:
            self.revoked.add(name)

    def acknowledge(self, data: st.DataObject) -> None:
        honest = data.draw(st.sampled_from([True] * 5 + [False]))
        pairs = [(version, engine) for version in self.all() for engine in sorted(self.engines)]
        # Mostly what can work: of a few steps, few would be acknowledged otherwise.
        useful = [(v, e) for v, e in pairs if v.state in PENDING and e in self.waiting(v)]
        version, engine = data.draw(st.sampled_from(pairs + useful * len(pairs)))
        serves = engine not in self.revoked and self.engines[engine] == version.spec.model
        pending = version.state in PENDING
        if version.state is State.DESTROYED or not honest:
            proof = np.random.default_rng(self.seed).integers(0, 64, 90)
        else:
            proof = self.text(version)
        allowed = serves and pending and honest
        again = engine in version.acknowledged
        self.expect(
            allowed,
            lambda: self.store.keybook.acknowledge(TENANT, engine, version.id, proof),
            StateError,
            NotFound,
            changes=not again,
        )
        if allowed:
            version.acknowledged.add(engine)

    def rotate_root(self, data: st.DataObject) -> None:
        self.kms.rotate()

    def checkpoint(self, data: st.DataObject) -> None:
        self.store.log.checkpoint(TENANT)

    def restore(self, data: st.DataObject) -> None:
        """Everything is lost but an archive and the root."""
        data = self.store.keybook.export_archive(TENANT)
        with pytest.raises(AlreadyExists):
            self.store.keybook.import_archive(data, actor="bob")
        before = self.revision
        self.store.database.close()
        self.store = self.stores.fresh(self.kms, self.store.clock)
        count = self.store.keybook.import_archive(data, actor="bob")
        assert count == len(self.all())
        self.revision = self.store.keybook.revision(TENANT)
        assert self.revision > before

    @invariant()
    def as_expected(self) -> None:
        found = {v.id: v for key in self.store.keybook.keys(TENANT) for v in key.versions}
        assert {id: v.state for id, v in found.items()} == {v.id: v.state for v in self.all()}
        for version in self.all():
            since = version.compromised_since
            told = found[version.id].compromised_since
            assert (told and stamp(told)) == (since and stamp(since))
        records = self.store.log.records(TENANT)
        for version in self.all():
            record = found[version.id]
            facts = records[record.log_index].facts
            assert (facts["key"], facts["commitment"]) == (version.id, record.commitment)
            assert set(record.acknowledged) == version.acknowledged
            alive = version.state in PENDING
            assert set(record.waiting_for) == (self.waiting(version) if alive else set())
        for versions in self.known.values():
            assert sum(version.state is State.ACTIVE for version in versions) <= 1
        # What was promoted had been committed to and acknowledged before: the log says in which
        # order.
        serving: dict[str, set[str]] = {model: set() for model in MODELS}
        committed, acknowledged = set(), dict[str, set[str]]()
        for entry in records:
            facts = entry.facts
            key = str(facts.get("key"))
            if entry.kind == "engine.enrol":
                models = facts["models"]
                assert isinstance(models, list)
                for model in models:
                    serving[model].add(str(facts["engine"]))
            elif entry.kind == "engine.revoke":
                for engines in serving.values():
                    engines.discard(str(facts["engine"]))
            elif entry.kind in ("key.create", "key.rotate", "key.import"):
                committed.add(key)
            elif entry.kind == "key.acknowledge":
                acknowledged.setdefault(key, set()).add(str(facts["engine"]))
            elif entry.kind == "key.promote":
                assert key in committed
                model = found[key].spec.model
                assert serving[model] <= acknowledged.get(key, set())
        promoted = {str(entry.facts["key"]) for entry in records if entry.kind == "key.promote"}
        for engine in set(self.engines) - self.revoked:
            for record in self.store.keybook.for_engine(TENANT, engine):
                assert record.spec.model == self.engines[engine]
                if record.state.marks:
                    assert record.id in promoted
                    assert record.marks_on(engine) == (engine in record.acknowledged)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.database.check()
        report = self.store.verify(TENANT)
        assert report.n_records == self.store.log.size(TENANT)
        fresh = self.store.again()
        versions = {v.id: v for key in fresh.keybook.keys(TENANT) for v in key.versions}
        keys = {}
        for version in self.all():
            if version.state is State.DESTROYED:
                with pytest.raises(NotFound):
                    fresh.keybook.key_of(versions[version.id])
            else:
                keys[version.id] = fresh.keybook.key_of(versions[version.id])
        for version in self.all():
            for text in version.texts:
                for id, key in keys.items():
                    found = log_pvalue(key, versions[id].spec, text) < np.log(1e-9)
                    assert found == (id == version.id)
        fresh.database.close()
        self.store.database.close()


@pytest.fixture(scope="module", params=kmskit.PROVIDERS)
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[kmskit.System]:
    # No step is about faults, so none of them may be one.
    folder = tmp_path_factory.mktemp("kms")
    with kmskit.running(request.param, folder, timeout_s=60.0) as made:
        yield made


def test_lives_of_keys(stores: storekit.Stores, system: kmskit.System) -> None:
    members = {"stores": stores, "system": system, "kms": system.kms}
    run_state_machine_as_test(
        type("KeyLivesHere", (KeyLives,), members),
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
