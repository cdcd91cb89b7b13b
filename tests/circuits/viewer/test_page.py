"""The page in a real browser: what a person does with it, by mouse, finger and keyboard."""

import copy
import io
import json
import math
import random
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from hf_circuit_sparsity.circuits.viewer.layout import layered_graph
from hf_circuit_sparsity.circuits.viewer.report import render_page

NEURON = "Neuron 7, layer 1, MLP"


@pytest.fixture(scope="module")
def html(data):
    return render_page(data)


def heading(page):
    return page.locator("#details h2").inner_text()


def slide(page, name, value):
    page.locator(f"#{name}").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
        value,
    )


def node(page, label):
    return page.locator(f'.node[aria-label^="{label}"]')


def test_it_says_what_the_circuit_does_and_how_well(open_page, html, data):
    page = open_page(html)
    assert page.locator("h1").inner_text() == "on_off"
    assert "208 nodes, 7 (3.37%)" in page.locator("#lead").inner_text()
    losses = page.locator("#losses").inner_text()
    for run in data["losses"].values():
        assert f"{run['loss']:.3f}" in losses
    assert page.locator(".node").count() == len(data["nodes"])
    assert page.locator(".link.weight").count() == data["size"]["edges"]
    # The node that matters most is open, and nothing is dimmed before the first click.
    assert heading(page) == "Neuron 7" or heading(page) == "Value 5"
    assert page.locator(".node.far").count() == 0


SMALLEST = """() => Math.min(...[...document.querySelectorAll("body *")]
  .filter((e) => e.getClientRects().length && [...e.childNodes].some((n) => n.nodeType === 3
    && n.data.trim()))
  .map((e) => {
    const matrix = e.ownerSVGElement ? e.getScreenCTM() : { a: 1, b: 0 };
    return parseFloat(getComputedStyle(e).fontSize) * Math.hypot(matrix.a, matrix.b);
  }))"""


@pytest.fixture(scope="module")
def crowded_html(crowded, data):
    """The graph of a hundred nodes, with what another circuit's nodes were measured to do."""
    model, circuit = crowded
    graph = layered_graph(circuit, model)
    some = next(node for node in data["nodes"] if node["site"] == "h.1.mlp.post_act")
    keys = list(graph.nodes)
    own = [key for key in keys if graph.nodes[key].kind != "token"]
    nodes = []
    for key, node in graph.nodes.items():
        place = {"site": key[0], "index": key[1], "kind": node.kind, "column": node.column}
        place["row"] = graph.rows[key]
        if node.head is not None:
            place["head"] = node.head
        nodes.append(place if node.kind == "token" else {**some, **place})
    many = {
        **data,
        "columns": [column._asdict() for column in graph.columns],
        "nodes": nodes,
        "links": [
            [keys.index(x.source), keys.index(x.target), *x[2:5], None, x.head] for x in graph.links
        ],
        "curve": {"sizes": [0, len(own)], "losses": [0.7, 0.1], "order": own},
    }
    return render_page(many)


def test_text_is_readable_and_weights_stand_on_nothing(open_page, html, crowded_html):
    for page in map(open_page, (html, crowded_html)):
        assert page.evaluate(SMALLEST) >= 11
        weights = [w.bounding_box() for w in page.locator(".weights text").all()]
        assert len(weights) >= 5
        boxes = [b.bounding_box() for b in page.locator(".node rect, .head rect").all()]
        for i, one in enumerate(weights):
            for other in [*boxes, *weights[:i]]:
                apart = max(
                    abs(one[x] + one[size] / 2 - other[x] - other[size] / 2)
                    - (one[size] + other[size]) / 2
                    for x, size in (("x", "width"), ("y", "height"))
                )
                assert apart > -2, (one, other)


