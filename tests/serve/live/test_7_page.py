"""The live page as a person has it: in a browser, over a running application."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from live.browser import Page, browser_page
from live.calls import Load, completion
from live.service import Service, wait_for

CLIENTS = 6
QUESTION = "Where does the river go?"
MIN_CONTRAST = 4.5
"""WCAG 2.2, level AA."""

CONTRASTS = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const isClear = (color) => channels(color)[3] === 0;
  const backOf = (one) => {
    const color = getComputedStyle(one).backgroundColor;
    return isClear(color) && one.parentElement ? backOf(one.parentElement) : color;
  };
  const texts = [...document.querySelectorAll("main *")].filter((one) => one.checkVisibility() && !one.disabled
    && [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  return texts.map((one) => {
    const [low, high] = [getComputedStyle(one).color, backOf(one)].map(luminance).sort((a, b) => a - b);
    return [one.tagName + "." + one.className + " " + one.textContent.slice(0, 30), (high + 0.05) / (low + 0.05)];
  });
})()"""
"""(Which element, contrast of its text to what is behind it) of every visible text."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browser_page() as page:
        yield page


@pytest.fixture
def page(browser: Page, service: Service) -> Iterator[Page]:
    """The live page, with its first figures; its script must have raised nothing by the test's end."""
    browser.problems.clear()
    browser.open(f"{service.url}/chameleon/")
    wait_for(lambda: "replicas answer" in browser.text("#status"), "the page's first figures")
    yield browser
    assert not browser.problems
    assert all(url.startswith((service.url, "data:", "about:")) for url in browser.requests), browser.requests


def queues(service: Service) -> dict[str, dict[str, Any]]:
    """``/v1/chameleon/queues``, by replica, once all replicas answer in time."""

    def all_answer() -> dict[str, dict[str, Any]]:
        listed = service.http.get("/v1/chameleon/queues").json()["replicas"]
        return {} if any("error" in one for one in listed) else {one["replica"]: one for one in listed}

    return wait_for(all_answer, "all replicas answer")


def percent(share: float) -> str:
    """As the page has it: JavaScript rounds halves up."""
    return f"{math.floor(100 * share + 0.5)} %"


def shown_tiers(page: Page) -> dict[str, dict[str, str]]:
    """Replica -> adapter -> tier, as the page's table has them."""
    (_, *replicas), *rows = page.table("#adapters")
    return {
        replica: {row[0]: row[column] for row in rows if row[column] != "–"}
        for column, replica in enumerate(replicas, 1)
    }


def test_the_page_shows_what_the_api_says_and_follows_it(page: Page, service: Service) -> None:
    names = service.adapter_names()
    status = f"2 of 2 replicas answer, {len(names)} adapters, Redis connected"
    wait_for(lambda: page.text("#status") == status, "the status line")

    def agrees() -> bool:
        return shown_tiers(page) == {one["replica"]: one["adapters"] for one in service.placement()}

    wait_for(agrees, "the tiers of placement")
    bodies = [completion(name, prompt=f"{name}: Once", max_tokens=60) | {"stream": True} for name in names]
    with Load(service, bodies, CLIENTS) as load:
        wait_for(load.more(2 * len(names)), "every adapter has been used", 120.0)
        wait_for(lambda: "gpu" in {tier for one in shown_tiers(page).values() for tier in one.values()}, "a gpu tier")
        wait_for(lambda: float(page.text("#rate")) > 0 and "median" in page.text("#ttft"), "rate and latency")
        wait_for(lambda: page.text("#replicas").count("requests 0 %") < 2, "requests in KV memory")
    wait_for(lambda: service.num_running() == 0, "nothing runs")
    wait_for(agrees, "the tiers of placement")

    def cards_agree() -> bool:
        cards = page.run("[...document.querySelectorAll('#replicas article')].map((one) => one.innerText)")
        by_replica = queues(service)
        assert len(cards) == len(by_replica)
        return all(
            f"Replica {replica}" in card
            and f"KV memory: requests {percent(one['kv_shares']['requests'])}," in card
            and f"adapters {percent(one['kv_shares']['adapters'])}," in card
            and f"{one['running']} running, {one['waiting']} waiting" in card
            for card, (replica, one) in zip(sorted(cards), sorted(by_replica.items()), strict=True)
        )

    wait_for(cards_agree, "the shares and queues of the API")
    for one in queues(service).values():
        assert sum(one["kv_shares"].values()) == pytest.approx(1)
        assert one["kv_shares"]["adapters"] == one["cache"]["blocks_held"] / one["cache"]["num_blocks"]
    assert page.run("document.querySelectorAll('#replicas svg path').length") == 2 * service.num_replicas


