"""The lens in a real browser: what it shows is what the trace says, whatever the text is.

Debian's Chromium, or another one on the path, driven by playwright; where there is none the tests
are skipped, in CI they fail. Every page must leave the console silent and ask for nothing.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
from traces import synthetic

from lethe_mini import FullKV, Lethe, LethePlus, UserError
from lethe_mini.engine import Engine
from lethe_mini.lens.__main__ import main
from lethe_mini.lens.page import page
from lethe_mini.lens.replay import replay, scored
from lethe_mini.lens.trace import Trace
from lethe_mini.policies import H2O, RKV, RandomKV, StreamingLLM

sync_api = pytest.importorskip("playwright.sync_api") if "CI" not in os.environ else None
if sync_api is None:
    from playwright import sync_api

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 2'>",
    "<!-- <script>",
    "\u2028\u2029",
    "\ud800",
    "&lt;b&gt;",
    "{{traces}} {{policy}}",
    "\\u003c\"'`${1}",
    "\u202edesrever",
    "\x00\x1b",
]


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = "the lens is tested in Chromium: apt-get install chromium"
        pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of some traces; at its end the console was silent and nothing was fetched."""

    @contextmanager
    def open_page(*traces, width=1300, height=900, **options):
        path = tmp_path / "lens.html"
        path.write_text(page(list(traces)), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        view, said, asked = context.new_page(), [], []
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.lens = path.as_uri()
        view.goto(view.lens)
        yield view
        assert said == []
        assert {url.partition("#")[0] for url in asked} <= {view.lens, "data:,", "about:blank"}
        context.close()

    return open_page


@pytest.fixture(scope="session")
def runs(demo):
    """Two runs of the demo model from one prompt: by Lethe, all heads alike, and by chance."""
    engine, traces = Engine.from_pretrained(str(demo)), []
    prompt = "Is <script>alert(1)</script> safe on a page?"
    for policy in (Lethe(budget=60, interval=12), RandomKV(budget=60, interval=12)):
        traces.append(Trace())
        engine.generate([prompt], policy, 70, ignore_eos=True, trace=traces[-1])
    return traces


def go(view, seen):
    view.locator("#step").fill(str(seen))
    view.wait_for_function("t => document.getElementById('now').textContent.includes(t)",
                           arg=f"{seen:,} tokens seen")  # fmt: skip


def state(trace, seen, sequence=0):
    """(L, tokens) how many heads of each layer hold a token when so many are seen."""
    data = trace.data
    held, last = [[np.arange(0)] * data["heads"]] * data["layers"], 0
    for record, _, after in replay(data, sequence):
        if record["seen"] <= seen:
            held, last = after, record["seen"]
    out = np.zeros((data["layers"], seen), int)
    for layer, heads in enumerate(held):
        for head in heads:
            out[layer, head] += 1
    out[:, last:] = data["heads"]
    return out


def rows(view, table):
    """The cells of a table, row by row."""
    return view.locator(table).evaluate(
        "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(c => c.textContent))"
    )


# -- a run of the demo model ----------------------------------------------------------------------


@pytest.mark.demo
def test_the_slider_shows_the_cache_at_every_step(opened, runs):
    one = runs[0].data["sequences"][0]
    seens = {one["prompt_tokens"], one["read"], *(r["seen"] for r in one["rounds"][:3])}
    seens |= {record["seen"] - 1 for record in one["rounds"][1:3]}
    with opened(runs[0]) as view:
        view.locator("#table-0 summary").click()
        for seen in sorted(seens):
            go(view, seen)
            held = state(runs[0], seen) > 0
            places = f"{held.sum():,} of {held.size:,} places held"
            assert places in view.locator("#now").inner_text()
            assert [int(row[1]) for row in rows(view, "#table-0 table")] == held.sum(1).tolist()
            assert [int(row[6]) for row in rows(view, "#table-0 table")] == (~held).sum(1).tolist()
            classes = view.locator("#text-0 span").evaluate_all("s => s.map(s => s.className)")
            right = [f"h{-(-count * 6 // len(held))}" for count in held.sum(0).tolist()]
            assert [name.split()[0] for name in classes[:seen]] == right
            whole = seen == one["read"]
            later = {name.split()[0] for name in classes[seen:]}
            assert later == ({"unread"} if whole else {"later"})


@pytest.mark.demo
def test_the_table_divides_what_is_held(opened, runs):
    """Into sinks, prompt, salient and recent; budget, Hoyer and breakpoint are the round's."""
    one = runs[0].data["sequences"][0]
    record = one["rounds"][2]
    with opened(runs[0]) as view:
        view.locator("#table-0 summary").click()
        go(view, record["seen"])
        held = state(runs[0], record["seen"]) > 0
        for layer, row in enumerate(rows(view, "#table-0 table")):
            recent = record["recent"][layer]
            sinks, prompt = held[layer, :4].sum(), held[layer, 4 : one["prompt_tokens"]].sum()
            salient = held[layer].sum() - sinks - prompt - recent
            assert list(map(int, row[2:6])) == [sinks, prompt, salient, recent]
            found = record["breakpoint"][layer]
            assert row[7:] == [
                str(record["budget"][layer]),
                str(record["hoyer"][layer]).removesuffix(".0"),
                "–" if found is None else str(found),
            ]


@pytest.mark.demo
def test_a_token_tells_when_each_layer_dropped_it(opened, runs):
    trace = runs[0]
    one = trace.data["sequences"][0]
    token = one["prompt_tokens"] + 3
    gone, last = {}, {}
    for record, before, after in replay(trace.data, 0):
        for layer in range(trace.data["layers"]):
            positions, scores = scored(record, layer, before[layer])
            if token in positions:
                last[layer] = scores[positions == token][0]
            if token in before[layer][0] and token not in after[layer][0]:
                gone[layer] = f"{record['seen']:,} tokens"
    assert gone
    with opened(trace) as view:
        view.locator(f"#text-0-{token}").hover()
        count = f"{len(gone)} of {trace.data['layers']} layers drop it"
        view.wait_for_function("t => document.getElementById('token-0').innerText.includes(t)",
                               arg=count)  # fmt: skip
        assert f"Token {token}, “{one['pieces'][token]}”" in view.locator("#token-0").inner_text()
        view.locator("#token-0 summary").click()
        view.wait_for_selector("#token-0 table")
        cells = rows(view, "#token-0 table")
        assert [row[1] for row in cells] == [
            gone.get(layer, "never") for layer in range(trace.data["layers"])
        ]
        for layer, score in last.items():
            assert float(cells[layer][3]) == pytest.approx(score, rel=0.006, abs=1e-3)
        assert view.locator("#token-0 svg").count() == 2


@pytest.mark.demo
def test_a_layer_tells_its_curve_and_breakpoint(opened, runs):
    one = runs[0].data["sequences"][0]
    record = one["rounds"][-1]
    found = record["breakpoint"]
    layers = {found.index(None)} | {i for i, k in enumerate(found) if k is not None}
    with opened(runs[0]) as view:
        for layer in sorted(layers)[:6]:
            view.locator("#pick-0").select_option(str(layer))
            view.wait_for_function("t => document.getElementById('layer-0').innerText.includes(t)",
                                   arg=f"Layer {layer} holds")  # fmt: skip
            text = view.locator("#layer-0").inner_text()
            assert f"budget {record['budget'][layer]}, Hoyer {record['hoyer'][layer]:.3f}" in text
            none = found[layer] is None
            assert ("no breakpoint" if none else f"breakpoint at {found[layer]}") in text
            assert view.locator("#layer-0 .breakpoint").count() == (not none)
            assert view.locator(f".charts .line.on[data-layer='{layer}']").count() >= 3


def pixel(view, layer, token):
    """Where on the screen a cell of the first map is."""
    return view.evaluate(
        """([layer, token]) => {
            const canvas = document.querySelector('#map-0 canvas'), { L, n } = sides[0].sequence;
            canvas.scrollIntoView({ block: 'center' });
            const box = canvas.getBoundingClientRect();
            return [box.left + LEFT + (token + 0.5) * (box.width - LEFT - 1) / n,
                    box.top + TOP + (layer + 0.5) * (box.height - TOP - 2) / L];
        }""",
        [layer, token],
    )


@pytest.mark.demo
def test_pointing_at_map_and_lines_chooses(opened, runs):
    record = runs[0].data["sequences"][0]["rounds"][-1]
    dense = record["hoyer"].index(min(record["hoyer"]))
    with opened(runs[0]) as view:
        view.mouse.move(*pixel(view, 17, 23))
        view.wait_for_function("() => document.getElementById('pick-0').value === '17'")
        assert "Token 23," in view.locator("#token-0").inner_text()
        chart = view.locator("svg[aria-label^='Hoyer']")
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()  # of all lines that of the densest layer is the lowest
        view.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] - 34)
        view.wait_for_function(f"() => document.getElementById('pick-0').value === '{dense}'")
        before = view.locator("#map-0 canvas").bounding_box()["width"]
        view.set_viewport_size({"width": 700, "height": 800})
        view.wait_for_function(f"() => document.querySelector('canvas').clientWidth < {before}")
        view.mouse.move(*pixel(view, 3, 41))
        view.wait_for_function("() => document.getElementById('pick-0').value === '3'")
        assert "Token 41," in view.locator("#token-0").inner_text()


