"""The operator page in headless Chromium: before the demo's server, and before a made-up engine."""

from __future__ import annotations

import threading
import time

import pytest
from fastapi.responses import JSONResponse
from msgspec import structs, to_builtins
from selenium.webdriver.common.by import By

from lora_serve.common.errors import InternalError
from lora_serve.demo.paths import demo_paths
from lora_serve.demo.prompts import PROJECTS, chat_messages
from lora_serve.demo.run import serve_arguments
from lora_serve.server.error_handlers import error_body
from server.fake_engine_client import adapter_info
from server.http_calls import make_app, make_client
from support.app_server import AppServer
from support.browser import headless_browser
from support.server_process import ServerProcess

HOSTILE_NAME = "<img/src=x/onerror=document.title='broken'>"
# GiB, and room for all of the demo's adapters but one: so they stand on two tiers.
LORA_MEMORY_GB = "0.0012"
WAIT_S = 60.0


class Page:
    """What an operator sees and does."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, url):
        self.browser.get(url + "/")

    def script(self, text, *arguments):
        return self.browser.execute_script(text, *arguments)

    def wait(self, condition):
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen in time; the page shows\n{self.text()}"
            time.sleep(0.05)

    def text(self):
        return self.script("return document.body.innerText")

    def shows(self, id):
        return self.browser.find_element(By.ID, id).is_displayed()

    def text_of(self, id):
        return self.browser.find_element(By.ID, id).text

    def click(self, id):
        self.browser.find_element(By.ID, id).click()

    def type(self, id, text):
        field = self.browser.find_element(By.ID, id)
        field.clear()
        field.send_keys(text)

    def rows(self, body="rows-body"):
        """The rows in their order: for each, what stands below each head."""
        return self.script(
            """
            const heads = [...document.querySelectorAll("#heads th")].map((head) => head.textContent);
            return [...document.querySelectorAll("#" + arguments[0] + " tr:not([hidden])")].map((row) =>
              Object.fromEntries([...row.cells].map((cell, i) => [heads[i], cell.textContent])));
            """,
            body,
        )

    def names(self):
        return [row["Adapter"] for row in self.rows()]

    def row(self, name):
        [row] = [row for row in self.rows() if row["Adapter"] == name]
        return row

    def sort_by(self, head):
        self.browser.find_element(By.XPATH, f"//*[@id='heads']//button[text()='{head}']").click()

    def tiers(self):
        """Tier to the number and bytes that its button shows."""
        buttons = self.browser.find_elements(By.CSS_SELECTOR, "[data-tier]")
        return {button.get_attribute("data-tier"): button.text.split("\n")[1:] for button in buttons}

    def ask_to_unload(self, name):
        buttons = self.browser.find_elements(By.CSS_SELECTOR, "#rows-body button")
        next(button for button in buttons if button.get_attribute("aria-label") == f"Unload {name}").click()
        assert self.text_of("unload-name") == name

    def load(self, name, path):
        self.click("load")
        self.type("load-name", name)
        self.type("load-path", str(path))
        self.click("load-submit")


@pytest.fixture(scope="module")
def browser():
    with headless_browser() as browser:
        yield browser


@pytest.fixture
def page(browser):
    browser.get_log("browser")
    yield Page(browser)
    # Answers such as 401 are logged under "network".
    complaints = [entry for entry in browser.get_log("browser") if entry["source"] != "network"]
    browser.get("about:blank")
    assert complaints == []


# --- Before the demo's server -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo():
    with ServerProcess(*serve_arguments(demo_paths()), "--lora-memory-gb", LORA_MEMORY_GB) as server:
        yield server


@pytest.fixture
def http(demo):
    with demo.http() as http:
        yield http


def test_demo_adapters_stand_on_their_tiers(demo, http, page):
    page.open(demo.url)
    page.wait(lambda: page.names() == sorted(PROJECTS))
    adapters = http.get("/v1/loras").json()["data"]
    assert {row["Adapter"]: row["Tier"] for row in page.rows()} == {a["name"]: a["tier"] for a in adapters}
    numbers = {tier: int(number) for tier, (number, _) in page.tiers().items()}
    assert numbers["host"] >= 1
    assert numbers == {
        tier: sum(adapter["tier"] == tier for adapter in adapters) for tier in ("device", "host", "disk")
    }
    assert page.row("argon")["Bytes"] == "96.0 KiB"
    assert page.row("argon")["Rank"] == "8"
    assert page.text_of("base-name") == "demo"
    page.browser.find_element(By.CSS_SELECTOR, "[data-tier=host]").click()
    assert page.names() == [adapter["name"] for adapter in adapters if adapter["tier"] == "host"]


def test_requests_show_in_rates_leases_and_pages(demo, http, page):
    page.open(demo.url)
    page.wait(lambda: page.names() == sorted(PROJECTS))
    left = threading.Event()

    def ask(model):
        with demo.http() as own:
            while not left.is_set():
                body = {
                    "model": model,
                    "messages": chat_messages("argon"),
                    "max_tokens": 200,
                    "ignore_eos": True,
                }
                assert own.post("/v1/chat/completions", json=body).status_code == 200

    asking = [threading.Thread(target=ask, args=(model,)) for model in ("argon", "demo")]
    for thread in asking:
        thread.start()
    try:
        page.wait(lambda: page.row("argon")["Running"] == "1" and page.row("argon")["Private"] != "0")
        page.wait(lambda: page.rows("base")[0]["Running"] == "1")
        page.wait(lambda: float(page.row("argon")["Tok/s"].replace("–", "0")) > 0)
        page.wait(lambda: page.row("argon")["Req/s"] not in ("0", "–"))
        page.wait(lambda: page.text_of("step").endswith((" ms", " µs")))
        assert page.text_of("decode") not in ("0", "–")
        assert page.row("bastion")["Tok/s"] == "0"
    finally:
        left.set()
        for thread in asking:
            thread.join()
    page.wait(lambda: page.text_of("running") == "0" and page.row("argon")["Running"] == "0")
    [argon] = [a for a in http.get("/v1/loras").json()["data"] if a["name"] == "argon"]
    assert page.row("argon")["Tree"] == str(argon["num_tree_pages"]) != "0"
    total = http.get("/v1/loras").json()["stats"]["num_tree_pages"]
    assert page.rows("base")[0]["Tree"] == str(total - argon["num_tree_pages"])


def test_buttons_unload_and_load(demo, http, page):
    page.open(demo.url)
    page.wait(lambda: page.names() == sorted(PROJECTS))
    page.ask_to_unload("bastion")
    page.click("unload-cancel")
    page.ask_to_unload("argon")
    page.click("unload-submit")
    page.wait(lambda: page.names() == ["bastion", "citadel", "dagger"])
    assert sorted(http.get("/v1/loras").json()["loras"]) == ["bastion", "citadel", "dagger"]
    page.load("argon", "/nowhere")
    page.wait(lambda: "/nowhere" in page.text_of("load-problem"))
    page.type("load-path", str(demo_paths().adapters["argon"]))
    page.click("load-submit")
    page.wait(lambda: page.names() == sorted(PROJECTS))
    page.wait(lambda: not page.shows("load-dialog"))


def test_a_name_that_is_html_is_text(demo, http, page):
    page.open(demo.url)
    page.wait(lambda: page.names() == sorted(PROJECTS))
    page.load(HOSTILE_NAME, demo_paths().adapters["dagger"])
    page.wait(lambda: HOSTILE_NAME in page.names())
    page.ask_to_unload(HOSTILE_NAME)
    page.click("unload-submit")
    page.wait(lambda: f"“{HOSTILE_NAME}” is unloaded" in page.text_of("notices"))
    page.wait(lambda: page.names() == sorted(PROJECTS))
    assert page.script("return document.images.length") == 0
    assert page.script("return document.title") == "demo · lora_serve"


# --- Before a made-up engine --------------------------------------------------------------------------------
def test_a_key_opens_the_page_and_nothing_shows_without_it(page):
    with AppServer(make_app(api_keys=("right",))) as server:
        page.open(server.url)
        page.wait(lambda: page.shows("key-panel"))
        assert not page.shows("live")
        assert page.text_of("key-problem") == ""
        page.type("key", "wrong\n")
        page.wait(
            lambda: page.text_of("key-problem").startswith("The server refuses this key (401): the API key")
        )
        assert (page.names(), page.shows("live")) == ([], False)
        page.type("key", "right\n")
        page.wait(lambda: page.names() == ["law", "sql"])
        assert not page.shows("key-panel")
        kept = "return [Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
        assert page.script(kept) == [["right"], [], ""]
        page.browser.refresh()
        page.wait(lambda: page.names() == ["law", "sql"])
        page.click("forget-key")
        page.wait(lambda: page.shows("key-panel"))
        assert page.script(kept) == [[], [], ""]
        assert "sql" not in page.script("return document.documentElement.outerHTML.split('<script>')[0]")


class RestrictedKey:
    """Answers as a server does to a key that is restricted to one adapter."""

    def __init__(self, app, adapters):
        self.app, self.adapters = app, adapters

    async def __call__(self, scope, receive, send):
        answer = self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            answer = JSONResponse(error_body("this key may not do that", "permission_error"), status_code=403)
        elif scope["type"] == "http" and scope["path"] == "/v1/loras":
            answer = JSONResponse({"data": [to_builtins(adapter) for adapter in self.adapters]})
        await answer(scope, receive, send)


def test_a_restricted_key_sees_its_adapters_and_why_it_may_not_unload(page):
    with AppServer(RestrictedKey(make_app(), [adapter_info("mine", 3)])) as server:
        page.open(server.url)
        page.wait(lambda: page.names() == ["mine"])
        assert page.rows("base") == []
        assert page.tiers()["device"] == ["1", "1,000 B"]
        cards = page.browser.find_elements(By.CSS_SELECTOR, "[data-needs-stats]")
        assert [card.is_displayed() for card in cards] == [False] * 4
        page.ask_to_unload("mine")
        page.click("unload-submit")
        page.wait(lambda: page.text_of("refusal") == "Not allowed (403): this key may not do that")
        buttons = page.browser.find_elements(By.CSS_SELECTOR, "#load, #rows-body button")
        assert [button.is_enabled() for button in buttons] == [False, False]


def test_a_thousand_adapters_are_sorted_filtered_and_updated_in_place(page):
    names = [f"tenant-{number}" for number in range(1000)]
    client = make_client()
    client.adapters = {
        name: structs.replace(adapter_info(name, number + 1), num_bytes=1000 + (number * 7919) % 1000)
        for number, name in enumerate(names)
    }
    with AppServer(make_app(client)) as server:
        page.open(server.url)
        page.wait(lambda: len(page.names()) == 1000)
        assert page.names() == names
        page.sort_by("Bytes")
        by_bytes = sorted(names, key=lambda name: -client.adapters[name].num_bytes)
        assert page.names() == by_bytes
        page.type("filter", "T-99")
        assert page.names() == [name for name in by_bytes if "t-99" in name]
        assert page.text_of("count") == "11 of 1,000 adapters"
        page.wait(lambda: page.row("tenant-99")["Tok/s"] == "0")  # known from the second poll on
        page.script(
            """
            window.changed = [];
            const note = (all) => window.changed.push(...all.map((change) => change.target.textContent));
            new MutationObserver(note)
              .observe(document.getElementById("rows-body"), { subtree: true, childList: true });
            window.rowsBefore = [...document.querySelectorAll("#rows-body tr")];
            """
        )
        client.adapters["tenant-5"] = structs.replace(client.adapters["tenant-5"], num_running_requests=42)
        page.wait(lambda: page.script("return window.changed.length"))
        assert page.script("return window.changed") == ["42"]
        rows_after = "[...document.querySelectorAll('#rows-body tr')]"
        assert page.script(f"return {rows_after}.every((row, i) => row === window.rowsBefore[i])")


def test_a_lost_server_is_shown_and_found_again_with_new_counters(page):
    client = make_client()
    client.adapters["sql"] = structs.replace(client.adapters["sql"], total_started_requests=1000)
    with AppServer(make_app(client)) as server:
        page.open(server.url)
        page.wait(lambda: page.text_of("connection") == "live")
        server.stop()
        page.wait(lambda: page.text_of("connection") == "lost")
        assert "it cannot be reached. The numbers below are those of" in page.text_of("lost-banner")
        assert page.names() == ["law", "sql"]
        client.adapters["sql"] = structs.replace(client.adapters["sql"], total_started_requests=0)
        page.script(
            """
            const wait = window.setTimeout;  // Once it is live again, it polls no more: what it shows stays.
            window.setTimeout = (call, ms) =>
              document.getElementById("connection").textContent === "live" ? 0 : wait(call, ms);
            """
        )
        server.start()
        page.wait(lambda: page.text_of("connection") == "live" and not page.shows("lost-banner"))
        assert page.row("sql")["Req/s"] == "–"


def test_a_failed_engine_is_shown_with_its_reason(page):
    client = make_client()

    async def fail():
        raise InternalError("the engine process ended by SIGKILL")

    client.list_lora_adapters = fail
    with AppServer(make_app(client)) as server:
        page.open(server.url)
        page.wait(lambda: page.text_of("lost-banner").endswith("the engine process ended by SIGKILL."))


def test_a_hidden_tab_polls_less_often_and_a_shown_one_at_once(page):
    with AppServer(make_app()) as server:
        page.open(server.url)
        page.wait(lambda: page.text_of("connection") == "live")
        page.script(
            """
            window.delays = [];
            const wait = window.setTimeout;
            window.setTimeout = (call, ms) => { window.delays.push(ms); return wait(call, ms); };
            Object.defineProperty(document, "hidden", { get: () => window.isHidden, configurable: true });
            window.isHidden = true;
            """
        )
        page.wait(lambda: 15000 in page.script("return window.delays"))
        show = """
            window.isHidden = false;
            window.delays = [];
            document.dispatchEvent(new Event("visibilitychange"));
            return window.delays;
            """
        assert page.script(show) == [10000]  # the limit of a poll that has just begun
        page.wait(lambda: page.script("return window.delays").count(1500) >= 2)
