"""A browser, and prose that is marked byte by byte: what tests of the web page stand on."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from filigrane.embedding import LanguageModel, Logits, embed
from filigrane.keys import Key
from filigrane.schemes import from_tag
from filigrane.service.office import open_office
from filigrane.service.settings import Settings
from servicekit import TENANT, Service

# A busy machine is no reason to fail.
expect.set_options(timeout=30_000)

CHROMIUM = os.environ.get("FILIGRANE_CHROMIUM", "/usr/bin/chromium")
AXE = Path(__file__).parent / "axe" / "axe-4.14.1.min.js"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PROSE = """
The harbour was quiet when the last ferry came in, and the lamps along the water were lit one after
another by a man who had done it for thirty years. He knew every boat by its sound. In winter the
wind came over the stones and the windows of the small houses were closed early, and in the evening
people sat together and talked about the weather, about the price of fish, and about those who had
gone away. The letters that came were read aloud. There was a school with two rooms, a church with
a wooden tower, and a shop where one could buy bread, paper, rope and oranges. When the first warm
days came the children ran down to the beach and looked for glass that the sea had made round, and
the old women carried their chairs outside and watched them, and nothing seemed to change at all.
But things did change. A road was built over the hills, and after the road came visitors, and after
the visitors a hotel with white walls, and some of the young people stayed who would have left. The
man with the lamps was given a small pension and a medal, and the lamps were made to light by
themselves. He still walked along the water every evening at the same hour, and counted them.
"""


class Prose(LanguageModel):
    """A model over bytes that writes what looks like English from afar: letters by the four before.

    It knows `PROSE` only and is often unsure, so that there is room for a mark.
    """

    vocab_size = 256

    def __init__(self) -> None:
        data = " ".join(PROSE.split()).encode("ascii")
        self._counts: dict[bytes, Counter[int]] = defaultdict(Counter)
        for order in range(4):
            for t in range(order, len(data)):
                self._counts[data[t - order : t]][data[t]] += 1
        self._histories: list[bytes] = []

    def prefill(self, prompts: Sequence[npt.NDArray[np.int64]]) -> tuple[Logits, None]:
        self._histories = [bytes(prompt.astype(np.uint8)) for prompt in prompts]
        return np.stack([self._row(history) for history in self._histories]), None

    def step(self, tokens: npt.NDArray[np.int64], cache: None) -> tuple[Logits, None]:
        self._histories = [
            history + bytes([int(token)])
            for history, token in zip(self._histories, np.ravel(tokens), strict=True)
        ]
        return np.stack([self._row(history) for history in self._histories]), None

    def _row(self, history: bytes) -> npt.NDArray[np.float32]:
        probs = np.zeros(256)
        for order, weight in ((0, 0.05), (1, 0.15), (2, 0.4), (3, 0.4)):
            counts = self._counts.get(history[-order:] if order else b"")
            if counts:
                total = sum(counts.values())
                for letter, count in counts.items():
                    probs[letter] += weight * count / total
        with np.errstate(divide="ignore"):
            return np.log(probs / probs.sum()).clip(-60.0).astype(np.float32)


@dataclass
class Desk:
    """What a service's owner can do behind its back: make keys and write with them."""

    service: Service

    def make_key(self, name: str, scheme: str = "gumbel", *, promote: bool = True) -> str:
        """Make a key with the tokenizer "bytes"; the id of its version 1."""
        with self.service.client("key-admin") as client:
            spec = {
                "name": name,
                "model": "prose-1",
                "scheme": scheme,
                "slots": 4,
                "tokenizer_sha256": _bytes_sha256(),
            }
            answer = client.post("/v1/keys", json=spec)
            assert answer.status_code == 201, answer.text
            if promote:
                answer = client.post(f"/v1/keys/{name}/versions/1/promote")
                assert answer.status_code == 200, answer.text
        return f"{TENANT}.{name}@1"

    def key(self, version_id: str) -> Key:
        settings = Settings.load(self.service.config)
        with open_office(settings) as office:
            key = office.keybook.key_of(office.keybook.version(TENANT, version_id))
        assert isinstance(key, Key)
        return key

    def write(
        self, version_id: str, n: int, seed: int, *, user: int | None = None, scheme: str = "gumbel"
    ) -> str:
        """n characters, marked."""
        root = self.key(version_id)
        key = root if user is None else root.user(user)
        rng = np.random.default_rng(seed)
        prompt = np.frombuffer(b"In the evening ", np.uint8).astype(np.int64)
        ids = embed(Prose(), prompt, n, key, from_tag(scheme), rng=rng).tokens
        return bytes(ids.astype(np.uint8)).decode("ascii")