@pytest.mark.demo
def test_the_map_is_drawn_as_its_legend_says(opened, runs):
    """A cell has the colour of its kind: the first four are sinks; what is dropped is grey."""
    one = runs[0].data["sequences"][0]
    held = state(runs[0], one["read"]) > 0
    dropped = np.argwhere(~held[2:])  # layer 0 is picked; its frame touches layer 1
    layer, token = int(dropped[0, 0]) + 2, int(dropped[0, 1])
    cells = [[layer, 2, 0], [layer, 9, 1], [layer, token, 4], [layer, one["read"] - 1, 3]]
    with opened(runs[0]) as view:
        found = view.evaluate(
            """cells => {
                const canvas = document.querySelector('#map-0 canvas');
                const { L, n } = sides[0].sequence;
                const { width, height } = canvas, row = (height - TOP - 2) / L;
                const data = canvas.getContext('2d').getImageData(0, 0, width, height).data;
                const pixels = new Uint32Array(data.buffer);
                return cells.map(([layer, p, kind]) => {
                    const x = Math.floor(LEFT + (p + 0.5) * (width - LEFT - 1) / n);
                    const shades = new Set(palette.kinds[kind]);
                    for (let y = TOP + layer * row; y < TOP + (layer + 1) * row - 1; y++)
                        if (!shades.has(pixels[y * width + x])) return false;
                    return true;
                });
            }""",
            [*cells, [layer, token, 2]],
        )
    assert found == [True] * 4 + [False]


