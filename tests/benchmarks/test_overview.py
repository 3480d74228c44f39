"""The picture at the top of docs/QUALITY.md and the tables that it is drawn from."""

from benchmarks import ROOT
from benchmarks.quality import plot_overview

PAGE = (ROOT / "docs" / "QUALITY.md").read_text(encoding="utf-8")


def test_every_panel_has_every_line():
    """Whoever changes a table finds out here that the picture no longer reads it."""
    panels = plot_overview.curves(PAGE)
    assert panels.keys() == plot_overview.PANELS.keys()
    for panel in panels.values():
        assert panel.keys() == plot_overview.LINES.keys()
        for name in ("random", "recall", "lethe", "lethe-plus"):
            assert set(panel[name]) >= {5, 10, 25}


def test_figures_are_those_of_the_page():
    walks = plot_overview.curves(PAGE)["walks, whole chain right, %"]
    assert f"| lethe-plus | {walks['lethe-plus'][5]} [" in PAGE
    assert walks["random"][5] == 0


def test_the_picture_is_drawn(tmp_path):
    out = tmp_path / "overview.svg"
    assert plot_overview.main([str(ROOT / "docs" / "QUALITY.md"), str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert all(title in text for title in plot_overview.PANELS)
