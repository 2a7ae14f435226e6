import json
import math
import re

import numpy as np
import pytest

from moe.errors import DataError
from moe.report import figures, kinds, page, specialisation, triad, write_report
from moe.report.records import Series, last, read_metrics, read_run, series
from moe.report.summary import expert_colors
from tests.report.fake_run import write_run

SECTIONS = (
    *("Learning", "Speed", "Load", "Balance and confidence", "Who takes what"),
    *("How experts specialise", "Routing in numbers"),
)
SPECIALISATION = (
    *("What choices tell", "Vocabulary", "Similarity of experts"),
    *("Saturation", "Churn", "Co-activation", "Expert by domain", "Preference for a domain"),
    *("Expert by modality", "Preference for a modality", "Favourite tokens"),
    *("What an expert tells about the domain", "What an expert tells about the modality"),
    *("Accuracy, valid", "Cost, valid", "Generalisation, valid"),
)
HOSTILE = "<img src=x onerror=alert(1)>"


def own_text(html: str) -> str:
    """The page without plotly.js, which is the first script."""
    head, _, rest = html.partition("<script>")
    return head + rest.partition("</script>")[2]


@pytest.fixture(scope="module")
def sparse_page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "sparse"))


def test_sparse_page_is_whole_and_self_contained(sparse_page):
    html = sparse_page.read_text()
    assert sparse_page.name == "report.html"
    assert not list(sparse_page.parent.glob("*.tmp"))
    assert len(html) < 6e6
    assert html.count("plotly.js v") == 1
    text = own_text(html)
    for section in (*SECTIONS, "Text by expert", "Evaluations", "Config"):
        assert f"<h2>{section}</h2>" in text
    for plot in SPECIALISATION:
        assert f"<h3>{plot}</h3>" in text
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", text)
    assert "3,412,992" in text  # total parameters


def test_many_experts_fit_the_page(tmp_path):
    domains = ("code", "prose", "web")
    workdir = write_run(tmp_path / "big", layers=24, experts=128, steps=1000, domains=domains)
    assert write_report(workdir).stat().st_size < 6.5e6


def test_everything_from_outside_is_escaped(tmp_path):
    workdir = write_run(tmp_path / HOSTILE.replace("/", ""), domains=(HOSTILE, "</script><b>"))
    config = json.loads((workdir / "config.json").read_text())
    config["config"]["data"]["name"] = "</pre>" + HOSTILE
    config["commit"] = HOSTILE
    (workdir / "config.json").write_text(json.dumps(config))
    path = workdir / "eval" / "valid-400.json"
    record = json.loads(path.read_text())
    record["sample"]["tokens"][:3] = [HOSTILE, "</script>", "</span>"]
    record["favourites"][0][0][0][0] = "</code><b>"
    record["modality_load"] = {HOSTILE: record["modality_load"]["text"]}
    record["triad"]["generalisation"] = {"</td>" + HOSTILE: {HOSTILE: {"value": 1.0}}}
    path.write_text(json.dumps(record))
    text = own_text(write_report(workdir).read_text())
    assert HOSTILE not in text
    assert "<img" not in text
    assert "</script><b>" not in text
    assert "<span>&lt;/script&gt;</span>" in text
    assert "<code>&lt;/code&gt;&lt;b&gt;</code>" in text
    assert "&lt;/td&gt;&lt;img" in text
    # plotly reads tags in labels, so they reach it as entities inside JSON
    assert "\\u0026lt;img" in text or "&lt;img src=x onerror=alert(1)&gt;" in text


def test_kind_maps_have_a_layer_at_a_time_with_kinds_for_rows():
    shares = {"text": np.array([[0.75, 0.25], [0.5, 0.5]]), "image": np.array([[0.25, 0.75]] * 2)}
    share = figures.kind_maps(shares, "share")
    assert [trace.visible for trace in share.data] == [True, False]
    np.testing.assert_allclose(share.data[1].z, [[0.5, 0.5], [0.25, 0.75]])
    assert list(share.data[0].y) == ["text", "image"]
    assert [b.label for b in share.layout.updatemenus[0].buttons] == ["layer 0", "layer 1"]
    lift = figures.kind_maps(shares, "log2 lift")
    np.testing.assert_allclose(lift.data[0].z[0], np.log2([1.5, 0.5]), rtol=1e-6)
    assert lift.layout.coloraxis.cmax == -lift.layout.coloraxis.cmin == 1.0


def test_information_is_told_in_words_beside_chance():
    # nats, of shuffled kinds, the difference, share of the entropy
    rows = np.array([[0.02, 0.01, 0.01, 0.03], [0.42, 0.01, 0.41, 0.61]])
    told = kinds.sentences("modality", rows)
    assert "in layer 1 knows 61% of what there is to know about its modality" in told
    assert "0.42 nats, or 0.61 bits, where shuffled labels give 0.01 nats" in told
    assert "mean beyond chance is 0.21 nats" in told
    told = kinds.sentences("domain", np.array([[0.021, 0.02, 0.001, 0.03]]))
    assert told.startswith("No layer's experts tell the domain beyond what chance explains")
    assert "0.021 nats against 0.02 nats" in told


