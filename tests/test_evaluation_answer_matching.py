"""Answer matching: whole words, forms of writing, scripts."""

from __future__ import annotations

import pytest

from goldenlayers.evaluation.generation import matches_answer, normalise_answer


@pytest.mark.parametrize(
    ("continuation", "answer"),
    [
        ("Paris", "Paris"),
        (" Paris, the capital of France.", "Paris"),
        ("\n\n  PARIS\n", "paris"),
        ('"Paris" is', "Paris"),
        ("**Paris**", "Paris"),
        ("Paris's mayor", "Paris"),
        ("Paris.It is", "Paris"),
        ("Paris—the city", "Paris"),
        ("the Beatles", "Beatles"),
        ("Beatles", "The Beatles"),
        ("United  States of\u00a0America", "United States"),
        ("the US.", "U.S."),
        ("U.S. president", "US"),
        ("J.K. Rowling wrote", "JK Rowling"),
        ("St Louis", "St. Louis"),
        ("O’Brien", "O'Brien"),
        ("McDonald's is", "McDonald’s"),
        ("1,000,000 people", "1000000"),
        ("3.14.", "3.14"),
        ("1969.", "1969"),
        ("-5 degrees", "\u22125"),
        ("Jean Paul Sartre", "Jean-Paul Sartre"),
        ("Jean-Paul Sartre", "Jean Paul Sartre"),
        ("Guinea-Bissau, in Africa", "Guinea-Bissau"),
        ("C++ and", "C++"),
        ("$5 million", "$5"),
        ("ＰＡＲＩＳ", "Paris"),
        ("ﬁnance", "finance"),
        ("Zu\u0308rich", "Z\u00fcrich"),
        ("São Paulo", "são paulo"),
        ("STRASSE", "Straße"),
        ("A is the vitamin", "A"),
        ("The The were a band", "The The"),
        ("?!", "?"),
        ("東京です。", "東京"),
        ("パリです", "パリ"),
        ("กรุงเทพมหานคร", "กรุงเทพ"),
        ("दिल्ली में", "दिल्ली"),
        ("서울, 한국", "서울"),
        ("\u200fالقاهرة، مصر", "القاهرة"),
        ("القاهـــرة", "القاهرة"),
        ("תל אביב", "תל־אביב"),
        ("Москва.", "москва"),
    ],
)
def test_matches(continuation: str, answer: str):
    assert matches_answer(continuation, answer)


@pytest.mark.parametrize(
    ("continuation", "answer"),
    [
        ("Parish", "Paris"),
        ("Parisian food", "Paris"),
        ("in Paris", "Paris"),
        ("not Paris", "Paris"),
        ("Par", "Paris"),
        ("", "Paris"),
        ("...", "Paris"),
        ("Guinea-Bissau", "Guinea"),
        ("York", "New York"),
        ("New", "New York"),
        ("3.14", "3"),
        ("31", "3"),
        ("5 degrees", "-5"),
        ("5 million", "$5"),
        ("C++", "C"),
        ("C# and", "C"),
        ("Sao Paulo", "São Paulo"),
        ("京都", "東京"),
        ("パリス", "パリ"),
        ("दिल्लीवाला", "दिल्ली"),
        ("दिल", "दिल्ली"),
        ("ارہاب", "القاهرة"),
        ("x", "?"),
    ],
)
def test_does_not_match(continuation: str, answer: str):
    assert not matches_answer(continuation, answer)


def test_aliases():
    assert matches_answer("Sao Paulo", "São Paulo", ["Sao Paulo"])
    assert not matches_answer("Sao Paulo", "São Paulo", [])
    assert not matches_answer("anything", "São Paulo", ["", " "])
    with pytest.raises(TypeError, match="one string"):
        matches_answer("S", "São Paulo", "Sao Paulo")


def test_normalised_words():
    assert normalise_answer("The U.S. of A-Z, isn't  a 1,024.5 test!") == (
        ["us", "of", "-", "z", "isnt", "1024.5", "test"]
    )
    assert normalise_answer(" .,; ") == []
    for text in ("Jean-Paul's Café", "東京 Tower", "القاهرة"):
        once = " ".join(normalise_answer(text))
        assert [w for w in normalise_answer(once) if w != "-"] == (
            [w for w in normalise_answer(text) if w != "-"]
        )
