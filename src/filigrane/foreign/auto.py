"""Reading a text when nobody remembers which tool marked it: try what fits, and pay for it.

Candidates share text and often numbers, so their p-values depend on each other: the smallest one is
corrected by Bonferroni, which holds under every dependence.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from filigrane import stats
from filigrane.errors import FiligraneError, KeyFormatError, VocabularyMismatch
from filigrane.foreign.base import ForeignResult, Profile, Written
from filigrane.foreign.keys import ForeignKey
from filigrane.foreign.profiles import PROFILES, from_tag
from filigrane.keys import MarkingKey

__all__ = ["AutoResult", "read_auto", "usual_candidates"]

AnyKey = ForeignKey | MarkingKey


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoResult:
    """The best of several readings. It has no truth value: compare `log_pvalue` with your alpha.

    log_pvalue: natural log, corrected for all readings; best: the reading with the smallest
    p-value, itself uncorrected; n_candidates: how many pairs of profile and key were read;
    readings: all of them, best first; skipped: profile -> why it was not read.
    """

    log_pvalue: float
    best: ForeignResult
    n_candidates: int
    readings: tuple[ForeignResult, ...]
    skipped: Mapping[str, str]
    method: str

    @property
    def log10_pvalue(self) -> float:
        """log_pvalue in decimal digits."""
        return self.log_pvalue / 2.302585092994046

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "an AutoResult is not true or false; compare result.log_pvalue with math.log(alpha)."
        )


def usual_candidates(vocab_size: int | None = None) -> tuple[list[Profile], dict[str, str]]:
    """Every profile with its tool's usual parameters, and why others were left out.

    vocab_size: width of the model's logits; profiles that need it are left out without. The
    schemes of `kgw-ext` count one each, but for those that equal another profile.
    """
    profiles: list[Profile] = []
    skipped: dict[str, str] = {}
    for name, kind in PROFILES.items():
        if not kind.needs_vocab:
            profiles.append(kind())
        elif vocab_size is None:
            skipped[name] = "needs vocab_size, the width of the model's logits"
        else:
            profiles += _with_vocab(name, kind, vocab_size)
    return profiles, skipped


def _with_vocab(name: str, kind: type[Profile], vocab_size: int) -> list[Profile]:
    variants: list[dict[str, object]] = [{}]
    if name == "kgw-ext":
        variants = [{"scheme": scheme} for scheme in ("selfhash", "minhash", "skipgram")]
    elif name == "hf-kgw-selfhash":
        variants = [{"context_width": 4}]
    elif name in ("maryland", "openai"):
        variants = [{"ngram": 1}, {"ngram": 2}]
    return [kind(vocab_size=vocab_size, **variant) for variant in variants]  # type: ignore[call-arg]


def read_auto(
    texts: Sequence[Written] | Written,
    keys: AnyKey | Iterable[AnyKey],
    *,
    candidates: Iterable[Profile | str] | None = None,
    vocab_size: int | None = None,
) -> AutoResult:
    """Read a claim with every candidate profile and key that fit together.

    keys: ForeignKeys are tried with profiles of their form; a filigrane key stands for the numbers
    that it has for each profile (`ForeignKey.derive`). candidates: profiles or their tags, by
    default `usual_candidates(vocab_size)`; not to be chosen by looking at the text. Raises
    KeyFormatError if no candidate takes any of the keys.
    """
    given = (keys,) if isinstance(keys, ForeignKey | MarkingKey) else tuple(keys)
    for key in given:
        if not isinstance(key, ForeignKey | MarkingKey):
            raise KeyFormatError(f"a key is a ForeignKey or a Key, not {type(key).__name__}.")
    claim = (texts,) if isinstance(texts, Written) else tuple(texts)
    if candidates is None:
        profiles, skipped = usual_candidates(vocab_size)
    else:
        profiles, skipped = [_profile(one, vocab_size) for one in candidates], {}
        if not profiles:
            raise FiligraneError("there is no candidate: name some profiles, or pass None.")
    readings: list[ForeignResult] = []
    for profile in profiles:
        fitting = _fitting(profile, given)
        if not fitting:
            skipped[profile.tag] = f"no key of form {profile.key_form.value}"
        try:
            readings += [profile.read(claim, key) for key in fitting]
        except VocabularyMismatch as error:
            skipped[profile.tag] = str(error)
    if not readings:
        if any(isinstance(key, MarkingKey) for key in given) or not given:
            raise FiligraneError("no profile could be tried; name some, and a key for each.")
        wanted = sorted({profile.key_form.value for profile in profiles})
        raise KeyFormatError(
            f"no candidate takes a key of form {', '.join(sorted(k.form.value for k in given))}; "  # type: ignore[union-attr]
            f"they take {', '.join(wanted)}. Profiles with lists need vocab_size as well."
        )
    readings.sort(key=lambda reading: reading.log_pvalue)
    count = len(readings)
    return AutoResult(
        log_pvalue=stats.bonferroni(readings[0].log_pvalue, count),
        best=readings[0],
        n_candidates=count,
        readings=tuple(readings),
        skipped=skipped,
        method=f"{readings[0].method}, Bonferroni over {count} readings",
    )


def _profile(candidate: Profile | str, vocab_size: int | None) -> Profile:
    return from_tag(candidate, vocab_size=vocab_size) if isinstance(candidate, str) else candidate


def _fitting(profile: Profile, keys: Sequence[AnyKey]) -> list[ForeignKey]:
    fitting: list[ForeignKey] = []
    for key in keys:
        if isinstance(key, ForeignKey):
            found = key if key.form is profile.key_form else None
        else:
            found = ForeignKey.derive(key, profile)
        if found is not None and found not in fitting:
            fitting.append(found)
    return fitting