def test_a_node_shows_its_site_weights_effect_and_examples(open_page, html, data):
    page = open_page(html)
    node(page, NEURON).click()
    details = page.locator("#details")
    text = details.inner_text()
    assert "h.1.mlp.post_act[7]" in text
    assert "Reads from 1" in text and "+1.50" in text
    assert "Writes to 1" in text and "+2.00" in text
    effect = next(n["effect"] for n in data["nodes"] if n["site"] == "h.1.mlp.post_act")
    assert f"+{effect:.3f} nats" in text
    assert page.locator("#details svg.chart rect").count() > 4
    before = page.locator("#details .examples").first.inner_text()
    page.get_by_role("button", name="Pretraining text").click()
    assert page.locator("#details .examples").first.inner_text() != before
    # Who pressed the button is still on it.
    assert page.evaluate("document.activeElement.textContent") == "Pretraining text"
    # A neighbour in the list leads on.
    page.locator("#details button.row").first.click()
    assert heading(page) == "Channel 3"
    page.get_by_role("button", name="Close").click()
    assert heading(page) == "Nothing selected"
    assert page.locator(".node.selected").count() == 0


def test_a_head_shows_where_it_looks(open_page, html, data):
    page = open_page(html)
    page.locator(".head").click()
    assert heading(page) == "Head 1"
    tokens = page.locator("#details .tokens button")
    assert tokens.count() == len(data["pairs"][0][0]["ids"])
    assert tokens.last.get_attribute("aria-pressed") == "true"
    tokens.nth(1).click()
    assert tokens.nth(1).get_attribute("aria-pressed") == "true"
    assert "it looks most at" in page.locator("#details").inner_text()
    page.get_by_role("button", name="Whole model").click()
    page.locator("#details").get_by_role("button", name="Class 2").click()
    assert tokens.count() == len(data["pairs"][0][1]["ids"])
    pattern = data["heads"]["heads"][0]["model"][1]
    cells = sum(weight >= 10 for weight in pattern)
    assert page.locator("#details .cell").count() == cells


def test_a_weight_shows_what_is_lost_without_it(open_page, html, data):
    page = open_page(html)
    node(page, NEURON).click()
    button = page.get_by_role("button", name="Weight +1.50, Channel 3 to Neuron 7")
    at = next(i for i, n in enumerate(data["nodes"]) if n["site"] == "h.1.mlp.post_act")
    effect = next(x[5] for x in data["links"] if x[1] == at)
    assert effect > 0.1 and button.inner_text() == f"+{effect:.3f}"
    button.click()
    assert heading(page) == "Weight +1.500"
    loss = data["losses"]["circuit"]["loss"]
    assert f"from {loss:.3f} to {loss + effect:.3f}" in page.locator("#details").inner_text()
    assert page.locator(".link.chosen").count() == 1
    page.locator(".link-catch").last.dispatch_event("click")
    assert "Channel" in page.locator("#details .place").inner_text()


def test_pairs_are_chosen_and_their_predictions_named(open_page, html, data):
    page = open_page(html)
    example = page.locator("#example")
    top, probability = data["pairs"][0][0]["predicted"]["circuit"][0]
    assert data["tokens"][str(top)] == "yes" and probability > 0.9
    assert f"yes {100 * probability:.0f}%" in example.inner_text()
    node(page, NEURON).click()
    classes = page.locator("#details .classes")
    before = classes.inner_text()
    assert "Class 1: yes" in before and "Class 2: no" in before
    neuron = next(n for n in data["nodes"] if n["site"] == "h.1.mlp.post_act")
    one, two = neuron["pairs"][:2]
    largest = max((a - b for a, b in zip(one, two, strict=True)), key=abs)
    assert f"largest +{largest:.2f}" in before
    page.get_by_role("button", name="Pair 2").click()
    assert classes.inner_text() != before
    assert page.evaluate("document.activeElement.textContent") == "Pair 2"
    assert "99 %" in page.locator("#details").inner_text()


def test_a_key_shows_what_it_adds_to_the_attention(open_page, html, data):
    page = open_page(html)
    node(page, "Key 4").click()
    key = next(n for n in data["nodes"] if n["site"] == "h.0.attn.k")
    products = [data["heads"]["scale"] * key["mateMean"] * k for k in key["pairs"][0]]
    shown = page.locator("#details .tokens button")
    assert shown.count() == len(products)
    place = max(range(len(products)), key=products.__getitem__)
    text = page.locator("#details .how").nth(1).inner_text()
    assert f"({products[place]:+.2f})".replace("-0.00", "+0.00").replace("-", "−") in text
    assert "The query of this channel is not in the circuit" in text


