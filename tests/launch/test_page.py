"""The page of `launch.serve` as a person meets it: three requests clicked through in a browser, on a phone too."""

import contextlib
import re
import signal
import urllib.error
import urllib.request

import numpy as np
import pytest
from processes import HANG, wait_until
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.envs.short_video import response
from mmrf_jax.signals import SHORT_VIDEO

TOKEN = "a-word-of-sixteen-letters"
LIKE, WATCH, CLICK, LONG = (SHORT_VIDEO.index(name) for name in ("like", "watch_time", "click", "long_view"))


@pytest.fixture(scope="module")
def start(artifact, launch, tmp_path_factory):
    """Starts services of the artefact; gives their address and the folder of their log."""
    running = []

    def start(*flags):
        folder = tmp_path_factory.mktemp("served")
        out = folder / "out"
        folders = f"--artifact={artifact}", f"--log={folder / 'log'}"
        process = launch.start("serve", *folders, "--port=0", f"--timeout={HANG}", *flags, log=out)
        running.append((process, out))
        assert wait_until(process, lambda: answers(out)), out.read_text()
        return address(out), folder / "log"

    yield start
    for process, _ in running:
        process.send_signal(signal.SIGTERM)
    for process, out in running:
        assert process.wait(HANG) in (0, -signal.SIGTERM), out.read_text()
        assert "Traceback" not in out.read_text(), out.read_text()


def address(out) -> str | None:
    """Where a service serves, as it says itself."""
    found = re.search(r"http://\S+", out.read_text())
    return found and found[0]


def answers(out) -> bool:
    """Whether it does so by now."""
    url = address(out)
    with contextlib.suppress(urllib.error.URLError):
        return url is not None and urllib.request.urlopen(url + "/healthz", timeout=HANG).status == 200
    return False


@pytest.fixture(scope="module")
def service(start):
    return start()


class Feed:
    """The page in a window of some width, a phone's below 500 pixels."""

    def __init__(self, browser, url: str, width: int):
        self.browser, self.width = browser, width
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get_log("browser")  # what was said before
        browser.get(url)

    def __call__(self, what: str, within=None):
        return (within or self.browser).find_element(By.CSS_SELECTOR, what)

    def all(self, what: str, within=None):
        return (within or self.browser).find_elements(By.CSS_SELECTOR, what)

    def until(self, condition, seconds: float = HANG):
        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: condition())

    def text(self, what: str) -> str:
        return self(what).get_property("textContent")

    def click(self, what: str, within=None) -> None:
        found = self(what, within)
        # As a person would scroll: a bar lies over the lower edge.
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def begin(self) -> None:
        """Starts watching, by the keyboard."""
        self.until(lambda: self("#begin").is_enabled())
        self("#begin").send_keys(Keys.ENTER)
        self.until(lambda: self.all(".card") or self("#problem").is_displayed())
        assert not self("#problem").is_displayed(), self("#problem").text
        self.until(lambda: self("#next").is_enabled())

    def next(self) -> None:
        """Asks for the next slate, or leaves with a user who does."""
        before = self.text("#status")

        def moved():
            return self.text("#status") != before or self("#end").is_displayed()

        self.click("#next")
        self.until(lambda: self("#next").is_enabled() and moved())
        assert not self("#problem").is_displayed(), self("#problem").text

    def slate(self) -> list[str]:
        """What the cards show, without what was done with them."""
        return [card.get_attribute("aria-label") + self.text_of(".agents", card) for card in self.all(".card")]

    def text_of(self, what: str, card) -> str:
        return self(what, card).get_property("textContent")

    def fits(self) -> None:
        """Nothing is wider than the window, all that can be pressed has a name, and the browser has no complaint."""
        wide = "const page = document.documentElement; return Math.max(page.scrollWidth, document.body.scrollWidth)"
        assert self.browser.execute_script(wide) <= self.width
        out = (
            "return [...document.querySelectorAll('button, summary, .chip, .agents span')].filter((x) => "
            "x.offsetParent && (x.getBoundingClientRect().right > innerWidth || x.scrollWidth > x.clientWidth + 1))"
            ".map((x) => x.outerHTML)"
        )
        assert self.browser.execute_script(out) == []
        assert all(x.accessible_name for x in self.all("button, input") if x.is_displayed())
        assert self.browser.get_log("browser") == []


def records(log, user: int) -> tuple[list[dict], list[dict]]:
    """What the feedback log has of a user: requests, and events."""
    found = [record for record, _ in feedback_log.scan(log) if record["user"] == user]
    return [r for r in found if r["kind"] == "rank"], [r for r in found if r["kind"] == "feedback"]


def signals(event: dict) -> np.ndarray:
    return np.frombuffer(event["feedback"], "<f4").reshape(-1, len(SHORT_VIDEO))


def follows_the_rules(events: list[dict], artifact) -> None:
    """Clicks and long views of the page are what the world makes of the same watch time."""
    with np.load(artifact / "arrays" / "catalogue.npz") as catalogue:
        duration = catalogue["duration"]
    for event in events:
        answers, videos = signals(event), np.frombuffer(event["videos"], "<i8")
        click, long_view = response.watch_rules(answers[:, WATCH], duration[videos])
        np.testing.assert_array_equal(answers[:, CLICK], click)
        np.testing.assert_array_equal(answers[:, LONG], long_view)


