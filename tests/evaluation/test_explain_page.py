"""Promise: the page plays the video with the right map of the right word over the right pixels at the right time, needs
no network, and runs nothing that its data says."""

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import choose, chromium, open_page, painted, pixels, requests_of, seek
from footage import footage_dir
from processes import ROOT
from scipy.ndimage import binary_fill_holes

from swim.data_tools.reencode import reencode
from swim.data_tools.rle import clip_coverage, decode_mask, encode_mask
from swim.data_tools.synth import read_barcode, synthesise
from swim.data_tools.video import probe
from swim.evaluation.explain_page import HEAT_TABLE, Film, Object, View, Word, pack, raw_cells, unpack, write_page

PROMPT = "which way does the red circle move ?"
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"' {{ 7 * 7 }} &lt; é\u2028"
GRID = (2, 4, 4)
FRAMES = [[1, 3], [5, 7]]
CIRCLE, MOVE = 5, 6  # words of PROMPT
OVERLAY, OTHER = 'figure[data-view="0"] canvas.heat', 'figure[data-view="1"] canvas.heat'


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Film:
    mp4 = synthesise(tmp_path_factory.mktemp("clips"), clips=1, seed=3).read(0).media()
    return Film("clip", mp4, 112, 112, 8, 8.0)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def words(text: str, *, first: int = 0, nouns: tuple[str, ...] = ("circle",)) -> list[Word]:
    found, at = [], 0
    for number, word in enumerate(text.split()):
        start = text.index(word, at)
        at = start + len(word)
        found.append(Word(start, at, word in nouns, first + number, num_keys=64.0))
    return found


