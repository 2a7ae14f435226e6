import subprocess
import sys

import pytest

from moe.data.sources.name_cloze import (
    BLANK,
    CONTEXT,
    find_names,
    make_questions,
    read_questions,
    sentences,
)
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, members, r_database, r_strings

FILE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CAST = ("Emma", "Frank", "Jane", "Harriet", "Robert", "Isabella")


def novel(cast=CAST, number=60) -> list[str]:
    """Lines of a novel: each sentence has a name, the cast in turn, and a number word of its own."""
    lines = ["TITLE", "", "Chapter 1", ""]
    for i in range(number):
        lines += [f"On day {'i' * (i + 1)} the", f"visit of {cast[i % len(cast)]} was short.", ""]
    return lines


def database(**novels: list[str]) -> dict[str, bytes]:
    texts = [[title.replace("_", " "), *lines[1:]] for title, lines in novels.items()]
    return {FILE: r_database(*(r_strings(lines) for lines in texts))}


def test_question():
    text = "\n".join(novel())
    questions = [*make_questions(text, "emma")]
    assert [question.number for question in questions] == [*range(CONTEXT, 61)]  # 0 is the title
    first = questions[0]
    context, question = first.source.split("\n")[:-1], first.source.split("\n")[-1]
    assert context == [*sentences(text)][:CONTEXT]
    assert question == f"On day {'i' * 20} the visit of {BLANK} was short."
    assert first.answer == CAST[(CONTEXT - 1) % 6]
    assert sorted(first.candidates) == sorted(CAST)


def test_the_answer_is_in_the_context_and_not_in_the_question():
    text = (
        "\n".join(novel())
        + "\n\nNow, Emma said: Emma and Jane knew that Emma was Emma's own Emmanuel."
    )
    last = [*make_questions(text, "emma")][-1]
    asked = last.source.split("\n")[-1]
    expected = {
        "Emma": "Now, X said: X and Jane knew that X was X's own Emmanuel.",
        "Jane": "Now, Emma said: Emma and X knew that Emma was Emma's own Emmanuel.",
    }
    assert asked == expected[last.answer].replace("X", BLANK)
    assert last.answer in "\n".join(last.source.split("\n")[:-1])


def test_too_few_candidates():
    assert [*make_questions("\n".join(novel(CAST[:5])), "emma")] == []
    assert [*make_questions("\n".join(novel(number=CONTEXT - 1)), "emma")] == []


def test_a_name_that_the_context_lacks_is_not_asked_for():
    text = "\n".join(novel()) + "\n\nThen came the Tilney of Tilney and a Tilney."
    assert "Tilney" in find_names(sentences(text))
    assert [*make_questions(text, "emma")][-1].number == 60


def test_names():
    listed = [
        "Then Miss Bates saw Mrs. Elton, and Mr. Weston saw Captain Weston in May.",
        "We told Emma that Miss Emma, or Emma, may go to Bath, and bath there in May.",
        "The Bath of Bath, and Mrs. Elton, and Mrs. Elton. Of May, Miss Bates and Miss Weston.",
        "Once seen: Knightley twice, Knightley.",
    ]
    assert find_names(listed) == {"Elton", "Weston", "Emma"}


def test_sentences():
    text = 'CHAPTER IV\n\nMr. Elton\ncame. "Oh!" said Mrs. Bates.\n\nVOLUME II\n\nWho? (He.) No one'
    assert [*sentences(text)] == [
        "Mr. Elton came.",
        '"Oh!"',
        "said Mrs. Bates.",
        "Who?",
        "(He.)",
        "No one",
    ]


def test_whole_novels_are_held_out_and_contexts_stay_inside(tmp_path):
    others = ("Anne", "Walter", "Mary", "Louisa", "Charles", "Henrietta")
    files = database(EMMA=novel(), PERSUASION=novel(others), NORTHANGER_ABBEY=novel(CAST[::-1], 40))
    splits = build("name_cloze", {"r-cran-janeaustenr": files}, tmp_path)
    assert {split: {e["domain"] for e in part} for split, part in splits.items()} == {
        "train": {"emma"},
        "valid": {"northanger_abbey"},
        "test": {"persuasion"},
    }
    sizes = {split: len(part) for split, part in splits.items()}
    assert sizes == {"train": 41, "valid": 21, "test": 41}
    assert not {e["target"] for e in splits["test"]} & set(CAST)
    for part in splits.values():
        for e in part:
            assert e["target"] in e["candidates"].split("|")
            assert e["source"].count("\n") == CONTEXT
            assert e["source"].count(BLANK) == 1


def test_a_novel_without_questions_is_named():
    with pytest.raises(DataError, match="'emma' has no sentence to ask about"):
        read_questions(members(database(EMMA=novel(number=10))))


def test_same_in_another_process():
    """The choice among several names is no salted hash."""
    code = (
        "from moe.data.sources.name_cloze import make_questions as make\n"
        "from tests.data.sources.test_name_cloze import pairs\n"
        "print([q.answer for q in make(pairs(), 'emma')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [question.answer for question in make_questions(pairs(), "emma")]
    assert run.stdout.strip() == str(here)
    assert len(set(here)) > 2


def pairs() -> str:
    """A novel with two names a sentence."""
    return "\n\n".join(
        f"On day {i} it was {CAST[i % 6]} with {CAST[(i + 1) % 6]}." for i in range(60)
    )
