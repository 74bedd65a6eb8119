"""The page in a headless Chromium: what a reader's hands and eyes meet, and a console that stays empty."""

import re

import numpy as np
import pytest
from PIL import Image
from report_runs import HOSTILE, add_overview, label_pass, make_run, write_log

from sela_ext.report import write_report

N = 260


def picture(index):
    """A square whose colour is the image's number."""
    return np.full((64, 64, 3), (index % 256, 255 - index % 256, 60), np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of a run of 260 images, 13 clusters of a head beside 4 of another, three classes."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    labels, _ = make_run(folder, n=N, clusters=(13, 4))
    add_overview(folder, labels)
    return write_report(folder, picture)


@pytest.fixture
def page(browser, path):
    browser.open(path)
    return browser


def cards(page):
    """Clusters whose cards are shown, in their order."""
    return page.run(
        "[...document.querySelectorAll('#gallery .tile')].filter((c) => !c.hidden).map((c) => +c.dataset.k)"
    )


def values(page, name):
    return page.run(
        f"[...document.querySelectorAll('#gallery .tile')].filter((c) => !c.hidden).map((c) => +c.dataset.{name})"
    )


def test_the_page_opens_from_a_file_without_a_word_on_the_console(page):
    assert page.count("#gallery .tile") == 13
    assert page.count("#gallery-controls") == 1
    assert page.count(".js-only") >= 3
    assert page.problems == []


def test_thumbnails_are_the_images_that_they_name(page, tmp_path):
    for number in (1, 7):
        selector = f"#gallery .tile:nth-child({number}) .thumbs li:nth-child(2) .t"
        index = int(re.match(r"image-(\d+)", page.run(f"document.querySelector({selector!r}).title"))[1])
        _, _, (x, y, width, height) = page.place(selector)
        page.picture(tmp_path / "page.png")
        pixel = Image.open(tmp_path / "page.png").convert("RGB").getpixel((int(x + width / 2), int(y + height / 2)))
        assert np.abs(np.array(pixel) - picture(index)[0, 0]).max() <= 12


@pytest.mark.parametrize("key", ["confidence", "size", "purity", "entropy", "k"])
def test_cards_are_sorted_by_what_is_asked_for(page, key):
    page.choose("#sort", key)
    high = values(page, key)
    assert high == sorted(high, reverse=True)
    page.click("#direction")
    assert page.text("#direction") == "Low to high"
    assert values(page, key) == sorted(high)
    assert len(high) == 13


def test_filters_leave_what_they_name(page):
    page.choose("#filter", "pure")
    shown = values(page, "purity")
    assert all(value >= 0.8 for value in shown)
    page.choose("#filter", "unsure")
    assert all(value < 0.5 for value in values(page, "confidence"))
    page.choose("#filter", "mixed")
    assert all(value < 0.5 for value in values(page, "purity"))
    assert page.text("#gallery-said").startswith(f"{len(cards(page))} of 13 clusters")
    page.choose("#filter", "all")
    assert len(cards(page)) == 13


def test_search_finds_clusters_images_and_classes(page):
    page.choose("#find", "12")
    assert cards(page) == [12]
    name, own = page.run(
        "(() => { const i = document.querySelector('#cluster-5 .t'); return [i.title.split(',')[0], 5]; })()"
    )
    page.choose("#find", name.upper())
    assert own in cards(page)
    page.choose("#find", "a hen")
    assert 0 < len(cards(page)) <= 13
    page.choose("#find", "no such thing")
    assert cards(page) == []
    assert page.text("#gallery-said") == "0 of 13 clusters."


def test_a_click_opens_the_panel_of_a_cluster_and_escape_closes_it(page):
    page.click("#cluster-3 button")
    assert page.run("document.querySelector('#panel').open")
    assert page.text("#panel-title") == "Cluster 3"
    members = page.run("document.querySelectorAll('#cluster-3 .thumbs li').length")
    assert page.count("#panel .body > .thumbs li") == members == 20
    assert page.count("#cluster-3 .thumbs li") == 12
    assert "Nearest clusters" in page.text("#panel-body")
    assert re.search(r"Head 1: cluster \d \(\d+%\)", page.text("#panel-body"))
    page.key("Escape")
    assert not page.run("document.querySelector('#panel').open")
    assert page.run("document.activeElement.getAttribute('aria-label')") == "Open cluster 3"


def test_the_panel_goes_to_the_next_cluster_and_to_near_ones(page):
    order = cards(page)
    page.click(f"#cluster-{order[1]} button")
    page.click("#panel-after")
    assert page.text("#panel-title") == f"Cluster {order[2]}"
    page.click("#panel-before")
    page.click("#panel-before")
    assert page.text("#panel-title") == f"Cluster {order[0]}"
    assert page.run("document.querySelector('#panel-before').disabled")
    nearest = page.text("#panel .strip li button")
    page.click("#panel .strip li button")
    assert page.text("#panel-title") == nearest
    page.click("#panel-close")
    assert not page.run("document.querySelector('#panel').open")


def test_images_of_the_panel_are_gone_through_by_keys(page):
    page.click("#cluster-3 button")
    page.run("document.querySelector('#panel .thumbs [tabindex=\"0\"]').focus()")
    titles = page.run("[...document.querySelectorAll('#panel .body > .thumbs li > *')].map((one) => one.title)")
    seen = [page.text("#panel .said")]
    for _ in range(2):
        page.key("ArrowRight")
        seen.append(page.text("#panel .said"))
    page.key("End")
    seen.append(page.text("#panel .said"))
    assert seen == [titles[0], titles[1], titles[2], titles[-1]]
    assert page.run("document.querySelectorAll('#panel .thumbs [tabindex=\"0\"]').length") == 1


def test_a_cluster_is_reached_by_its_address_and_by_links(page, browser, path):
    page.choose("#find", "11")
    page.run("document.querySelector('.shades a[href=\"#cluster-4\"]').click()")
    assert 4 in cards(page)
    assert page.run("location.hash") == "#cluster-4"
    assert page.run("document.activeElement.getAttribute('aria-label')") == "Open cluster 4"


def test_curves_are_read_off_by_pointer_and_keys(page):
    figure = "figure[data-curves='chart-1']"
    x, y, _ = page.place(f"{figure} svg")
    page.mouse("mouseMoved", x, y)
    assert re.fullmatch(r"epoch [\d.]+ · Training loss [\d.]+", page.text(f"{figure} output"))
    page.run(f"document.querySelector({figure + ' .plot'!r}).focus()")
    page.key("Home")
    assert page.text(f"{figure} output") == "epoch 0 · Training loss 3"
    page.key("ArrowRight")
    assert page.text(f"{figure} output") == "epoch 0.1 · Training loss 1.5"
    page.key("End")
    assert page.text(f"{figure} output") == "epoch 3 · Training loss 0.09677"
    assert page.run(f"document.querySelector({figure + ' output'!r}).getAttribute('aria-live')") == "polite"


def ticks(page, figure):
    """Numbers below the x axis."""
    return page.run(
        f"[...document.querySelectorAll({figure + ' .grid text'!r})].filter((t) => t.getAttribute('y') === '257')"
        ".map((t) => +t.textContent)"
    )


def test_curves_are_looked_at_closer_by_dragging_keys_and_buttons(page):
    figure = "figure[data-curves='chart-1']"
    whole = ticks(page, figure)
    assert (min(whole), max(whole)) == (0, 3)
    _, _, (left, top, width, height) = page.place(f"{figure} svg")
    third, half, two_thirds = (left + width * (68 + share * 556) / 640 for share in (1 / 3, 1 / 2, 2 / 3))
    middle = top + height / 2
    page.mouse("mousePressed", third, middle)
    page.mouse("mouseMoved", half, middle)
    assert page.count(f"{figure} .brush") == 1
    page.mouse("mouseMoved", two_thirds, middle)
    page.mouse("mouseReleased", two_thirds, middle)
    near = ticks(page, figure)
    assert 0.95 <= min(near) <= 1.2
    assert 1.8 <= max(near) <= 2.05
    page.click(f"{figure} .tools button:nth-child(3)")
    assert ticks(page, figure) == whole
    page.run(f"document.querySelector({figure + ' .plot'!r}).focus()")
    page.key("+")
    assert max(ticks(page, figure)) - min(ticks(page, figure)) < 2
    page.key("-")
    assert ticks(page, figure) == whole


def test_legend_entries_show_and_hide_curves(page):
    figure = "figure:has(#chart-4)"
    paths = page.count(f"{figure} path")
    page.click(f"{figure} .legend button")
    assert page.run(f"document.querySelector({figure + ' .legend button'!r}).getAttribute('aria-pressed')") == "false"
    assert page.count(f"{figure} path") < paths
    page.click(f"{figure} .legend button")
    assert page.count(f"{figure} path") == paths


def test_bars_are_read_by_keys(page):
    page.run("document.querySelector('figure[data-bars] .plot').focus()")
    page.key("ArrowRight")
    assert page.text("figure[data-bars] output") == "cluster 0: 20 images"
    page.key("End")
    assert page.text("figure[data-bars] output") == "cluster 12: 20 images"


def test_the_map_tells_the_image_pointed_at_and_changes_colours(page):
    names = page.run("JSON.parse(document.querySelector('#data-map').textContent).names")
    x, y, _ = page.place("#map-plot circle:nth-child(10)")
    page.mouse("mouseMoved", x, y)
    assert any(page.text("#map-said").startswith(name) for name in names)
    assert page.count("#map-said .t") == 1
    page.choose("#map-colour", "truth")
    assert page.text("#map-keys") == "a cata doga hen"
    first = page.run("document.querySelector('#map-plot circle').getAttribute('cx')")
    page.choose("#map-layout", "Principal components")
    assert page.run("document.querySelector('#map-plot circle').getAttribute('cx')") != first
    page.run("document.querySelector('#map-plot').focus()")
    page.key("Escape")
    page.key("ArrowRight")
    one = page.text("#map-said")
    page.key("ArrowRight")
    assert page.text("#map-said") != one
    cluster = re.search(r"In (cluster \d+)\.", page.text("#map-said"))[1]
    page.key("Enter")
    assert page.text("#panel-title") == cluster.capitalize()


def test_heads_stand_side_by_side(page):
    assert page.text("#other-title") == "head 1"
    assert page.count("#heads-rows tr") == 13
    assert page.count("#heads-rows .pictures .t") > 13
    assert re.fullmatch(r"cluster \d: \d+%", page.text("#heads-rows tr .pair b"))


def background(page):
    return page.run("getComputedStyle(document.body).backgroundColor")


def test_colours_follow_the_system_until_the_reader_chooses(browser, path):
    browser.open(path)
    light = background(browser)
    browser.open(path, dark=True)
    dark = background(browser)
    assert light != dark
    browser.click("#theme")
    assert (browser.text("#theme"), background(browser)) == ("Colours: light", light)
    browser.click("#theme")
    browser.prefer(dark=False)
    assert (browser.text("#theme"), background(browser)) == ("Colours: dark", dark)
    browser.open(path.with_name("report.html"))  # the choice is remembered
    assert background(browser) == dark
    browser.click("#theme")
    assert (browser.text("#theme"), background(browser)) == ("Colours: as the system", light)


def test_words_stand_out_from_their_background(browser, path):
    """Contrast of text as WCAG 2 measures it: 4.5 and more."""
    for dark in (False, True):
        browser.open(path, dark=dark)
        worst = browser.run(
            """(() => {
              const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
              const rgb = (colour) => {
                canvas.clearRect(0, 0, 1, 1);
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data];
              };
              const light = (colour) => {
                const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                const [r, g, b] = rgb(colour).map((v) => linear(v / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const behind = (element) => {
                for (let e = element; e; e = e.parentElement) {
                  const colour = getComputedStyle(e).backgroundColor;
                  if (rgb(colour)[3] === 255) return colour;
                }
                return "white";
              };
              let worst = [99, ""];
              const words = "p, td, th, h1, h2, h3, dt, dd, small, caption, a, button, label, li, figcaption, bdi";
              for (const e of document.querySelectorAll(words)) {
                if (!e.textContent.trim() || !e.checkVisibility() || e.disabled) continue;
                const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
                const contrast = (a + 0.05) / (b + 0.05);
                const what = `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`;
                if (contrast < worst[0]) worst = [contrast, what];
              }
              return worst;
            })()"""
        )
        assert worst[0] >= 4.5, worst


def test_every_control_has_a_name_and_the_order_of_focus_is_that_of_the_page(page):
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = ("button", "link", "combobox", "searchbox", "checkbox", "image", "dialog", "table")
    named = [node for node in tree if not node["ignored"] and node["role"]["value"] in controls]
    assert len(named) > 100
    nameless = [node["role"] for node in named if not node.get("name", {}).get("value", "").strip()]
    assert nameless == []
    roles = {node["role"]["value"] for node in tree if not node["ignored"]}
    assert {"main", "navigation", "search", "region", "status"} <= roles
    assert page.run("[...document.querySelectorAll('[tabindex]')].every((e) => e.tabIndex <= 0)")
    page.key("Tab")
    assert page.run("document.activeElement.className") == "skip"
    page.key("Enter")
    assert page.run("location.hash") == "#clusters"


def test_nothing_is_wider_than_a_telephone(browser, path):
    browser.open(path, width=360, height=740)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    browser.click("#cluster-3 button")
    assert browser.run("document.querySelector('#panel').scrollWidth <= document.querySelector('#panel').clientWidth")


def test_motion_is_left_out_where_it_is_not_wanted(browser, path):
    browser.open(path, still=True)
    assert browser.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_paper_shows_all_cards_and_no_controls(page):
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.count("#gallery .tile") == 13
    assert page.count("button:not(.legend button), select, input") == 0
    assert page.run("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"


def test_many_clusters_come_a_page_at_a_time(browser, tmp_path):
    make_run(tmp_path / "run", n=400, clusters=(131,))
    browser.open(write_report(tmp_path / "run", None))
    assert len(cards(browser)) == 48
    assert "the first 48 are shown" in browser.text("#gallery-said")
    browser.click("#more")
    assert len(cards(browser)) == 96
    last = browser.run("[...document.querySelectorAll('#gallery .tile')].find((c) => c.hidden).dataset.k")
    browser.open(tmp_path / "run" / "report.html")
    assert int(last) not in cards(browser)
    browser.run("document.querySelector('.skip').href = '#cluster-" + last + "'")
    browser.run("document.querySelector('.skip').click()")
    assert int(last) in cards(browser)


def test_hostile_names_stay_text_in_the_browser(browser, tmp_path):
    n = 10 * len(HOSTILE)
    names = [HOSTILE[i % len(HOSTILE)] + f" {i}" for i in range(n)]
    labels, _ = make_run(tmp_path / "run", n=n, clusters=(4, 3), names=names)
    add_overview(tmp_path / "run", labels, names=tuple(HOSTILE[:3]))
    browser.open(write_report(tmp_path / "run", picture))
    browser.run("window.alert = () => { throw new Error('executed'); }; 0")
    for k in range(4):
        browser.click(f"#cluster-{k} button")
        browser.key("Escape")
    browser.choose("#map-colour", "truth")
    browser.run("document.querySelector('#map-plot').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        browser.key(key)
    browser.choose("#find", "<script>")
    assert browser.count("img[src='x'], script:not([type]):not(body > script), #map-said script, #map-said img") == 0
    assert "<script>alert(1)</script>.png" in browser.run("document.querySelector('#map-keys').textContent")


def test_a_log_of_one_point_and_of_many_heads_is_drawn(browser, tmp_path):
    make_run(tmp_path / "run", n=80, clusters=(5,) * 12, metrics=False)
    write_log(tmp_path / "run", [label_pass(0, (5,) * 12)])
    browser.open(write_report(tmp_path / "run", picture))
    browser.run("document.querySelector('figure[data-curves] .plot').focus()")
    browser.key("ArrowRight")
    assert browser.text("figure[data-curves] output").endswith("4 more")
