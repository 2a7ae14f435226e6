from collections import Counter

import pytest

from moe.data.sources.interface import (
    merge,
    read_catalogue,
    read_catalogues,
    read_manuals,
    without_access_key,
)
from moe.data.sources.language import words
from moe.data.sources.types import split_of
from moe.errors import DataError
from tests.data.sources.tiny_packages import build, catalogue, members

MO = "usr/lib/libreoffice/program/resource/de/LC_MESSAGES/a.mo"
HELP = "usr/share/help/"


def page(
    *blocks: str, info: str = "<info><desc>Say</desc><credit><name>x</name></credit></info>"
) -> bytes:
    body = "".join(blocks)
    return f'<page xmlns="http://projectmallard.org/1.0/" id="a">{info}{body}</page>'.encode()


def packages(n: int = 120):
    messages = {"": "Content-Type: text/plain", "ctx\x04~File": "~Datei", "Same": "Same"}
    messages |= {f"Word {chr(65 + i % 26)}{i}": f"Wort {i}" for i in range(n)}
    messages |= {"Word A0...": "Wort 0 …", "%n file\0%n files": "%n Datei\0%n Dateien", "Un": ""}
    english = page("<title>Open <gui>it</gui></title><section><p>All\n of it.</p></section>")
    german = page("<title>Öffne <gui>es</gui></title><section><p>Alles.</p></section>")
    pages = {
        f"{HELP}C/h/a.page": english,
        f"{HELP}de/h/a.page": german,
        f"{HELP}C/h/b.page": english,
    }
    pages |= {f"{HELP}C/h/c.page": page("<p>One</p>"), f"{HELP}de/h/c.page": page("<list/>")}
    return {"libreoffice-l10n-de": {MO: catalogue(messages)}, "gnome-user-docs": pages}


def test_pairs(tmp_path):
    splits = build("interface_en_de", packages(), tmp_path)
    pairs = {e["source"]: e["target"] for part in splits.values() for e in part}
    assert sum(map(len, splits.values())) == len(pairs) == 120 + 1 + 1 + 1 + 2
    wanted = {"File": "Datei", "%n file": "%n Datei", "Open it": "Öffne es", "All of it.": "Alles."}
    assert pairs == wanted | {f"Word {chr(65 + i % 26)}{i}": f"Wort {i}" for i in range(120)} | {
        "Word A0...": "Wort 0 …"
    }
    for split, part in splits.items():
        assert part
        assert all(split_of(words(e["source"])) == split for e in part)
        assert {e["domain"] for e in part} == {"en-de"}


def test_chinese_reads_its_own_folder(tmp_path):
    files = packages()
    pages = {
        name.replace("/de/", "/zh_CN/"): data for name, data in files["gnome-user-docs"].items()
    }
    renamed = {"libreoffice-l10n-zh-cn": files["libreoffice-l10n-de"], "gnome-user-docs": pages}
    splits = build("interface_en_zh", renamed, tmp_path)
    pairs = {e["source"]: e["domain"] for part in splits.values() for e in part}
    assert pairs["All of it."] == "en-zh"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("~Open", "Open"),
        ("E_xit", "Exit"),
        ("打开(~O)...", "打开..."),
        ("添加(A)", "添加"),
        ("编辑(E):", "编辑:"),
        ("简称(_S)", "简称"),
        ("Größe (A)", "Größe (A)"),
        ("角度(A) 以上", "角度(A) 以上"),
        ("snake_case_name", "snake_case_name"),
        ("underscore ( _ )", "underscore ( _ )"),
        ("Vitamin (A)", "Vitamin (A)"),
    ],
)
def test_access_keys(text, plain):
    assert without_access_key(text) == plain


def test_words_join_variants():
    assert words("Open...") == words("open:") == words("OPEN") == "open"
    assert words(" ... ") == "..."


def test_merge_keeps_the_first_and_counts():
    skipped = Counter()
    pairs = [("a", "b"), ("a", "c"), ("d", "d"), ("e", ""), ("", "f")]
    assert merge(iter(pairs), iter([("a", "z"), ("g", "h")]), skipped=skipped) == {
        "a": "b",
        "g": "h",
    }
    assert skipped == {
        "English texts met before": 2,
        "equal to their translation": 1,
        "not translated or empty": 2,
    }


@pytest.mark.parametrize("order", "<>")
def test_catalogue_of_both_byte_orders(order):
    assert [*read_catalogue(catalogue({"a": "ä", "b": ""}, order), "x.mo")] == [
        ("a", "ä"),
        ("b", ""),
    ]


def test_catalogue_truncated_at_every_byte():
    whole = catalogue({"a": "one", "b": "two"})
    for end in range(len(whole) - 1):  # the very last byte is a terminator
        with pytest.raises(DataError, match=r"x\.mo"):
            [*read_catalogue(whole[:end], "x.mo")]


def test_bad_catalogues():
    with pytest.raises(DataError, match="no message catalogue"):
        [*read_catalogue(b"\0" * 40, "x.mo")]
    data = catalogue({"a": "b", "c": "d"}).replace(b"d\0", b"\xff\0")
    with pytest.raises(DataError, match="message 2 of 2 is not UTF-8"):
        [*read_catalogue(data, "x.mo")]
    with pytest.raises(DataError, match="no message catalogues"):
        [*read_catalogues({}, Counter())]


def test_manuals_are_counted():
    skipped = Counter()
    files = members(packages()["gnome-user-docs"])
    assert [*read_manuals(files, "de", skipped)] == [
        ("Say", "Say"),
        ("Open it", "Öffne es"),
        ("All of it.", "Alles."),
    ]
    assert skipped == {"pages not translated": 1, "pages with other elements": 1}


def test_bad_manuals():
    with pytest.raises(DataError, match="no pages"):
        [*read_manuals({}, "de", Counter())]
    files = members({f"{HELP}C/a.page": b"<page>", f"{HELP}de/a.page": b"<page/>"})
    with pytest.raises(DataError, match=r"C/a\.page is no XML"):
        [*read_manuals(files, "de", Counter())]
