from __future__ import annotations

from hf_shrink.calibration.overlap import SHINGLE, OverlapFilter

A = "The harbour was empty before noon, and the boats that had gone out in the dark were not expected until evening."
B = "Nobody in the village remembered who had planted the pear trees along the wall of the old school house."


def naive_overlap(text: str, excluded: str) -> bool:
    """The definition, without hashes."""
    one, other = " ".join(text.lower().split()), " ".join(excluded.lower().split())
    if len(one) < SHINGLE:
        return one in other
    return any(one[i : i + SHINGLE] in other for i in range(len(one) - SHINGLE + 1))


def test_matches_the_definition_on_texts_that_share_more_and_less_than_a_shingle():
    for start in range(0, len(A) - 10, 7):
        for length in (SHINGLE - 1, SHINGLE, SHINGLE + 1, 80):
            text = "xyz " + A[start : start + length] + " zyx"
            assert OverlapFilter([B, A]).overlaps(text) == naive_overlap(text, A), (start, length)


def test_case_and_white_space_do_not_hide_an_overlap():
    assert OverlapFilter([A]).overlaps(A.upper().replace(" ", " \n "))


def test_nothing_excluded_and_nothing_in_the_text_drop_nothing():
    assert not any(map(OverlapFilter([]).overlaps, (A, "")))
    assert not OverlapFilter([A]).overlaps("  ")
    assert not OverlapFilter([A[:20]]).overlaps(A)


def test_a_text_shorter_than_a_shingle_overlaps_when_it_is_contained():
    assert OverlapFilter([A, B]).overlaps(A[20:45])
    assert not OverlapFilter([A, B]).overlaps(A[20:44] + "!")


def test_scripts_with_long_utf8_are_counted_in_characters():
    text = "\u6d77" * (SHINGLE - 1)
    assert not OverlapFilter([text + "a"]).overlaps(text + "b")
    assert OverlapFilter([text + "ab"]).overlaps(text + "ac")
