"""One identity per content: the digest, its short form, vLLM's name and vLLM's number."""

import hashlib

import pytest

from chameleon_ray.adapters.identity import AdapterId, AdapterNumbers

ONE, TWO = (AdapterId(hashlib.sha256(text).hexdigest()) for text in (b"1", b"2"))


@pytest.mark.parametrize("name", ["sql", "team/sql.v2", "a@b", "", "two\nlines"])
def test_a_lora_name_holds_the_clients_name_and_the_whole_digest(name: str) -> None:
    assert AdapterId.parse(ONE.lora_name(name)) == (name, ONE)


@pytest.mark.parametrize("name", ["sql", "a@b", f"a@{ONE.short}", f"a@{ONE.digest.upper()}", f"a@{ONE.digest}0"])
def test_other_names_have_no_identity(name: str) -> None:
    assert AdapterId.parse(name) == (name, None)


def test_adapters_that_agree_in_the_short_digest_keep_different_names_and_numbers() -> None:
    same = AdapterId(ONE.digest[:-1] + ("0" if ONE.digest[-1] != "0" else "1"))
    assert same.short == ONE.short and same.lora_name("a") != ONE.lora_name("a")
    numbers = AdapterNumbers()
    first, second = numbers.number(ONE.digest), numbers.number(same.digest)
    assert first != second
    assert (numbers.digest(first), numbers.digest(second)) == (ONE.digest, same.digest)


def test_a_number_is_the_same_after_release_and_in_every_process() -> None:
    numbers, elsewhere = AdapterNumbers(), AdapterNumbers()
    elsewhere.number(TWO.digest)
    number = numbers.number(ONE.digest)
    assert number == numbers.number(ONE.digest) == elsewhere.number(ONE.digest)
    numbers.release(ONE.digest)
    numbers.release(ONE.digest)
    assert len(numbers) == 0 and numbers.digest(number) is None
    assert numbers.number(ONE.digest) == number


def test_numbers_fit_vllms_int32_and_are_never_0() -> None:
    numbers = AdapterNumbers()
    largest = 2**31 - 1
    assert numbers.number(f"{largest - 1:064x}") == largest
    assert numbers.number(f"{2 * largest - 1:064x}") == 1  # the next free one is at the other end
    assert numbers.number("0" * 64) == 2
