"""The report's page in a real browser: the slider, what is greyed, the best, the copied command.

Needs Chromium (Debian's) and Playwright; `.ci/full` installs both.
"""

import shutil

import pytest

from experiments.cli import main
from experiments.report import report
from tests.experiments.report_rows import PLANS, row, write

pytestmark = [pytest.mark.heavy, pytest.mark.xdist_group("browser")]
MISCHIEF = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = [row(plan, depth) for plan in PLANS for depth in (8, 16, 32)]
    buffer = {"size_bytes": 1, "shape": MISCHIEF, "operation": MISCHIEF, "source": MISCHIEF}
    rows[0] |= {"buffers": [buffer], "commit": MISCHIEF}
    rows.append({"key": "e", "plan": MISCHIEF, "depth": 8, "target": "local", "error": MISCHIEF})
    out = folder / "report.html"
    main(report, [str(write(folder / "sweep", rows)), f"-o={out}"])
    return out


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=["light", "dark"])
def page(request, browser, page_file):
    """A page that may not reach any network, and fails on what its scripts complain of."""
    context = browser.new_context(
        color_scheme=request.param, permissions=["clipboard-read", "clipboard-write"]
    )
    page, said = context.new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda r: r.url.startswith("file:") or said.append(f"fetched {r.url}"))
    page.goto(page_file.as_uri())
    page.scheme = request.param
    yield page
    context.close()
    assert said == []


def move_slider(page, mebibytes: float):
    """Moves the slider to the least budget of at least so many MiB."""
    page.evaluate(
        """(bytes) => {
          const slider = document.getElementById("budget");
          for (let n = 0; n <= 1000; n++) {
            slider.value = n;
            if (budgetBytes() >= bytes) break;
          }
          slider.dispatchEvent(new Event("input"));
        }""",
        mebibytes * 2**20,
    )


def plans(page, selector: str) -> set[str]:
    return {node.get_attribute("data-plan") for node in page.query_selector_all(selector)}


def test_a_budget_greys_out_and_names_the_best(page):
    assert plans(page, ".point") == set(PLANS) and plans(page, ".point.out") == set()
    assert page.inner_text("#best") == "Fastest that fits: none, 400 MiB, 50 ms"
    for budget, out, best in (
        (251, {"none", "uniform:4"}, "dots, 250 MiB, 52 ms"),
        (125, {"none", "uniform:4", "dots"}, "full, 120 MiB, 60 ms"),
        (90, {"none", "uniform:4", "dots", "full"}, "sqrt, 80 MiB, 70 ms"),
    ):
        move_slider(page, budget)
        assert plans(page, ".point.out") == out
        assert page.inner_text("#best") == f"Fastest that fits: {best}"
        assert plans(page, ".point.best") == {best.partition(",")[0]}
    move_slider(page, 0)
    assert plans(page, ".point.out") == set(PLANS)
    assert page.inner_text("#best") == "No plan fits."
    grey = page.eval_on_selector(".point.out .mark", "node => getComputedStyle(node).fill")
    assert grey == {"light": "rgb(180, 186, 194)", "dark": "rgb(86, 95, 105)"}[page.scheme]


def test_the_slider_moves_by_keyboard(page):
    page.focus("#budget")
    page.keyboard.press("Home")
    assert page.inner_text("#best") == "No plan fits."
    page.keyboard.press("End")
    assert plans(page, ".point.out") == set()


def test_a_click_copies_the_command(page):
    page.click(".point[data-plan=full] .mark")
    command = "python -m experiments.train --remat=full --num-blocks=8"
    page.wait_for_function("document.getElementById('copied').textContent !== ''")
    assert page.inner_text("#copied") == f"Copied: {command}"
    assert page.evaluate("navigator.clipboard.readText()") == command
    assert page.input_value("#plan") == "full"
    page.focus(".point[data-plan=sqrt]")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('copied').textContent.includes('sqrt')")
    assert "--remat=sqrt" in page.evaluate("navigator.clipboard.readText()")


def test_hovering_says_the_plan(page):
    assert page.is_hidden("#tip")
    page.hover(".point[data-plan='uniform:4'] .mark")
    text = page.inner_text("#tip")
    assert text.startswith("uniform:4\n") and "260 MiB" in text and "66 ms, measured" in text
    page.mouse.move(1, 1)
    assert page.is_hidden("#tip")


def test_depth_buffers_losses_and_groups(page):
    assert "sqrt  slope 0.50" in page.text_content("#depth")
    page.select_option("#quantity", "peaks")
    assert "compiled peak, " in page.text_content("#depth")
    assert len(page.query_selector_all("#loss .line[data-plan]")) == len(PLANS)
    note = page.inner_text("#loss-note")
    assert "Largest difference between two plans at any step: none." in note
    assert "rounding lets their curves part late" in note
    page.select_option("#plan", "full")
    assert "f32[256,1024]" in page.text_content("#buffers")
    page.select_option("#group", "2")
    assert page.inner_text("#best") == "Fastest that fits: none, 1.563 GiB, 200 ms"


def test_names_in_the_data_are_text(page):
    page.select_option("#plan", "none")
    assert "</script><script>window" in page.text_content("#buffers")
    assert MISCHIEF in page.text_content("#problems")
    assert page.evaluate("window.pwned") is None and page.query_selector("img") is None


def test_the_head_says_what_was_compared_and_when(page):
    assert page.inner_text("#about") == (
        "a Transformer of width 64, batches of 16 x 128 tokens, adamw; 2026-01-02"
    )


@pytest.fixture
def noisy_page(browser, tmp_path):
    """A page of two plans within noise of each other and one that is slower."""
    times = {"full+names:a": (50.0, 49, 53), "full+names:b": (52.0, 50, 55), "full": (70.0, 69, 71)}
    rows = [
        row(plan, step_seconds=middle / 1e3, step_seconds_spread=[low / 1e3, high / 1e3])
        for plan, (middle, low, high) in times.items()
    ]
    out = tmp_path / "noisy.html"
    main(report, [str(write(tmp_path / "noisy", rows)), f"-o={out}"])
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(out.as_uri())
    yield page
    page.close()


def test_times_within_noise_have_no_winner(noisy_page):
    assert noisy_page.inner_text("#best") == (
        "Within noise of each other: full+names:a and full+names:b, about 50 ms"
    )
    assert len(noisy_page.query_selector_all(".spread")) == 3
    assert "52 ms (50 to 55)" in noisy_page.inner_text("#rows")


def test_no_two_plans_look_alike(noisy_page):
    looks = noisy_page.eval_on_selector_all(
        ".point",
        "nodes => nodes.map(n => n.classList[1] + n.querySelector('.mark').getAttribute('d'))",
    )
    assert len(looks) == len(set(looks)) == 3
    many = noisy_page.evaluate(
        "[...Array(40).keys()].map(n => styleOf(`full+names:x${n}`)).map(s => s.colour + s.shape)"
    )
    assert len(set(many)) == 40


def test_text_is_readable_on_a_phone(noisy_page):
    heights = noisy_page.eval_on_selector_all(
        "#time svg text", "nodes => nodes.map(n => n.getScreenCTM().a * 12.5)"
    )
    assert heights and min(heights) >= 11
    assert noisy_page.evaluate("document.documentElement.scrollWidth") <= 400
    noisy_page.set_viewport_size({"width": 1280, "height": 800})
    noisy_page.wait_for_function("document.querySelector('#time svg').viewBox.baseVal.width > 700")
