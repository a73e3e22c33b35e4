"""The chat page in a real browser, against a real server of a tiny model."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("playwright.sync_api", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"the browser's tests need {package}: make test-browser")
from playwright.sync_api import Locator, Page, expect  # noqa: E402

from hymba.commands.chat import Conversation  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

LONG = 15_000  # tokens: an answer that is still coming when the test stops it
CHAT = "**/v1/chat/completions"
CONTROLS = "button, input, textarea, select, a"


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message")


def answers(page: Page) -> Locator:
    return page.locator(".turn.assistant .text")


def turns(page: Page) -> list[dict[str, str]]:
    return page.evaluate("JSON.parse(localStorage.getItem('hymba.turns')) ?? []")


def choose(page: Page, **settings: object) -> None:
    button(page, "Settings").click()
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    button(page, "Done").click()


def say(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def ask(page: Page, text: str, **settings: object) -> str:
    """Say something and wait for the whole answer."""
    choose(page, **{"max_tokens": 20, **settings})
    before = answers(page).count()
    say(page, text)
    expect(button(page, "Copy answer")).to_have_count(before + 1)
    return turns(page)[-1]["content"]


def begin_long(page: Page) -> None:
    """Say something and wait for the beginning of a long answer."""
    choose(page, max_tokens=LONG)
    say(page, "to be")
    expect(answers(page).last).to_have_text(re.compile(r"\S{3}"))
    expect(button(page, "Stop")).to_be_visible()


def get(url: str) -> dict[str, Any]:
    return json.load(urllib.request.urlopen(url))


def events(*said: str, error: str | None = None) -> dict[str, Any]:
    """A made-up answer, for what a tiny model never says."""
    lines = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in said]
    lines += [json.dumps({"error": {"message": error}})] if error else ["[DONE]"]
    body = "".join(f"data: {line}\n\n" for line in lines)
    return {"status": 200, "content_type": "text/event-stream", "body": body}


def test_an_answer_streams_and_is_the_servers(page: Page, server: Any) -> None:
    choose(page, max_tokens=1000, seed=7, temperature=0.8, top_p=0.9)
    say(page, "to be or")
    expect(page.get_by_text("The answer is coming.")).to_be_attached()
    expect(answers(page)).to_have_text(re.compile(r"\S{3}"))
    assert button(page, "Stop").is_visible(), "the answer came in one piece"
    assert page.locator("#spoken").inner_text() == "The answer is coming.", "not token by token"
    facts = page.locator(".facts")
    expect(facts).to_have_text(
        re.compile(r"^1000 tokens · [\d.,]+ tokens/s · first after \d\.\d\d s")
    )
    expect(facts).to_contain_text("cut at max tokens (1000)")
    body = {"messages": [{"role": "user", "content": "to be or"}], "seed": 7, "max_tokens": 1000}
    call = urllib.request.Request(
        f"{server.url}v1/chat/completions",
        json.dumps(body | {"temperature": 0.8, "top_p": 0.9}).encode(),
        {"Content-Type": "application/json"},
    )
    told = json.load(urllib.request.urlopen(call))["choices"][0]["message"]["content"]
    assert [turn["content"] for turn in turns(page)] == ["to be or", told]
    assert page.locator("#spoken").inner_text()  # the whole of it, once
    expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "off")


def test_stop_keeps_what_was_said_and_frees_the_server(page: Page, server: Any) -> None:
    for stop in (lambda: page.keyboard.press("Escape"), lambda: button(page, "Stop").click()):
        begin_long(page)
        stop()
        expect(button(page, "Send")).to_be_visible()
        expect(page.locator(".facts").last).to_contain_text("stopped")
        assert len(turns(page)[-1]["content"]) > 2
        deadline = time.monotonic() + 20
        while get(f"{server.url}stats")["running"]:
            assert time.monotonic() < deadline, "the server goes on with what nobody reads"
    assert len(turns(page)) == 4
    expect(box(page)).to_be_focused()


def test_a_draft_waits_while_an_answer_comes(page: Page) -> None:
    begin_long(page)
    say(page, "the next one")
    expect(box(page)).to_have_value("the next one")
    assert page.locator(".turn").count() == 2
    box(page).press("Shift+Enter")
    expect(box(page)).to_have_value("the next one\n")


def test_the_conversation_survives_a_reload(page: Page, server: Any) -> None:
    ask(page, "to be or not", temperature=0)
    begin_long(page)
    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    kept = turns(page)
    assert kept[3]["content"] and kept[0]["content"] == "to be or not"
    page.goto(f"{server.url}health")
    page.evaluate("localStorage.setItem('hymba.turns', '[{\"role\": 1}, 7]')")
    page.goto(server.url)
    expect(page.get_by_text("Ask something.")).to_be_visible()


def test_settings_reach_the_server_and_stay(page: Page) -> None:
    chosen = {"temperature": "0.3", "top_p": "0.8", "max_tokens": "9", "seed": "5"}
    choose(page, system="Be brief.", key="sesame", **chosen)
    with page.expect_request(CHAT) as sent:
        say(page, "to be")
    body = sent.value.post_data_json
    assert {name: body[name] for name in chosen} == {n: float(v) for n, v in chosen.items()}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["model"] == "tiny" and body["stream"] is True
    assert sent.value.headers["authorization"] == "Bearer sesame"
    expect(page.locator(".facts")).to_contain_text("9 tokens")
    page.reload()
    button(page, "Settings").click()
    expect(page.get_by_label("System text")).to_have_value("Be brief.")
    expect(page.get_by_label("API key")).to_have_value("sesame")
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    page.get_by_label("Temperature").fill("9")
    button(page, "Done").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()  # 9 is too hot
    button(page, "Defaults").click()
    button(page, "Done").click()
    with page.expect_request(CHAT) as sent:
        say(page, "to be")
    body = sent.value.post_data_json
    assert body["temperature"] == 0.7 and "seed" not in body
    assert body["messages"][0]["role"] == "user"


def test_regenerate_new_undo_export_copy(visit: Callable[..., Page], server: Any) -> None:
    page = visit(server.url, permissions=["clipboard-read", "clipboard-write"])
    first = ask(page, "to be", temperature=2, seed=1)
    choose(page, seed=2)
    button(page, "Regenerate answer").click()
    expect(button(page, "Regenerate answer")).to_have_count(1)
    second = turns(page)[-1]["content"]
    assert len(turns(page)) == 2 and second != first
    button(page, "Copy answer").click()
    expect(page.get_by_text("Copied.")).to_be_attached()
    assert page.evaluate("navigator.clipboard.readText()") == second
    with page.expect_download() as download:
        button(page, "Export").click()
    content = json.loads(Path(download.value.path()).read_text())
    assert [m["content"] for m in content["messages"]] == ["to be", second]
    assert content["model"] == "tiny" and content["seed"] == 2
    assert Conversation.load(Path(download.value.path())).messages == content["messages"]
    button(page, "New chat").click()
    assert turns(page) == [] and page.locator(".turn").count() == 0
    button(page, "Undo").click()
    assert len(turns(page)) == 2 and page.locator(".turn").count() == 2
    button(page, "New chat").click()
    ask(page, "to be")
    assert len(turns(page)) == 2


def test_a_new_chat_in_the_middle_of_an_answer(page: Page) -> None:
    ask(page, "to be")
    begin_long(page)
    button(page, "New chat").click()
    expect(button(page, "Send")).to_be_visible()
    assert turns(page) == [] and page.locator(".turn").count() == 0
    button(page, "Undo").click()
    assert [turn["role"] for turn in turns(page)] == ["user", "assistant"] * 2


def test_the_server_is_seen_live(page: Page) -> None:
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#cache")).to_have_text(re.compile(r"^[\d.]+ k?M?B of [\d.]+ [kMG]B$"))
    begin_long(page)
    expect(page.locator("#requests")).to_have_text("1 running")
    expect(page.locator("#speed")).not_to_have_text("0.0 tokens/s")
    page.keyboard.press("Escape")
    expect(page.locator("#requests")).to_have_text("0 running")


def test_a_model_without_a_template_says_so(page: Page, server: Any) -> None:
    notice = page.get_by_text("This model has no chat template")
    expect(notice).to_be_visible()
    stats = get(f"{server.url}stats") | {"chat_template": True}
    page.route("**/stats", lambda route: route.fulfill(json=stats))
    expect(notice).to_be_hidden()


def test_a_server_that_goes_and_comes_back(
    visit: Callable[..., Page], serve: Callable[..., Any]
) -> None:
    server = serve()
    page = visit(server.url)
    begin_long(page)
    server.stop()
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(re.compile("connection|engine|server"))
    expect(page.locator("#health")).to_have_text("not answering")
    expect(page.locator(".facts")).to_contain_text("broken off")
    kept = turns(page)[-1]["content"]
    say(page, "are you there?")
    expect(alert).to_contain_text("The server does not answer. Start it again with hymba serve")
    assert [turn["role"] for turn in turns(page)] == ["user", "assistant", "user"]
    assert turns(page)[1]["content"] == kept
    serve(server.port)
    choose(page, max_tokens=5)
    button(page, "Try again").click()
    expect(button(page, "Copy answer")).to_have_count(2)
    expect(alert).to_be_hidden()
    expect(page.locator("#health")).to_have_text("ready")


def test_a_key_is_asked_for(visit: Callable[..., Page], serve: Callable[..., Any]) -> None:
    page = visit(serve(api_key="sesame").url)
    expect(page.locator("#health")).to_have_text("wants an API key")
    say(page, "to be")
    expect(page.get_by_role("alert")).to_contain_text("The server wants an API key")
    button(page, "Open settings").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("sesame")
    page.get_by_label("Max tokens").fill("5")
    page.keyboard.press("Enter")
    button(page, "Try again").click()
    expect(button(page, "Copy answer")).to_be_visible()
    assert len(turns(page)) == 2
    expect(page.locator("#health")).to_have_text("ready")


def test_errors_are_told_with_what_to_do(page: Page) -> None:
    alert = page.get_by_role("alert")
    busy = {"status": 429, "headers": {"Retry-After": "3"}, "json": {"error": {"message": "no"}}}
    page.route(CHAT, lambda route: route.fulfill(**busy))
    say(page, "to be")
    expect(alert).to_contain_text("The server is busy with other requests. Try again in 3 seconds.")
    page.unroute(CHAT)
    broken = events("half an ", "answer", error="the engine stopped before the end")
    page.route(CHAT, lambda route: route.fulfill(**broken))
    button(page, "Try again").click()
    expect(alert).to_contain_text("The engine stopped before the end.")
    expect(answers(page)).to_have_text("half an answer")
    page.unroute(CHAT)
    choose(page, system="to be or not " * 20_000)
    button(page, "Try again").click()
    expect(alert).to_contain_text("Start a new chat, or shorten the system text.")
    expect(answers(page)).to_have_text("half an answer")  # the old one is back
    choose(page, system="", max_tokens=5)
    button(page, "Try again").click()
    expect(alert).to_be_hidden()
    expect(page.locator(".facts")).to_contain_text("5 tokens")


def test_a_models_text_is_text(page: Page) -> None:
    code = "```html\n<b>code</b>\n```\nafter"
    said = ["<img src=x onerror='alert(1)'> <script>alert(2)</script>\n", code[:9], code[9:]]
    page.route(CHAT, lambda route: route.fulfill(**events(*said)))
    say(page, "<i>hello</i>")
    expect(answers(page)).to_contain_text("<img src=x onerror='alert(1)'> <script>")
    expect(page.get_by_role("region", name="Code, html")).to_have_text("<b>code</b>")
    expect(page.locator(".turn.user .text")).to_have_text("<i>hello</i>")
    assert page.locator("#log :is(img, script, b, i)").count() == 0
    expect(answers(page).locator(".said").last).to_have_text("after")


def test_events_may_be_cut_anywhere(page: Page) -> None:
    """Networks cut where they like: in a line, between \\r and \\n, inside a character."""
    said = page.evaluate(
        """async () => {
          const { answer } = await import("/page/wire.js");
          const said = (text) => JSON.stringify({ choices: [{ delta: { content: text } }] });
          const lines = [": note", `data: ${said("é😀")}`, `data:${said("!")}`, "", "data: [DONE]"];
          const bytes = new TextEncoder().encode(lines.join("\\r\\n"));
          window.fetch = async () => new Response(new ReadableStream({
            start(c) { for (const b of bytes) c.enqueue(Uint8Array.of(b)); c.close(); } }));
          let all = "";
          for await (const piece of answer({}, "", undefined)) all += piece.text;
          return all;
        }"""
    )
    assert said == "é😀!"


SMALL = """controls => controls.filter(e => e.checkVisibility() && !e.matches('.skip'))
  .map(e => [e.ariaLabel || e.id || e.textContent, e.getBoundingClientRect()])
  .filter(([name, r]) => r.width < 44 || r.height < 44).map(([name]) => name)"""


def test_a_phone(visit: Callable[..., Page], server: Any) -> None:
    phone = {"viewport": {"width": 320, "height": 568}, "has_touch": True, "is_mobile": True}
    page = visit(server.url, **phone)
    wide = ["w" * 200, "\n```python\n", "x = 1 " * 60, "\n```\n"]
    page.route(CHAT, lambda route: route.fulfill(**events(*wide)))
    box(page).fill("u" * 200)
    button(page, "Send").tap()
    expect(button(page, "Copy code")).to_be_visible()
    expect(page.locator("#health")).to_have_text("ready")

    def check() -> None:
        width = "document.scrollingElement.scrollWidth"
        assert page.evaluate(width) == 320
        assert page.evaluate("document.getElementById('log').scrollWidth") <= 320
        assert page.locator(CONTROLS).evaluate_all(SMALL) == []

    check()
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    button(page, "Regenerate answer").tap()
    expect(page.get_by_role("alert")).to_be_visible()
    check()
    button(page, "Settings").tap()
    check()
    dialog = page.get_by_role("dialog", name="Settings")
    assert dialog.evaluate("d => d.scrollWidth <= d.clientWidth && d.clientWidth <= 320")


NAMED = {
    "button",
    "link",
    "textbox",
    "spinbutton",
    "meter",
    "dialog",
    "log",
    "navigation",
    "region",
}


def nameless(page: Page) -> list[str]:
    """Roles of the accessibility tree's nodes that should have a name and have none."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NAMED]
    assert len(seen) > 5
    return [node["role"]["value"] for node in seen if not node.get("name", {}).get("value")]