@pytest.mark.demo
def test_an_address_opens_at_a_step_a_token_and_a_layer(opened, runs):
    one = runs[0].data["sequences"][0]
    with opened(runs[0]) as view:
        for place, step, layer, token in (
            ("step=70&token=12&layer=5", 70, 5, "text-0-12"),
            ("step=99999&token=-1&layer=x", one["read"], 0, f"text-0-{opening(runs[0])}"),
        ):
            view.goto("about:blank")
            view.goto(f"{view.lens}#{place}")
            assert int(view.locator("#step").input_value()) == step
            view.wait_for_function(f"() => document.getElementById('pick-0').value === '{layer}'")
            assert view.locator("#text-0").get_attribute("aria-activedescendant") == token


def opening(trace):
    """The token that the page should choose: dropped by most layers, of these held longest."""
    layers, last = {}, {}
    for record, before, after in replay(trace.data, 0):
        for old, new in zip(before, after, strict=True):
            gone = set(np.concatenate(old).tolist()) - set(np.concatenate(new).tolist())
            for token in gone:
                layers[token], last[token] = layers.get(token, 0) + 1, record["seen"]
    return max(layers, key=lambda token: (layers[token], last[token] - token, -token))


@pytest.mark.demo
@pytest.mark.parametrize("which", [0, 1])
def test_a_token_is_chosen_on_opening_and_the_page_says_why(opened, runs, which):
    """So that its panel is not empty. The words go with the first choice of one's own."""
    token = opening(runs[which])
    with opened(runs[which]) as view:
        assert view.locator("#text-0").get_attribute("aria-activedescendant") == f"text-0-{token}"
        panel = view.locator("#token-0")
        assert f"Token {token}, " in panel.inner_text()
        assert "The page chose this token. Of the tokens that" in panel.inner_text()
        assert panel.locator("svg").count() == 2
        view.locator("#text-0").focus()
        view.keyboard.press("ArrowLeft")
        view.wait_for_function(
            "t => document.getElementById('token-0').innerText.includes(t)",
            arg=f"Token {token - 1}",
        )
        assert "The page chose this token" not in panel.inner_text()