def test_the_view_is_in_the_address(open_page, html, data):
    page = open_page(html)
    node(page, NEURON).click()
    page.get_by_role("button", name="Pin", exact=True).click()
    page.get_by_label("Name of Neuron 7").fill("sees <on> & says so")
    page.get_by_label("Name of Neuron 7").press("Enter")
    page.locator("#pins input").nth(1).fill("Readers")
    page.locator("#pins input").nth(1).press("Enter")
    page.locator("#search").fill("mlp channel")
    page.get_by_role("button", name="Pair 3").click()
    page.get_by_role("button", name="Pretraining text").click()
    page.locator("#channels").get_by_role("button", name="3", exact=False).click()
    slide(page, "strength", 30)
    slide(page, "size", 3)
    page.locator("#theme").click()

    def view(page):
        return [
            page.locator(f"#{name}").inner_text()
            for name in (
                "example",
                "details",
                "strength-value",
                "size-value",
                "pins",
                "found",
                "channels",
            )
        ] + [
            page.locator("#pins input").evaluate_all("list => list.map((entry) => entry.value)"),
            page.locator(".node.found").count(),
            page.evaluate("document.documentElement.dataset.theme"),
        ]

    seen = view(page)
    assert seen[-3] == ["sees <on> & says so", "Readers"] and seen[-2] == 2
    assert "“sees <on> & says so”" in seen[1]
    assert page.locator(".node .dot-mark.group-0").count() == 1
    other = open_page(html)
    other.evaluate("(hash) => { location.hash = hash; }", page.evaluate("location.hash"))
    other.wait_for_selector("#pins input")
    assert view(other) == seen
    other.reload()
    other.wait_for_selector("html[data-ready]", state="attached")
    assert view(other) == seen
    other.locator("#pins .groups button").click()
    assert heading(other) == "Readers"
    other.locator("#pins").get_by_label("Unpin").click()
    assert other.locator("#pins input").count() == 0 and "pin=" not in other.url


def test_an_address_that_names_nothing_here_shows_the_page(open_page, html):
    page = open_page(html)
    strange = "#at=h.9&strength=1e9&size=-1&pair=99&side=x&query=4.5&sample=<b>&pin=[1&pin=null"
    strange += "&pin=%5B%22h.1.mlp.post_act.7%22%2C%7B%7D%5D&search=%3Cimg%20src%3Dx%3E&theme=a%0Ab"
    page.evaluate("(hash) => { location.hash = hash; }", strange)
    page.wait_for_selector("#pins input")
    assert heading(page) == "Nothing selected"
    assert page.locator("#strength-value").inner_text().startswith("from 0.00")
    assert page.locator("#size-value").inner_text().startswith("best 7 of 7")
    assert page.evaluate("document.images.length") == 0


def places(data, sample):
    """Nodes and tokens at which a node does at least a twentieth of the most that any does."""
    effects = {
        (number, at): abs(effect)
        for number, entry in enumerate(data["nodes"])
        for at, effect in enumerate(entry.get("byToken", [[]] * (sample + 1))[sample])
    }
    return {place for place, effect in effects.items() if effect >= 0.05 * max(effects.values())}


def test_nodes_stand_at_the_tokens_where_they_matter(open_page, html, data):
    page = open_page(html)
    switch = page.get_by_role("button", name="By token position")
    switch.focus()
    page.keyboard.press("Enter")
    assert switch.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.textContent") == "By token position"
    boxes = page.locator(".node.harms, .node.helps")
    assert boxes.count() == len(places(data, 0)) > 4
    view = page.locator("#view")
    view.get_by_role("button", name="Class 2").click()
    assert boxes.count() == len(places(data, 1))
    assert page.evaluate("document.activeElement.textContent") == "Class 2"
    view.get_by_role("button", name="Class 1").click()

    ids = data["pairs"][0][0]["ids"]
    word = next(i for i, token in enumerate(ids) if data["tokens"][str(token)] == "on")
    value = next(n for n in data["nodes"] if n["site"] == "h.0.attn.v")
    effect = value["byToken"][0][word]
    assert effect == max(value["byToken"][0]) > 0.5
    box = node(page, f"Value 5, layer 0, attention, head 1, at token {word + 1}, on")
    assert f"logit difference −{effect:.2f}" in box.get_attribute("aria-label")
    # Columns are tokens: what stands at one stands above its word.
    token = node(page, f"Prompt, token {word + 1}, on")
    middle = [b.bounding_box()["x"] + b.bounding_box()["width"] / 2 for b in (box, token)]
    assert abs(middle[0] - middle[1]) < 60
    assert box.bounding_box()["y"] + 40 < token.bounding_box()["y"]
    box.click()
    assert heading(page) == "Value 5"
    assert "Where it matters" in page.locator("#details").inner_text()
    assert page.locator(".node.selected").count() == 1
    assert page.locator(".node.far").count() > 0
    token.click()
    assert heading(page) == "Token on"
    first = page.locator("#details .row .value").first.inner_text()
    most = max((n["byToken"][0][word] for n in data["nodes"] if "byToken" in n), key=abs)
    assert first == f"{most:+.2f}".replace("-", "−")