def test_every_control_has_a_name(page: Page) -> None:
    page.route(CHAT, lambda route: route.fulfill(**events("a\n```\nb\n```\n", error="no")))
    say(page, "to be")
    expect(page.get_by_role("alert")).to_be_visible()
    assert nameless(page) == []
    button(page, "New chat").click()
    assert nameless(page) == []
    button(page, "Settings").click()
    expect(page.get_by_role("spinbutton")).to_have_count(4)
    assert nameless(page) == []
    for label in ("System text", "Temperature", "Top-p", "Max tokens", "Seed", "API key"):
        expect(page.get_by_label(label)).to_be_visible()


FOCUSED = """() => { const e = document.activeElement;
  return [e.ariaLabel || e.labels?.[0]?.textContent || e.textContent,
          getComputedStyle(e).outlineStyle]; }"""


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    expect(box(page)).to_be_focused()
    choose(page, max_tokens=5)
    box(page).focus()
    page.keyboard.type("to be")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("or not")
    page.keyboard.press("Enter")
    expect(button(page, "Copy answer")).to_be_visible()
    assert turns(page)[0]["content"] == "to be\nor not"
    page.reload()
    page.locator("#model").click()  # the next Tab begins at the top
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Shift+Tab")
    stops = {}
    for _ in range(12):
        name, outline = page.evaluate(FOCUSED)
        stops[name] = outline
        page.keyboard.press("Tab")
    wanted = "New chat|Export|Settings|Conversation|Copy answer|Regenerate answer|Message|Send"
    assert {"Skip to the message box", *wanted.split("|")} <= stops.keys()
    assert all(stops[name] != "none" for name in wanted.split("|"))
    page.get_by_role("link", name="Skip to the message box").press("Enter")
    expect(box(page)).to_be_focused()
    button(page, "Settings").press("Enter")
    expect(page.get_by_label("System text")).to_be_focused()
    page.keyboard.press("Escape")
    expect(button(page, "Settings")).to_be_focused()
    button(page, "Regenerate answer").press("Enter")
    expect(box(page)).to_be_focused()


def test_light_dark_and_calm(visit: Callable[..., Page], server: Any) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page = visit(server.url, color_scheme=scheme, reduced_motion="reduce")
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        begin_long(page)
        caret = "getComputedStyle(document.querySelector('.growing .said'), '::after')"
        assert page.evaluate(f"{caret}.animationName") == "none"
        page.keyboard.press("Escape")
    assert len(grounds) == 2