@pytest.mark.demo
def test_the_parameters_fold_away(opened, runs):
    """Three of them stand in one line; a click shows all, by name."""
    policy = runs[0].data["policy"]
    with opened(runs[0]) as view:
        parameters = view.locator("details.options")
        summary = parameters.locator("summary")
        assert summary.inner_text() == (
            f"Parameters: budget 60, interval 12, sinks 4, … (show all {len(policy) - 1})"
        )
        assert not parameters.locator("dl").is_visible()
        summary.click()
        shown = dict(re.findall(r"(.+)\n+(.+)", parameters.locator("dl").inner_text()))
        assert shown.keys() == {name.replace("_", " ") for name in policy if name != "name"}
        assert (shown["tau"], shown["protect prompt"]) == ("400", "yes")


def legend_of(opened, engine, policy):
    trace = Trace()
    engine.generate([[1, 2, 3]], policy, 30, trace=trace)
    with opened(loaded(trace)) as view:
        return view.locator("ul.legend.words").inner_text()


def test_the_legend_explains_each_kind_for_the_policy(opened, engine):
    """Salient by score; distinct only where the policy keeps such tokens; protection as it is."""
    lethe = legend_of(opened, engine, Lethe(budget=12, interval=3))
    assert "salient: its score was among the highest of the layer" in lethe
    assert "distinct" not in lethe.lower()
    assert "The prompt is protected" in lethe
    plus = legend_of(opened, engine, LethePlus(budget=12, interval=3, protect_prompt=False))
    assert "salient or distinct: Salient: its score" in plus
    assert "LethePlus also keeps a token whose key no newer token of the layer resembles" in plus
    assert "The prompt is not protected" in plus
    assert "random eviction ranked" in legend_of(opened, engine, RandomKV(budget=12, interval=3))


