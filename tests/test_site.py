"""The built site: what is public is in it, and every page looks right in a browser.

`make docs` builds it, and runs these.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
if not (SITE / "objects.inv").exists():
    pytest.skip("the site has not been built: see `make docs`", allow_module_level=True)
sphinx_inventory = pytest.importorskip("sphinx.util.inventory")

PACKAGES = (
    "metaopt",
    "metaopt.blocks",
    "metaopt.curvature",
    "metaopt.leaf",
    "metaopt.meta",
    "metaopt.numerics",
    "metaopt.presets",
    "metaopt.projection",
    "metaopt.rules",
    "metaopt.step_sizes",
    "metaopt_jax",
    "metaopt_keras",
    "metaopt_keras.callbacks",
    "metaopt_kernels",
    "metaopt_mlx",
    "metaopt_torch",
)
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
PHONE, SLACK = 390, 2
#: Returns what is wrong on a page: formulas, images, width.
LOOK = """
const wrong = [];
for (const node of document.querySelectorAll('mjx-merror, .problematic'))
    wrong.push('formula or reference: ' + node.textContent.slice(0, 80));
for (const node of document.querySelectorAll('.math'))
    if (!node.querySelector('mjx-container')) wrong.push('raw: ' + node.textContent.slice(0, 80));
for (const image of document.querySelectorAll('article img')) {
    if (!image.complete || image.naturalWidth === 0) wrong.push('no image: ' + image.src);
    const thumb = image.closest(".sphx-glr-thumbcontainer");  // its title says it
    if (!image.alt.trim() && !thumb) wrong.push('no alternative text: ' + image.src);
}
const width = document.documentElement.scrollWidth;
if (width > innerWidth + arguments[0]) wrong.push(`${width} wide on ${innerWidth}`);
return wrong;
"""


@pytest.fixture(scope="module")
def documented() -> set[str]:
    """Return every name that the reference describes."""
    inventory = sphinx_inventory.InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    return {
        name for kind, some in inventory.data.items() if kind.startswith("py:") for name in some
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_public_is_missing(package: str, documented: set[str]) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        homes = {package, getattr(value, "__module__", package), *_parents(package)}
        if isinstance(value, type(importlib)):
            assert value.__name__ in documented, name
        elif callable(value):
            assert {f"{home}.{name}" for home in homes} & documented, name


def _parents(package: str) -> Iterator[str]:
    while "." in package:
        package = package.rpartition(".")[0]
        yield package


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield Chromium without a window, as wide as a phone."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = which("chromium") or which("google-chrome")
    if binary is None or which("chromedriver") is None:
        pytest.skip("needs Chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", f"--window-size={PHONE},900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    metrics = {"width": PHONE, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield driver
    driver.quit()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_looks_right(page: str, browser: Any) -> None:
    """No error on the console, formulas and images shown, no wider than a phone."""
    browser.get((SITE / page).as_uri())
    browser.execute_async_script(
        "const done = arguments[0]; const math = window.MathJax;"
        "(math && math.startup ? math.startup.promise : Promise.resolve()).then(() => done());"
    )
    assert browser.execute_script(LOOK, SLACK) == []
    own = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # a diagram's script comes from a network that there may not be
    assert [e["message"] for e in own if "cdn.jsdelivr.net" not in e["message"]] == []
