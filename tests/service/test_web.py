"""The web page in a real browser: by keyboard, with and without JavaScript, in both colours."""

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, expect
from webkit import Desk, Visit, browser, plain, visit

from filigrane.service.receipts import verify
from filigrane.service.web import rendering
from servicekit import (
    OTHER,
    TENANT,
    Service,
    operator_token,
    prepare,
    problem,
    running,
    signed_in,
)

STATIC = Path(rendering.__file__).parent / "static"
TEMPLATES = Path(rendering.__file__).parent / "templates"
KEY = f"{TENANT}.chat@1"
SPLIT = 800
SPOTTED = (
    "<script>",
    "<img src=x onerror=fire()>",
    "</textarea><script>fire()</script>",
    "'\"><b>",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    sections = (
        '[public]\ntenant = "demo"\nmin_tokens = 200\nper_identity = "1000/minute"\n'
        'per_network = "1000/minute"\nnear_duplicates = 1000\n'
    )
    made = prepare(tmp_path_factory.mktemp("web"), sections=sections)
    with running(made):
        for role in ("attribution-officer", "custodian"):
            name = f"second-{role}"
            made.tokens[TENANT][name] = operator_token(made, name, role)
        found = Desk(made)
        found.make_key("chat")
        yield found


@pytest.fixture(scope="module")
def service(desk: Desk) -> Service:
    return desk.service


@pytest.fixture(scope="module")
def text(desk: Desk) -> str:
    """Unmarked, then marked, then unmarked."""
    return plain(SPLIT) + "\n" + desk.write(KEY, 900, 3) + "\n" + plain(2 * SPLIT)[SPLIT:]


def jwks(service: Service) -> dict[str, object]:
    found: dict[str, object] = httpx2.get(f"{service.url}/.well-known/jwks.json").json()
    return found


def quiet(seen: Visit, url: str) -> None:
    """Nothing was asked of anybody else, and nothing broke or was kept."""
    assert seen.requests and all(one.startswith(url) for one in seen.requests)
    assert seen.complaints == []


# Journeys


@pytest.mark.parametrize("javascript", [True, False])
def test_public_journey_by_keyboard(
    chromium: Browser, service: Service, text: str, javascript: bool, tmp_path: Path
) -> None:
    with visit(chromium, service.url, javascript=javascript) as seen:
        page = seen.page
        page.goto("/")
        seen.tab_to("Text")
        page.keyboard.insert_text(text)
        seen.tab_to("Check this text")
        page.keyboard.press("Enter")
        expect(page.locator("#verdict")).to_have_text("A mark was found.")
        if javascript:
            expect(page.locator("#verdict")).to_be_focused()
        # The verdict comes before the form, and no number is told.
        order = page.locator("h1, #verdict, form.card").evaluate_all(
            "all => all.map(one => one.id || one.tagName)"
        )
        assert order == ["H1", "verdict", "FORM"]
        assert not re.search(r"log10|p-value|p =|1 in 10[⁰¹²³⁴⁵⁶⁷⁸⁹]", page.content())
        seen.tab_to("How sure is that")
        page.keyboard.press("Enter")
        expect(page.get_by_text("False alarms")).to_be_visible()
        seen.tab_to("Download a signed receipt")
        with page.expect_download() as waiting:
            page.keyboard.press("Enter")
        token = Path(waiting.value.path()).read_text()
        receipt = verify(token, jwks(service), text)
        assert (receipt.verdict, receipt.tier, receipt.log10_pvalue) == ("detected", "public", None)
        assert seen.context.cookies() == []
        if javascript:
            # htmx notes the address; nothing of the text is kept anywhere.
            kept = page.evaluate("[{...localStorage}, {...sessionStorage}]")
            assert kept in ([{}, {}], [{}, {"htmx-current-path-for-history": "/"}])
        quiet(seen, service.url)


@pytest.mark.parametrize("javascript", [True, False])
def test_public_answers_in_three_classes(
    chromium: Browser, service: Service, javascript: bool
) -> None:
    with visit(chromium, service.url, javascript=javascript) as seen:
        page = seen.page
        for typed, said in (
            (plain(900), "No mark was found."),
            ("A short one.", "The text is too short to say."),
            (" ", "That cannot be used as it is"),
        ):
            page.goto("/")
            page.fill("#text", typed)
            page.click("text=Check this text")
            expect(page.locator("#verdict")).to_have_text(said)


@pytest.mark.parametrize("javascript", [True, False])
def test_expert_journey_by_keyboard(
    chromium: Browser, service: Service, text: str, javascript: bool
) -> None:
    with visit(chromium, service.url, javascript=javascript) as seen:
        page = seen.page
        page.goto("/")
        seen.log_in(service.token("detector-expert"))
        assert page.url == f"{service.url}/expert"
        seen.tab_to("Text")
        page.keyboard.insert_text(text)
        seen.tab_to("Check this text")
        page.keyboard.press("Enter")
        expect(page.locator("#verdict")).to_have_text("This text carries a mark")
        expect(page.locator(".say")).to_contain_text(KEY)
        # The text is whole, and what is underlined is the marked part of it, by number and table.
        shown = page.locator("#heat").evaluate(
            "heat => { const copy = heat.cloneNode(true);"
            " copy.querySelectorAll('.number').forEach(one => one.remove());"
            " return copy.textContent; }"
        )
        assert shown == text
        assert page.locator("#heat mark").count() == page.locator("[id^=row-]").count() >= 1
        marked = [
            tuple(int(part.replace(",", "")) for part in cell.split("–"))
            for cell in page.locator("[id^=row-] td:nth-of-type(2)").all_inner_texts()
        ]
        # The key is another each time, and where a passage begins and ends is an estimate.
        inside = sum(max(0, min(stop, SPLIT + 900) - max(start, SPLIT)) for start, stop in marked)
        assert inside > sum(stop - start for start, stop in marked) / 2
        patterns = page.locator("#heat mark span").evaluate_all(
            "all => [...new Set(all.map(one => getComputedStyle(one).textDecorationStyle))].sort()"
        )
        assert len(patterns) >= 3 and "none" not in patterns
        outside = page.locator("#heat").evaluate("one => getComputedStyle(one).textDecorationLine")
        assert outside == "none"
        seen.tab_to("The text, with")
        if javascript:
            page.keyboard.press("n")
            assert seen.focused("Passage 1")
            expect(page.locator("#row-1")).to_have_class("here")
        seen.tab_to("Every key that was tried")
        page.keyboard.press("Enter")
        expect(page.get_by_role("rowheader", name=KEY)).to_be_visible()
        page.locator("#verdict").focus()
        seen.tab_to("Download a signed receipt")
        with page.expect_download() as waiting:
            page.keyboard.press("Enter")
        assert waiting.value.suggested_filename.endswith(".jws")
        receipt = verify(Path(waiting.value.path()).read_text(), jwks(service), text)
        assert receipt.tier == "expert" and receipt.key_id == KEY
        assert receipt.log10_pvalue is not None and receipt.log10_pvalue < -12
        page.locator("main").focus()
        page.keyboard.press("Shift+Tab")
        assert seen.focused("Log out")
        page.keyboard.press("Enter")
        expect(page.locator(".notice")).to_have_text("You are logged out.")
        assert seen.context.cookies() == []
        page.goto("/expert")
        assert page.url == f"{service.url}/login"
        quiet(seen, service.url)


def test_a_file_counts_to_the_last_byte(
    chromium: Browser, service: Service, text: str, tmp_path: Path
) -> None:
    """Line ends of a file survive; the hash in the receipt is that of the file."""
    file = tmp_path / "found <b>text&.txt"
    file.write_bytes(text.replace("\n", "\r\n").encode())
    with visit(chromium, service.url) as seen:
        page = seen.page
        page.goto("/login")
        seen.log_in(service.token("detector-expert"))
        page.set_input_files("#file", file)
        expect(page.locator("#text")).to_be_disabled()
        page.click("text=Check this text")
        expect(page.locator("#verdict")).to_have_text("This text carries a mark")
        with page.expect_download() as waiting:
            page.click("text=Download a signed receipt")
        token = Path(waiting.value.path()).read_text()
        assert verify(token, jwks(service), file.read_bytes().decode()).verdict == "detected"
        file.write_bytes(b"\xff\xfe\x00not text")
        page.set_input_files("#file", file)
        page.click("text=Check this text")
        expect(page.locator("#verdict")).to_have_text("That cannot be used as it is")
        expect(page.locator("#result")).to_contain_text("UTF-8")


@pytest.mark.parametrize("javascript", [True, False])
def test_key_admin_journey_by_keyboard(
    chromium: Browser, service: Service, javascript: bool
) -> None:
    name = f"news-{'js' if javascript else 'plain'}"
    with visit(chromium, service.url, javascript=javascript) as seen:
        page = seen.page
        page.goto("/")
        seen.log_in(service.token("key-admin"))
        assert page.url == f"{service.url}/keys"
        page.locator("#new").scroll_into_view_if_needed()
        seen.tab_to("Name")
        page.keyboard.type(name)
        seen.tab_to("Model")
        page.keyboard.type("prose-1")
        seen.tab_to("Create the key")
        page.keyboard.press("Enter")
        expect(page.locator(".notice")).to_contain_text("The key was created.")

        def state(version: int) -> str:
            row = page.get_by_role("row", name=f"{TENANT}.{name}@{version}")
            return row.locator(".state").inner_text()

        def press(what: str, said: str) -> None:
            seen.tab_to(what)
            page.keyboard.press("Enter")
            expect(page.locator(".notice")).to_contain_text(said)

        assert state(1) == "waiting"
        press(f"Promote {TENANT}.{name}@1", "in use now")
        assert state(1) == "in use"
        press(f"Make the next version of {name}", "A new version")
        press(f"Promote {TENANT}.{name}@2", "in use now")
        assert (state(1), state(2)) == ("retired", "in use")
        press(f"Retire {TENANT}.{name}@2", "marks no more")
        seen.tab_to(f"Report as compromised {TENANT}.{name}@2")
        page.keyboard.press("Enter")
        seen.tab_to("It cannot be taken back.")
        page.keyboard.press("Space")
        seen.tab_to(f"Report {TENANT}.{name}@2")
        page.keyboard.press("Enter")
        expect(page.locator(".notice")).to_contain_text("recorded as compromised")
        assert state(2) == "compromised"
        quiet(seen, service.url)


def test_two_custodians_destroy_a_version(chromium: Browser, service: Service, desk: Desk) -> None:
    doomed = desk.make_key("doomed", promote=False)
    with (
        visit(chromium, service.url, javascript=False) as first,
        visit(chromium, service.url) as second,
    ):
        for seen, role in ((first, "custodian"), (second, "second-custodian")):
            seen.page.goto("/")
            seen.log_in(service.token(role))
        first.tab_to(f"Destroy {doomed}")
        first.page.keyboard.press("Enter")
        first.tab_to("Why")
        first.page.keyboard.type("the model is gone")
        first.page.keyboard.press("Enter")
        expect(first.page.locator(".notice")).to_contain_text("Another person has to approve")
        expect(first.page.get_by_text("waits for a second custodian")).to_be_visible()
        second.page.reload()
        expect(second.page.get_by_text("custodian asks: the model is gone")).to_be_visible()
        second.tab_to(f"Agree to destroy {doomed}")
        second.page.keyboard.press("Enter")
        expect(second.page.locator(".notice")).to_contain_text("You approved")
        first.page.reload()
        first.tab_to("Nobody can read its marks ever again.")
        first.page.keyboard.press("Space")
        first.tab_to(f"Destroy {doomed}", most=3)
        first.page.keyboard.press("Enter")
        expect(first.page.locator(".notice")).to_contain_text("is destroyed")
        row = first.page.get_by_role("row", name=doomed)
        assert row.locator(".state").inner_text() == "destroyed"


@pytest.mark.parametrize("javascript", [True, False])
def test_two_officers_trace_a_text(
    chromium: Browser, service: Service, desk: Desk, javascript: bool
) -> None:
    written = desk.write(KEY, 600, 11 + javascript, user=42)
    purpose = f"complaint 12 <i>of {javascript}</i>"
    with (
        visit(chromium, service.url, javascript=javascript) as first,
        visit(chromium, service.url, javascript=javascript) as second,
    ):
        for seen, role in (
            (first, "attribution-officer"),
            (second, "second-attribution-officer"),
        ):
            seen.page.goto("/")
            seen.log_in(service.token(role))
            assert seen.page.url == f"{service.url}/trace"

        def fill(which: str) -> None:
            first.tab_to("Text")
            first.page.keyboard.insert_text(written)
            first.tab_to("Users")
            first.page.keyboard.press("Control+A")
            first.page.keyboard.type("100")

        first.tab_to("Skip")
        fill("ask")
        first.tab_to("Purpose")
        first.page.keyboard.insert_text(purpose)
        first.page.keyboard.press("Enter")
        expect(first.page.locator(".notice")).to_contain_text("Another person has to approve")
        assert not first.page.get_by_role("button", name="Agree to").count()
        second.page.reload()
        expect(second.page.get_by_text(purpose).first).to_be_visible()
        second.tab_to("Agree to request")
        second.page.keyboard.press("Enter")
        expect(second.page.locator(".notice")).to_contain_text("You approved")
        first.page.reload()
        first.page.locator("#approval").focus()
        fill("run")
        first.page.keyboard.press("Enter")
        expect(first.page.locator("#verdict")).to_have_text("The text carries the mark of user 42")
        expect(first.page.get_by_role("rowheader", name="42", exact=True)).to_be_visible()
        expect(first.page.locator(".verdict .hint").first).to_contain_text(purpose)
        # It served once, and is there for her alone if the answer gets lost.
        first.page.goto("/trace")
        assert first.page.locator("#approval > option").count() == 0
        assert first.page.locator("#approval optgroup[label='Your answer again'] option").count()
        first.page.locator("#approval").focus()
        fill("run")
        first.page.keyboard.press("Enter")
        expect(first.page.locator("#verdict")).to_have_text("The text carries the mark of user 42")
        second.page.goto("/trace")
        expect(second.page.get_by_text("No request is approved and unused.")).to_be_visible()
        quiet(first, service.url)


def test_a_text_is_traced_with_the_tokenizer_that_is_chosen(service: Service) -> None:
    with service.client("key-admin") as admin:
        spec = {"name": "ids-only", "model": "prose-1", "scheme": "gumbel", "slots": 1}
        assert admin.post("/v1/keys", json=spec).status_code == 201
    form = {"text": plain(500), "key": "ids-only", "users": "10", "purpose": "case 3"}
    with (
        signed_in(service, "attribution-officer") as (first, csrf),
        signed_in(service, "second-attribution-officer") as (second, other),
    ):
        form["csrf"] = csrf
        page = first.get("/trace").text
        assert re.search(r'<select id="ask-tokenizer".*?<option value="bytes">', page, re.DOTALL)
        refused = first.post("/trace/ask", data=form)
        assert refused.status_code == 422 and "names no tokenizer" in refused.text
        # What was typed is still there.
        assert "case 3" in refused.text and plain(500)[:40] in refused.text
        chosen = form | {"tokenizer": "bytes"}
        assert first.post("/trace/ask", data=chosen).status_code == 303
        (approval,) = re.findall(r'name="approval" value="([0-9a-f]+)"', second.get("/trace").text)
        agreed = {"csrf": other, "approval": approval}
        assert second.post("/trace/agree", data=agreed).status_code == 303
        refused = first.post("/trace", data=form | {"approval": approval})
        assert refused.status_code == 422 and "names no tokenizer" in refused.text
        done = first.post("/trace", data=chosen | {"approval": approval})
        assert done.status_code == 200 and "Nobody is named" in done.text
        assert re.search(r'<option value="bytes" selected>', done.text)


def test_keys_say_what_they_read_and_since_when(
    chromium: Browser, service: Service, desk: Desk
) -> None:
    gone, leaked = desk.make_key("gone", promote=False), desk.make_key("leaked")
    with (
        service.client("custodian") as first,
        service.client("second-custodian") as second,
        visit(chromium, service.url, width=320) as seen,
    ):
        for version, since in ((gone, "2026-01-02T03:04:00Z"), (leaked, "2026-05-06T07:08:00Z")):
            path = f"/v1/keys/{version.split('.')[1].replace('@', '/versions/')}"
            assert first.post(f"{path}/compromise", json={"since": since}).status_code == 200
        asked = {"kind": "destroy", "subject": gone, "purpose": "leaked"}
        approval = first.post("/v1/approvals", json=asked).json()["id"]
        assert second.post(f"/v1/approvals/{approval}/approve").status_code == 200
        path = "/v1/keys/gone/versions/1/destroy"
        destroyed = first.post(path, json={"approval": approval})
        assert destroyed.status_code == 200, destroyed.text
        page = seen.page
        page.goto("/")
        seen.log_in(service.token("key-admin"))
        row = page.get_by_role("row", name=leaked)
        expect(row.get_by_text("2026-05-06 07:08 UTC")).to_be_visible()
        row = page.get_by_role("row", name=gone)
        expect(row.get_by_text("compromised since 2026-01-02 03:04 UTC")).to_be_visible()
        destroyed_and_leaked = re.compile(
            r"^\s*\d{4}-\d\d-\d\d \d\d:\d\d UTC\s*compromised since 2026-01-02 03:04 UTC\s*$"
        )
        expect(row.locator(".since")).to_have_text(destroyed_and_leaked)
        # The whole commitment is one key press away, and is text that can be copied.
        commitment = destroyed.json()["commitment"]
        whole = row.get_by_text(commitment, exact=True)
        expect(whole).to_be_hidden()
        seen.tab_to(f"Whole commitment of {gone}")
        page.keyboard.press("Enter")
        expect(whole).to_be_visible()
        expect(page.locator("#tokenizer-hint")).to_contain_text(
            "a text cannot be read with it unless somebody names a tokenizer"
        )


# Accessibility


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(chromium: Browser, service: Service, text: str, dark: bool) -> None:
    found: dict[str, list[str]] = {}
    with visit(chromium, service.url, dark=dark) as seen:
        page = seen.page

        def look(name: str) -> None:
            if problems := seen.axe():
                found[name] = problems

        page.goto("/")
        look("public")
        for typed in (text, plain(900), "short", ""):
            page.fill("#text", typed)
            page.click("text=Check this text")
            page.wait_for_selector("#verdict")
            page.wait_for_timeout(50)
            look(f"public: {typed[:9]}")
        page.goto("/login")
        look("login")
        page.fill("#token", "fgt_wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#verdict")
        look("login refused")
        seen.log_in(service.token("detector-expert"))
        page.fill("#text", text)
        page.click("text=Check this text")
        page.wait_for_selector("#heat mark")
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        look("expert")
        page.goto("/keys")
        look("refused")
        for role in ("attribution-officer", "key-admin", "custodian"):
            seen.log_in(service.token(role))
            page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
            look(role)
    assert found == {}


def test_axe_would_find_something(chromium: Browser, service: Service) -> None:
    with visit(chromium, service.url) as seen:
        seen.page.goto("/")
        seen.page.evaluate("document.querySelector('label').remove()")
        assert any("label" in one for one in seen.axe())


@pytest.mark.parametrize(("width", "scale"), [(320, 1.0), (640, 2.0), (768, 1.0)])
def test_small_screens_and_large_letters(
    chromium: Browser, service: Service, text: str, width: int, scale: float
) -> None:
    with visit(chromium, service.url, width=width, height=800, scale=scale) as seen:
        page = seen.page

        def narrow() -> None:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.url

        page.goto("/")
        narrow()
        seen.log_in(service.token("detector-expert"))
        page.fill("#text", text)
        page.click("text=Check this text")
        page.wait_for_selector("#heat mark")
        narrow()
        for role in ("key-admin", "custodian", "attribution-officer"):
            seen.log_in(service.token(role))
            page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
            narrow()
            # Nothing to do, and no hash, is cut off by the window or by a region that scrolls.
            hidden = page.locator("button, input, select, td code").evaluate_all(
                """all => all.filter((one) => {
                    const region = one.closest(".scroll");
                    const edge = region ? region.getBoundingClientRect().right : innerWidth;
                    return one.type !== "hidden" && one.getBoundingClientRect().right > edge + 1;
                }).map((one) => one.outerHTML)"""
            )
            assert hidden == []
            cut = page.locator("select").evaluate_all(
                """all => all.flatMap((one) => {
                    const style = getComputedStyle(one);
                    const pen = document.createElement("canvas").getContext("2d");
                    pen.font = style.font;
                    // 20 pixels are for the arrow.
                    const room = one.clientWidth - parseFloat(style.paddingLeft)
                        - parseFloat(style.paddingRight) - 20;
                    return [...one.options].map((option) => option.textContent.trim())
                        .filter((words) => pen.measureText(words).width > room);
                })"""
            )
            assert cut == []


def test_nothing_moves_for_those_who_ask_for_calm(chromium: Browser, service: Service) -> None:
    read = "one => getComputedStyle(one).transitionDuration"
    for calm, moves in ((True, False), (False, True)):
        with visit(chromium, service.url, calm=calm) as seen:
            seen.page.goto("/")
            duration = seen.page.locator("button.primary").evaluate(read)
            assert (duration != "0s") == moves


# Attacks


def test_texts_and_names_stay_text(chromium: Browser, service: Service, desk: Desk) -> None:
    """What looks like HTML is shown, in every place where words of others come up."""
    spotted = " ".join(SPOTTED)
    with visit(chromium, service.url) as seen:
        page = seen.page
        fired: list[str] = []
        page.on("dialog", lambda dialog: (fired.append(dialog.message), dialog.dismiss()))
        page.expose_function("fire", lambda: fired.append("fire"))
        written = spotted + desk.write(KEY, 700, 21) + spotted
        seen.page.goto("/")
        page.fill("#text", spotted + plain(700))
        page.click("text=Check this text")
        page.wait_for_selector("#verdict")
        seen.log_in(service.token("detector-expert"))
        page.fill("#text", written)
        page.click("text=Check this text")
        page.wait_for_selector("#heat mark")
        assert spotted in page.locator("#heat").inner_text()
        assert page.locator("#heat img, #heat b, #heat script").count() == 0
        page.goto(f"/login?done={SPOTTED[1]}")
        assert page.locator(".notice").count() == 0
        seen.log_in(service.token("attribution-officer"))
        page.fill("#ask-text", "some text")
        page.fill("#purpose", spotted)
        page.click("text=Ask a second officer")
        expect(page.get_by_text(spotted).first).to_be_visible()
        assert page.locator("main img, main b, main script").count() == 0
        seen.log_in(service.token("key-admin"))
        page.locator("#name").evaluate("one => { one.pattern = '.*'; one.maxLength = 500; }")
        page.fill("#name", spotted)
        page.fill("#model", "x")
        page.click("text=Create the key")
        page.wait_for_selector(".problem")
        assert page.input_value("#name") == spotted
        assert page.locator("main img, main b, main script").count() == 0
        page.wait_for_timeout(200)
        assert fired == []


def test_the_policy_stops_a_script_that_got_in(chromium: Browser, service: Service) -> None:
    with visit(chromium, service.url) as seen:
        page = seen.page
        page.goto("/")
        page.evaluate(
            """() => {
                const one = document.createElement('div');
                one.innerHTML = '<img src=x onerror="document.title = 1" style="color: red">';
                document.body.append(one);
                const script = document.createElement('script');
                script.textContent = 'document.title = 2';
                document.body.append(script);
                const far = document.createElement('script');
                far.src = 'https://example.org/x.js';
                document.body.append(far);
            }"""
        )
        page.wait_for_timeout(200)
        assert page.title() == "Does this text carry a mark? – filigrane"
        assert any("Content Security Policy" in one for one in seen.complaints)
        assert not any("example.org" in one for one in seen.requests)


def test_pages_hold_no_inline_code_and_headers_are_strict(service: Service) -> None:
    for file in TEMPLATES.glob("*.html"):
        source = file.read_text()
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|\|\s*safe|autoescape", source)
        assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", source))
    for path in ("/", "/login", "/expert", "/nowhere"):
        headers = httpx2.get(service.url + path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "set-cookie" not in headers
    page = httpx2.get(service.url).text
    for address in re.findall(r'(?:href|src)="(/static/[^"]+)"', page):
        answer = httpx2.get(service.url + address)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
    assert httpx2.get(f"{service.url}/static/..%2froutes.py").status_code == 404
    assert httpx2.get(f"{service.url}/static/routes.py").status_code == 404


def test_browsers_get_a_page_where_there_is_none(chromium: Browser, service: Service) -> None:
    with visit(chromium, service.url, width=320) as seen:
        page = seen.page
        page.goto("/nowhere/<b>x</b>")
        expect(page.locator("h1")).to_have_text("There is no such thing")
        assert seen.axe() == []
        seen.log_in(service.token("key-admin"))
        page.goto("/kyes")
        # Who is logged in stays so, with the way back in the menu.
        expect(page.get_by_role("link", name="Keys", exact=True)).to_be_visible()
        seen.tab_to("To the start")
        page.keyboard.press("Enter")
        page.wait_for_url(f"{service.url}/")
    html = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for path, status in (("/nowhere", 404), ("/static/nothing.css", 404), ("/logout", 405)):
        answer = httpx2.get(service.url + path, headers=html)
        assert answer.status_code == status
        assert answer.headers["content-type"].startswith("text/html")
        assert 'href="/"' in answer.text and answer.headers["cache-control"] == "no-store"
        assert (answer.headers.get("allow") == "POST") == (status == 405)
        for accept in ("*/*", "application/json", "text/plain, application/problem+json"):
            problem(httpx2.get(service.url + path, headers={"Accept": accept}), status)
    # Addresses of programs speak to programs, whoever asks.
    problem(httpx2.get(f"{service.url}/v1/keys", headers=html), 401)
    problem(httpx2.get(f"{service.url}/v1/nowhere", headers=html), 404)


def test_what_never_reaches_a_page_is_said_on_one(service: Service) -> None:
    html = {"Accept": "text/html", "Content-Type": "application/x-www-form-urlencoded"}
    large = b"text=" + b"x" * 12_000_000
    whole = httpx2.post(service.url, content=large, headers=html)
    assert whole.status_code == 413 and "<h1>That is too long</h1>" in whole.text
    assert whole.headers["connection"] == "close"
    part = httpx2.post(service.url, content=large, headers=html | {"HX-Request": "true"})
    assert part.status_code == 413 and "That is too long" in part.text and "<h1" not in part.text
    wrong = httpx2.post(service.url, content=b"x", headers=html | {"Content-Type": "text/plain"})
    assert wrong.status_code == 415 and "<h1>" in wrong.text
    problem(httpx2.post(service.url, content=large, headers=html | {"Accept": "*/*"}), 413)


def test_static_files_are_small_and_pinned() -> None:
    assert (STATIC / "filigrane.js").stat().st_size < 10_000
    htmx = (STATIC / "htmx-2.0.11.min.js").read_bytes()
    assert hashlib.sha256(htmx).hexdigest() == (
        "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717"
    )
    assert "Zero-Clause BSD" in (STATIC / "htmx-LICENSE.txt").read_text()
    assert set(rendering.STATIC) == {file.name for file in STATIC.iterdir()}


def test_forms_of_other_sites_are_refused(service: Service) -> None:
    form = {"name": "forged", "model": "m", "mark": "gumbel", "tokenizer": "", "slots": "1"}
    with signed_in(service, "key-admin") as (client, csrf):
        for sent, headers in (
            (form, {}),
            (form | {"csrf": "wrong"}, {}),
            (form | {"csrf": csrf}, {"Sec-Fetch-Site": "cross-site"}),
            (form | {"csrf": csrf}, {"Sec-Fetch-Site": "same-site"}),
            (form | {"csrf": csrf}, {"Origin": "https://evil.example"}),
            (form | {"csrf": csrf}, {"Origin": "null"}),
        ):
            assert client.post("/keys/create", data=sent, headers=headers).status_code == 403
        with signed_in(service, "key-admin") as (_, foreign):
            pass
        answer = client.post("/keys/create", data=form | {"csrf": foreign})
        assert answer.status_code == 403
        assert "forged" not in client.get("/keys").text
        # Logging in as somebody else, from elsewhere, is refused as well.
        token = {"token": service.token("key-admin")}
        headers = {"Sec-Fetch-Site": "cross-site"}
        assert client.post("/login", data=token, headers=headers).status_code == 403
        own = {"Origin": service.url, "Sec-Fetch-Site": "same-origin"}
        answer = client.post("/keys/create", data=form | {"csrf": csrf}, headers=own)
        assert answer.status_code == 303 and "forged" in client.get("/keys").text


def test_roles_and_tenants_stay_apart(service: Service) -> None:
    pages = {"/expert": "detector-expert", "/trace": "attribution-officer", "/keys": "key-admin"}
    for role in pages.values():
        with signed_in(service, role) as (client, _):
            for path, needed in pages.items():
                answer = client.get(path)
                assert answer.status_code == (200 if role == needed else 403)
                assert ("This is not yours to do" in answer.text) == (role != needed)
    with signed_in(service, "key-admin", OTHER) as (client, csrf):
        assert "chat" not in client.get("/keys").text
        sent = {"version": KEY, "csrf": csrf}
        assert client.post("/keys/retire", data=sent).status_code == 404
        assert client.post("/keys/nothing", data=sent).status_code == 404
    with signed_in(service, "custodian") as (client, csrf):
        sent = {"version": KEY, "csrf": csrf}
        assert client.post("/keys/retire", data=sent).status_code == 403


def test_a_session_ends_with_its_token(service: Service, desk: Desk) -> None:
    with service.client("tenant-admin") as admin:
        made = admin.post("/v1/tokens", json={"name": "guest", "roles": ["detector-expert"]})
        service.tokens[TENANT]["guest"] = made.json()["token"]
        with signed_in(service, "guest") as (client, _):
            assert client.get("/expert").status_code == 200
            (name, value), *_ = client.cookies.items()
            for broken in (
                value[:40] + ("A" if value[40] != "A" else "B") + value[41:],
                "1.x",
                "x",
                "9" * 400,
            ):
                answer = httpx2.get(service.url + "/expert", cookies={name: broken})
                assert answer.status_code == 303 and answer.headers["location"] == "/login"
            token_id = made.json()["token"].split("_")[2]
            assert admin.delete(f"/v1/tokens/{token_id}").status_code in (200, 204)
            deadline = 60
            while client.get("/expert").status_code == 200:
                deadline -= 1
                assert deadline, "a revoked token goes on opening pages"
                time.sleep(0.1)
            partial = client.post("/expert", headers={"HX-Request": "true"})
            assert partial.headers["hx-redirect"] == "/login"
