"""Text from tokens as they come: whole characters only, and stop strings across tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jlora.engine.detokenizer import Detokenizer
from tests.engine.tools import make_tokenizer

TOKENIZER = make_tokenizer()
# Characters of one to four bytes, joined and combined ones, and what a cut character looks like.
LETTERS = st.sampled_from(
    [*"ab e\n", "é", "e\u0301", "東", "京", "🙂", "👩‍👩‍👧", "🇫🇷", "\u0301", "क्षि"]
)
TEXT = st.lists(LETTERS | st.characters(exclude_categories=("Cs",)), max_size=30).map("".join)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def feed(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    """The text after each token, and after the end; stops at a stop string."""
    texts = []
    for token in tokens:
        stopped = detokenizer.add(token)
        texts.append(detokenizer.text)
        if stopped:
            break
    detokenizer.finish()
    return [*texts, detokenizer.text]


@given(TEXT)
def test_text_grows_by_whole_characters_to_what_the_tokenizer_decodes(text):
    texts = feed(Detokenizer(TOKENIZER, []), encode(text))
    assert texts[-1] == text
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)


@given(TEXT.filter(lambda text: "\ufffd" not in text))
def test_no_text_in_between_ends_in_half_a_character(text):
    texts = feed(Detokenizer(TOKENIZER, []), encode(text))
    assert not any("\ufffd" in one for one in texts)


@given(TEXT, TEXT)
def test_prompt_is_context_and_not_text(prompt, answer):
    assert feed(Detokenizer(TOKENIZER, encode(prompt)), encode(answer))[-1] == answer


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_any_tokens_give_what_the_tokenizer_decodes(tokens):
    assert feed(Detokenizer(TOKENIZER, []), tokens)[-1] == decode(tokens)


def test_special_tokens_are_skipped_or_not():
    tokens = [1, *encode("one"), 2, *encode(" two")]
    assert feed(Detokenizer(TOKENIZER, []), tokens)[-1] == "one two"
    kept = Detokenizer(TOKENIZER, [], skip_special_tokens=False)
    assert feed(kept, tokens)[-1] == "<s>one</s> two"


def test_space_before_a_word_survives_a_skipped_special_token():
    """A tokeniser of the Llama 2 kind drops the space of the first word that it decodes."""
    words = {"<unk>": 0, "</s>": 1, "▁one": 2, "▁two": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    detokenizer = Detokenizer(tokenizer, [])
    assert feed(detokenizer, [2, 1, 3, 1, 1, 2])[-1] == "one two one"


# -- stop strings ------------------------------------------------------------------------------


@given(
    st.text("ab東", max_size=14),
    st.lists(st.text("ab東", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_strings_as_a_search_after_each_token_finds_them(text, stops, include):
    # One token a byte, so that stop strings lie across tokens.
    tokens = [token for letter in text for token in encode(letter)]
    expected, matched = text, None
    for count in range(len(tokens) + 1):
        known = decode(tokens[:count])
        found = [(known.find(stop), stop) for stop in stops if stop in known]
        if found and not known.endswith("\ufffd"):
            at, matched = min(found)
            expected = known[: at + len(matched) if include else at]
            break
    detokenizer = Detokenizer(TOKENIZER, [], tuple(stops), include)
    assert feed(detokenizer, tokens)[-1] == expected
    assert detokenizer.matched == matched


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_safe_text_is_never_taken_back(text, stops):
    detokenizer = Detokenizer(TOKENIZER, [], tuple(stops))
    safe = []
    for token in encode(text):
        stopped = detokenizer.add(token)
        if stopped:
            break
        safe.append(detokenizer.text[: detokenizer.safe_length])
    detokenizer.finish()
    assert all(detokenizer.text.startswith(one) for one in safe)


def test_all_text_is_safe_without_stop_strings():
    detokenizer = Detokenizer(TOKENIZER, [])
    for token in encode("the dog"):
        detokenizer.add(token)
        assert detokenizer.safe_length == len(detokenizer.text)


@pytest.mark.parametrize(
    ("stops", "include", "text", "matched"),
    [
        (("dog",), False, "the ", "dog"),
        (("dog",), True, "the dog", "dog"),
        (("og a", "dog"), False, "the ", "dog"),  # complete first
        (("dog", "do"), False, "the ", "do"),  # the shorter one of two that begin together
        (("cat",), False, "the dog and", None),
    ],
)
def test_stop_string(stops, include, text, matched):
    detokenizer = Detokenizer(TOKENIZER, [], stops, include)
    tokens = [token for letter in "the dog and" for token in encode(letter)]
    assert feed(detokenizer, tokens)[-1] == text
    assert detokenizer.matched == matched


def test_stop_string_in_one_token_with_text_around_it():
    """A token of several letters: what follows the stop string in it is cut."""
    tokens = encode("the dogs")
    assert len(tokens) < len("the dogs") - 2
    detokenizer = Detokenizer(TOKENIZER, [], ("he d",))
    assert feed(detokenizer, tokens)[-1] == "t"


def test_stop_strings_before_min_tokens_do_not_count():
    detokenizer = Detokenizer(TOKENIZER, [], ("a",))
    first, second, third = encode("a"), encode("b"), encode("a")
    assert not detokenizer.add(*first, search=False)
    assert not detokenizer.add(*second)
    assert detokenizer.add(*third)
    assert detokenizer.text == "ab"