def view(name: str = "model", seed: int = 0, answer: str = "the circle moves left", **changes: Any) -> View:
    """Two layers, two heads; random maps, but for layer 1, head mean: "circle" looks at one cell a step."""
    prompt_words = words(PROMPT)
    answer_words = words(answer, first=len(prompt_words))
    shape = (len(prompt_words) + len(answer_words) + 1, 4, np.prod(GRID))
    rng = np.random.default_rng(seed)
    maps = {layer: rng.dirichlet(np.ones(shape[2]), shape[:2]).astype(np.float32) for layer in (0, 1)}
    maps[1][CIRCLE, :2] = 0
    maps[1][CIRCLE, :2, [5, 16 + 10]] = 1.0  # row 1 column 1, then row 2 column 2
    made = View(name, answer, prompt_words, answer_words, GRID, FRAMES, maps, heads=(0, 1), num_heads=2)
    return replace(made, own_layers=(1,), about_training="Trained on nothing.", **changes)


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """Colour in the middle of a cell."""
    height, width = (side // n for side, n in zip(picture.shape, GRID[1:]))
    return picture[row * height + height // 2, column * width + width // 2]


def test_cells_are_wrong_by_no_more_than_the_page_says() -> None:
    maps = np.random.default_rng(0).dirichlet(np.full(768, 0.1), 50).astype(np.float32)
    back = unpack(*pack(maps))
    assert (np.abs(back - maps).max(-1) <= 0.004 * maps.max(-1)).all()
    inside = np.arange(768) < 40  # and with them the mass that the page computes
    assert np.abs(back[:, inside].sum(-1) / back.sum(-1) - maps[:, inside].sum(-1)).max() < 0.005
    assert unpack(*pack(np.zeros((1, 3), np.float32))).tolist() == [[0, 0, 0]]


def test_the_page_in_docs_has_the_script_of_today() -> None:
    """It is generated (`make explain-page`): a change of the script must reach it."""
    assert (ROOT / "evaluation" / "explain.js").read_text().strip() in (ROOT / "docs" / "explain.html").read_text()


def test_wrong_maps_are_refused(film: Film, tmp_path: Path) -> None:
    for wrong, problem in ((replace(view(), heads=(0,)), "words need"), (replace(view(), frames=[[1]]), "2 steps")):
        with pytest.raises(ValueError, match=problem):
            write_page(tmp_path / "page.html", prompt=PROMPT, film=film, views=[wrong])
    with pytest.raises(ValueError, match="not 3"):
        write_page(tmp_path / "page.html", prompt=PROMPT, film=film, views=[view()] * 3)


def test_raw_cells_are_the_maps(film: Film) -> None:
    made = view()
    (model,) = raw_cells([made], prompt=PROMPT, film=film)["models"]
    circle = model["words"][CIRCLE]
    assert (circle["text"], circle["turn"], circle["noun"]) == ("circle", "prompt", True)
    for layer, planes in made.maps.items():
        for number, name in enumerate(("mean_within_step", "mean", "head_0", "head_1")):
            np.testing.assert_allclose(
                np.ravel(circle["layers"][str(layer)][name]), planes[CIRCLE, number], rtol=1e-5, atol=1e-12
            )
            np.testing.assert_allclose(
                np.ravel(model["shared"][str(layer)][name]), planes[-1, number], rtol=1e-5, atol=1e-12
            )


@pytest.fixture(scope="module")
def compared(film: Film, tmp_path_factory: pytest.TempPathFactory, driver: Any) -> Any:
    """A page with two models and an object, open."""
    page = tmp_path_factory.mktemp("page") / "compared.html"
    masks = {frame: {"size": (112, 112), "counts": _square(frame)} for frame in range(8)}
    thing = Object("c", "red circle", masks)
    coverage = {"c": [np.eye(4), np.zeros((4, 4))]}
    views = [view("first", 0, coverages=coverage), view("second", 1, answer="up", coverages=coverage)]
    sizes = write_page(page, prompt=PROMPT, film=film, views=views, objects=[thing])
    assert sizes["page"] == page.stat().st_size > sizes["video"] + sizes["maps"]
    requests_of(driver)
    open_page(driver, page)
    return driver


def _square(frame: int) -> str:
    mask = np.zeros((112, 112), bool)
    mask[20:60, 10 * frame : 10 * frame + 30] = True
    return str(encode_mask(mask)["counts"])


def test_it_plays(compared: Any) -> None:
    compared.execute_script("document.getElementById('play').click()")
    compared.execute_async_script(
        """const done = arguments[0], video = document.querySelector("video"), from = video.currentTime;
        const look = () => (video.currentTime > from + 0.2 ? done() : setTimeout(look, 20)); look();"""
    )
    compared.execute_script("document.getElementById('play').click()")
    paused, width, decoded = compared.execute_script(
        "const v = document.querySelector('video'); return [v.paused, v.videoWidth, "
        "v.getVideoPlaybackQuality().totalVideoFrames]"
    )
    assert (paused, width) == (True, 112)
    assert decoded >= 1


def test_maps_follow_the_frame_that_is_shown(compared: Any) -> None:
    """The frame on screen, by its barcode, is the frame the page names; the map is that of the nearest step."""
    choose(compared, "layer", "1")
    highest = (HEAT_TABLE[-1] * 255).round()
    for frame, hot in ((0, (1, 1)), (3, (1, 1)), (5, (2, 2)), (7, (2, 2))):
        seek(compared, frame)
        assert read_barcode(pixels(compared, 'figure[data-view="0"] canvas.frame')[..., :3]) == frame
        assert f"frame {frame}," in compared.find_element("id", "now").text
        picture = pixels(compared, OVERLAY)
        np.testing.assert_allclose(cell(picture, *hot), highest, atol=2)  # the scale is one for all steps
        assert cell(picture, 0, 3)[3] == 0, "no attention, no colour"


def test_words_layers_heads_and_sinks_change_the_overlay(compared: Any) -> None:
    seek(compared, 0)
    seen = []
    for field, value in (("layer", "1"), ("layer", "0"), ("layer", "all"), ("head", "1"), ("scope", "all")):
        choose(compared, field, value)
        seen.append(painted(compared, OVERLAY))
    compared.find_element("id", "sinks").click()
    seen.append(painted(compared, OVERLAY))
    compared.find_element("id", "sinks").click()
    compared.find_element("css selector", f'button[data-text="0"][data-word="{MOVE}"]').click()
    seen.append(painted(compared, OVERLAY))
    compared.find_element("css selector", 'button[data-text="1"][data-word="3"]').click()  # "left", of the first answer
    seen.append(painted(compared, OVERLAY))
    assert len(set(seen)) == len(seen)
    assert not pixels(compared, OTHER)[..., 3].any()
    assert "no such word" in compared.find_element("css selector", 'figure[data-view="1"] .now').text
    for field, value in (("layer", "1"), ("head", "mean"), ("scope", "step")):
        choose(compared, field, value)
    compared.find_element("css selector", f'button[data-text="0"][data-word="{CIRCLE}"]').click()
    assert painted(compared, OVERLAY) == seen[0]
    assert pixels(compared, OTHER)[..., 3].any(), "the other model is shown beside it"


def test_cells_of_a_word_can_be_saved(compared: Any, tmp_path: Path) -> None:
    compared.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    compared.find_element("id", "get").click()
    file = tmp_path / "cells_circle.json"
    for _ in range(100):
        if file.exists():
            break
        time.sleep(0.05)
    saved = json.loads(file.read_text())
    assert saved["word"] == "circle"
    first, second = saved["models"]
    assert (first["name"], second["name"]) == ("first", "second")
    known = view("first", 0).maps[0][CIRCLE]
    for number, name in enumerate(("mean_within_step", "mean", "head_0", "head_1")):
        np.testing.assert_allclose(
            np.ravel(first["layers"]["0"][name]), known[number], atol=0.005 * known[number].max()
        )


def test_scale_mass_and_uniform_are_said(compared: Any) -> None:
    choose(compared, "layer", "1")
    seek(compared, 0)
    bar = [span.text for span in compared.find_elements("css selector", "#bar span")]
    assert "uniform = 0.063" in bar  # 1 / 16 cells
    assert "1" in bar
    assert "mass 1.00" in compared.find_element("css selector", 'figure[data-view="0"] .now').text
    choose(compared, "scope", "all")
    bar = [span.text for span in compared.find_elements("css selector", "#bar span")]
    assert "uniform = 0.016" in bar  # 1 / 64 tokens
    choose(compared, "scope", "step")


def test_words_behind_an_emoji_are_cut_where_python_cuts_them(film: Film, tmp_path: Path, driver: Any) -> None:
    """The script compares words by their letters; a browser counts an emoji as two of them."""
    answer = "\U0001f642 \U0001f642 circle goes"
    views = [view("first"), view("second", 1, answer=answer)]
    write_page(tmp_path / "page.html", prompt=PROMPT, film=film, views=views)
    open_page(driver, tmp_path / "page.html")
    driver.find_element("css selector", 'button[data-text="1"][data-word="1"]').click()
    caption = driver.find_element("css selector", 'figure[data-view="1"] .now').text
    assert caption.startswith("step "), "the second answer has the word too"


def test_sinks_are_what_all_words_share(film: Film, tmp_path: Path, driver: Any) -> None:
    """A word that looks where all do has nothing left; one that also looks elsewhere has that left."""
    made = view()
    for planes in made.maps.values():
        planes[:] = 0
        planes[1:, :, [0, 16]] = 0.9  # the sink, of all words but the first
        planes[CIRCLE, :, [5, 21]] = 0.5
    write_page(page := tmp_path / "page.html", prompt=PROMPT, film=film, views=[made])
    open_page(driver, page)
    assert cell(pixels(driver, OVERLAY), 0, 0)[3] > 200
    driver.find_element("id", "sinks").click()
    picture = pixels(driver, OVERLAY)
    assert cell(picture, 0, 0)[3] == 0
    np.testing.assert_allclose(cell(picture, 1, 1), (HEAT_TABLE[-1] * 255).round(), atol=2)
    driver.find_element("css selector", f'button[data-text="0"][data-word="{MOVE}"]').click()
    assert not pixels(driver, OVERLAY)[..., 3].any()


def test_nothing_is_asked_for_and_nothing_from_data_runs(film: Film, tmp_path: Path, driver: Any) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hostile = replace(
        view(HOSTILE), answer=HOSTILE, about_training=HOSTILE, left_out=[HOSTILE], provenance={HOSTILE: HOSTILE}
    )
    word = [Word(0, len(HOSTILE), True, 0)]
    hostile = replace(
        hostile, prompt_words=word, answer_words=(), maps={0: np.full((2, 4, 32), 0.1, np.float32)}, own_layers=()
    )
    thing = Object(HOSTILE, HOSTILE, {0: None})
    write_page(
        page := tmp_path / "page.html",
        prompt=HOSTILE,
        film=replace(film, name=HOSTILE),
        views=[hostile],
        objects=[thing],
        nouns_by=HOSTILE,
    )
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    requests_of(driver)
    driver.get_log("browser")
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    open_page(driver, page)
    assert driver.find_element("css selector", ".prompt").text.replace(" ", "") == " ".join(HOSTILE.split()).replace(
        " ", ""
    )
    assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert {url.split(":")[0] for url in requests_of(driver)} <= {"file", "data", "blob"}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False, "downloadThroughput": -1})
    # What does try to get out, or to run, is stopped by the page's policy.
    address = f"http://127.0.0.1:{server.server_port}/"
    refused = driver.execute_async_script(
        """const [address, done] = arguments, script = document.createElement("script");
        script.textContent = "window.ran = 1"; document.body.append(script);
        const image = document.createElement("img"); image.src = address + "image"; document.body.append(image);
        fetch(address).then(() => done("loaded"), (error) => done(String(error)));""",
        address,
    )
    server.shutdown()
    assert "TypeError" in refused
    assert asked == []
    assert driver.execute_script("return window.ran === undefined")


