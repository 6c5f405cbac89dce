"""Ids leave the data only as keyed hashes; the key is the user's, private, and never half a key."""

import hashlib
import hmac
import os
import stat
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kladi.data.rows import identity
from kladi.data.rows.identity import Key, load_key
from kladi.errors import UserError

ZEROS = Key(bytes(32))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "kladi" / "key"


def test_s8_a_hash_is_hmac_sha256_over_kind_issuer_and_id_cut_to_128_bits():
    parts = [b"id", b"patient", b"Ward 3", b"0042"]
    message = b"".join(len(p).to_bytes(8, "little") + p for p in parts)
    expected = hmac.new(bytes(32), message, hashlib.sha256).hexdigest()[:32]
    assert ZEROS.hashed("patient", "Ward 3", "0042") == expected
    assert len(bytes.fromhex(expected)) == 16


def test_s8_a_hash_without_the_key_is_another_hash():
    bare = {hashlib.sha256(text).hexdigest()[:32] for text in (b"0042", b"patient0042", b"id\0patient\0\0000042")}
    other = Key(bytes([1]) * 32).hashed("patient", "", "0042")
    assert len({ZEROS.hashed("patient", "", "0042"), other, *bare}) == len(bare) + 2


def test_the_parts_do_not_run_into_each_other():
    hashes = {
        ZEROS.hashed(*parts)
        for parts in [("a", "bc", "d"), ("ab", "c", "d"), ("a", "b", "cd"), ("abc", "", "d"), ("d", "bc", "a")]
    }
    assert len(hashes) == 5


@pytest.mark.parametrize("written", ["0042", " 0042 ", "0042\0", "\0 0042 \0 \0", "\t0042\n"])
def test_padding_does_not_make_another_patient(written):
    assert ZEROS.hashed("patient", "", written) == ZEROS.hashed("patient", "", "0042")


def test_composed_and_decomposed_letters_are_one_patient():
    assert ZEROS.hashed("patient", "", "Jose\u0301") == ZEROS.hashed("patient", "", "Jos\u00e9")


def test_leading_zeros_and_case_stay():
    assert len({ZEROS.hashed("patient", "", text) for text in ("042", "42", "a42", "A42")}) == 4


@pytest.mark.parametrize("nobody", ["", " ", "\0", " \0 "])
def test_nobody_has_no_hash(nobody):
    with pytest.raises(ValueError, match="names nobody"):
        ZEROS.hashed("patient", "", nobody)


@given(st.text(), st.text(min_size=1))
def test_any_text_has_a_hash_of_32_digits_or_names_nobody(issuer, text):
    if identity.cleaned(text):
        assert len(ZEROS.hashed("patient", issuer, text)) == 32
    assert identity.cleaned(identity.cleaned(text)) == identity.cleaned(text)


def test_the_secret_is_in_no_repr():
    secret = bytes(range(65, 97))
    shown = repr(Key(secret)) + str(Key(secret))
    assert "ABC" not in shown
    assert secret.hex() not in shown


def test_the_fingerprint_names_a_key_and_is_no_hash_of_an_id():
    assert len(ZEROS.fingerprint) == 8
    assert ZEROS.fingerprint != Key(bytes([1]) * 32).fingerprint
    assert ZEROS.fingerprint == Key(bytes(32)).fingerprint


def test_a_key_is_made_once_private_and_kept(home):
    first = load_key()
    assert home.read_bytes() == first.secret
    assert len(first.secret) == 32
    assert load_key() == first
    assert [p.name for p in home.parent.iterdir()] == ["key"]
    if os.name != "nt":
        assert stat.S_IMODE(home.stat().st_mode) == 0o600
        assert stat.S_IMODE(home.parent.stat().st_mode) == 0o700


def test_two_homes_have_two_keys(tmp_path, monkeypatch):
    keys = set()
    for name in ("a", "b"):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / name))
        keys.add(load_key().secret)
    assert len(keys) == 2


def test_processes_that_start_together_agree_on_the_key(home):
    found, start = [], threading.Barrier(8)

    def run():
        start.wait()
        found.append(load_key().secret)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {home.read_bytes()}


def test_a_given_key_is_used_and_none_is_made_for_a_mistyped_one(tmp_path, home):
    key = tmp_path / "lab.key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    assert load_key(key).secret == bytes(range(32))
    with pytest.raises(UserError, match=r"labb\.key cannot be read.*head -c 32"):
        load_key(str(tmp_path / "labb.key"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lab.key"]


@pytest.mark.parametrize("length", [0, 31, 33, 4096])
def test_a_file_of_another_length_is_no_key(tmp_path, length):
    key = tmp_path / "key"
    key.write_bytes(bytes(length))
    key.chmod(0o600)
    with pytest.raises(UserError, match="a key has 32 bytes"):
        load_key(key)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mode bits")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        load_key(key)


def test_a_configuration_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "config").write_text("a file")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(UserError, match=r"--data\.key"):
        load_key()


def test_what_people_see_is_eight_digits():
    assert identity.shown(ZEROS.hashed("patient", "", "0042")) == ZEROS.hashed("patient", "", "0042")[:8]
    digest = hashlib.sha256(b"file").digest()
    row_id = np.array([int.from_bytes(digest[:8], "big"), 0], dtype=np.uint64)
    assert identity.shown_rows(row_id) == [digest.hex()[:8], "00000000"]
