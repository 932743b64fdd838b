"""The page, in headless Chromium: dropped pictures, the slider, the download, the keyboard alone, a phone."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import Running, encoded, until

PAGE = Path(__file__).resolve().parents[2] / "src/sanrt/serve/page"

selenium = pytest.importorskip("selenium", reason="needs selenium, which drives the browser")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs Chromium and its driver (apt-get install chromium chromium-driver)", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(word)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, running) -> webdriver.Chrome:
    """The page, freshly loaded; in the end it must not have complained."""
    browser.get_log("browser")
    browser.get(f"http://{running.host}:{running.port}/")
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#scale option")) > 1)
    yield browser
    told = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    complaints = [entry["message"] for entry in told if "status of 422" not in entry["message"]]  # a bad picture's
    assert not complaints, complaints


def drop(page: webdriver.Chrome, name: str, picture: bytes, event: str = "drop") -> None:
    """Let a picture fall onto the page, or paste it."""
    page.execute_script(
        "const data = new DataTransfer(), bytes = Uint8Array.from(atob(arguments[1]), (c) => c.charCodeAt(0));"
        "data.items.add(new File([bytes], arguments[0], {type: 'image/png'}));"
        "const made = arguments[2] === 'drop' ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})"
        " : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});"
        "document.body.dispatchEvent(made);",
        name,
        base64.b64encode(picture).decode(),
        event,
    )


def states(page: webdriver.Chrome) -> list[str]:
    return [element.text for element in page.find_elements(By.CSS_SELECTOR, "#pictures .state")]


def screenshot(page: webdriver.Chrome, name: str) -> None:
    """Kept for people who set SCREENSHOTS to a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.save_screenshot(str(Path(folder, f"{name}.png")))


def test_a_dropped_picture_is_enlarged_compared_and_downloaded_as_sanrt_run_makes_it(page, running: Running, downloads):
    picture = encoded(".png", height=60, width=90)
    drop(page, "a cat.png", picture)
    until(lambda: states(page) != [] and "enlarged 2 times" in states(page)[0])
    until(lambda: page.find_element(By.ID, "title").text == "a cat_x2.png, 180 x 120")
    until(lambda: page.execute_script("return document.getElementById('after').naturalWidth") == 180)
    before = page.find_element(By.ID, "before").rect
    assert before == page.find_element(By.ID, "after").rect
    page.find_element(By.LINK_TEXT, "Download").click()
    until(lambda: (downloads / "a cat_x2.png").exists())
    assert (downloads / "a cat_x2.png").read_bytes() == running.upscale(picture).body
    screenshot(page, "wide")


def test_the_slider_moves_the_line_between_before_and_after(page):
    drop(page, "a.png", encoded(".png"))
    until(lambda: page.find_element(By.ID, "viewer").is_displayed())
    handle = page.find_element(By.ID, "handle")
    until(lambda: handle.size["height"] > 100)
    ActionChains(page).drag_and_drop_by_offset(handle, 100, 0).perform()
    split = float(page.find_element(By.ID, "split").get_attribute("value"))
    assert split > 55
    clip = page.execute_script("return getComputedStyle(document.getElementById('after')).clipPath")
    assert float(clip.split()[-1].rstrip("%)")) == pytest.approx(split, abs=0.5)


def test_zoom_goes_from_fitting_to_single_pixels(page):
    drop(page, "a.png", encoded(".png", height=60, width=600))
    until(lambda: page.execute_script("return document.getElementById('after').naturalWidth") == 1200)
    wide = page.find_element(By.ID, "after").size["width"]
    page.find_element(By.ID, "pixels").click()
    assert page.find_element(By.ID, "after").size["width"] == 1200 > wide
    assert page.find_element(By.ID, "percent").text == "100 %"
    page.find_element(By.ID, "fit").click()
    assert page.find_element(By.ID, "after").size["width"] == wide