def test_what_a_head_brings_goes_from_where_it_looks(open_page, html, data):
    page = open_page(html)
    page.get_by_role("button", name="By token position").click()
    head = data["heads"]["heads"][0]["circuit"][0]
    last = len(data["pairs"][0][0]["ids"]) - 1
    here, number = places(data, 0), {n["site"]: i for i, n in enumerate(data["nodes"])}
    source, target = number["h.0.attn.v"], number["h.0.attn.resid_delta"]
    assert (target, last) in here
    crossing = [
        at for node, at in here
        if node == source and head[last * (last + 1) // 2 + at] >= 20
    ]  # fmt: skip
    lines = page.evaluate(
        """() => d3.selectAll(".link.weight").data()
          .filter((line) => line.source.at !== line.target.at)
          .map((line) => [line.source.node.site, line.source.at, line.target.at, line.weight])"""
    )
    weight = next(x[2] for x in data["links"] if x[:2] == [source, target])
    found = {at: w for site, at, to, w in lines if site == "h.0.attn.v" and to == last}
    assert sorted(found) + [last] * (last in crossing) == sorted(crossing)
    for at, shown in found.items():
        share = head[last * (last + 1) // 2 + at] / 1000
        assert shown == pytest.approx(weight * share)
    assert {site for site, *_ in lines} == {"h.0.attn.v"}
    inside = page.evaluate(
        """() => d3.selectAll(".link.embed, .link.residual").data()
          .every((line) => line.source.at === line.target.at)"""
    )
    assert inside


def test_the_view_by_token_is_in_the_address_and_on_the_keyboard(open_page, html, data):
    page = open_page(html)
    page.get_by_role("button", name="By token position").click()
    page.locator("#view").get_by_role("button", name="Class 2").click()
    page.locator(".node.harms, .node.helps").first.focus()
    page.keyboard.press("Enter")
    seen = set()
    for key in [
        "ArrowDown",
        "ArrowUp",
        "ArrowUp",
        "ArrowRight",
        "ArrowUp",
        "ArrowRight",
        "ArrowUp",
    ]:
        page.keyboard.press(key)
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert len(seen) > 2
    node(page, "Value 5").first.click()

    def view(page):
        return [
            page.locator(".node.selected").evaluate_all("all => all.map((e) => e.ariaLabel)"),
            page.locator(".node").count(),
            page.locator("#details").inner_text(),
            page.locator("#view").inner_text(),
            page.locator("#graph-how").inner_text(),
        ]

    seen = view(page)
    assert len(seen[0]) == 1 and "view=tokens" in page.url and "side=1" in page.url
    other = open_page(html)
    other.evaluate("(hash) => { location.hash = hash; }", page.evaluate("location.hash"))
    other.locator("#view >> text=Class 2").wait_for()
    assert view(other) == seen
    other.reload()
    other.wait_for_selector("html[data-ready]", state="attached")
    assert view(other) == seen
    other.get_by_role("button", name="Nodes", exact=True).click()
    assert other.locator(".node").count() == len(data["nodes"])
    assert "view=" not in other.url
    strange = "#view=<b>&at=token%2099&token=-1"
    other.evaluate("(hash) => { location.hash = hash; }", strange)
    other.locator("text=Nothing selected").wait_for()
    assert other.locator(".node").count() == len(data["nodes"])


def test_the_view_by_token_on_a_phone_and_in_the_dark(open_page, html):
    page = open_page(
        html, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True,
        color_scheme="dark",
    )  # fmt: skip
    page.get_by_role("button", name="By token position").tap()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(SMALLEST) >= 11
    box = page.locator(".node.harms").first
    box.tap()
    assert page.locator(".node.selected").count() == 1
    fill = box.locator("rect").evaluate("(rect) => getComputedStyle(rect).fill")
    assert fill != "none"
    page.locator("#theme").tap()
    assert box.locator("rect").evaluate("(rect) => getComputedStyle(rect).fill") != fill


def test_picture_and_data_are_downloaded(open_page, html, data, tmp_path):
    page = open_page(html, accept_downloads=True)
    for button, name in (("SVG", "on_off.svg"), ("Data", "on_off.json")):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=button).click()
        assert waiting.value.suggested_filename == name
        waiting.value.save_as(tmp_path / name)
    assert json.loads((tmp_path / "on_off.json").read_text()) == json.loads(json.dumps(data))
    root = ElementTree.parse(tmp_path / "on_off.svg").getroot()
    assert root.tag.endswith("svg") and "+2.00" in "".join(root.itertext())
    boxes = [e for e in root.iter() if e.get("class", "").startswith("node ")]
    assert len(boxes) == len(data["nodes"])
    assert all(box[0].get("fill", "").startswith(("rgb", "color", "oklab")) for box in boxes)


def saved_pixels(page, path):
    """The downloaded PNG, `(height, width, 4)`, and the size of the graph on the page."""
    with page.expect_download() as waiting:
        page.get_by_role("button", name="PNG").click()
    assert waiting.value.suggested_filename == "on_off.png"
    waiting.value.save_as(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    size = page.locator("svg.graph").bounding_box()
    return imread(path), [math.ceil(size[side]) for side in ("height", "width")]


def test_the_picture_is_downloaded_in_pixels(open_page, html, tmp_path):
    page = open_page(html, accept_downloads=True)
    for view in ("Nodes", "By token position"):
        page.get_by_role("button", name=view, exact=True).click()
        light, size = saved_pixels(page, tmp_path / "light.png")
        assert list(light.shape) == [2 * size[0], 2 * size[1], 4]
        assert light[0, 0].tolist() == [1, 1, 1, 1]
        # What is seen is in it: here, the box that matters most, in its colour.
        box = page.locator(".node.strong.harms:not(.far) rect").first
        frame, place = page.locator("svg.graph").bounding_box(), box.bounding_box()
        row = round(2 * (place["y"] + place["height"] / 2 - frame["y"]))
        column = round(2 * (place["x"] + 8 - frame["x"]))
        page.mouse.move(0, 0)
        shown = imread(io.BytesIO(box.screenshot()))
        there = shown[len(shown) // 2, 8, :3]
        assert light[row, column, :3] == pytest.approx(there, abs=0.02)
        assert there.min() < 0.5
    page.locator("#theme").click()
    dark, _ = saved_pixels(page, tmp_path / "dark.png")
    assert dark[0, 0, :3].max() < 0.2
    assert dark.shape == light.shape


def test_pixels_of_hostile_names(open_page, data, tmp_path):
    hostile = copy.deepcopy(data)
    for entry in hostile["nodes"]:
        entry["name"] = "\ud800 <x> & \u0000 \ufffe"
    page = open_page(render_page(hostile), accept_downloads=True)
    pixels, size = saved_pixels(page, tmp_path / "hostile.png")
    assert list(pixels.shape[:2]) == [2 * size[0], 2 * size[1]]


def test_the_sliders_hide_weights_and_nodes(open_page, html, data):
    page = open_page(html)
    lines = [abs(weight) for _, _, weight, kind, *_ in data["links"] if kind != "residual"]
    assert f"{len(lines)} of {len(lines)} lines" in page.locator("#strength-value").inner_text()
    slide(page, "strength", 60)
    left = sum(weight >= 0.6 * max(lines) for weight in lines)
    assert 0 < left < len(lines)
    assert f"{left} of {len(lines)} lines" in page.locator("#strength-value").inner_text()
    assert page.locator(".link:not(.hidden):not(.residual)").count() == left
    slide(page, "strength", 0)

    slide(page, "size", 2)
    curve = data["curve"]
    shown = f"best 2 of 7: loss {curve['losses'][curve['sizes'].index(2)]:.3f}"
    assert page.locator("#size-value").inner_text() == shown
    assert page.locator(".node.cut").count() == 5
    kept = {tuple(key) for key in curve["order"][:2]}
    effects = {(n["site"], n["index"]): n["effect"] for n in data["nodes"] if "effect" in n}
    assert min(map(effects.get, kept)) >= sorted(effects.values())[-2]
    # The mark on the curve follows, and a click on the curve moves the slider.
    mark = page.locator(".here circle")
    x = float(mark.get_attribute("cx"))
    page.locator("#curve .catch").click(position={"x": 400, "y": 50})
    assert page.locator("#size-value").inner_text().startswith("best 7 of 7")
    assert float(mark.get_attribute("cx")) > x
    assert page.locator(".node.cut").count() == 0


def test_the_keyboard_reaches_everything(open_page, html):
    page = open_page(html)
    node(page, "Channel 0").focus()
    page.keyboard.press("Enter")
    assert heading(page) == "Channel 0"
    seen = []
    for _ in range(12):
        page.keyboard.press("ArrowRight")
        seen.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert any(label.startswith(NEURON) for label in seen)
    assert seen[-1].startswith("Answer") and heading(page).startswith("Answer")
    page.keyboard.press("ArrowLeft")
    assert heading(page) == "Channel 4"
    assert node(page, "Channel 4").first.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert heading(page) == "Nothing selected"

    def scale():
        return page.evaluate("d3.zoomTransform(document.querySelector('svg.graph')).k")

    fit = scale()
    page.keyboard.press("+")
    assert scale() > fit
    page.keyboard.press("0")
    assert scale() == pytest.approx(fit)
    page.keyboard.press("-")
    assert scale() <= fit
    page.locator(".head").focus()
    page.keyboard.press("Enter")
    assert heading(page) == "Head 1"
    page.locator("#strength").focus()
    page.keyboard.press("ArrowRight")  # the slider's own key
    assert page.locator("#strength").input_value() == "1" and heading(page) == "Head 1"


def test_channels_show_tokens_and_positions(open_page, html):
    page = open_page(html)
    channels = page.locator("#channels")
    channels.get_by_role("button", name="0", exact=True).click()
    text = channels.inner_text()
    assert "+1.50" in text and "−1.50" in text
    assert channels.locator("svg .stem").count() == 16  # one per position
    node(page, "Channel 4").first.click()
    page.get_by_role("button", name="Tokens and positions on channel 4").click()
    assert "+3.00" in channels.inner_text() and "yes" in channels.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(open_page, html, scheme):
    page = open_page(html, color_scheme=scheme)

    def is_dark():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]) < 200

    assert is_dark() == (scheme == "dark")
    page.locator("#theme").click()
    assert is_dark() == (scheme == "light")
    page.locator("#theme").click()
    assert is_dark() == (scheme == "dark")


def test_a_phone_gets_the_graph_from_top_to_bottom(open_page, html):
    page = open_page(html, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    first, last = page.locator(".node.token").first, page.locator(".node.token").last
    assert first.bounding_box()["y"] + 200 < last.bounding_box()["y"]
    node(page, NEURON).tap()
    assert heading(page) == "Neuron 7"
    page.set_viewport_size({"width": 1200, "height": 800})
    # `wait_for_function` evaluates a string if it has to ask twice, which the page forbids.
    page.locator("#graph:not(.vertical)").wait_for()
    assert first.bounding_box()["x"] + 300 < last.bounding_box()["x"]


HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 2</script>",
    "<img src=x onerror='window.hit = 3'>",
    '"\' onmouseover="window.hit = 4" {{SCRIPT}} ${window.hit = 5} $& $\'',
    "javascript:window.hit = 6",
    "\u202e\u0000\u2028gnirts",
    "x" * 10_000,
]


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_text_stays_text(open_page, data, label):
    hostile = copy.deepcopy(data)
    for name in ("task", "description", "model", "fingerprint"):
        hostile[name] = label
    hostile["tokens"] = {token: label for token in hostile["tokens"]}
    hostile["pairs"] = [[side | {"target": 7} for side in pair] for pair in hostile["pairs"]]
    hostile["checks"] = {label: {"value": 1.0, "control": 0.0, "control_low": -1.0, "passed": 1.0}}
    hostile["verdict"] = f"Failed: {label}"[:2000]
    for node in hostile["nodes"]:
        node |= {"name": label, "note": label}
    page = open_page(render_page(hostile))
    assert "Failed: " in page.locator("#verdict").inner_text()
    for selector in (".node.token >> nth=0", ".head", ".node.v"):
        page.locator(selector).click()
        page.locator(selector).hover()
        page.locator("#details .chip, #details h2").first.hover()
    assert page.evaluate("window.hit === undefined && document.scripts.length === 3")
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert label[:20].strip() in page.title() or "\u2028" in label
    # Cut where it is shown, so that the page stays a page.
    assert page.evaluate("document.body.innerText.length") < 60_000
    assert page.evaluate("document.documentElement.scrollHeight") < 12_000


def test_the_policy_runs_nothing_else(browser, html, tmp_path):
    """Even text that became HTML by some mistake could run nothing and load nothing."""
    planted = (
        "<script>window.hit = 1</script><img src='data:,' onerror='window.hit = 2'>"
        "<svg onload='window.hit = 3'></svg><img src='http://localhost:9/x.png'></body>"
    )
    path = tmp_path / "page.html"
    path.write_text(html.replace("</body>", planted), encoding="utf-8")
    context = browser.new_context()
    page, refused = context.new_page(), []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate("window.hit === undefined")
    assert sum("Content Security Policy" in text for text in refused) >= 3
    assert any("img-src" in text and "localhost:9" in text for text in refused)
    context.close()


def test_a_large_circuit_is_a_small_page(open_page, data):
    """A hundred nodes with all their examples stay under 3 MB, and nothing is left out."""
    large = copy.deepcopy(data)
    pattern = next(n for n in large["nodes"] if n["site"] == "h.1.mlp.post_act")
    place = large["nodes"].index(pattern)
    for i in range(110):
        clone = copy.deepcopy(pattern) | {"index": 100 + i, "row": i - 55}
        large["nodes"].append(clone)
        large["curve"]["order"].append([clone["site"], clone["index"]])
        for source, target, weight, *rest in list(large["links"]):
            if place in (source, target):
                new = len(large["nodes"]) - 1
                ends = [new if end == place else end for end in (source, target)]
                large["links"].append([*ends, weight * (1 - i / 120), *rest])
    # As many tokens of every prompt as are shown at most, and something at each of them.
    numbers = random.Random(0)
    for side in (side for pair in large["pairs"] for side in pair):
        side["ids"] = (side["ids"] * 48)[:48]
    for entry in large["nodes"]:
        for field in {"pairs", "byToken"} & set(entry):
            entry[field] = [[round(numbers.gauss(0, 1), 3) for _ in range(48)] for _ in range(8)]
    for head in large["heads"]["heads"]:
        head |= {run: [[20] * (48 * 49 // 2)] * 8 for run in ("circuit", "model")}
    large["curve"]["sizes"].append(117)
    large["curve"]["losses"].append(0.1)
    html = render_page(large)
    assert len(html.encode()) < 3_000_000
    page = open_page(html)
    assert page.locator(".node").count() == len(large["nodes"])
    node(page, "Neuron 150").dispatch_event("click")
    assert heading(page) == "Neuron 150"
    page.get_by_role("button", name="By token position").click()
    assert page.locator(".node.harms, .node.helps").count() == 120
    # Wherever the picture begins, the rows have their titles.
    frame = page.locator("#graph").bounding_box()
    assert min(box.bounding_box()["x"] for box in page.locator(".node").all()) < frame["x"]
    for title in page.locator(".titles text").all():
        assert 0 < title.bounding_box()["x"] - frame["x"] < 40
    assert page.evaluate(SMALLEST) >= 11
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