@pytest.mark.demo
def test_all_of_it_works_by_touch(opened, runs):
    """A tap on the text, a swipe over the map, a tap on a chart; and the page says so."""
    with opened(runs[0], width=360, height=740, has_touch=True, is_mobile=True) as view:
        assert "Touch: tap a token" in view.locator("footer").inner_text()
        view.locator("#text-0-20").tap()
        view.wait_for_function(
            "() => document.getElementById('token-0').innerText.includes('Token 20,')"
        )
        x, y = pixel(view, 7, 33)
        view.touchscreen.tap(x, y)
        view.wait_for_function("() => document.getElementById('pick-0').value === '7'")
        at = view.locator("#text-0").get_attribute("aria-activedescendant")
        assert abs(int(at.removeprefix("text-0-")) - 33) <= 1  # columns are narrow here
        touch = view.context.new_cdp_session(view)
        for kind, layer, token in (
            ("touchStart", 7, 33),
            ("touchMove", 5, 60),
            ("touchMove", 4, 80),
        ):
            x, y = pixel(view, layer, token)
            touch.send(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            )
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        view.wait_for_function("() => document.getElementById('pick-0').value === '4'")
        chart = view.locator("svg[aria-label^='Hoyer']")
        for _ in range(10):  # the first tap may only stop the swipe: it comes without a click
            chart.tap(position={"x": chart.bounding_box()["width"] / 2, "y": 9})
            view.wait_for_timeout(1000)
            if view.locator("#pick-0").input_value() != "4":
                break
        assert view.locator("#pick-0").input_value() != "4"


@pytest.mark.demo
def test_all_of_it_works_from_the_keyboard(opened, runs):
    one = runs[0].data["sequences"][0]
    rounds = [record["seen"] for record in one["rounds"]]

    with opened(runs[0]) as view:

        def at(seen):
            view.wait_for_function(
                "t => document.getElementById('step').value === t", arg=f"{seen}"
            )

        for key, seen in (
            ("Home", one["prompt_tokens"]),
            ("ArrowRight", one["prompt_tokens"] + 1),
            ("Shift+ArrowRight", rounds[0] if rounds[0] > one["prompt_tokens"] + 1 else rounds[1]),
            ("End", one["read"]),
            ("ArrowLeft", one["read"] - 1),
            ("Shift+ArrowLeft", rounds[-1]),
        ):
            view.keyboard.press(key)  # wherever the focus is
            at(seen)
        view.locator("#step").focus()
        view.keyboard.press("ArrowRight")
        at(rounds[-1] + 1)

        view.locator("#text-0").focus()
        view.keyboard.press("Home")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
            view.keyboard.press(key)
        assert view.locator("#text-0").get_attribute("aria-activedescendant") == "text-0-11"
        chosen = view.locator("#text-0-11")
        assert chosen.get_attribute("aria-selected") == "true"
        view.wait_for_function(
            "() => document.getElementById('live').innerText.includes('Token 11,')"
        )
        assert "held in 30 of 30 layers" in chosen.get_attribute("aria-label")

        view.locator("#map-0").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowRight"):
            view.keyboard.press(key)
        view.wait_for_function("() => document.getElementById('pick-0').value === '2'")
        assert view.locator("#text-0").get_attribute("aria-activedescendant") == "text-0-12"
        at(rounds[-1] + 1)  # the arrows of the map are no steps

        view.locator("#map-0").blur()
        view.keyboard.press("Home")
        view.keyboard.press("Space")
        view.wait_for_function("() => Number(document.getElementById('step').value) > 60")
        assert view.locator("#play").get_attribute("aria-pressed") == "true"
        view.keyboard.press("Space")
        view.wait_for_function("() => document.getElementById('play').textContent === 'Play'")


@pytest.mark.demo
def test_two_traces_show_where_they_differ(opened, runs):
    first, second = (trace.data["sequences"][0]["token_ids"] for trace in runs)
    pairs = zip(first, second, strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))
    with opened(*runs) as view:
        for seen in (same, same + 20):
            go(view, seen)
            left, right = (state(trace, seen)[:, :same] > 0 for trace in runs)
            text = view.locator("#difference-text").inner_text()
            assert f"the same for {same} tokens" in text
            for count, name in (
                ((left & right).sum(), "both hold"),
                ((left & ~right).sum(), "only the first"),
                ((right & ~left).sum(), "only the second"),
                ((~left & ~right).sum(), "neither"),
            ):
                assert f"{name} {count:,}" in text
        view.locator("#difference-table summary").click()
        view.wait_for_selector("#difference-table table")
        cells = rows(view, "#difference-table table")
        assert [int(row[2]) for row in cells] == (left & ~right).sum(1).tolist()
        assert view.locator("article").count() == 2


