import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from amradio.images.names import Digests, Names, unique_stems

any_text = st.text(st.characters(codec=None), max_size=20)  # also lone surrogates, as file names may have


@given(st.lists(any_text))
def test_names_are_a_list(texts):
    names = Names(texts)
    assert list(names) == texts
    assert len(names) == len(texts)
    assert names[1:3] == texts[1:3]
    if texts:
        assert names[-1] == texts[-1]


def test_names_take_little_memory():
    texts = [f"n01440764/n01440764_{i:06d}.JPEG" for i in range(10_000)]
    names = Names(texts)
    taken = sys.getsizeof(names._text) + sys.getsizeof(names._ends)
    assert taken < 1.3 * sum(len(t) + 8 for t in texts)


@given(st.lists(st.sampled_from("abcdefgh")))
def test_repeated_texts_are_found(texts):
    digests = Digests()
    for t in texts:
        digests.append(t)
    before, several = digests.repeated()
    np.testing.assert_array_equal(before, [t in texts[:i] for i, t in enumerate(texts)])
    np.testing.assert_array_equal(several, [texts.count(t) > 1 for t in texts])


def test_stems_have_folders_only_where_needed():
    assert unique_stems(["a/x-0.tar", "b/x-1.tar"]) == ["x-0", "x-1"]
    assert unique_stems(["r/a/0000.tar", "r/b/0000.tar"]) == ["a/0000", "b/0000"]
    assert unique_stems(["r/0.tar"]) == ["0"]
