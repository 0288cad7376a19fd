"""auth.json and .env: many writers, no loss, nothing half-written, nothing readable by others."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import router

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
KEY = "sk-provider-0123456789"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def auth(tmp_path):
    """auth(document): the path of an auth.json that holds it."""

    def make(document: object) -> Path:
        path = tmp_path / "auth.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return make


# --- the lock --------------------------------------------------------------------------

CROWD = """
import os, sys
import router
from pathlib import Path
folder, wait = Path(sys.argv[1]), []
for n in range(20):
    child = os.fork()
    if child == 0:
        for m in range(3):
            router.edit_json(
                folder / "auth.json",
                lambda d: router.add_provider_key(d, "groq", f"gsk_{n}_{m}_0123456789"),
            )
            router.edit_env(folder / ".env", {f"WRITER_{n}_{m}": "here"})
        os._exit(0)
    wait.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in wait))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_twenty_programs_that_write_at_once_lose_nothing(tmp_path, auth):
    auth({"providers": {"gemini": ["AIza-first"]}, "mine": {"kept": True}})
    (tmp_path / ".env").write_text("# mine\nPORT=9000\n")
    done = subprocess.run(
        [sys.executable, "-c", CROWD, str(tmp_path)], cwd=ROOT, timeout=50, check=False
    )
    assert done.returncode == 0
    document = json.loads((tmp_path / "auth.json").read_text())
    assert len(set(document["providers"]["groq"])) == 60
    assert document["providers"]["gemini"] == ["AIza-first"] and document["mine"] == {"kept": True}
    lines = (tmp_path / ".env").read_text().splitlines()
    assert lines[:2] == ["# mine", "PORT=9000"] and len(set(lines)) == len(lines) == 62
    assert names(tmp_path) == [".auth.json.lock", ".env", ".env.lock", "auth.json"]


def test_threads_of_one_program_wait_for_each_other(tmp_path):
    path, seen = tmp_path / "auth.json", []

    def change(document):
        before = document.get("n", 0)
        seen.append(before)
        document["n"] = before + 1

    threads = [threading.Thread(target=router.edit_json, args=(path, change)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(seen) == list(range(20)) and json.loads(path.read_text()) == {"n": 20}


def test_a_lock_that_is_never_given_back_is_told(tmp_path, monkeypatch):
    path = tmp_path / "auth.json"
    monkeypatch.setattr(router.FileLock.__init__, "__defaults__", (0.05,))
    held = r"auth\.json is being written by another"
    with router.FileLock(path), pytest.raises(router.FileProblem, match=held):
        router.edit_json(path, lambda d: d.update(a=1))
    assert not path.exists()
    router.edit_json(path, lambda d: d.update(a=1))
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_change_that_fails_gives_the_lock_back_and_writes_nothing(auth):
    path = auth({"a": 1})

    def fail(document):
        document["a"] = 2
        raise router.BadValue("a", "no")

    for _ in range(2):
        with pytest.raises(router.BadValue):
            router.edit_json(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}


# --- JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'{"providers": {\n  "groq": ["k",]\n}}', "line 2, column"),
        (b'{"providers": {"groq": ["secret-key"', "line 1, column"),
        (b"[]", "expected an object"),
        (b'"text"', "expected an object"),
        (b'{"a": 1} x', "line 1, column 10"),
        (b'{"a":\n "\xff"}', "line 2, column 3: not UTF-8"),
        (b"[" * 200_000, "line 1, column"),
    ],
    ids=["comma", "cut", "list", "text", "more", "latin-1", "deep"],
)
def test_a_broken_file_is_kept_as_it_is_and_told_once(tmp_path, content, place):
    path = tmp_path / "auth.json"
    path.write_bytes(content)
    for _ in range(3):
        with pytest.raises(router.FileProblem) as told:
            router.edit_json(path, lambda d: router.add_provider_key(d, "groq", KEY))
        assert "auth.json" in str(told.value) and place in str(told.value)
        assert "secret-key" not in str(told.value)
    assert path.read_bytes() == content
    copies = [p for p in tmp_path.iterdir() if p.name.startswith("auth.json.broken-")]
    assert [p.read_bytes() for p in copies] == [content], "one copy, however often it is tried"
    assert copies[0].name in str(told.value)
    assert os.name != "posix" or mode(copies[0]) == 0o600


