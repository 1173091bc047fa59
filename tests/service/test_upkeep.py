"""What the service's worker does by itself: logs are verified and signed, what was erased goes."""

import sqlite3
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from filigrane.errors import AuditError
from filigrane.service.office import Office, open_office
from filigrane.service.routes.operations import check
from filigrane.service.settings import Settings
from filigrane.service.upkeep import SIGN_EVERY, Upkeep
from filigrane.store.database import now

HOUR = SIGN_EVERY.total_seconds()


class Clock:
    """Seconds and the time of day, moved together."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.start = now()

    def timer(self) -> float:
        return self.passed

    def __call__(self) -> datetime:
        return self.start + timedelta(seconds=self.passed)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.initial(tmp_path / "service")


@pytest.fixture
def office(settings: Settings) -> Iterator[Office]:
    with open_office(settings) as opened:
        yield opened


def test_a_log_that_grows_is_signed_every_hour(office: Office) -> None:
    clock = Clock()
    office.database.clock = clock
    upkeep, log = Upkeep(office, timer=clock.timer), office.log
    upkeep.run()
    assert log.latest("demo") is None
    clock.passed += HOUR + 60
    upkeep.run()
    first = log.latest("demo")
    assert first is not None and first.size == log.size("demo")
    # Nothing new, nothing signed.
    clock.passed += 2 * HOUR
    upkeep.run()
    assert log.latest("demo") == first
    log.append("demo", "ann", "a.note", {})
    upkeep.run()
    assert log.latest("demo") == first
    clock.passed += HOUR
    upkeep.run()
    second = log.latest("demo")
    assert second is not None and second.size == first.size + 1
    # Another process, which sees that somebody has signed a moment ago.
    log.append("demo", "ann", "a.note", {})
    Upkeep(office, timer=clock.timer).run()
    assert log.latest("demo") == second


def test_a_log_that_was_rewritten_turns_the_service_red(settings: Settings) -> None:
    with open_office(settings) as office:
        office.log.checkpoint("demo")
    path = settings.database.open_url().reveal().removeprefix("sqlite:///")
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER log_no_update")
    database.execute("UPDATE log SET actor = 'eve' WHERE position = 1")
    database.commit()
    database.close()
    with open_office(settings) as office:
        assert check(office, {}).ready
        Upkeep(office).run()
        (red,) = (part for part in check(office, {}).components if not part.ok)
        assert (red.name, red.problem) == ("log", "AuditError")
        with pytest.raises(AuditError, match="altered or removed"):
            office.log.checkpoint("demo")


def test_what_readers_kept_goes_later(office: Office, settings: Settings) -> None:
    clock = Clock()
    upkeep = Upkeep(office, timer=clock.timer)
    upkeep.run()
    path = Path(settings.database.open_url().reveal().removeprefix("sqlite:///") + "-wal")
    office.log.append("demo", "ann", "a.note", {})
    with office.database.reading("demo") as connection:
        connection.exec_driver_sql("SELECT count(*) FROM log").all()
        assert not office.database.erase()
    upkeep.run()
    assert path.stat().st_size > 0
    clock.passed += 61
    upkeep.run()
    assert path.stat().st_size == 0
