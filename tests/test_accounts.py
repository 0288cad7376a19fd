"""Codex accounts: read from auth.json, renewed once for all who wait, written back safely."""

from __future__ import annotations

import base64
import json
import logging
import os
import stat
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import router

NOW = 1_800_000_000.0
CLAIM = {"https://api.openai.com/auth": {"chatgpt_account_id": "acc-claimed"}}


def jwt(exp=None, **claims) -> str:
    body = {**claims, **({} if exp is None else {"exp": exp})}
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, body)]
    coded = [base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts]
    return ".".join([*coded, "c2ln"])


FRESH, STALE = jwt(NOW + 3600), jwt(NOW + 299)


def row(id="acc-1", access=STALE, refresh="refresh-1", **more) -> dict:
    tokens = {"account_id": id, "access_token": access, "refresh_token": refresh}
    return {**tokens, "last_refresh": "2026-11-20T00:00:00Z", **more}


class Endpoint:
    """A token endpoint: counts, and rotates both tokens at each call."""

    def __init__(self, *answers, delay=0.0) -> None:
        self.answers, self.delay, self.calls = list(answers), delay, []
        self.lock = threading.Lock()

    def __call__(self, url, body, timeout):
        with self.lock:
            self.calls.append((url, body, timeout))
            n = len(self.calls)
        time.sleep(self.delay)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        token = jwt(NOW + 3600, n=n)
        return 200, {"access_token": token, "refresh_token": f"new-{n}", "id_token": "id.new.x"}


@pytest.fixture
def pool(tmp_path):
    """pool(document, endpoint): (accounts, path of the auth.json)."""

    def make(document, endpoint, wall=lambda: NOW):
        path = tmp_path / "auth.json"
        path.write_text(json.dumps(document))
        accounts = router.read_accounts(document)
        return router.Accounts(accounts, path, endpoint, wall, "http://token"), path

    return make


def test_formats_that_people_have():
    codex_cli = {
        "OPENAI_API_KEY": None,
        "tokens": {"id_token": jwt(1, **CLAIM), "access_token": FRESH, "refresh_token": "r"},
        "last_refresh": "2026-11-01T10:00:00.123456Z",
    }
    ids = [
        [account.id for account in router.read_accounts(document)]
        for document in (
            {"codex_accounts": [row("a"), row("b"), row("a", refresh="later")]},
            {"providers": {"codex": [row("a"), "sk-text"]}},
            {"codex_accounts": [codex_cli]},
            codex_cli,
            {"codex_accounts": codex_cli, "providers": {"codex": [row("b")]}},
        )
    ]
    assert ids == [["a", "b"], ["a"], ["acc-claimed"], ["acc-claimed"], ["acc-claimed", "b"]]


@pytest.mark.parametrize(
    "bad",
    [
        {},
        row(refresh=""),
        row(refresh=None),
        row(id="", access="opaque"),
        row(id="two\r\nlines"),
        row(id=5),
        "text",
        None,
    ],
)
def test_rows_that_cannot_be_used_are_ignored(bad):
    assert router.read_accounts({"codex_accounts": [bad]}) == ()


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["codex_accounts", "providers", "codex", "tokens", "account_id",
                         "refresh_token", "access_token", "last_refresh"]), inner, max_size=4),
    max_leaves=12,
), st.text(max_size=20))  # fmt: skip
def test_any_document_and_token_is_survived(document, token):
    if isinstance(document, dict):
        router.read_accounts(document)
    assert router.jwt_claims(token) == {} or "." in token
    router.token_end(token)


@pytest.mark.parametrize(
    ("token", "end"),
    [
        (jwt(1700000000), 1700000000.0),
        (jwt("1700000000"), 1700000000.0),
        (jwt(), 0.0),
        (jwt([1]), 0.0),
        ("", 0.0),
        ("a.b", 0.0),
        ("a.%%%.c", 0.0),
        ("a." + base64.urlsafe_b64encode(b"[1]").decode() + ".c", 0.0),
        ("é.é.é", 0.0),
    ],
)
def test_when_a_token_ends(token, end):
    assert router.token_end(token) == end