def test_members_that_nobody_knows_stay(auth):
    strange = {"future": [1, {"é": "ü\n"}], "n": 1.50, "big": 10**30, "none": None}
    path = auth({"_readme": "x", "providers": {"groq": ["k1"], "new": {"a": 1}}, **strange})
    router.edit_json(path, lambda d: router.add_provider_key(d, "groq", KEY))
    text = path.read_text()
    document = json.loads(text)
    assert document == {
        "_readme": "x",
        "providers": {"groq": ["k1", KEY], "new": {"a": 1}},
        **strange,
    }
    assert text == json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def test_half_a_surrogate_pair_is_written_as_it_was(auth):
    path = auth('{"name": "\\ud83d", "other": "é"}')
    router.edit_json(path, lambda d: d.update(a=1))
    assert json.loads(path.read_text()) == {"name": "\ud83d", "other": "é", "a": 1}


@pytest.mark.parametrize("content", [None, "", "\n  ", "{}", "\ufeff{}"])
def test_an_empty_or_missing_file_is_an_empty_object(tmp_path, content):
    path = tmp_path / "deep" / "auth.json"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content, encoding="utf-8")
    router.edit_json(path, lambda d: d.update(a=1))
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.name != "posix" or mode(path) == 0o600


def test_what_changes_nothing_writes_nothing(auth):
    path = auth('{"a":1}')
    assert router.edit_json(path, lambda d: d["a"]) == 1
    assert path.read_text() == '{"a":1}'


@POSIX
def test_modes_and_links(tmp_path, auth):
    path = auth({"a": 1})
    path.chmod(0o644)
    link = tmp_path / "sub" / "link.json"
    link.parent.mkdir()
    link.symlink_to(path)
    umask = os.umask(0)
    try:
        router.edit_json(link, lambda d: d.update(b=2))
        router.edit_env(tmp_path / "fresh" / ".env", {"A": "1"})
    finally:
        os.umask(umask)
    assert link.is_symlink() and json.loads(path.read_text()) == {"a": 1, "b": 2}
    assert names(link.parent) == ["link.json"]
    assert {mode(path), mode(tmp_path / ".auth.json.lock")} == {0o600}
    assert mode(tmp_path / "fresh") == 0o700 and mode(tmp_path / "fresh" / ".env") == 0o600


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(auth, monkeypatch, number):
    path = auth({"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(number, "is full")))
        with pytest.raises(router.FileProblem, match=r"auth\.json cannot be written: is full"):
            router.edit_json(path, lambda d: d.update(b=2))
        with pytest.raises(router.FileProblem, match=r"\.env cannot be written"):
            router.edit_env(path.with_name(".env"), {"A": "1"})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(path.parent) == [".auth.json.lock", ".env.lock", "auth.json"]


def test_a_folder_that_nobody_may_write_is_told(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o500)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        folder = Path("/sys")  # where not even root may make a file
    if not folder.is_dir() or os.name != "posix":
        pytest.skip("no folder that this user may not write")
    with pytest.raises(router.FileProblem, match=r"auth\.json cannot be written: \w+"):
        router.edit_json(folder / "auth.json", lambda d: d.update(a=1))


def test_a_file_that_is_mounted_by_itself_says_what_helps(auth, monkeypatch):
    path = auth({})
    busy = OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(busy))
    with pytest.raises(router.FileProblem, match="mount its folder"):
        router.edit_json(path, lambda d: d.update(a=1))


@POSIX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give")
def test_what_root_writes_belongs_to_the_owner_of_the_folder(tmp_path):
    os.chown(tmp_path, 1234, 1234)
    router.edit_json(tmp_path / "auth.json", lambda d: d.update(a=1))
    assert {p.stat().st_uid for p in tmp_path.iterdir()} == {1234}
    assert len(names(tmp_path)) == 2


def test_what_a_killed_writer_left_is_swept(auth):
    path = auth({"a": 1})
    old, new, other = (path.with_name(f".auth.json.{n}") for n in ("abcdefgh", "abcdefgi", "x"))
    for file in (old, new, other):
        file.write_text("secret")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    os.utime(other, (hours_ago, hours_ago))
    router.edit_json(path, lambda d: d.update(a=2))
    assert names(path.parent) == [".auth.json.abcdefgi", ".auth.json.lock", other.name, "auth.json"]


# --- .env ------------------------------------------------------------------------------


def edited(tmp_path, old: str | bytes, **changes) -> bytes:
    path = tmp_path / ".env"
    path.write_bytes(old if isinstance(old, bytes) else old.encode())
    router.edit_env(path, changes)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "A=new\n"),
        ("# c\n\nB=1", "# c\n\nB=1\nA=new\n"),
        ("B=1\r\nC=2\r\n", "B=1\r\nC=2\r\nA=new\r\n"),
        ("A=old\nB=1\n", "A=new\nB=1\n"),
        ("A=old\r\nB=1\n", "A=new\r\nB=1\n"),
        ("  export  A = 'old' # why\nB=1", "export A=new # why\nB=1"),
        ("B=1\nA=old#x  # why", "B=1\nA=new # why"),
        ("A=1\nB=2\nA=3\n", "A=new\nB=2\n"),
        ("#A=old\nAB=1\n", "#A=old\nAB=1\nA=new\n"),
        ("\ufeffA=old\nB=1\n", "\ufeffA=new\nB=1\n"),
        ("A=# none\n", "A=new # none\n"),
    ],
)
def test_a_line_is_set_and_all_others_stay(tmp_path, old, new):
    assert edited(tmp_path, old, A="new").decode() == new
    assert router.read_dotenv(tmp_path / ".env")["A"] == "new"