@pytest.mark.demo
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1300])
def test_every_control_has_a_name_and_every_width_fits(opened, runs, width, scheme):
    with opened(*runs, width=width, color_scheme=scheme) as view:
        unnamed = view.evaluate("""() => [...document.querySelectorAll(
            'button, input, select, canvas, svg, [tabindex]')].filter(node =>
            !(node.labels?.length || node.getAttribute('aria-label') || node.textContent.trim() ||
              node.getAttribute('aria-hidden') || node.hidden)).map(node => node.outerHTML)""")
        assert unnamed == []
        for role, name in (("slider", "Tokens seen"), ("listbox", "Tokens of the text")):
            assert view.get_by_role(role, name=re.compile(name)).count() >= 1
        assert view.get_by_role("application", name=re.compile("^Map of layers")).count() == 2
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page_colour = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", page_colour))) < 60) == (scheme == "dark")


# -- traces that no model made --------------------------------------------------------------------


def test_hostile_text_shows_as_text(opened):
    n = 4 * len(HOSTILE)
    trace = synthetic(n, 2, interval=5, budget=12, prompt=3, pieces=HOSTILE * 4)
    trace.data["model"] = HOSTILE[1]
    trace.data["policy"] |= {"name": HOSTILE[0], HOSTILE[2]: HOSTILE[1]}
    trace = loaded(trace)
    with opened(trace, loaded(trace)) as view:
        view.on("dialog", lambda dialog: pytest.fail(dialog.message))
        for token, piece in enumerate(HOSTILE):
            shown = view.locator(f"#text-0-{token}").evaluate("node => node.textContent")
            assert shown == piece
            view.evaluate("token => choose({ token })", token)
            view.wait_for_function("t => document.getElementById('token-0').innerText.includes(t)",
                                   arg=f"Token {token},")  # fmt: skip
        assert view.evaluate("window.hacked") is None
        assert view.locator("img, b").count() == 0
        assert view.locator("script").count() == 2
        assert HOSTILE[0] in view.title()


def test_no_other_script_or_style_can_run(browser, tmp_path):
    path = tmp_path / "lens.html"
    html = page([synthetic(50, 2, interval=5, budget=12, prompt=3)])
    added = "<style>body { color: red }</style><script>window.hacked = 1</script><p onclick='x()'>"
    path.write_text(html.replace("</header>", f"{added}</header>"), encoding="utf-8")
    with browser.new_context() as context:
        view = context.new_page()
        view.goto(path.as_uri())
        assert view.evaluate("window.hacked") is None
        assert view.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
        assert view.locator("article").count() == 1
        failed = view.evaluate("fetch('https://example.org').then(() => 0, error => 1)")
        assert failed == 1


def loaded(trace):
    """As it is when it comes from a file."""
    again = Trace()
    again.data = json.loads(json.dumps(trace.data))
    return again


def test_a_layer_costs_the_page_few_elements(opened):
    """What a layer holds is drawn, not made of elements, so a long text of many layers stays smooth
    to step through: 28 more layers of 5,000 tokens add fewer than 10 elements each."""
    counts = []
    for layers in (4, 32):
        with opened(synthetic(5_000, layers, heads=8)) as view:
            counts.append(
                view.evaluate("""() => {
                    document.getElementById('step').value = 3000;
                    draw();
                    return document.querySelectorAll('*').length;
                }""")
            )
    assert counts[1] - counts[0] < 28 * 10


@pytest.fixture(scope="module")
def engine():
    return tiny.engine()


