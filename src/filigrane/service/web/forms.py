"""What a browser sent: fields and one text file, read in memory, from this site's own pages only.

Nothing is spooled to a disk: a text lives in memory for one request. A form that another site
sends is refused by what browsers say of where a request comes from (Sec-Fetch-Site, Origin), which
no page can forge; forms of a session carry its CSRF token besides.
"""

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from filigrane.service.problems import Problem

__all__ = ["Form", "exactly", "read_form"]

_MAX_FIELDS: Final = 24


class _InMemory(MultiPartParser):
    """Starlette's parser, which would write files of more than a megabyte to a disk."""

    spool_max_size = 1 << 62


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a form; the last one of a name counts. file: content of a text file, if any."""

    fields: Mapping[str, str]
    file: str | None = None

    def __repr__(self) -> str:
        return f"<Form of {len(self.fields)} fields>"

    def line(self, name: str) -> str:
        """One field without surrounding white space; empty if it was not sent."""
        return self.fields.get(name, "").strip()

    def text(self) -> str:
        """The text to look at: of the file, if one was chosen, else what was typed or pasted.

        Browsers send typed lines with CR LF whatever was pasted; they count as LF. A file is taken
        as it is, and so is what a page of ours holds to ask about it once more (`exactly`).
        """
        if self.file is not None:
            return self.file
        if "exact" in self.fields:
            try:
                return b64decode(self.fields["exact"], validate=True).decode("utf-8")
            except ValueError:
                raise Problem(400, "malformed", "The form cannot be read.") from None
        return self.fields.get("text", "").replace("\r\n", "\n")

    def some_text(self) -> str:
        """`text`; raises Problem 422 if there is nothing in it."""
        text = self.text()
        if not text.strip():
            raise Problem(422, "empty", "Paste a text or choose a file first.")
        return text

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high. Raises Problem 422 for anything else."""
        value = self.line(name)
        if not value.isascii() or not value.isdigit() or not low <= int(value[:12]) <= high:
            raise Problem(
                422, name, f"{name.capitalize()}: a whole number from {low:,} to {high:,}."
            )
        return int(value)

    def require_sure(self) -> None:
        """Raise Problem 422 unless the box of what cannot be taken back was ticked."""
        if self.line("sure") != "yes":
            raise Problem(422, "sure", "Tick the box: this cannot be taken back.")


def exactly(text: str) -> str:
    """A text for a hidden field, safe from what browsers do to line ends."""
    return b64encode(text.encode("utf-8")).decode("ascii")


async def read_form(request: Request) -> Form:
    """The form of a request. Raises Problem if it comes from another site or cannot be read."""
    _require_own_page(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    data: FormData
    try:
        if kind == "multipart/form-data":
            data = await _InMemory(
                request.headers,
                request.stream(),
                max_files=1,
                max_fields=_MAX_FIELDS,
                # The body has been bounded before it came here.
                max_part_size=1 << 40,
            ).parse()
        else:
            data = await FormParser(request.headers, request.stream()).parse()
    except MultiPartException:
        raise Problem(400, "malformed", "The form cannot be read; send it again.") from None
    try:
        fields: dict[str, str] = {}
        file: str | None = None
        for name, value in data.multi_items():
            if isinstance(value, UploadFile):
                file = _decoded(await value.read()) if value.filename else file
            else:
                fields[name] = value
        return Form(fields, file)
    finally:
        await data.close()


def _decoded(content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Problem(
            422,
            "not_text",
            "This file is not plain text in UTF-8. Save it as a .txt file, or paste the text.",
        ) from None
    if "\0" in text:
        raise Problem(422, "not_text", "This file is not plain text; paste the text instead.")
    return text


def _require_own_page(request: Request) -> None:
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if site not in (None, "same-origin", "none") or not own:
        raise Problem(
            403, "other_site", "This form came from another site; open the page here and try again."
        )