def test_a_line_is_removed(tmp_path):
    assert edited(tmp_path, "# A\nA=1\n\nexport A='2'\nB=3\n", A=None) == b"# A\n\nB=3\n"
    assert edited(tmp_path, "B=3", A=None) == b"B=3"


def test_bytes_that_are_no_text_stay(tmp_path):
    old = b"# f\xfcr mich\nNAME=\xff\n"
    assert edited(tmp_path, old, A="1") == old + b"A=1\n"


@pytest.mark.parametrize("wrong", ["a\nb", "a\r", "\n", "a\u2028b", "a\x0cb", "a\x85", "a\0b"])
def test_a_value_of_two_lines_is_refused(tmp_path, wrong):
    path = tmp_path / ".env"
    with pytest.raises(router.BadValue) as told:
        router.edit_env(path, {"B": "1", "A": wrong})
    assert told.value.field == "A" and not path.exists()


@pytest.mark.parametrize("name", ["", "A B", "A=B", "É", "1A", "A\n", "#A", "export A"])
def test_a_name_that_no_variable_has_is_refused(tmp_path, name):
    with pytest.raises(router.BadValue):
        router.edit_env(tmp_path / ".env", {name: "1"})


ENV_NAMES = st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True)
LINE = st.text(max_size=30).filter(lambda text: text.splitlines() in ([], [text]))