ODD = {
    "full": (FullKV(), [[1, 2, 3]], 20),
    "one token": (FullKV(), [[1]], 1),
    "no scores": (StreamingLLM(budget=9, interval=2), [[1, 2, 3]], 20),
    "negative scores": (RKV(budget=12, interval=3, window=2, kernel=3), [[1, 2, 3]], 30),
    "per head": (H2O(budget=9, interval=3), [[1, 2, 3]], 30),
    "Algorithm 1 alone": (
        Lethe(budget=None, evict_threshold=9, interval=2, tau=1.5),
        [[1, 2, 3]],
        40,
    ),
    "a share": (LethePlus(budget=0.4, evict_threshold=9, interval=2), [[1, 2, 3]], 40),
    "several": (RandomKV(budget=12, interval=3), [[1, 2, 3], [4], [5] * 7], 25),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_are_shown_too(opened, engine, name):
    policy, prompts, limit = ODD[name]
    trace = Trace()
    engine.generate(prompts, policy, limit, trace=trace)
    with opened(loaded(trace)) as view:
        for index, one in enumerate(trace.data["sequences"]):
            if index:
                view.locator("#sequence").select_option(str(index))
                is_there = "n => document.querySelectorAll('#text-0 span').length === n"
                view.wait_for_function(is_there, arg=len(one["pieces"]))
            first, last = one["prompt_tokens"], one["read"]
            for seen in {first, (first + last) // 2, last}:
                go(view, seen)
                held = state(trace, seen, index).sum() / trace.data["heads"]
                assert f"{held:,.0f} of" in view.locator("#now").inner_text()
            view.locator("#text-0").focus()
            view.keyboard.press("End")
            view.keyboard.press("Home")


def test_a_run_interrupted_before_it_began_is_shown(opened, engine):
    def on_token(*_):
        raise KeyboardInterrupt

    trace = Trace()
    prompts = [[1, 2], [3, 4, 5]]
    engine.generate(prompts, max_new_tokens=5, batch_size=1, on_token=on_token, trace=trace)
    with opened(loaded(trace)) as view:
        view.locator("#sequence").select_option("1")
        view.wait_for_function(
            "() => document.getElementById('now').textContent.startsWith('0 tokens')"
        )
        assert view.locator("#text-0 span").count() == 3


# -- the command ---------------------------------------------------------------------------------


def test_the_command_writes_a_page_of_one_trace_or_two(tmp_path, capsys):
    trace = synthetic(60, 2, interval=5, budget=12, prompt=3)
    trace.write(tmp_path / "a.json")
    page_a, page_b = tmp_path / "a.html", tmp_path / "b.html"
    assert main([str(tmp_path / "a.json"), "-o", str(page_a)]) == 0
    both = [str(tmp_path / "a.json"), "--compare", str(tmp_path / "a.json")]
    assert main([*both, "-o", str(page_b)]) == 0
    assert page_a.read_text(encoding="utf-8") == page([trace])
    assert page_b.read_text(encoding="utf-8") == page([trace, trace])
    assert "http" not in re.sub("http-equiv|http://www.w3.org/2000/svg", "", page([trace]))
    assert capsys.readouterr() == ("", "")


def test_what_cannot_be_shown_is_one_line(tmp_path, capsys):
    trace = synthetic(60, 2, interval=5, budget=12, prompt=3)
    files = {"a": trace, "layers": synthetic(60, 3, interval=5, budget=12, prompt=3)}
    files["prompt"] = synthetic(60, 2, interval=5, budget=12, prompt=4)
    for name, one in files.items():
        one.write(tmp_path / name)
    a, out = str(tmp_path / "a"), str(tmp_path / "out.html")
    for argv, match in (
        ([str(tmp_path / "none"), "-o", out], "cannot read"),
        ([a, "-o", str(tmp_path)], "cannot write"),
        ([a, "-o", out, "--compare", str(tmp_path / "layers")], "same number of layers"),
        ([a, "-o", out, "--compare", str(tmp_path / "prompt")], "same prompts"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert match in said.err
    assert not (tmp_path / "out.html").exists()
    with pytest.raises(UserError, match="no sequence"):
        page([Trace()])