def test_heat_and_contour_lie_on_the_object(driver: Any, tmp_path: Path) -> None:
    """The known masks of real footage as maps: where the heat is, the contour is, at every time."""
    source = footage_dir()
    records = json.loads((source / "nl_refer_footage.json").read_text())
    masks = {int(f): m["segmentation"] for f, m in records[1]["annotation"][0].items()}  # the red cups
    steps = [f for f in sorted(masks) if masks[f] is not None][::15]
    mp4, _, _ = reencode((source / "cups.mp4").read_bytes(), 360, crf=28)
    info = probe(mp4)
    grid = (len(steps), 45, 80)
    coverage = clip_coverage([masks[f] for f in steps], grid[1:])
    maps = {0: np.tile(coverage.reshape(1, 1, -1), (2, 2, 1)).astype(np.float32)}
    known = View("mask", "", [Word(0, 4, True, 0)], [], grid, [[f] for f in steps], maps, heads=(), num_heads=1)
    film = Film("cups", mp4, info.height, info.width, info.num_frames, info.fps)
    page = tmp_path / "cups.html"
    write_page(page, prompt="cups", film=film, views=[known], objects=[Object("o", "cups", masks)])
    open_page(driver, page)
    for number, frame in enumerate(steps):
        seek(driver, frame)
        heat = pixels(driver, OVERLAY)[..., 3] > 0.55 * 255  # about half of a cell covered, through the square root
        line = pixels(driver, 'figure[data-view="0"] canvas.outline')[..., 3] > 0
        enclosed = binary_fill_holes(line)
        truth = decode_mask(masks[frame])[::2, ::2]
        # The line is drawn on the border: the mask reaches into it everywhere and nowhere beyond it.
        assert (truth & ~enclosed).sum() < 0.002 * truth.sum(), f"the contour at frame {frame} leaves out mask"
        assert (enclosed & ~line & ~binary_fill_holes(truth)).sum() < 0.002 * truth.sum(), (
            f"the contour at frame {frame} is too wide"
        )
        assert _iou(heat, truth) > 0.85, f"the heat at frame {frame} is not on the mask"
        for a, b in zip(_centre(heat), _centre(enclosed)):
            assert abs(a - b) < 4, "half a cell"
        assert number == 0 or _iou(heat, decode_mask(masks[steps[number - 1]])[::2, ::2]) < 0.85, "the cups move"


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def _centre(mask: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(mask)
    return float(y.mean()), float(x.mean())


def test_the_page_in_the_docs_opens_plays_and_gives_nothing_away(driver: Any) -> None:
    page = ROOT / "docs" / "explain.html"
    assert page.stat().st_size < 1 << 20
    assert not re.search(r"/(home|root|tmp|work|usr)/", page.read_text())
    requests_of(driver)
    driver.get_log("browser")
    open_page(driver, page)
    for width in (1280, 800):
        driver.set_window_size(width, 1200)
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "it fits"
    choose(driver, "layer", "own")
    for frame in (0, 7):
        seek(driver, frame)
        assert read_barcode(pixels(driver, 'figure[data-view="0"] canvas.frame')[..., :3]) == frame
        assert "mass 0.9" in driver.find_element("css selector", 'figure[data-view="1"] .now').text
    assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert {url.split(":")[0] for url in requests_of(driver)} <= {"file", "data", "blob"}