def test_information_needs_its_control_and_several_kinds():
    layers = {f"routing/per_layer/domain_information{n}": [0.5] for n in ("", "_shuffled")}
    load = {"a": [[0.5, 0.5]], "b": [[0.5, 0.5]]}
    old = {"metrics": layers, "domain_load": load}
    assert kinds.sections(old)[0].tables == []
    more = {f"routing/per_layer/domain_information{n}": [0.1] for n in ("_excess", "_share")}
    (section,) = kinds.sections({"metrics": layers | more, "domain_load": load})
    (table,) = section.tables
    assert table.rows == [["0", "0.5", "0.7213", "0.5", "0.1", "10.0%"]]
    (section,) = kinds.sections({"metrics": layers | more, "domain_load": {"a": [[1.0, 0.0]]}})
    assert section.tables == []
    assert [plot.title for plot in section.plots] == ["Expert by domain"]
    assert kinds.sections({"metrics": {}}) == []


def test_favourites_show_spaces_and_leave_out_layers_that_do_not_fit():
    listed = [[["a b\n\t\x00", 1234, 2.25]], []]
    (section,) = kinds.sections({"favourites": [listed, listed]})
    (table,) = section.tables
    assert [row[0] for row in table.rows] == [
        f"layer {n}, expert {e}" for n in (0, 1) for e in (0, 1)
    ]
    assert table.rows[0][1] == [("a␣b↵⇥·", "2.2 times, 1,234")]
    many = [[[["x" * 50, 10, 2.0]]] * 150] * 4
    (section,) = kinds.sections({"favourites": many})
    (table,) = section.tables
    assert {row[0].split(",")[0] for row in table.rows} == {"layer 0", "layer 3"}
    assert "2 of 4 layers" in table.caption
    assert len(table.rows[0][1][0].text) == kinds.TOKEN_LENGTH


def test_triad_has_the_score_that_counts_first_and_every_interval(sparse_page):
    run = read_run(sparse_page.parent)
    (section,) = triad.sections(run)
    accuracy, cost, checks = section.tables
    assert accuracy.rows[0] == ["accuracy", "0.861", "0.842 to 0.879", "2,000"]
    assert [row[0] for row in accuracy.rows] == ["accuracy", "f1"]
    assert cost.rows[0] == ["parameters_total: numbers of the model", "3,412,992"]
    assert checks.rows == [["noise:2 · accuracy", "0.8", "0.842 to 0.879", "2,000", "-0.0610"]]
    assert triad.sections(run._replace(evaluations={"valid": {"metrics": {}}})) == []


def test_dense_run_has_no_routing_sections(tmp_path):
    text = own_text(write_report(write_run(tmp_path / "dense", experts=0)).read_text())
    assert "<h2>Learning</h2>" in text
    for section in (*SECTIONS[2:], "Text by expert"):
        assert f"<h2>{section}</h2>" not in text


def test_routing_in_numbers_says_what_was_promised_and_what_was_executed():
    evaluation = {
        "metrics": {"routing/choices": 1.5, "routing/causal_gap": 0.25},
        "model": {"flops_per_token": 7.2e6, "flops_executed": 6.9e6},
        "causality": {"router": "C3", "causal_form": False},
    }
    found = dict(specialisation.numbers(evaluation))
    assert found["experts a token"] == "1.5"
    assert found["causal gap, nats a token"] == "0.25"
    assert found["FLOPs a token, by the config"] == "7,200,000"
    assert found["FLOPs a token, executed"] == "6,900,000"
    assert found["causal form"].startswith("none")
    assert specialisation.numbers({"metrics": {"accuracy": 0.5}}) == []


def test_coactivation_map_has_a_layer_at_a_time_and_no_diagonal():
    together = np.array([[[1.0, 0.5], [0.25, 1.0]], [[1.0, 0.0], [0.125, 1.0]]])  # [L E E]
    evaluation = {"tables": {"routing/coactivation": together.tolist()}}
    fig = specialisation.coactivation_maps(evaluation)
    assert [trace.visible for trace in fig.data] == [True, False]
    np.testing.assert_allclose(fig.data[0].z, [[np.nan, 0.5], [0.25, np.nan]])
    np.testing.assert_allclose(fig.data[1].z, [[np.nan, 0.0], [0.125, np.nan]])
    assert {trace.zmax for trace in fig.data} == {0.5}
    alone = {"tables": {"routing/coactivation": [np.eye(4).tolist()]}}
    assert specialisation.coactivation_maps(alone) is None, "k = 1: nobody meets"
    many = {"tables": {"routing/coactivation": np.full((40, 128, 128), 0.1)}}
    assert len(specialisation.coactivation_maps(many).data) == 2


def test_one_step_and_nothing_else(tmp_path):
    workdir = write_run(tmp_path / "young", steps=10, evaluated=False)
    (workdir / "config.json").unlink()
    text = own_text(write_report(workdir).read_text())
    assert "There is no config.json" in text
    assert "<h2>Load</h2>" in text
    assert "<h2>Evaluations</h2>" not in text