def plain(n: int) -> str:
    """n characters without a mark, of English that does not repeat itself soon."""
    words = " ".join(PROSE.split()).split(" ")
    order = np.random.default_rng(5).permutation(len(words) * 8) % len(words)
    return " ".join(words[int(i)] for i in order)[:n]


def _bytes_sha256() -> str:
    from filigrane.service.tokenizing import BYTES_SHA256

    return BYTES_SHA256


@dataclass
class Visit:
    """One visit of a browser: its page, and everything that it asked for."""

    page: Page
    context: BrowserContext
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def axe(self) -> list[str]:
        """What axe-core finds against WCAG 2.1 A and AA and its best practices, in words."""
        self.page.evaluate(AXE.read_text("utf-8"))
        found = self.page.evaluate("async () => (await axe.run(document)).violations")
        return [
            f"{one['id']}: {one['help']}: {node['html'][:200]} {node['any'][:1]}"
            for one in found
            for node in one["nodes"]
        ]

    def tab_to(self, name: str, *, most: int = 60) -> None:
        """Press the tab key until the element with this accessible text or name has the focus."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.focused(name):
                return
        raise AssertionError(f"{name!r} cannot be reached with the keyboard")

    def focused(self, name: str) -> bool:
        """Whether the focus is on an element that is called so."""
        return bool(
            self.page.evaluate(
                """(name) => {
                    const here = document.activeElement;
                    if (!here || here === document.body) return false;
                    const labels = [...(here.labels || [])].map((label) => label.textContent);
                    const names = [here.getAttribute("aria-label"), here.textContent, ...labels];
                    return names.some((one) => one && one.replace(/\\s+/g, " ").trim()
                        .startsWith(name));
                }""",
                name,
            )
        )

    def log_in(self, token: str) -> None:
        """Log in, by keyboard alone."""
        base = self.page.url.split("/", 3)[:3]
        self.page.goto("/".join(base) + "/login" if self.page.url.startswith("http") else "/login")
        self.tab_to("API token")
        self.page.keyboard.insert_text(token)
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(lambda url: "/login" not in url)


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, headless."""
    assert Path(CHROMIUM).exists(), (
        f"{CHROMIUM} is missing; install Debian's package chromium, or set FILIGRANE_CHROMIUM."
    )
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def visit(
    opened: Browser,
    url: str,
    *,
    dark: bool = False,
    javascript: bool = True,
    width: int = 1100,
    height: int = 900,
    scale: float = 1.0,
    calm: bool = True,
) -> Iterator[Visit]:
    """A browser profile of its own. Whatever it asks of another host is refused and remembered."""
    context = opened.new_context(
        base_url=url,
        color_scheme="dark" if dark else "light",
        java_script_enabled=javascript,
        reduced_motion="reduce" if calm else "no-preference",
        viewport={"width": math.floor(width / scale), "height": math.floor(height / scale)},
        device_scale_factor=scale,
        accept_downloads=True,
    )
    page = context.new_page()
    found = Visit(page=page, context=context)

    def watch(route: Route) -> None:
        found.requests.append(route.request.url)
        if route.request.url.startswith((url, "data:")):
            route.continue_()
        else:
            route.abort()

    context.route("**/*", watch)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on(
        "console",
        lambda message: found.complaints.append(message.text) if message.type == "error" else None,
    )
    try:
        yield found
    finally:
        context.close()