def test_what_left_is_listed_with_its_reason_latest_first(page: Page) -> None:
    report = {
        "replica": "r1",
        "cache": {"evictions": {"kv_pressure": 2, "load": 0}},
        "latest_evictions": [
            {"adapter": "a", "reason": "kv_pressure", "age_s": 90.0},
            {"adapter": "<b>", "reason": "of another version", "age_s": 3.2},
        ],
    }
    page.run(f"showLog([{json.dumps(report)}])")
    assert page.run("[...document.querySelectorAll('#log li')].map((one) => one.textContent)") == [
        "3 s ago: <b> left the GPU memory of replica r1: of another version",
        "90 s ago: a left the GPU memory of replica r1: requests needed its memory",
    ]
    assert (
        page.text("#totals") == "Adapters that left GPU memory since the start: 2 because requests needed its memory."
    )


def chat(service: Service, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "temperature": 0}
    return str(service.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])


def test_two_adapters_answer_side_by_side_by_keyboard_alone(page: Page, service: Service) -> None:
    first, second = service.adapter_names()[:2]
    page.run("document.getElementById('question').value = ''")
    page.press("Tab")
    assert page.focused() == "question"
    page.call("Input.insertText", text=QUESTION)
    page.press("Tab")
    assert page.focused() == "left"
    page.run(
        f"[document.getElementById('left').value, document.getElementById('right').value] = ['{first}', '{second}']"
    )
    seen = [page.focused()]
    while seen[-1] != "Ask both":
        page.press("Tab")
        seen.append(page.focused())
    assert seen == ["left", "right", "API key", "Ask both"]
    page.press("Enter")
    wait_for(lambda: all("tokens in" in page.text(f"#{side}-time") for side in ("left", "right")), "both answers")
    answers = [page.run(f"document.getElementById('{side}-answer').textContent") for side in ("left", "right")]
    assert answers == [chat(service, first), chat(service, second)]
    assert answers[0] != answers[1]


def test_a_refusal_is_shown_where_the_answer_would_be(page: Page) -> None:
    page.run("document.getElementById('question').value = 'x'.repeat(20000)")
    page.run("document.getElementById('ask').requestSubmit()")
    wait_for(lambda: "maximum context length" in page.text("#left-answer"), "the service's own message")
    assert page.run("document.getElementById('left-answer').className") == "answer error"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(page: Page, scheme: str) -> None:
    page.prefer(prefers_color_scheme=scheme)
    contrasts = page.run(CONTRASTS)
    assert len(contrasts) > 40
    assert not [(what, ratio) for what, ratio in contrasts if ratio < MIN_CONTRAST]


def test_every_control_has_a_name_and_nothing_moves_for_who_does_not_want_it(page: Page) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "combobox", "button", "image", "table", "region", "DisclosureTriangle", "list", "status"}
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(controls) > 12
    unnamed = [node["role"]["value"] for node in controls if not node.get("name", {}).get("value")]
    assert set(unnamed) <= {"status"}, "a status is named by what it says"

    probe = "Object.assign(document.querySelector('#adapters td'), {className: 'changed'})"
    for wish, animation in (("no-preference", "arrive"), ("reduce", "none")):
        page.prefer(prefers_reduced_motion=wish)
        assert page.run(f"getComputedStyle({probe}).animationName") == animation


def test_the_page_is_for_this_machine_only(service: Service) -> None:
    answer = service.http.get("/chameleon/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for headers in ({"Host": "elsewhere.example"}, {"X-Forwarded-For": "10.1.2.3"}):
        refused = service.http.get("/chameleon/", headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert httpx.get(f"{service.url}/chameleon", follow_redirects=True).text == answer.text