def test_several_pictures_go_in_a_row_and_a_bad_one_is_told_in_one_line(page):
    drop(page, "first.png", encoded(".png"))
    drop(page, "bad.png", encoded(".png")[:200])
    drop(page, "third.png", encoded(".png", bands=4), "paste")
    until(lambda: len(states(page)) == 3 and "enlarged 2 times" in states(page)[2])
    first, bad, third = states(page)
    assert "enlarged 2 times" in first
    assert "enlarged 2 times" in third
    assert bad.startswith("picture: damaged PNG file")
    screenshot(page, "several")
    for _ in range(3):
        page.find_element(By.XPATH, "//button[text()='Remove']").click()
    assert states(page) == []
    assert not page.find_element(By.ID, "viewer").is_displayed()


def test_the_keyboard_alone_suffices(page, tmp_path, downloads):
    (tmp_path / "key.png").write_bytes(encoded(".png"))

    def tab_to(test: str) -> None:
        for _ in range(40):
            if page.execute_script(f"const e = document.activeElement; return Boolean({test})"):
                return
            ActionChains(page).send_keys(Keys.TAB).perform()
        pytest.fail(f"not reached: {test}")

    tab_to("e.id === 'format'")
    ActionChains(page).send_keys("w").perform()
    tab_to("e.id === 'files'")
    assert page.execute_script("return getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    page.switch_to.active_element.send_keys(str(tmp_path / "key.png"))  # what the system's dialog would do
    until(lambda: states(page) != [] and "enlarged 2 times" in states(page)[0])
    tab_to("e.textContent === 'Compare'")
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert page.switch_to.active_element.get_attribute("id") == "split"
    ActionChains(page).send_keys(Keys.ARROW_RIGHT * 4).perform()
    assert page.execute_script("return document.getElementById('stage').style.getPropertyValue('--split')") == "52%"
    tab_to("e.id === 'zoom'")
    ActionChains(page).send_keys(Keys.HOME, Keys.ARROW_RIGHT).perform()
    page.execute_script("document.getElementById('files').focus()")
    tab_to("e.textContent === 'Download'")
    ActionChains(page).send_keys(Keys.ENTER).perform()
    until(lambda: (downloads / "key_x2.webp").exists())
    tab_to("e.textContent === 'Remove'")
    ActionChains(page).send_keys(Keys.SPACE).perform()
    assert states(page) == []


def test_on_a_phone_nothing_is_cut_off(page):
    page.set_window_size(500, 800)  # Chromium's narrowest window; the frame is emulated below
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        drop(page, "a photograph with a rather long name that somebody gave it in summer.png", encoded(".png", height=90))
        until(lambda: states(page) != [] and "enlarged 2 times" in states(page)[0])
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 360
        small = page.execute_script(
            "return [...document.querySelectorAll('button, select, .button')]"
            ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 40).map((e) => e.textContent)"
        )
        assert not small
        screenshot(page, "narrow")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.set_window_size(1200, 900)


def test_a_token_is_asked_for_and_then_used(serving, browser):
    token = "a-token-that-is-long-enough"
    with serving(token=token) as running:
        browser.get(f"http://{running.host}:{running.port}/")
        until(lambda: browser.find_element(By.ID, "door").is_displayed())
        for typed in ("something else that is long", token):
            browser.find_element(By.ID, "token").clear()
            browser.find_element(By.ID, "token").send_keys(typed, Keys.ENTER)
            until(lambda typed=typed: browser.find_element(By.ID, "door").is_displayed() == (typed != token))
        drop(browser, "a.png", encoded(".png"))
        until(lambda: states(browser) != [] and "enlarged 2 times" in states(browser)[0])


def test_the_page_asks_nobody_else_and_is_small(running):
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 60_000
    answer = running.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "").replace("http://THIS-SERVER", "")
        assert "//" not in text.replace("// ", ""), path
        assert running.ask("GET", "/" if path.name == "index.html" else f"/page/{path.name}").body == path.read_bytes()
    for path in ("/page/../application.py", "/page/%2e%2e/application.py", "/page/", "/page/nothing.js"):
        assert running.ask("GET", path).status == 404, path