def test_a_good_token_is_used_again(pool):
    endpoint = Endpoint()
    accounts, _ = pool({"codex_accounts": [row(access=FRESH)]}, endpoint)
    assert accounts.access_token("acc-1") == FRESH and not endpoint.calls


def test_five_minutes_before_its_end_it_is_renewed(pool):
    endpoint = Endpoint()
    accounts, path = pool({"codex_accounts": [row()]}, endpoint)
    token = accounts.access_token("acc-1")
    assert router.jwt_claims(token)["n"] == 1
    assert accounts.access_token("acc-1") == token, "once is enough"
    body = {"grant_type": "refresh_token", "refresh_token": "refresh-1"}
    expected = {"client_id": "app_EMoamEEZ73f0CkXaXp7hrann", **body}
    assert endpoint.calls == [("http://token", expected, 30.0)]


def test_the_rotated_token_is_on_disk_and_all_else_stays(pool):
    document = {
        "_readme": "é",
        "providers": {"groq": ["k"]},
        "codex_accounts": [row("acc-0", refresh="other"), row(note=[1], id_token="old")],
    }
    accounts, path = pool(document, Endpoint())
    path.write_text(json.dumps({**document, "added": "meanwhile"}))
    token = accounts.access_token("acc-1")
    stored = json.loads(path.read_text())
    mine = stored["codex_accounts"].pop()
    assert stored == {
        **document,
        "added": "meanwhile",
        "codex_accounts": document["codex_accounts"][:1],
    }
    assert mine == {
        **row(access=token, refresh="new-1", note=[1], id_token="id.new.x"),
        "last_refresh": "2027-01-15T08:00:00Z",
    }
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert path.read_text().endswith("\n}\n") and '\n  "' in path.read_text()
    assert sorted(os.listdir(path.parent)) == [".auth.json.lock", "auth.json"]


def test_codex_cli_files_keep_their_shape(pool):
    tokens = {"account_id": "a", "access_token": STALE, "refresh_token": "r", "id_token": "i"}
    document = {"OPENAI_API_KEY": None, "tokens": tokens, "last_refresh": "x"}
    accounts, path = pool(document, Endpoint())
    accounts.access_token("a")
    stored = json.loads(path.read_text())
    assert set(stored) == set(document) and set(stored["tokens"]) == set(tokens)
    assert stored["tokens"]["refresh_token"] == "new-1" and stored["last_refresh"] != "x"


def test_fifty_threads_ask_once(pool):
    endpoint = Endpoint(delay=0.1)
    accounts, path = pool({"codex_accounts": [row("a"), row("b", refresh="rb")]}, endpoint)
    got, start = [], threading.Barrier(50)

    def ask(n):
        start.wait()
        got.append(("ab"[n % 2], accounts.access_token("ab"[n % 2])))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(got) == 50 and len(set(got)) == 2
    assert sorted(body["refresh_token"] for _, body, _ in endpoint.calls) == ["rb", "refresh-1"]
    stored = {
        r["account_id"]: r["refresh_token"] for r in json.loads(path.read_text())["codex_accounts"]
    }
    assert sorted(stored.values()) == ["new-1", "new-2"], "neither write loses the other"


def test_while_one_account_is_renewed_others_are_served(pool):
    go, began = threading.Event(), threading.Event()

    def post(url, body, timeout):
        began.set()
        go.wait(10)
        return 200, {"access_token": FRESH}

    accounts, _ = pool({"codex_accounts": [row("a"), row("b", FRESH)]}, post)
    thread = threading.Thread(target=accounts.access_token, args=("a",))
    thread.start()
    began.wait(5)
    assert accounts.access_token("b") == FRESH
    with pytest.raises(router.AccountError, match="too long"):
        accounts.access_token("a", patience_s=0.01)
    go.set()
    thread.join(5)
    assert accounts.access_token("a") == FRESH