def test_what_cannot_be_read_is_said(tmp_path):
    workdir = write_run(tmp_path / "killed", steps=50)
    metrics = workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    (workdir / "eval" / "valid-60.json").write_text('{"step": 60, "metr')
    text = own_text(write_report(workdir).read_text())
    assert "1 line(s) of metrics.jsonl could not be read" in text
    assert "eval/valid-60.json could not be read" in text


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "spl'])
def test_no_metrics_is_a_data_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_records_keep_the_last_value_of_a_step_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(1, 5.0), (3, 4.0), (2, 4.5), (3, 3.0)]
    path.write_text(
        "".join(json.dumps({"step": s, "split": "train", "loss/total": v}) + "\n" for s, v in rows)
        + '{"step": 4, "split": "train", "loss/total": null}\n[1]\n'
    )
    metrics, broken = read_metrics(path)
    found = series(metrics["train"], "loss/total")
    assert broken == 1
    assert found is not None
    np.testing.assert_array_equal(found.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(found.values, [5.0, 4.5, 3.0, np.nan])
    assert repr(last(metrics["train"], "loss/total")) == "nan"
    assert series(metrics["train"], "accuracy") is None


def test_series_of_layers_drops_other_shapes():
    records = [
        {"step": 1, "split": "train", "routing/load": [[0.5, 0.5]]},
        {"step": 2, "split": "train", "routing/load": [[0.5, 0.5], [1.0, 0.0]]},
        {"step": 3, "split": "train", "routing/load": [[0.2, 0.8], [None, 0.0]]},
    ]
    found = series(records, "routing/load", rank=2)
    assert found is not None
    np.testing.assert_array_equal(found.steps, [2, 3])
    assert found.values.shape == (2, 2, 2)
    assert series(records, "routing/load", rank=1) is None


def test_load_heat_maps_show_multiples_of_the_balanced_share():
    load = np.array([[[0.25, 0.75], [0.5, 0.5]], [[0.5, 0.5], [0.9, 0.1]]])  # [N L E]
    found = Series(np.array([10, 20]), load)
    over_layers = figures.load_over_layers(found)
    assert [trace.visible for trace in over_layers.data] == [False, True]
    np.testing.assert_allclose(over_layers.data[1].z, [[1.0, 1.0], [1.8, 0.2]], rtol=1e-6)
    assert [s.label for s in over_layers.layout.sliders[0].steps] == ["10", "20"]
    over_steps = figures.load_over_steps(found)
    np.testing.assert_allclose(over_steps.data[1].z, [[1.0, 1.8], [1.0, 0.2]], rtol=1e-6)  # [E N]
    assert [b.label for b in over_steps.layout.updatemenus[0].buttons] == ["layer 0", "layer 1"]


def test_balanced_scale_ends_exactly_at_one_whatever_the_largest_load():
    for top in [1.1, 1.5, *np.linspace(2.0, 9.0, 200)]:
        places = [at for at, _ in figures.balanced_scale(top)]
        assert places[0] == 0.0
        assert places[-1] == 1.0  # plotly refuses a scale that ends one rounding above
        assert places == sorted(places)


def test_balanced_scale_is_white_at_one():
    scale = figures.balanced_scale(4.0)
    positions = [at for at, _ in scale]
    assert positions == sorted(positions)
    assert (positions[0], positions[-1]) == (0.0, 1.0)
    assert [color for at, color in scale if at == 0.25] == ["#f7f7f7"]


def test_log_ratio_against_the_mean_of_the_domains():
    shares = np.array([[[0.75, 0.25, 0.0]], [[0.25, 0.75, 0.0]]])  # [M L E]
    ratio = figures.log_ratio(shares)
    np.testing.assert_allclose(ratio[0, 0, :2], [math.log2(1.5), -1.0])
    assert np.isnan(ratio[:, :, 2]).all()
    never = figures.log_ratio(np.array([[[0.0, 1.0]], [[0.5, 0.5]]]))
    assert never[0, 0, 0] == -6.0


def test_thinning_averages_and_picking_keeps_the_ends():
    found = Series(np.arange(1, 101), np.arange(1.0, 101.0))
    thinned = figures.thin(found, 10)
    np.testing.assert_array_equal(thinned.steps, np.arange(10, 101, 10))
    np.testing.assert_allclose(thinned.values, np.arange(5.5, 100, 10))
    picked = figures.pick(found, 7)
    assert (picked.steps[0], picked.steps[-1], len(picked.steps)) == (1, 100, 7)


def test_expert_colors_differ_and_carry_dark_text():
    colors = expert_colors(128)
    assert len(set(colors)) == 128

    def luminance(color: str) -> float:  # WCAG 2.1, relative luminance
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    ink = luminance(figures.INK)
    assert min((luminance(c) + 0.05) / (ink + 0.05) for c in colors) > 4.5


def test_numbers_for_people():
    shown = [page.number(v) for v in (None, 3, 12_345_678, 0.123456, 2.0, 1e-5, math.nan)]
    assert shown == ["-", "3", "12,345,678", "0.1235", "2", "1e-05", "nan"]
