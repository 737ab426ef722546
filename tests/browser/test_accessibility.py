"""axe-core finds no serious fault on any tab, in light and dark."""

from axe_playwright_python.sync_playwright import Axe

from tests.browser import staged
from tests.browser.conftest import show_in_colours, show_tab

TABS = ("dataset", "train", "preview", "library")


def test_no_tab_has_serious_accessibility_faults(open_page, server, monkeypatch) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    found = []
    with staged.at_work(staged.stage("seen by axe", 60)):
        page = open_page("train", color_scheme="light", reduced_motion="reduce")
        page.wait_for_selector(".at-compare")
        for tab in TABS:
            show_tab(page, tab)
            show_in_colours(page, "light")
            found += faults(page, tab, {})
            show_in_colours(page, "dark")
            found += faults(page, f"{tab}, dark", {"runOnly": ["color-contrast"]})
    assert not found, "\n".join(found)


def faults(page, tab: str, options: dict) -> list[str]:
    result = Axe().run(page, options={"resultTypes": ["violations"], **options})
    return [
        f"{tab}: {violation['id']}: {node['target']} {node['html'][:120]}"
        for violation in result.response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
