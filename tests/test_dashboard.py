"""The page: what may run on it, what it shows, in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from upstream import HELLO, KEY, Reply, failing_first, good, provider, until

import router

PAGE = router.DASHBOARD
SCRIPT = PAGE.partition("<script>")[2].partition("</script>")[0]
GUEST = "sk-router-key-of-a-guest"
EVIL = "<img src=x onerror=alert(1)>"
LIMITED = Reply(429, {"error": {"message": f"slow down {EVIL}"}}, {"Retry-After": "30"})


# --- as text ------------------------------------------------------------------


class Tags(HTMLParser):
    VOID = frozenset({"meta", "br", "input", "link", "img"})

    def __init__(self):
        super().__init__()
        self.ids, self.open, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_its_script_finds_its_parts():
    tags = Tags()
    tags.feed(PAGE)
    assert tags.open == [] and len(set(tags.ids)) == len(tags.ids)
    made = set(re.findall(r'\bid: "([\w-]+)"', SCRIPT))
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= {*tags.ids, *made}


def test_the_page_asks_nobody_but_the_router_and_reads_nothing_as_html():
    assert not re.search(r"https?://", PAGE)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage", PAGE
    )
    tags = Tags()
    tags.feed(PAGE)
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name == "style"]


def test_only_its_own_script_and_style_may_run(make_app):
    answer = make_app().test_client().get("/dashboard")
    assert answer.status_code == 200 and answer.mimetype == "text/html"
    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; ")
    )
    for tag in ("script", "style"):
        text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert KEY not in answer.text


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", 302),
        ("text/html", 302),
        ("*/*", 200),
        ("application/json", 200),
        (None, 200),
    ],
)
def test_a_browser_at_the_root_gets_the_page_others_json(make_app, accept, status):
    headers = {"Accept": accept} if accept else {}
    answer = make_app().test_client().get("/", headers=headers)
    assert answer.status_code == status
    if status == 302:
        assert answer.location == "/dashboard"
    else:
        assert answer.get_json()["status"] == "ok"
    assert make_app().test_client().get("/metrics/dashboard").location == "/dashboard"


# --- in a browser -------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not program:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Site:
    """One tab before one router; whatever goes wrong in it is remembered."""

    def __init__(self, browser, live, **options):
        self.live, self.wrong = live, []
        self.tab = browser.new_context(**options).new_page()
        self.tab.set_default_timeout(10_000)
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.answer(dialog))
        self.tab.on(
            "console", lambda line: "Security" in line.text and self.wrong.append(line.text)
        )
        self.tab.goto(live.url + "/")

    def answer(self, dialog):
        if dialog.type == "alert":
            self.wrong.append("alert")
        dialog.accept()

    def login(self, key=KEY):
        self.tab.fill("#key", key)
        self.tab.click("#login-go")
        return self

    def open(self, page):
        self.tab.click(f"#to-{page}")
        return self

    def sees(self, text):
        self.tab.get_by_text(text).first.wait_for()
        return self


@pytest.fixture
def site(browser, upstream, serve):
    """site(script, SETTING=...): a tab before a router with two providers of one script."""
    made = []

    def open(script=None, options=None, **settings):
        groq, cerebras = upstream(script or good()), upstream(script or good())
        rows = {**provider("groq", groq, "m1"), **provider("cerebras", cerebras, "m1")}
        keys = {"PROXY_API_KEYS": f"{KEY},{GUEST}"}
        made.append(Site(browser, serve(**{**rows, **keys, **settings}), **(options or {})))
        return made[-1]

    yield open
    for one in made:
        one.tab.context.close()
        assert one.wrong == []


def test_a_wrong_key_is_told_and_a_right_one_lets_in(site):
    page = site()
    page.login("wrong").sees("This key is not accepted.")
    page.login().sees("mode")
    assert page.tab.locator("#state").inner_text() == "live"
    assert page.tab.evaluate("Object.keys(localStorage).length") == 0
    page.tab.reload()
    page.sees("mode")  # the tab remembers the key
    page.tab.click("#leave")
    page.sees("Paste one of this router's keys")
    page.tab.reload()
    page.sees("Paste one of this router's keys")


@pytest.mark.parametrize("key", ["ключ", " ", "a b", "\u2028"])
def test_a_key_that_is_none_is_told_without_being_sent(site, key):
    page = site()
    page.tab.fill("#key", key)
    page.tab.click("#login-go")
    page.tab.locator("#key").wait_for()
    assert page.tab.locator("#leave").is_hidden()


def test_the_log_follows_what_happens_and_says_why(site):
    page = site(failing_first(LIMITED)).login().open("log").sees("nothing yet")
    page.live.chat(model="hermes-router")
    page.tab.locator("td .good").first.wait_for()
    page.tab.locator("button[id^=why-]").first.click()
    page.sees("rate_limited").sees("Candidates in order")
    page.tab.keyboard.press("Escape")
    assert page.tab.locator("dialog").is_hidden()


def test_names_and_errors_are_text_whoever_wrote_them(site):
    page = site(failing_first(LIMITED))
    url = f"{page.live.url}/v1/chat/completions"
    page.live.session.post(url, json={"messages": HELLO, "model": EVIL})
    page.live.session.post(url, json={"messages": EVIL, "model": EVIL})
    page.login().open("log").sees(EVIL)
    for at in range(page.tab.locator("button[id^=why-]").count()):
        page.tab.locator("button[id^=why-]").nth(at).click()
        page.sees("Attempts")
        page.tab.click("#close")
    assert page.tab.locator("main img").count() == 0


def test_a_guest_may_look_at_its_own_only(site):
    page = site()
    page.live.chat()
    page.login(GUEST).open("log").sees("nothing yet")
    page.open("settings").sees("This key may look but not change anything")
    assert page.tab.locator("form").count() == 1  # that of the dialog


def test_every_page_opens_by_keyboard_on_a_phone_in_the_dark(site):
    page = site(options={"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"})
    page.live.chat()
    page.login().sees("mode")
    assert page.tab.evaluate("document.documentElement.dataset.theme") == "dark"
    for name in ("providers", "models", "callers", "log", "cache", "settings", "overview"):
        page.tab.focus(f"#to-{name}")
        page.tab.keyboard.press("Enter")
        page.tab.locator(f"#to-{name}[aria-current=page]").wait_for()
        wide = page.tab.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert not wide, f"{name} is wider than the screen"
    page.tab.click("#theme")
    assert page.tab.evaluate("document.documentElement.dataset.theme") == "light"


@pytest.mark.parametrize(
    ("bookmark", "page"),
    [("keys", "providers"), ("access", "callers"), ("addons", "settings"), ("logs", "log"),
     ("constructor", "overview")],
)  # fmt: skip
def test_pages_under_older_names_open(site, bookmark, page):
    opened = site().login().sees("mode")
    opened.tab.goto(f"{opened.live.url}/dashboard#{bookmark}")
    opened.tab.locator(f"#to-{page}[aria-current=page]").wait_for()


def test_every_control_has_a_name_and_every_table_a_caption(site):
    page = site()
    page.live.chat()
    page.login().sees("mode")
    for name in ("overview", "providers", "models", "callers", "log", "cache", "settings"):
        page.open(name)
        nameless = page.tab.evaluate(
            "[...document.querySelectorAll('button, a, input, select')].filter(x =>"
            " !(x.textContent.trim() || x.labels?.length || x.ariaLabel)).length"
        )
        assert nameless == 0
        assert page.tab.locator("table:not(:has(caption))").count() == 0
        assert page.tab.locator("h2").count() > 0


def test_a_router_that_stops_is_told_and_its_return_noticed(site):
    page = site().login().sees("mode")
    page.tab.route("**/v1/**", lambda route: route.abort())
    page.sees("no answer from the router")
    page.tab.unroute("**/v1/**")
    page.tab.locator("#state.good").wait_for()


# --- changing things ----------------------------------------------------------


@pytest.fixture
def desk(site, tmp_path):
    """The page of an admin whose settings stand in files that can be changed."""
    rows = {GUEST: {"name": "guest"}}
    (tmp_path / "auth.json").write_text(json.dumps({"proxy_keys": rows}))
    return site(PROXY_API_KEYS=KEY).login().sees("mode")


def stored(tmp_path):
    return json.loads((tmp_path / "auth.json").read_text())


def test_a_key_of_a_provider_is_added_and_used(desk, tmp_path):
    desk.open("providers")
    desk.tab.select_option("#add-key select", "mistral")
    desk.tab.fill("#add-key input", "mistral-key-a1b2c3d4e5")
    desk.tab.click("#add-key-go")
    desk.sees("mistral has 1 key now").sees("d4e5")
    assert stored(tmp_path)["providers"]["mistral"] == ["mistral-key-a1b2c3d4e5"]
    assert "mistral" in desk.live.session.get(f"{desk.live.url}/health").json()["providers"]
    assert "mistral-key" not in desk.tab.content()


def test_a_provider_that_rests_is_asked_again(desk):
    page = desk
    router_ = page.live.app.extensions["router"]
    router_.keys.rest("groq", router.ANY, router.ANY, 3600.0, "day_quota")
    page.open("providers")
    page.tab.click("#wake-groq")
    page.sees("groq is asked again.")
    page.tab.locator("#wake-groq").wait_for(state="detached")
    assert router_.keys.rests() == {}


def test_a_limit_holds_at_once(desk, tmp_path):
    desk.open("callers")
    desk.tab.fill("#limit-1 input[name=rpm]", "1")
    desk.tab.click("#limit-1-go")
    desk.sees("are set (empty = the usual, 0 = none)")
    headers = {"Authorization": f"Bearer {GUEST}"}
    url = f"{desk.live.url}/v1/chat/completions"
    codes = [
        desk.live.session.post(url, json={"messages": HELLO}, headers=headers).status_code
        for _ in range(2)
    ]
    assert codes == [200, 429]
    assert stored(tmp_path)["proxy_keys"][GUEST] == {"name": "guest", "rpm": 1}
    desk.tab.fill("#limit-1 input[name=rpm]", "0")
    desk.tab.fill("#limit-1 input[name=streams]", "2")
    desk.tab.click("#limit-1-go")
    until(lambda: stored(tmp_path)["proxy_keys"][GUEST].get("streams") == 2)
    assert stored(tmp_path)["proxy_keys"][GUEST] == {"name": "guest", "rpm": 0, "streams": 2}
    assert desk.tab.input_value("#limit-1 input[name=rpm]") == "0"


def test_a_callers_key_is_made_shown_once_and_revoked(desk, tmp_path):
    desk.open("callers")
    desk.tab.fill("#new-caller input[name=name]", EVIL)
    desk.tab.click("#new-caller-go")
    key = desk.tab.locator("#new-key").inner_text()
    desk.tab.click("#close")
    url, headers = f"{desk.live.url}/v1/models", {"Authorization": f"Bearer {key}"}
    assert desk.live.session.get(url, headers=headers).status_code == 200
    desk.sees(EVIL)
    assert key in stored(tmp_path)["proxy_keys"]
    desk.tab.click("#revoke-2")
    desk.sees("Revoked")
    assert desk.live.session.get(url, headers=headers).status_code == 401
    assert key not in stored(tmp_path)["proxy_keys"]


def test_a_feature_and_a_setting_are_changed_and_wrong_values_told(desk, tmp_path):
    desk.open("settings")
    desk.tab.click("#feature-fast_routing")
    desk.sees("is on.")
    env = tmp_path / ".env"
    assert "FAST_ROUTE_THRESHOLD=200" in env.read_text()
    desk.tab.select_option("#setting select", "MAX_STREAMS")
    desk.tab.fill("#setting input", "many")
    desk.tab.click("#setting-go")
    desk.sees("MAX_STREAMS")
    desk.tab.locator("#note.bad").wait_for()
    desk.tab.fill("#setting input", "50")
    desk.tab.click("#setting-go")
    desk.tab.locator("#note.good").wait_for()
    assert "MAX_STREAMS=50" in env.read_text()
    assert desk.live.app.extensions["router"].config.max_streams == 50


def test_the_models_of_a_provider_are_set_and_reset(desk, tmp_path):
    desk.open("models")
    desk.tab.select_option("#set-model select", "mistral")
    desk.tab.fill("#set-model input", "mistral-small-latest")
    desk.tab.click("#set-model-go")
    desk.sees("Models of mistral are set.")
    assert "MISTRAL_MODEL=mistral-small-latest" in (tmp_path / ".env").read_text()
    desk.tab.select_option("#set-model select", "mistral")
    desk.tab.fill("#set-model input", "")
    desk.tab.click("#set-model-go")
    desk.sees("mistral has its default models again.")
    assert "MISTRAL_MODEL" not in (tmp_path / ".env").read_text()
