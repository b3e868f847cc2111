"""The page: small, complete, safe, and at work in a browser without a network."""

import base64
import builtins
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from mixture_core.alarms import Alarm
from mixture_torch import MixtureStats
from mixture_torch.report import content, page
from mixture_torch.report.run import Run, read_run
from mixture_torch.report.verdicts import verdicts

HOSTILE = "</script><script>document.title = 'run'</script><img src=x onerror=alert(1)>\u2028%{x} <b>&amp;"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 60 steps in which a quarter of the samples goes away."""
    folder = tmp_path_factory.mktemp("run")
    chance = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 8)
    with MixtureStats(K=4, enabled=True, log_dir=folder, snapshot_every=10, on_alarm=print) as estimator:
        for step in range(60):
            labels = torch.arange(256) % (4 if step < 50 else 3)
            estimator.update(centres[labels] + 0.1 * torch.randn(256, 8, generator=chance))
            estimator.log_step(step=step, epoch=0)
    (folder / "config.yaml").write_text("K: 4\n")
    return read_run(folder)


@pytest.fixture(scope="module")
def hostile(run: Run) -> Run:
    alarm = Alarm(kind=HOSTILE, component=1, step=30, since=29, figures={HOSTILE: 1.0})
    return attrs.evolve(
        run, name=HOSTILE, config=HOSTILE, missing=(HOSTILE,), alarms=(*run.alarms, alarm), ends=(*run.ends, None)
    )


def long(run: Run, S: int, K: int) -> Run:
    """The same run with S rows of K components, one of which holds a spike."""
    chance = np.random.default_rng(0)
    step, figures = np.arange(S), {name: chance.random(S) for name in (*run.log, *(run.extra or {}))}
    counts = {"step": step, "epoch": step // 100, "K": np.full(S, K), "n_rows": np.full(S, 256)}
    parts = {name: chance.random((S, K)) / K for name in ("pi", "n", "rel")}
    parts["pi"][S // 3, 0], parts["pi"][S // 2, 0] = 9.0, np.nan
    figures |= counts | {"n_relocated": step % 50 == 0}
    figures["trace_B"][S // 3] = np.inf
    figures["trace_B"][S // 2] = 7.0
    extra = {name: figures[name] for name in run.extra or {} if name not in parts} | parts
    return attrs.evolve(run, log={name: figures[name] for name in run.log}, extra=extra)


def unpack(array: Any) -> Any:
    [(kind, text)] = array.items()
    return np.frombuffer(base64.b64decode(text), f"<{kind}")


def test_page_of_100_000_steps_is_small_and_soon_there(run: Run) -> None:
    long_run = long(run, 100_000, 64)
    begin = time.perf_counter()
    html = page.render(long_run)
    assert time.perf_counter() - begin < 15.0
    assert len(html.encode()) < 10e6


def test_no_spike_is_lost_and_what_is_not_finite_is_a_gap(run: Run) -> None:
    long_run = long(run, 100_000, 10)
    [drawn] = content.content((long_run,), [verdicts(long_run)])["runs"]
    high = unpack(drawn["series"]["trace_B"]["high"])
    assert high[np.isfinite(high)].max() == 7.0
    assert not np.isinf(high).any()
    assert unpack(drawn["components"]["pi_high"][drawn["components"]["k"].index(0)]).max() == 9.0
    assert sum(drawn["components"]["moved"]["count"]) == 2000


def test_text_of_a_run_stays_text(hostile: Run) -> None:
    html = page.render(hostile)
    assert len(re.findall("<script", html)) == len(re.findall("</script", html)) == 3
    assert HOSTILE not in html
    assert "\u2028" not in html.partition('id="data"')[2].partition("</script")[0]


def test_page_of_nothing_but_the_log_says_what_is_missing(run: Run) -> None:
    nothing: dict[str, Any] = {"extra": None, "snapshots": (), "last": None, "config": None, "alarms": (), "ends": ()}
    bare = attrs.evolve(run, D=None, missing=("No extra.",), **nothing)
    html = page.render(bare)
    assert "<li>No extra.</li>" in html
    assert 'id="chart-trace_B"' in html
    assert 'id="chart-trace_T"' not in html


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        page.render()


def test_missing_extra_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'^`report` needs .*: pip install "mixture-diagnostics\[report\]"$'):
        page.render(run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Chromium without a network."""
    paths = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if None in paths:
        pytest.skip("no browser here: the page was not tried; install the system's chromium and chromium-driver")
    options = Options()
    options.binary_location = str(paths[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(str(paths[1])))
    chrome.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    chrome.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield chrome
    chrome.quit()


Show = Callable[..., Chrome]


@pytest.fixture(scope="module")
def show(browser: Chrome, tmp_path_factory: pytest.TempPathFactory, run: Run, hostile: Run) -> Show:
    """Opens the page of one run, or that of two with hostile names, unless it is open at this width."""
    folder = tmp_path_factory.mktemp("pages")
    pages = {"one": (run,), "two": (hostile, attrs.evolve(run, name="a-second-run-of-" + "x" * 80))}
    for name, runs in pages.items():
        (folder / f"{name}.html").write_text(page.render(*runs), encoding="utf-8")
    opened: list[tuple[str, int]] = []

    def shown(name: str, width: int = 1280) -> Chrome:
        if opened[-1:] != [(name, width)]:
            opened.append((name, width))
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get((folder / f"{name}.html").as_uri())
            charts = "return [...document.querySelectorAll('.chart')].every(node => node.querySelector('.main-svg'))"
            WebDriverWait(browser, 60).until(lambda _: browser.execute_script(charts))
        return browser

    return shown


def complaints(browser: Chrome) -> list[Any]:
    return [entry["message"] for entry in browser.get_log("browser")]


@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_its_width_without_a_complaint(show: Show, width: int) -> None:
    browser = show("two", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = """return [...document.querySelectorAll('figure, article, .scroll, pre, h1, h2, h3, p')]
        .filter(each => each.getBoundingClientRect().right > innerWidth).map(each => each.outerHTML)"""
    assert browser.execute_script(wide) == []
    assert complaints(browser) == []


def test_text_of_a_run_cannot_run(show: Show) -> None:
    browser = show("two")
    hover = """const node = document.querySelector('#chart-trace_B'), at = node.data.findIndex(t => t.yaxis === 'y2');
        Plotly.Fx.hover(node, [{curveNumber: at, pointNumber: 0}]);
        return node.querySelector('.hoverlayer').textContent"""
    assert "<img src=x onerror=alert(1)>" in browser.execute_script(hover)
    assert browser.title.endswith("- mixture diagnostics")
    assert browser.execute_script("return document.querySelectorAll('img, figure b').length") == 0
    assert complaints(browser) == []


def test_slider_moves_the_plane_and_the_spectra(show: Show, run: Run) -> None:
    browser = show("one")
    state = (
        "return ['[data-of=plane]', '#spectra'].map(of => JSON.stringify([...document.querySelector(of).data[0].y]))"
    )
    before = browser.execute_script(state)
    browser.find_element(By.ID, "frame").send_keys(Keys.HOME)
    WebDriverWait(browser, 10).until(
        lambda _: all(a != b for a, b in zip(before, browser.execute_script(state), strict=True))
    )
    assert browser.find_element(By.ID, "frame-step").text == str(run.snapshots[0]["step"])
    assert complaints(browser) == []


def test_pointer_reads_a_series_and_a_zoom_goes_everywhere(show: Show) -> None:
    browser = show("one")
    chart = browser.find_element(By.ID, "chart-trace_B")
    ActionChains(browser).move_to_element(chart).perform()
    label = WebDriverWait(browser, 10).until(lambda _: chart.find_element(By.CSS_SELECTOR, ".hoverlayer").text)
    assert re.search(r"step \d+\s+trace_B 0\.\d+", label)
    ActionChains(browser).click_and_hold().move_by_offset(100, 0).release().perform()
    ranges = "return [...document.querySelectorAll('.chart:not(.square)')].map(node => node.layout.xaxis.range.join())"
    WebDriverWait(browser, 10).until(lambda _: len(set(browser.execute_script(ranges))) == 1)
    assert float(browser.execute_script(ranges)[0].split(",")[0]) > 20
    assert complaints(browser) == []


def test_theme_follows_the_system_and_the_button(show: Show) -> None:
    browser, seen = show("one"), {}
    colour = (
        "return getComputedStyle(document.body).backgroundColor + document.querySelector('.chart').layout.font.color"
    )
    button = browser.find_element(By.ID, "theme")
    for scheme, other in (("dark", "Light"), ("light", "Dark")):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        WebDriverWait(browser, 10).until(lambda _, other=other: button.text == other)
        seen[scheme] = browser.execute_script(colour)
    button.click()
    assert browser.execute_script(colour) == seen["dark"] != seen["light"]
    assert complaints(browser) == []
