"""The front end as a user has it: a real server, a real browser, both of the host's renderers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import small
from harness.server import Server, link
from tests.web.page import PATIENCE, Page

RENDERERS = ("classic", "nodes2")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-extensions", "--no-proxy-server"),
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Any]:
    """The machine's own Chromium: nothing is downloaded; where there is none the tests are skipped, which says how."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    running.set_script_timeout(PATIENCE)
    running.set_page_load_timeout(PATIENCE)
    yield running
    running.quit()


@pytest.fixture(scope="session")
def server(comfy_path) -> Iterator[Server]:
    running = Server(comfy_path, models=small.cached(comfy_path, "sd15"))
    link(Path(__file__).with_name("stand_in.py"), running.base / "custom_nodes" / "stand_in.py")
    with running:
        yield running


@pytest.fixture(scope="module", params=RENDERERS)
def renderer(request, browser, server) -> Page:
    """The page, loaded once for each file of tests and renderer: that takes longer than any test."""
    return Page(browser, server, nodes2=request.param == "nodes2")


@pytest.fixture
def page(renderer) -> Page:
    renderer.clear()
    return renderer
