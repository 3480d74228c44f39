"""Plots: what is drawn is what the trace says; files of both kinds; mistakes are one line."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
from traces import synthetic

from lethe_mini import FullKV, Lethe, LethePlus, UserError
from lethe_mini.lens.plot import figures, held_by_layer, hoyer_by_layer, main, save, score_of_tokens
from lethe_mini.lens.replay import replay, scored
from lethe_mini.lens.trace import Trace
from lethe_mini.policies import RKV, StreamingLLM


@pytest.fixture(scope="module")
def trace():
    made = Trace()
    policy = LethePlus(budget=14, interval=4, breakpoint="global", tau=3.0)
    tiny.engine().generate([[5, 6, 7], [8, 9]], policy, 40, trace=made)
    return made


def test_what_is_drawn_is_what_the_trace_says(trace):
    one, data = trace.data["sequences"][1], trace.data
    seen, values = hoyer_by_layer(data, 1)
    assert seen == [record["seen"] for record in one["rounds"]]
    assert values.T.tolist() == [record["hoyer"] for record in one["rounds"]]

    steps, held = held_by_layer(data, 1)
    assert steps.tolist() == list(range(one["read"] + 1))
    assert held[:, : seen[0]].tolist() == [list(range(seen[0]))] * 3
    courses = score_of_tokens(data, 1, [0, 7])
    for record, before, after in replay(data, 1):
        sizes = [len(layer[0]) for layer in after]
        assert held[:, record["seen"]].tolist() == sizes
        assert held[:, record["seen"] - 1].tolist() == [len(layer[0]) - 1 for layer in before]
        for token, course in courses.items():
            total = 0.0
            for layer, heads in enumerate(before):
                scores = dict(np.array(scored(record, layer, heads)).T.tolist())
                total += scores.get(token, 0.0)
            if total:
                assert dict(course)[record["seen"]] == pytest.approx(total)
    assert held[:, -1].tolist() == [size + one["read"] - record["seen"] for size in sizes]

    made = figures(trace, 1, [0, 7])
    assert list(made) == ["hoyer", "held", "scores"]
    mesh = made["hoyer"].axes[0].collections[0]
    assert np.array_equal(np.asarray(mesh.get_array()), values)
    assert np.array_equal(made["held"].axes[0].images[0].get_array(), held)
    lines = made["scores"].axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [
        [list(point) for point in course] for course in courses.values()
    ]


def test_a_long_trace_is_drawn_at_no_more_steps_than_the_plot_has_room_for():
    steps, held = held_by_layer(synthetic(5_000, 2).data, 0)
    assert (steps[0], steps[-1], len(steps), held.shape) == (0, 4_999, 401, (2, 401))
    assert held[:, -1].max() < 512 + 128


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (FullKV(), ["held"]),
        (StreamingLLM(budget=9, interval=2), ["held", "scores"]),
        (RKV(budget=12, interval=3, window=2, kernel=3), ["held", "scores"]),
        (Lethe(budget=30, interval=4), ["held"]),
        (Lethe(budget=9, interval=16), ["hoyer", "held", "scores"]),  # one round
    ],
)
def test_plots_are_of_what_there_is(tmp_path, policy, names):
    made = Trace()
    tiny.engine().generate([[1, 2, 3]], policy, 24, trace=made)
    paths = save(figures(made), tmp_path / "a.b")
    kinds = ("png", "svg")
    assert [p.name for p in paths] == [f"a.b-{name}.{kind}" for name in names for kind in kinds]
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in save(figures(made), tmp_path / "a.b")] == before


def test_any_text_can_be_in_the_legend(tmp_path):
    pieces = ["$\\frac{", "\ud800", "\u6f22<b>", "_x", "\n", "^$"] * 10
    made = synthetic(60, 2, interval=5, budget=12, prompt=6, pieces=pieces)
    save(figures(made, 0, list(range(6))), tmp_path / "plot")


def test_the_command(trace, tmp_path, capsys):
    trace.write(tmp_path / "t.json")
    name = str(tmp_path / "plot")
    options = ["--tokens", "0,3", "--sequence", "2"]
    assert main([str(tmp_path / "t.json"), "-o", name, *options]) == 0
    lines = capsys.readouterr().out.split()
    assert lines == [f"{name}-{n}.{k}" for n in ("hoyer", "held", "scores") for k in ("png", "svg")]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--tokens", "1,x"], "not 1,x"),
        (["--tokens", "1,400"], "from 0 to 41"),
        (["--tokens", "-1"], "from 0 to 41"),
        (["--sequence", "3"], "has 2 sequences"),
        (["--sequence", "0"], "has 2 sequences"),
    ],
)
def test_a_mistake_is_one_line(trace, tmp_path, capsys, options, match):
    trace.write(tmp_path / "t.json")
    refused(capsys, [str(tmp_path / "t.json"), "-o", str(tmp_path / "p"), *options], match)


def refused(capsys, argv, match):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert match in err


def test_what_is_not_there_is_one_line(trace, tmp_path, capsys, monkeypatch):
    path, name = str(tmp_path / "t.json"), str(tmp_path / "p")
    refused(capsys, [path, "-o", name], "cannot read")
    trace.write(tmp_path / "t.json")
    refused(capsys, [path, "-o", str(tmp_path / "none" / "p")], "cannot write")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(capsys, [path, "-o", name], "pip install 'lethe-mini[plot]'")


def test_a_sequence_that_never_began_has_no_plot():
    def on_token(*_):
        raise KeyboardInterrupt

    made = Trace()
    tiny.engine().generate([[1, 2], [3]], batch_size=1, on_token=on_token, trace=made)
    with pytest.raises(UserError, match="nothing to plot"):
        figures(made, 1)