@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": "invalid_grant", "error_description": "refresh-1 was used"}),
        (401, {"error": {"message": "gone", "code": "refresh_token_expired"}}),
        (200, {"error": "refresh-1"}),
        (200, None),
        (200, {"access_token": "two\nlines"}),
        (500, "refresh-1"),
        OSError("refresh-1"),
    ],
)
def test_a_refused_refresh_is_told_without_secrets(pool, caplog, answer):
    caplog.set_level(logging.DEBUG)
    accounts, path = pool({"codex_accounts": [row()]}, Endpoint(answer))
    before = path.read_text()
    with pytest.raises(router.AccountError) as error:
        accounts.access_token("acc-1")
    for text in (str(error.value), caplog.text, repr(error.value)):
        assert "refresh-1" not in text and STALE not in text
    assert path.read_text() == before
    assert accounts.access_token("acc-1"), "the next one may try again"


def test_what_the_transport_raises_frees_those_who_wait(pool):
    accounts, _ = pool({"codex_accounts": [row()]}, Endpoint(RuntimeError("cut")))
    with pytest.raises(RuntimeError):
        accounts.access_token("acc-1")
    assert accounts.access_token("acc-1")


def test_a_newer_sign_in_on_disk_wins(pool):
    endpoint = Endpoint()
    accounts, path = pool({"codex_accounts": [row()]}, endpoint)
    path.write_text(json.dumps({"codex_accounts": [row(access=FRESH, refresh="newer")]}))
    assert accounts.access_token("acc-1") == FRESH and not endpoint.calls
    path.write_text(json.dumps({"codex_accounts": [row(refresh="newest")]}))
    accounts.reject("acc-1", FRESH)
    accounts.access_token("acc-1")
    assert endpoint.calls[0][1]["refresh_token"] == "newest"


def test_a_sign_in_during_the_refresh_is_not_overwritten(pool):
    def post(url, body, timeout):
        path.write_text(json.dumps({"codex_accounts": [row(refresh="newer")]}))
        return 200, {"access_token": FRESH, "refresh_token": "ours"}

    accounts, path = pool({"codex_accounts": [row()]}, post)
    assert accounts.access_token("acc-1") == FRESH
    assert json.loads(path.read_text())["codex_accounts"][0]["refresh_token"] == "newer"


@pytest.mark.parametrize("content", ["{broken", "[]", None])
def test_a_file_that_is_broken_or_gone_is_left_alone(pool, caplog, content):
    endpoint = Endpoint()
    accounts, path = pool({"codex_accounts": [row()]}, endpoint)
    path.unlink()
    if content is not None:
        path.write_text(content)
    token = accounts.access_token("acc-1")
    assert "not stored" in caplog.text and "new-1" not in caplog.text and token not in caplog.text
    assert (path.read_text() if path.exists() else None) == content
    accounts.reject("acc-1", token)
    path.write_text(json.dumps({"codex_accounts": [row()]}))
    accounts.access_token("acc-1")
    assert endpoint.calls[1][1]["refresh_token"] == "new-1", "memory is newer than the old file"
    assert json.loads(path.read_text())["codex_accounts"][0]["refresh_token"] == "new-2"


def test_a_failed_write_leaves_the_old_file_whole(pool, monkeypatch, caplog):
    accounts, path = pool({"codex_accounts": [row()]}, Endpoint())
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert accounts.access_token("acc-1")
    assert path.read_text() == before
    assert sorted(os.listdir(path.parent)) == [".auth.json.lock", "auth.json"]
    assert "not stored" in caplog.text


