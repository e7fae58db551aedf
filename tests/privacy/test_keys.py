"""Secrets and the keys that are derived from them."""

from __future__ import annotations

import hashlib
import hmac
import multiprocessing
import os
import stat

import pytest

from e2h.errors import InputError
from e2h.privacy.keys import TEST_SECRET, create_secret, derive_key, keystream, load_secret

SECRET = bytes(range(32))


def test_a_key_is_a_function_of_secret_purpose_and_address():
    addresses = [
        ("noise",),
        ("noise", 1),
        ("noise", 2),
        ("noise", "domain", 1),
        ("noise", "domain", 2),
        ("sampling", 1),
    ]
    keys = [derive_key(SECRET, *address) for address in addresses]
    assert keys == [derive_key(SECRET, *address) for address in addresses]
    assert len({*keys, *(derive_key(bytes(32), *address) for address in addresses)}) == 2 * len(addresses)
    assert {len(key) for key in keys} == {32}


def test_parts_of_an_address_do_not_run_into_each_other():
    joined = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ("a", "b", "c"), ("a", 1, 11), ("a", 11, 1)]
    assert len({derive_key(SECRET, *address) for address in joined}) == len(joined)


def test_keys_are_hkdf_of_rfc_5869():
    extracted = hmac.new(bytes(32), SECRET, hashlib.sha256).digest()
    info = b"e2h" + (5).to_bytes(4, "big") + b"noise" + (1).to_bytes(4, "big") + b"7"
    assert derive_key(SECRET, "noise", 7) == hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def test_a_keystream_can_be_entered_anywhere():
    whole = keystream(SECRET, 0, 20)
    assert keystream(SECRET, 7, 5) == whole[7 * 16 : 12 * 16]
    assert keystream(SECRET, 3, 0) == b""


def test_a_new_secret_is_owner_only_and_never_replaced(tmp_path):
    path = tmp_path / "secrets" / "run.key"
    create_secret(path)
    first = load_secret(f"file:{path}")
    assert len(first) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    create_secret(path)
    assert load_secret(f"file:{path}") == first
    assert [entry.name for entry in path.parent.iterdir()] == ["run.key"]
    create_secret(tmp_path / "other.key")
    assert load_secret(f"file:{tmp_path / 'other.key'}") != first


def create_at_once(path, start) -> None:
    start.wait(timeout=30)
    create_secret(path)


def test_racing_processes_keep_one_secret(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        path, start = tmp_path / f"{attempt}.key", context.Event()
        racers = [context.Process(target=create_at_once, args=(path, start)) for _ in range(2)]
        for racer in racers:
            racer.start()
        start.set()
        while not path.exists():
            pass
        first = path.read_bytes()
        for racer in racers:
            racer.join(timeout=30)
            assert racer.exitcode == 0
        assert path.read_bytes() == first
        load_secret(f"file:{path}")


def test_what_a_killed_process_left_does_not_endanger_the_secret(tmp_path):
    path = tmp_path / "run.key"
    create_secret(path)
    before = path.read_bytes()
    # Killed between link and unlink: its temporary name is the secret itself, and this process may have its number.
    os.link(path, tmp_path / f".run.key.{os.getpid()}")
    create_secret(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_secret_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "run.key"
    path.write_text(SECRET.hex())
    path.chmod(mode)
    with pytest.raises(InputError, match="only its owner may read; chmod 600"):
        load_secret(f"file:{path}")
    path.chmod(0o400)
    assert load_secret(f"file:{path}") == SECRET


def test_a_secret_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("E2H_A_SECRET", f" {SECRET.hex()}\n")
    assert load_secret("env:E2H_A_SECRET") == SECRET
    monkeypatch.delenv("E2H_A_SECRET")
    with pytest.raises(InputError, match=r"privacy\.secret=env:E2H_A_SECRET: .* set E2H_A_SECRET"):
        load_secret("env:E2H_A_SECRET")


BAD_SECRETS = {
    "short": b"ab" * 31,
    "long": SECRET.hex().encode() + b"00",
    "not hexadecimal": b"zq" * 32,
    "not text": bytes(range(128, 160)),
    "empty": b"",
    "published": TEST_SECRET.hex().encode(),
    "not random": b"00" * 32,
}


@pytest.mark.parametrize("content", BAD_SECRETS.values(), ids=BAD_SECRETS)
def test_a_malformed_secret_is_refused_and_never_repeated(tmp_path, content):
    path = tmp_path / "run.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="expected 64 random hex digits") as refused:
        load_secret(f"file:{path}")
    # What a traceback would print, causes included.
    shown = f"{refused.value!r} {refused.value.__cause__!r} {refused.value.__context__!r}"
    assert not content or content.decode("latin-1")[:8] not in shown


def test_a_secret_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    create_secret(tmp_path / "run.key")
    assert load_secret("file:~/run.key").hex() == (tmp_path / "run.key").read_text()


def test_a_missing_secret_is_refused(tmp_path):
    with pytest.raises(InputError, match="it does not exist"):
        load_secret(f"file:{tmp_path / 'none.key'}")
    with pytest.raises(InputError, match="it does not exist"):
        load_secret(f"file:{tmp_path}")
