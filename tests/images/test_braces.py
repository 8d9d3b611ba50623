import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import DatasetError
from amradio.images.braces import expand_braces

BASH = shutil.which("bash")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("shard-{0000..0003}.tar", ["shard-0000.tar", "shard-0001.tar", "shard-0002.tar", "shard-0003.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,{b,c}x}", ["a", "bx", "cx"]),
        ("{x{1,2}}", ["{x1}", "{x2}"]),
        ("{}", ["{}"]),
        ("{x}{a,b}", ["{x}a", "{x}b"]),
        ("{a,b", ["{a,b"]),
        ("a}{b,c}", ["a}b", "a}c"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(pattern, expected):
    assert expand_braces(pattern) == expected
    if BASH:
        shown = subprocess.run([BASH, "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines() == expected


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 5))
def test_ranges_count_up_or_down_with_a_width(a, b, width):
    words = expand_braces(f"s{{{a:0{width}d}..{b:0{width}d}}}.tar")
    numbers = [int(w[1:-4]) for w in words]
    assert numbers == list(range(a, b + 1) if a <= b else range(a, b - 1, -1))
    assert all(len(w) - 5 >= width for w in words)


@given(st.lists(st.lists(st.text("ab01-", min_size=0, max_size=3), min_size=2, max_size=3), min_size=1, max_size=4))
def test_lists_are_products_in_order(groups):
    import itertools

    pattern = "/".join("{" + ",".join(words) + "}" for words in groups)
    assert expand_braces(pattern) == ["/".join(words) for words in itertools.product(*groups)]


@given(st.text(st.characters(exclude_characters="{}"), max_size=30))
def test_texts_without_braces_stay(text):
    assert expand_braces(text) == [text]


def test_too_many_names_are_refused():
    with pytest.raises(DatasetError, match=r"stand for 9,999,999 names, more than 1,000,000\."):
        expand_braces("{1..9999999}")
    with pytest.raises(DatasetError, match=r"stand for 100,000,000 names"):
        expand_braces("{1..10000}{1..10000}")
