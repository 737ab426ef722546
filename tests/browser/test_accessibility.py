"""axe-core finds nothing serious on any tab, in light and dark."""

from axe_playwright_python.sync_playwright import Axe

from tests.browser import staged

TABS = ("dataset", "train", "preview", "library")


def test_nothing_serious(open_page, server, monkeypatch) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    found = []
    with staged.at_work(staged.stage("seen by axe", 60)):
        page = open_page("train", color_scheme="light")
        page.wait_for_selector(".at-compare")
        for tab in TABS:
            page.locator(f"#tabs [role=tab]:has-text('{tab.capitalize()}')").first.click()
            page.wait_for_timeout(1200)
            page.emulate_media(color_scheme="light")
            page.wait_for_timeout(400)  # colours fade
            found += faults(page, tab, {})
            page.emulate_media(color_scheme="dark")  # only the colours are others
            page.wait_for_timeout(400)
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
