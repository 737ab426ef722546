"""What `app.gradio_compat` expects of the installed Gradio.

If one of these tests fails after an update, change `app/gradio_compat.py` and nothing else.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import gradio as gr
import pytest
from gradio import routes
from gradio.context import LocalContext
from starlette.testclient import TestClient

from app import gradio_compat

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_OUTPUTS", str(tmp_path_factory.mktemp("outputs")))
        patch.setenv("GRADIO_TEMP_DIR", "")  # restored afterwards
        from app.server import create_app

        return TestClient(create_app(), base_url="http://127.0.0.1:7860")


def test_the_installed_version_is_the_checked_one():
    assert gr.__version__ == gradio_compat.CHECKED_VERSION, (
        f"Gradio {gr.__version__} is installed. Run all tests, look at the page, then set "
        "CHECKED_VERSION in app/gradio_compat.py."
    )


def test_every_open_route_exists_in_gradio():
    source = inspect.getsource(routes)
    for route in gradio_compat.OPEN_ROUTES | set(gradio_compat.OPEN_PREFIXES):
        name = route.removeprefix("/gradio_api")
        if name == "/file=" or name == "/":
            continue
        assert f'"{name}' in source, f"Gradio has no route {route} any more"


def test_a_route_with_a_trailing_slash_is_the_same_route():
    assert gradio_compat.is_open("/gradio_api/info/")
    assert not gradio_compat.is_open("/gradio_api/information")
    assert not gradio_compat.is_open("")


def test_the_variables_of_gradio_are_read_at_import(tmp_path):
    code = (
        "from pathlib import Path; from app import gradio_compat;"
        f"gradio_compat.configure(Path({str(tmp_path)!r}));"
        "import gradio.analytics as analytics, gradio.utils as utils;"
        "print(analytics.analytics_enabled())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO")}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=True,
    )
    assert shown.stdout.strip() == "False"


def test_the_limit_of_recorded_events_is_a_variable_of_gradio():
    folder = Path(inspect.getfile(gr)).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    assert any("GRADIO_ANALYTICS_MAX_EVENTS" in source for source in sources)


@pytest.mark.parametrize("kind", [gr.Radio, gr.Dropdown, gr.Slider])
def test_a_value_that_is_not_a_choice_reaches_the_handler(kind):
    gradio_compat.accept_any_choice()
    component = kind() if kind is gr.Slider else kind(choices=["a"])
    assert component.preprocess("gone") == "gone"


def test_the_request_of_a_handler_is_in_the_local_context():
    class Request:
        request = type("Inner", (), {"scope": {"atelier_user": "anna"}})

    token = LocalContext.request.set(Request())
    try:
        assert gradio_compat.request_scope() == {"atelier_user": "anna"}
    finally:
        LocalContext.request.reset(token)
    assert gradio_compat.request_scope() is None


def test_the_page_loads_through_the_open_routes(client):
    page = client.get("/")
    assert page.status_code == 200
    for route in ("/config", "/theme.css", "/gradio_api/info", "/gradio_api/startup-events"):
        assert client.get(route).status_code == 200, route
