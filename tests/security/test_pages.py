"""Pages of hostile names and texts have the elements and attributes of clean ones, and no other."""

from collections import Counter
from html.parser import HTMLParser
import json
import re

import pytest

from moe.report import write_report
from moe.sweep import comparison_report, comparison_table, report
from moe.sweep.arms import Arm, Comparison
from moe.sweep.comparison_table import Row as ArmRow
from moe.sweep.space import Sweep
from moe.sweep.table import Interval, Row
from tests.report.fake_run import write_run

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end": "</script><img src=x onerror=alert(1)>",
    "comment": "<!--<script>",
    "quotes": "\"' onmouseover='alert(1)' x=\"",
    "entity": "&lt;script&gt;&#60;b&#62;",
    "controls": "a\x00b\x1b[31m\x08\x7f\u0085",
    "lines": "a\u2028b\u2029c\r\nd",
    "directions": "\u202egnp.exe\ufeff\u200b",
    "template": "{{ 7*7 }}{% raw %}${x}`",
    "plotly": '<a href="javascript:alert(1)">x</a><br><b>y</b>',
    "url": "javascript:alert(1)//",
    "long": "<x>" * 4000,
}
# One page of all of them for every push; a page each under `slow`.
KINDS = {"together": " ".join(HOSTILE.values())} | HOSTILE


class Page(HTMLParser):
    """What a browser would make of a page: elements with the names of their attributes, and scripts."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: Counter = Counter()
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements[tag, tuple(sorted(name for name, _ in attrs))] += 1
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert not (value or "").strip().lower().startswith("javascript:")
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = self._script and tag != "script"

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text.append(data)

    def handle_comment(self, data):
        self.elements["comment", ()] += 1


def rename(value, names):
    """The same JSON with other texts: in keys, in values, everywhere."""
    if isinstance(value, dict):
        return {names.get(key, key): rename(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [rename(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value


def run_page(folder, text):
    """The report of a run whose domains, tokens, config, versions and scores are called `text`."""
    workdir = write_run(folder / "run", steps=40, layers=2, experts=3, domains=("code", "prose"))
    names = dict.fromkeys(("code", "grouped", "0.10.2", "f1", "noise:2", "sparse", "image"), text)
    names |= {"jax": text, "accuracy": text, "topk": text, "bytes": text}
    for path in (workdir / "config.json", workdir / "eval" / "valid-40.json"):
        record = rename(json.loads(path.read_text()), names)
        if "sample" in record:
            record["sample"]["tokens"] = [text, *record["sample"]["tokens"][1:]]
            record["favourites"][0][0] = [[text, 3, 2.0]]
        path.write_text(json.dumps(record))
    record["metrics"] |= {"perplexity": text, "routing/path_entropy": text}
    record["model"]["parameters_total"] = text
    # Of a split called `text`, as far as a file can be; what cannot be read is named in a notice.
    called = re.sub("[/\0\n]", "", text).encode()[:200].decode(errors="ignore")
    (workdir / "eval" / f"{called}-40.json").write_text(json.dumps(record))
    (workdir / "eval" / "valid-40.json").write_text(json.dumps(record))
    (workdir / "eval" / f"{called}!-40.json").write_text("{")
    lines = (workdir / "metrics.jsonl").read_text().replace('"valid"', json.dumps(text))
    (workdir / "metrics.jsonl").write_text(lines)
    return write_report(workdir.rename(folder / called))


def sweep_page(folder, text):
    sweep = Sweep(
        name=text,
        base=text,
        overrides={text: text},
        space={},
        sampler="grid",
        points=2,
        pruner="none",
        seeds=(0, 1),
        metric=text,
        split=text,
        direction="minimize",
        sampler_seed=0,
        steps=2,
        evaluate_every=1,
    )
    sweep = sweep._replace(space=dict.fromkeys((text, "router.k")))
    curve = [[1, 2.0], [2, 1.5]]
    rows = [
        Row(n, "complete", {text: text, "router.k": n}, {0: 1.5, 1: 1.6}, Interval(1.5, 0.1),
            {0: curve, 1: curve}, text)
        for n in range(3)
    ]  # fmt: skip
    return report.write_sweep_report(folder, sweep, rows)


def comparison_page(folder, text):
    settings = {"model": {"num_experts": 4}, "checkpoint": {"every": 1}, "steps": 2}
    settings["data"] = {"batch_size": 1, "sequence_length": 2, "weights": {text: 1.0}}
    arms = [Arm(f"{text}{n}", text, {text: text}, text, text, "C1", settings) for n in range(3)]
    comparison = Comparison(text, text, tuple(arms), arms[0].name, (0, 1), "language", text, text)
    means = dict.fromkeys((key for key, *_ in comparison_table.COLUMNS), 1.0) | dict.fromkeys(
        comparison_table.CSV_MEANS, 2.0
    )
    one = Interval(1.5, 0.1)
    rows = [ArmRow(arm, "complete", {0: 1.5, 1: 1.6}, one, one, one, means, text) for arm in arms]
    rows[2] = rows[2]._replace(state="failed")
    return comparison_report.write_comparison_report(
        folder, comparison, rows, command=text, workers=2
    )


WRITERS = {"comparison": comparison_page, "run": run_page, "sweep": sweep_page}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return {
        name: Page(write(tmp_path_factory.mktemp(name), "plain").read_text(encoding="utf-8"))
        for name, write in WRITERS.items()
    }


@pytest.mark.parametrize(
    "kind",
    [k if k == "together" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
@pytest.mark.parametrize("writer", WRITERS)
def test_no_text_becomes_an_element(tmp_path, clean, writer, kind):
    text = KINDS[kind]
    found = Page(WRITERS[writer](tmp_path, text).read_text(encoding="utf-8"))
    assert found.elements == clean[writer].elements
    for script in found.scripts[1:]:  # the first is plotly.js itself
        assert "</" not in script.lower()
        assert "<!--" not in script
        assert not re.search("[\u2028\u2029]", script)
        labels = script.replace("\\u003c", "<").replace("\\u003e", ">")  # as plotly reads them
        assert "<a href" not in labels
        assert "<img" not in labels


def test_the_parser_would_see_it():
    assert Page("<p>x</p>").elements != Page("<p>x<b>y</b></p>").elements
    with pytest.raises(AssertionError):
        Page("<p onclick=x>")
    with pytest.raises(AssertionError):
        Page("<a href=' JavaScript:x'>")
