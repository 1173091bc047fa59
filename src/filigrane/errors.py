"""Every error filigrane raises on purpose, in one tree; each message says what to do next.

    FiligraneError
    ├── KeyFormatError         a key's text or file cannot be read as a key
    ├── SecretLeakError        something tried to pickle or otherwise spill a secret
    ├── SchemeError            a scheme's name or parameters make no sense
    ├── UnsupportedDecoding    this scheme cannot carry a mark in this decoding mode
    ├── DraftError             target, draft and draft length do not fit together
    ├── TokenError             what was passed is not a sequence of token ids
    │   ├── TooShort           fewer tokens than the test needs
    │   └── VocabularyMismatch ids or logits that do not belong to the stated vocabulary
    ├── LogitsError            logits from which nothing can be drawn (NaN, all -inf, wrong shape)
    ├── RecordError            a file or a record of a batch cannot be read
    ├── ModelError             a model or tokenizer cannot be loaded
    ├── EvidenceError          what was gathered about a suspect cannot be tested as it is
    ├── EndpointError          a server is down, refuses, or answers with something unusable
    ├── KeyringError           a server's keyring cannot be read or contradicts itself
    ├── RequestRefused         a request to a server cannot be marked as it asks, or must be
    ├── NotReady               marks made here are not the ones everybody else makes
    ├── KmsError               a key management system refuses, or answers nonsense
    │   └── KmsUnavailable     it does not answer at all; trying again later may help
    ├── StoreError             a database cannot be used as it is
    │   ├── StoreUnavailable   it does not answer, or is too busy; trying again later may help
    │   ├── StoreVersionError  its tables are of another version of filigrane, or there are none
    │   ├── StoreFull          there is no room left on its disk
    │   ├── StoreReadOnly      it can be read, and takes no changes
    │   └── StoreDamaged       what it holds was damaged or altered
    ├── Busy                   too much of the same is under way; trying again soon may help
    ├── BudgetSpent            somebody asked more often, or for more, than is allowed
    ├── StateError             a key, job or approval is not in a state that allows this
    ├── NotFound               there is no such tenant, key, job or token here
    ├── AlreadyExists          this name or number is taken
    ├── AuditError             a log, checkpoint or proof does not verify
    ├── ReceiptError           a receipt does not verify
    └── MissingDependency      an optional package is needed for this call

Catch FiligraneError for all of them; each also derives from the built-in error it refines. An
index or a number outside its range (key.user(-1)) raises Python's own ValueError, TypeError or
IndexError.
"""


class FiligraneError(Exception):
    """Base of all errors raised by filigrane itself."""


class KeyFormatError(FiligraneError, ValueError):
    """A key's text or file is not a filigrane key; the message never echoes the secret part."""


class SecretLeakError(FiligraneError, TypeError):
    """A secret was about to leave by a side door (pickle); export it by name instead."""


class SchemeError(FiligraneError, ValueError):
    """An unknown scheme, or parameters outside their range."""


class UnsupportedDecoding(FiligraneError, ValueError):
    """The scheme cannot carry a mark in this decoding mode; nothing was generated."""


class DraftError(FiligraneError, ValueError):
    """Target, draft and draft length do not fit together; nothing was generated."""


class TokenError(FiligraneError, ValueError):
    """The input is not a one-dimensional sequence of token ids in [0, 2**32 - 2]."""


class TooShort(TokenError):
    """The text has no position with a complete context; pass a longer one."""


class VocabularyMismatch(TokenError):
    """Token ids or logits do not fit the vocabulary that was stated."""


class LogitsError(FiligraneError, ValueError):
    """Logits from which no token can be drawn."""


class RecordError(FiligraneError, ValueError):
    """A file or one record of a batch cannot be read."""


class ModelError(FiligraneError, OSError):
    """A model or tokenizer cannot be loaded."""


class EvidenceError(FiligraneError, ValueError):
    """Windows, predictions, answers or filters that do not fit together or hold nothing to test."""


class EndpointError(FiligraneError, OSError):
    """A model behind a network address cannot be used; what was collected before is kept."""


class KeyringError(FiligraneError, ValueError):
    """A server's keyring is missing, unreadable or contradicts itself; nothing was started."""


class RequestRefused(FiligraneError, ValueError):
    """A request cannot be marked as it asks or as the server demands; nothing was generated.

    reason: a code of `filigrane.serving.orders.REASONS`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotReady(FiligraneError, RuntimeError):
    """Known answers do not come out on this machine, or an engine would leave text unmarked."""


class KmsError(FiligraneError, OSError):
    """A key management system refused a request or answered something unusable."""


class KmsUnavailable(KmsError):
    """A key management system does not answer; nothing was changed, try again later."""


class StoreError(FiligraneError, OSError):
    """A database cannot be used as it is; nothing was changed."""


class StoreUnavailable(StoreError):
    """A database does not answer, or not in time; nothing was changed, try again later."""


class StoreVersionError(StoreError):
    """A database has the tables of another version of filigrane, or none; nothing was changed."""


class StoreFull(StoreError):
    """There is no room left for a database; nothing was changed, reading goes on."""


class StoreReadOnly(StoreError):
    """A database takes no changes at present; nothing was changed, reading goes on."""


class StoreDamaged(StoreError):
    """What a database holds was damaged, altered or moved; nothing was done with it."""


class Busy(FiligraneError, RuntimeError):
    """As much of this as may be under way is; nothing was done, try again in a moment."""


class BudgetSpent(FiligraneError, RuntimeError):
    """Somebody asked more often, or for more, than is allowed; nothing was done.

    reason: which limit, one word; retry_after_s: when asking again makes sense.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class StateError(FiligraneError, ValueError):
    """What is asked for is not allowed in the present state; nothing was changed."""


class NotFound(FiligraneError, LookupError):
    """There is no such thing, or none that the caller may see."""


class AlreadyExists(FiligraneError, ValueError):
    """A name or an id is taken; nothing was changed."""


class AuditError(FiligraneError, ValueError):
    """A log was altered, cut or reordered, or a checkpoint or proof does not belong to it."""


class ReceiptError(FiligraneError, ValueError):
    """A receipt is forged, damaged, or belongs to another text or service."""


class MissingDependency(FiligraneError, ImportError):
    """An optional package is not installed; the message names the extra."""