def test_opaque_tokens_last_as_long_as_stated(pool):
    clock = [NOW]
    answers = [(200, {"access_token": "opaque", "expires_in": 1000})] * 2
    endpoint = Endpoint(*answers)
    accounts, path = pool({"codex_accounts": [row(access="o")]}, endpoint, lambda: clock[0])
    assert accounts.access_token("acc-1") == "opaque"
    clock[0] += 699
    assert accounts.access_token("acc-1") and len(endpoint.calls) == 1
    clock[0] += 2
    assert accounts.access_token("acc-1") and len(endpoint.calls) == 2
    assert json.loads(path.read_text())["codex_accounts"][0]["refresh_token"] == "refresh-1"


def test_a_rejected_token_is_renewed_but_not_its_successor(pool):
    endpoint = Endpoint()
    accounts, _ = pool({"codex_accounts": [row(access=FRESH)]}, endpoint)
    accounts.reject("acc-1", FRESH)
    token = accounts.access_token("acc-1")
    accounts.reject("acc-1", FRESH)
    assert accounts.access_token("acc-1") == token and len(endpoint.calls) == 1


def test_unknown_accounts_and_reprs(pool):
    accounts, _ = pool({"codex_accounts": [row(access=FRESH)]}, Endpoint())
    with pytest.raises(router.AccountError):
        accounts.access_token("nobody")
    accounts.reject("nobody", "x")
    assert accounts.ids == ("acc-1",)
    [account] = router.read_accounts({"codex_accounts": [row()]})
    for shown in (repr(account), repr(router.Flight(token="secret")), repr(accounts)):
        assert "refresh-1" not in shown and STALE not in shown and "secret" not in shown


def test_headers():
    headers = router.codex_headers("acc-1", "session-1")
    assert headers["chatgpt-account-id"] == "acc-1" and headers["session_id"] == "session-1"
    assert headers["OpenAI-Beta"] == "responses=experimental"
    assert headers["originator"] == "codex_cli_rs" and headers["Accept"] == "text/event-stream"
    for bad in ("", "a\r\nb: c", "é", "x" * 200):
        assert "session_id" not in router.codex_headers("acc-1", bad)


def window(name, used, wait) -> dict:
    stem = f"x-codex-{name}"
    return {f"{stem}-used-percent": str(used), f"{stem}-reset-after-seconds": str(wait)}


FULL_AT = {"x-codex-primary-used-percent": "100", "x-codex-primary-reset-at": str(NOW + 70)}


def limit(**members) -> bytes:
    return json.dumps({"error": {"type": "usage_limit_reached", **members}}).encode()


@pytest.mark.parametrize(
    ("headers", "body", "wait"),
    [
        ({}, limit(resets_in_seconds=120), 120),
        ({}, limit(resets_at=NOW + 50), 50),
        ({}, limit(resets_at=NOW + 50, resets_in_seconds=20), 20),
        ({}, limit(resets_in_seconds=5 * 86400), 5 * 86400),
        ({}, limit(resets_in_seconds=90 * 86400), 7 * 86400),
        ({}, limit(resets_in_seconds=-4), 1),
        ({}, limit(resets_in_seconds="x"), None),
        ({}, b'{"detail":"slow"}', None),
        ({}, b"<html>", None),
        ({"retry-after": "9"}, b"{}", 9),
        (window("primary", 100, 600) | window("secondary", 40, 500_000),
         limit(resets_in_seconds=500_000), 600),
        (window("primary", 100, 600) | window("secondary", 100, 500_000), limit(), 500_000),
        (window("primary", 12, 600) | window("secondary", 40, 500_000),
         limit(resets_in_seconds=500_000), 600),
        (window("primary", 12, 600) | window("secondary", 40, 500_000),
         limit(resets_in_seconds=30), 30),
        (window("primary", 12, 600) | window("secondary", "100.0", 500_000), b"", 500_000),
        (window("primary", 12, 600), b"", None),
        (FULL_AT, b"", 70),
        (window("primary", "nan", "inf"), limit(resets_in_seconds=30), 30),
    ],
)  # fmt: skip
def test_how_long_a_plan_rests(headers, body, wait):
    assert router.codex_wait(headers, body, NOW) == wait