@pytest.mark.slow
def test_a_visitor_clicks_through_three_requests(service, artifact, browser):
    url, log = service
    feed = Feed(browser, url, 390)
    feed.fits()
    feed.begin()
    user = int(re.search(r"user (\d+)", feed.text("#person"))[1])
    assert not feed("#answer").is_displayed() and not feed("#changed").is_displayed()
    slates = []
    for request in range(3):
        assert feed.text("#status").startswith(f"Request {request + 1} ")
        cards = feed.all(".card")
        slates.append(feed.slate())
        assert len(cards) == 6 and len(set(slates[-1])) == 6
        assert [feed.text_of(".decides .place", card) for card in cards] == ["1", "2", "3", "4", "5", "6"]
        feed.fits()
        feed.click(".whole", cards[0])
        feed("[data-signal=like]", cards[0]).send_keys(Keys.SPACE)
        assert feed("[data-signal=like]", cards[0]).get_attribute("aria-pressed") == "true"
        assert "click, long view" in feed.text_of("output", cards[0])
        feed("input", cards[1]).send_keys(Keys.END)  # twice its length
        feed.click("[data-signal=hate]", cards[2])
        feed.click("[data-signal=hate]", cards[2])  # taken back
        if not request:
            feed.click(".play", cards[3])  # at ten times the speed
            feed.until(lambda card=cards[3]: "0:00 of" not in feed.text_of("output", card))
            feed.click(".play", cards[3])
            assert feed.text_of(".play", cards[3]) == "Watch"
        if request < 2:
            feed.next()
            assert "of 6 videos are of topics that got a reaction" in feed.text("#changed summary")
    assert len({tuple(slate) for slate in slates}) == 3
    # The agents got the feedback, and have another order of the same candidates.
    moved = [float(cell.get_property("textContent")) for cell in feed.all("#changed td:nth-child(2)")]
    assert len(moved) == 7 and max(moved) > 0
    feed.click("#leave")
    feed.until(lambda: feed("#end").is_displayed())
    assert feed.text("#end-text").startswith("3 requests, 18 videos shown") and "3 likes" in feed.text("#end-text")
    feed.fits()

    asked, reported = records(log, user)
    assert [r["start"] for r in asked] == [True, False, False] and [r["left"] for r in reported] == [False, False, True]
    before, after = (set(np.frombuffer(r["candidates"], "<i8")) for r in asked[:2])
    assert len(before & after) >= len(before) // 2
    for event in reported:
        answers = signals(event)
        assert answers[:, LIKE].tolist() == [1, 0, 0, 0, 0, 0]
        assert answers[:2, CLICK].all() and answers[:2, LONG].all() and answers[0, WATCH] > 0
        assert not answers[:, SHORT_VIDEO.index("hate")].any() and not answers[4:].any()
    assert signals(reported[0])[3, WATCH] > 0
    follows_the_rules(reported, artifact)
    feed.click("#again")
    assert feed("#start").is_displayed()


@pytest.mark.slow
def test_a_simulated_user_answers(service, artifact, browser):
    url, log = service
    feed = Feed(browser, url, 1200)
    feed.until(lambda: feed("#begin").is_enabled())
    feed.click("input[value=simulated]")
    for number in range(7, 27):  # until one stays for three requests
        feed("#number").clear()
        feed("#number").send_keys(str(number))
        feed.begin()
        user = int(re.search(r"to the service user (\d+)", feed.text("#person"))[1])
        assert f"Simulated user {number}," in feed.text("#person") and "30 videos" in feed.text("#person")
        slates = []
        while not feed("#end").is_displayed() and len(slates) < 3:
            slates.append(feed.slate())
            feed.click("#answer")
            feed.until(lambda: feed("#next").is_enabled())
            assert f"User {number}:" in feed.text("#said")
            leaves = feed.text("#next") == "The user leaves"
            assert ("leaves" in feed.text("#said")) == leaves
            if leaves or len(slates) < 3:
                feed.next()
        if len(slates) == 3:
            break
        feed.click("#again")
    assert len({tuple(slate) for slate in slates}) == 3
    feed.fits()
    if not feed("#end").is_displayed():
        feed.click("#leave")
        feed.until(lambda: feed("#end").is_displayed())
    asked, reported = records(log, user)
    history = asked[0]["history"]
    assert len(history["videos"]) == 30 * 8 and len(asked) == len(reported) == 3 and reported[-1]["left"]
    answers = np.concatenate([signals(event) for event in reported])
    assert len(answers) == 18 and (answers[:, WATCH] > 0).all()
    follows_the_rules(reported, artifact)


@pytest.mark.slow
def test_the_page_asks_for_the_token(start, browser, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    url, _ = start(f"--token_file={tmp_path / 'token'}")
    feed = Feed(browser, url, 390)
    for token in ("not-the-token-of-it", TOKEN):
        feed.until(lambda: feed("#token-form").is_displayed())
        feed("#token").clear()
        feed("#token").send_keys(token, Keys.ENTER)
        feed.until(
            lambda typed=token: (
                feed("#problem").is_displayed() == (typed != TOKEN)
                and not (typed == TOKEN and feed("#token-form").is_displayed())
            )
        )
    feed.begin()
    assert len(feed.all(".card")) == 6
    browser.refresh()
    feed.begin()  # the tab has kept it
    assert len(feed.all(".card")) == 6