@settings(deadline=None)  # a disk that is busy
@given(
    st.dictionaries(ENV_NAMES, LINE, max_size=4),
    st.lists(st.one_of(LINE, st.builds("{}={}".format, ENV_NAMES, LINE)), max_size=6),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read_again(tmp_path_factory, changes, lines, end):
    path = tmp_path_factory.mktemp("env") / ".env"
    old = "".join(line + end for line in lines)
    path.write_bytes(old.encode("utf-8", "surrogatepass"))
    before = router.read_dotenv(path)
    try:
        router.edit_env(path, changes)
    except router.BadValue as error:
        value = changes[error.field]
        assert "\0" in value or not router.is_unicode(value) or {'"', "'"} <= set(value)
        assert router.read_dotenv(path) == before
        return
    assert router.read_dotenv(path) == {**before, **changes}
    router.edit_env(path, dict.fromkeys(changes))
    left = {name: value for name, value in before.items() if name not in changes}
    assert router.read_dotenv(path) == left


# --- auth.json: provider keys ----------------------------------------------------------


def test_a_provider_key_is_added_once():
    document = {"providers": {"gemini": ["", " AIza-1 "], "google": ["AIza-2"]}}
    add = router.add_provider_key
    assert add(document, "Google", " AIza-3\n") == ("gemini", True, False, 3)
    assert add(document, "gemini", "AIza-2") == ("gemini", False, True, 3)
    assert document == {"providers": {"gemini": [" AIza-1 ", "AIza-3"], "google": ["AIza-2"]}}
    reader = router.SettingsReader({})
    row = router.provider_named("gemini")
    found = router.read_keys(reader, row, document["providers"])
    assert [key for key, _ in found] == ["AIza-1", "AIza-3", "AIza-2"]


@pytest.mark.parametrize(
    ("provider", "key", "field"),
    [
        ("nobody", KEY, "provider"),
        ("<img src=x>", KEY, "provider"),
        (None, KEY, "provider"),
        ("codex", KEY, "provider"),
        ("groq", "", "key"),
        ("groq", "  \n", "key"),
        ("groq", "two words", "key"),
        ("groq", "a\nb", "key"),
        ("groq", "kéy", "key"),
        ("groq", "k" * 9000, "key"),
        ("groq", 7, "key"),
        ("groq", None, "key"),
        ("groq", [KEY], "key"),
    ],
)
def test_keys_that_cannot_be_stored(provider, key, field):
    document: dict = {}
    with pytest.raises(router.BadValue) as told:
        router.add_provider_key(document, provider, key)
    assert told.value.field == field and document == {}
    assert not isinstance(key, str) or len(key) < 4 or key not in str(told.value)


@pytest.mark.parametrize("document", [{"providers": []}, {"providers": {"groq": "gsk_old"}}])
def test_a_place_of_another_shape_is_not_destroyed(document):
    before = json.dumps(document)
    with pytest.raises(router.BadValue, match="mend it by hand"):
        router.add_provider_key(document, "groq", KEY)
    assert json.dumps(document) == before


def test_a_provider_key_is_removed_by_tail_id_or_itself():
    keys = ["gsk_aaaa_111111", "gsk_bbbb_111111", "gsk_cccc_222222", "gsk_dddd_333333"]
    document = {"providers": {"groq": list(keys), "gemini": ["x"]}}
    remove = router.remove_provider_key
    assert remove(document, "groq", "222222") == "222222"
    assert remove(document, "groq", router.caller_id(keys[3])) == "333333"
    for which in ("111111", "11", "", "nothing", keys[2]):
        with pytest.raises(router.NoSuchEntry):
            remove(document, "groq", which)
    assert remove(document, "groq", keys[0]) == "111111"
    assert document == {"providers": {"groq": [keys[1]], "gemini": ["x"]}}


# --- auth.json: keys of callers --------------------------------------------------------

LIMITED = {
    "name": "Ümit's <b>laptop</b> 🙂",
    "rpm": 60,
    "req_per_day": 0,
    "tokens_per_day": 10**12,
    "cost_per_day": 1.5,
    "allowed_providers": ["Google", "groq", "gemini"],
    "admin": True,
}


def test_a_proxy_key_is_made_changed_and_revoked():
    document: dict = {"other": 1}
    key = router.add_proxy_key(document, LIMITED)
    assert key.startswith("sk-router-") and len(key) > 40
    stored = {**LIMITED, "allowed_providers": ["gemini", "groq"]}
    assert document == {"other": 1, "proxy_keys": {key: stored}}
    document["proxy_keys"][key]["future"] = [1]
    changes = {"rpm": None, "allowed_providers": [], "name": " new ", "cost_per_day": 0}
    assert router.update_proxy_key(document, key[-6:], changes) == key
    assert document["proxy_keys"][key] == {
        "name": "new",
        "req_per_day": 0,
        "tokens_per_day": 10**12,
        "cost_per_day": 0,
        "admin": True,
        "future": [1],
    }
    assert router.revoke_proxy_key(document, router.caller_id(key)) == key
    assert document == {"other": 1, "proxy_keys": {}}


def test_a_proxy_key_of_the_environment_gets_a_row():
    document: dict = {}
    assert router.update_proxy_key(document, "-of-env", {"rpm": 5}, ["key-of-env"]) == "key-of-env"
    assert document == {"proxy_keys": {"key-of-env": {"rpm": 5}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, bad) for name in router.CALLER_LIMITS for bad in (-1, "5", True, [], 10**16)),
        *(("cost_per_day", bad) for bad in (float("nan"), float("inf"), -0.5)),
        ("rpm", 1.5),
        ("name", "x" * 81),
        ("name", "a\nb"),
        ("name", "\x1b[31m"),
        ("name", 5),
        ("allowed_providers", "groq"),
        ("allowed_providers", ["nobody"]),
        ("allowed_providers", [None]),
        ("admin", "yes"),
        ("admin", 1),
    ],
)
def test_what_may_not_be_said_of_a_proxy_key(field, value):
    document = {"proxy_keys": {"some-key-123": {"rpm": 1}}}
    for call in (
        lambda: router.add_proxy_key(document, {"name": "good", field: value}),
        lambda: router.update_proxy_key(document, "-123", {field: value}),
    ):
        with pytest.raises(router.BadValue) as told:
            call()
        assert told.value.field == field and field in str(told.value)
    assert document == {"proxy_keys": {"some-key-123": {"rpm": 1}}}


