from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.text import canonicalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A photo of a cat.", "a photo of a cat"),
        ("ice_cream", "ice cream"),
        ("  two\tlines\nof  TEXT ", "two lines of text"),
        ("jack-o'-lantern", "jackolantern"),
        ("a_b__c", "a b c"),
        ("¿Dónde está? 50%", "¿dónde está 50"),
        ("ÄÖÜ ΑΒΓ", "äöü αβγ"),
        ("«voilà»…", "«voilà»…"),  # only ASCII punctuation goes
        ("!?.,", ""),
        ("", ""),
    ],
)
def test_cases(text: str, expected: str) -> None:
    assert canonicalize(text) == expected


@given(st.text())
def test_canonical_text_stays_as_it_is(text: str) -> None:
    once = canonicalize(text)
    assert canonicalize(once) == once


@given(st.text(alphabet=string.printable))
def test_ascii_result_has_only_words_with_single_spaces(text: str) -> None:
    words = canonicalize(text).split(" ")
    assert not set("".join(words)) & set(string.punctuation + string.ascii_uppercase + string.whitespace)
    assert words == [""] or all(words)
