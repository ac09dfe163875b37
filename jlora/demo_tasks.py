"""The tasks of the demo model: one for the base and one for each demo adapter.

All tasks read the same kind of input, one or two lower-case words, and each
writes something else. This file needs only the standard library, so that
tests and examples can compute the right answer without loading a model.
"""

import codecs
import random
from collections.abc import Callable
from dataclasses import dataclass

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"

#: What follows the input in a prompt. The answer comes right after it.
SEPARATOR = " ="


def prompt(text: str) -> str:
    """The prompt that asks the model to work on `text`."""
    return text + SEPARATOR


def sample_words(rng: random.Random) -> str:
    """Draw one or two random words of three to eight letters.

    Vowels are drawn more often than other letters, as in real words; this
    also gives the tasks enough repeated letters. Each word has a consonant,
    so that no answer is empty.
    """
    return " ".join(_sample_word(rng) for _ in range(rng.randint(1, 2)))


def _sample_word(rng: random.Random) -> str:
    kinds = [CONSONANTS] + [
        VOWELS if rng.random() < 0.45 else CONSONANTS for _ in range(rng.randint(2, 7))
    ]
    rng.shuffle(kinds)
    return "".join(rng.choice(kind) for kind in kinds)


@dataclass(frozen=True)
class Task:
    """One thing to do with a text."""

    name: str
    description: str
    answer: Callable[[str], str]
    sample: Callable[[random.Random], str] = sample_words


def _echo(text: str) -> str:
    return text


def _upper(text: str) -> str:
    return text.upper()


def _reverse(text: str) -> str:
    return text[::-1]


def _sort(text: str) -> str:
    return " ".join("".join(sorted(word)) for word in text.split(" "))


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _count_vowels(text: str) -> str:
    return str(sum(letter in VOWELS for letter in text))


def _drop_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in VOWELS)


def _double(text: str) -> str:
    return "".join(letter if letter == " " else letter * 2 for letter in text)


def _title(text: str) -> str:
    return text.title()


#: What the base model does without an adapter.
BASE_TASK = Task("echo", "repeat the text", _echo)

#: What each adapter does; the adapter has the name of its task.
ADAPTER_TASKS = (
    Task("upper", "write the text in upper case", _upper),
    Task("reverse", "write the text backwards", _reverse),
    Task("sort", "sort the letters of each word", _sort),
    Task("rot13", "move each letter 13 places in the alphabet", _rot13),
    Task("count-vowels", "count the vowels", _count_vowels),
    Task("drop-vowels", "leave out the vowels", _drop_vowels),
    Task("double", "write each letter twice", _double),
    Task("title", "write the first letter of each word in upper case", _title),
)

#: All tasks by name.
TASKS = {task.name: task for task in (BASE_TASK, *ADAPTER_TASKS)}