def test_an_unknown_member_is_named():
    with pytest.raises(router.BadValue, match="unknown member: rmp"):
        router.add_proxy_key({}, {"rmp": 5})


def test_tails_that_collide_name_ids():
    keys = ["sk-router-a-tail99", "sk-router-b-tail99"]
    document = {"proxy_keys": {key: {} for key in keys}}
    with pytest.raises(router.NoSuchEntry) as told:
        router.revoke_proxy_key(document, "tail99")
    assert all(router.caller_id(key) in str(told.value) for key in keys)
    assert not any(key in str(told.value) for key in keys)


# --- auth.json: accounts ---------------------------------------------------------------


def test_an_account_is_imported_once_and_kept_in_its_form():
    cli = {
        "OPENAI_API_KEY": None,
        "tokens": {"account_id": "a1", "access_token": "x", "refresh_token": "r", "id_token": "i"},
        "last_refresh": "2026-01-01T00:00:00Z",
    }
    document: dict = {"codex_accounts": [{"account_id": "", "refresh_token": ""}]}
    assert router.upsert_account(document, cli)
    flat = {
        "account_id": "a1",
        "access_token": "x",
        "refresh_token": "r",
        "last_refresh": "2026-01-01T00:00:00Z",
    }
    assert document == {"codex_accounts": [flat]}
    newer = {**flat, "access_token": "y", "refresh_token": "s"}
    assert not router.upsert_account(document, newer)
    assert document == {"codex_accounts": [newer]}
    whole = json.loads(json.dumps(cli))
    assert not router.upsert_account(whole, newer)
    assert whole["tokens"] == {**cli["tokens"], "access_token": "y", "refresh_token": "s"}


@pytest.mark.parametrize("row", [{}, {"refresh_token": "r"}, {"account_id": "a"}])
def test_a_sign_in_without_tokens_is_refused(row):
    with pytest.raises(router.BadValue):
        router.upsert_account({}, row)


def test_the_example_can_be_used_as_it_is(tmp_path):
    """Copied and not filled in it lets nobody in; each member is one that is known."""
    document = json.loads((ROOT / "auth.example.json").read_text())
    row = document["proxy_keys"]["sk-router-1"]
    assert router.check_caller(row) == row
    assert row.keys() == {"name", "admin", "allowed_providers", "privacy", *router.CALLER_LIMITS}
    (tmp_path / "auth.json").write_text(json.dumps(document))
    config = router.Config.from_env({"HR_HOME": str(tmp_path)})
    assert (config.services, config.accounts, config.proxy_keys) == ((), (), ())
    router.upsert_account(document, {"account_id": "a", "refresh_token": "r"})
    router.add_provider_key(document, "groq", KEY)
    assert len(document["codex_accounts"]) == 1 and document["providers"]["groq"] == [KEY]
