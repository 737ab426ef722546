"""Access control on the real application: hosts, origins, passwords, sizes, routes and files."""

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app import security
from app.__main__ import listen, main
from app.security import BODY_LIMIT
from trainer import config
from trainer.runs import run_folder

OWN = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Returns outputs with one dataset and one run, surrounded by files that must stay private."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("guard") / "outputs"
        patch.setenv("ATELIER_OUTPUTS", str(root))
        patch.setattr(security, "WRONG_PASSWORD_DELAY", 0)
        patch.setenv("GRADIO_TEMP_DIR", "")  # restored after create_app has set it
        dataset = root / "datasets" / "cats"
        dataset.mkdir(parents=True)
        Image.new("RGB", (64, 48), "teal").save(dataset / "one.png")
        (dataset / "one.txt").write_text("a cat")
        folder = run_folder.create(config.RunConfig(name="cat"))
        (folder / "samples").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "samples" / "000000-0.webp")
        (folder / "cat.safetensors").write_bytes(b"weights")
        for name in (
            "x.html",
            "x.svg",
            ".secret",
            "log.txt",
            "samples/x.svg",
            "samples/.hidden.txt",
        ):
            (folder / name).write_text("<script>secret</script>")
        (root.parent / "secret.safetensors").write_bytes(b"secret")
        (folder / "link.safetensors").symlink_to(root.parent / "secret.safetensors")
        (root / "runs" / "linked").symlink_to(root.parent)
        yield root


@pytest.fixture(scope="module")
def client(outputs: Path) -> TestClient:
    from app.server import create_app

    return TestClient(create_app(), base_url=OWN)


@pytest.fixture(scope="module")
def closed_client(outputs: Path) -> TestClient:
    from app.server import create_app

    return TestClient(create_app({"anna": "secret"}), base_url=OWN)


def run_id(outputs: Path) -> str:
    return run_folder.list_runs(outputs / "runs")[0].name


def upload(client: TestClient, **headers: str) -> int:
    return client.post(
        "/gradio_api/upload", files={"files": ("x.png", b"x")}, headers=headers
    ).status_code


def test_the_page_answers_with_security_headers(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and "LoRA Atelier" in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "SAMEORIGIN"
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.7:7860", ""]
)
def test_unknown_hosts_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 421
    assert upload(client, host=host, origin=f"http://{host}") == 421


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860"])
def test_own_hosts_are_known(client: TestClient, host: str) -> None:
    assert client.get("/config", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:9999"}, 403),
        ({"origin": "http://127.0.0.1:7861"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": OWN}, 403),
        ({"origin": OWN}, 200),
        ({"origin": OWN, "sec-fetch-site": "same-origin"}, 200),
        ({}, 200),  # curl or a script
    ],
)
def test_only_the_page_itself_may_change_things(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert upload(client, **headers) == status
    if status == 403:
        assert client.post("/gradio_api/queue/join", json={}, headers=headers).status_code == 403
        assert (
            client.post("/gradio_api/component_server", json={}, headers=headers).status_code == 403
        )


def test_other_sites_may_link_but_not_read(client: TestClient) -> None:
    foreign = {"sec-fetch-site": "cross-site"}
    assert (
        client.get(
            "/", headers=foreign | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        ).status_code
        == 200
    )
    assert (
        client.get(
            "/", headers=foreign | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
        ).status_code
        == 403
    )
    assert client.get("/config", headers=foreign | {"sec-fetch-mode": "cors"}).status_code == 403


def test_large_bodies_are_refused(client: TestClient) -> None:
    large = b"x" * (BODY_LIMIT + 1)
    assert client.post("/gradio_api/queue/join", content=large).status_code == 413
    assert client.post(
        "/gradio_api/queue/join", content=(part for part in (large[:1000], large))
    ).status_code in (400, 413)
    assert (
        client.post(
            "/gradio_api/component_server", content=b"x" * (security.VIEW_LIMIT + 1)
        ).status_code
        == 413
    )


def test_a_folder_of_20000_files_is_one_request(client: TestClient, outputs: Path) -> None:
    """A list in several requests would separate captions from images."""
    sent = client.post("/gradio_api/upload", files={"files": ("0", b"no picture")}).json()[0]
    name = "one of the photographs of a long holiday at the sea, " * 5
    files = [{"path": sent, "name": f"holiday/{name}{number:05}.md"} for number in range(20_000)]
    view = next(
        part
        for part in client.get("/config").json()["components"]
        if part["props"].get("elem_id") == "dataset-view"
    )
    data = {"dataset": "holiday", "files": files}
    call = {"data": data, "component_id": view["id"], "fn_name": "add_files", "session_hash": "a"}
    answer = client.post("/gradio_api/component_server", json=call)
    assert answer.status_code == 200 and len(answer.json()["messages"]) == 20_000


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring",
        "/gradio_api/monitoring",
        "/openapi.json",
        "/gradio_api/openapi.json",
        "/docs",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/vibe-code",
        "/gradio_api/run-history/buckets",
        "/a-route-of-the-next-release",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_samples_adapters_and_thumbnails_are_served_inert(
    client: TestClient, outputs: Path
) -> None:
    run = run_id(outputs)
    adapter = client.get(f"/runfile/{run}/cat.safetensors")
    assert adapter.content == b"weights" and "attachment" in adapter.headers["content-disposition"]
    sample = client.get(f"/runfile/{run}/samples/000000-0.webp")
    assert sample.headers["content-type"] == "image/webp"
    thumb = client.get(f"/thumb/cats/{hashlib.sha256(b'one.png').hexdigest()[:24]}")
    assert thumb.headers["content-type"] == "image/webp"
    for answer in (adapter, sample, thumb):
        assert answer.status_code == 200
        assert (
            answer.headers["content-security-policy"].startswith("sandbox")
            and answer.headers["x-content-type-options"] == "nosniff"
        )


ESCAPES = [
    "..",
    "../..",
    "%2e%2e",
    "..%2f..",
    "..\\..",
    "C:\\",
    "/etc",
    "%00",
    ".",
    "-",
    "",
    "linked",
    "x" * 300,
    "ｒｕｎ",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_the_roots_is_served(client: TestClient, outputs: Path, name: str) -> None:
    run = run_id(outputs)
    for path in (
        f"/runfile/{name}/secret.safetensors",
        f"/runfile/{run}/{name}/secret.safetensors",
        f"/thumb/{name}/{'0' * 24}",
        f"/thumb/cats/{name}",
    ):
        answer = client.get(path)
        # The client resolves `..` before it sends the request.
        leaves_route = not answer.request.url.path.startswith(("/runfile/", "/thumb/"))
        assert (answer.status_code == 404 or leaves_route) and b"secret" not in answer.content, path


@pytest.mark.parametrize(
    "name",
    [
        "x.html",
        "x.svg",
        ".secret",
        "log.txt",
        "run.toml",
        "samples/x.svg",
        "samples/.hidden.txt",
        "link.safetensors",
        "samples",
    ],
)
def test_other_files_of_a_run_stay_private(client: TestClient, outputs: Path, name: str) -> None:
    assert client.get(f"/runfile/{run_id(outputs)}/{name}").status_code == 404


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "pyproject.toml", "app/__init__.py", "outputs/.gitkeep"]
)
def test_gradio_serves_no_file_of_ours(client: TestClient, path: str) -> None:
    assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


GRADIO_ROUTES = [
    "/",
    "/config",
    "/theme.css",
    "/gradio_api/info",
    "/gradio_api/app_id",
    "/gradio_api/startup-events",
    "/anything",
]
ROUTES = [*GRADIO_ROUTES, "/thumb/cats/0", "/runfile/a/b", "/previewfile/0.png", "/favicon.ico"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_requires_the_password(closed_client: TestClient, path: str) -> None:
    answer = closed_client.get(path)
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")


def test_the_right_password_opens_the_page(closed_client: TestClient) -> None:
    def status(credentials: str, host: str = "127.0.0.1:7860") -> int:
        token = base64.b64encode(credentials.encode()).decode()
        return closed_client.get(
            "/config", headers={"authorization": f"Basic {token}", "host": host}
        ).status_code

    assert status("anna:secret") == 200
    assert status("anna:secret", "192.168.1.7:7860") == 200
    assert status("anna:secret", "evil.example") == 421
    assert [
        status(wrong) for wrong in ("anna:secre", "anna:", ":secret", "anna", "Anna:secret")
    ] == [401] * 5
    assert closed_client.get("/config", headers={"authorization": "Basic ???"}).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_need_a_password(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATELIER_AUTH", raising=False)
    assert main(["--host", host, "--no-browser"]) == 1
    assert "--auth" in capsys.readouterr().err


def test_a_busy_port_gives_the_next() -> None:
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = listen("127.0.0.1", port)
    assert port < second.getsockname()[1] < port + 20
    first.close()
    second.close()


def test_uploads_are_stored_in_outputs(client: TestClient, outputs: Path) -> None:
    assert Path(os.environ["GRADIO_TEMP_DIR"]).is_relative_to(outputs)
    assert list((outputs / "cache" / "uploads").rglob("x.png"))


def test_an_upload_needs_a_length_within_the_limit(client: TestClient) -> None:
    def send(**headers: str) -> int:
        return client.post(
            "/gradio_api/upload",
            content=(part for part in [b"x"]),
            headers={"content-type": "text/plain"} | headers,
        ).status_code

    assert send() == 411
    assert send(**{"content-length": str(security.UPLOAD_LIMIT + 1)}) == 413


def test_the_report_of_a_failure_is_served_as_text(client: TestClient, outputs: Path) -> None:
    folder = outputs / "runs" / run_id(outputs)
    (folder / "report.txt").write_text("what happened")
    answer = client.get(f"/runfile/{folder.name}/report.txt")
    assert answer.text == "what happened" and answer.headers["content-type"].startswith(
        "text/plain"
    )
    assert "attachment" in answer.headers["content-disposition"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("anna", "user:password for each"),
        ("anna:", "user:password for each"),
        ("", "user:password for each"),
        ("../x:y", "become folders"),
        ("anna:x\nAnna:y", "become folders"),
    ],
)
def test_a_wrong_file_of_accounts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "accounts"
    file.write_text(content)
    assert (
        main(["--auth-file", str(file), "--no-browser"]) == 1
        and "chmod 600" in capsys.readouterr().err
    )
    file.chmod(0o600)
    assert (
        main(["--auth-file", str(file), "--no-browser"]) == 1 and message in capsys.readouterr().err
    )
    assert (
        main(["--auth-file", str(tmp_path / "none"), "--no-browser"]) == 1
        and "cannot be read" in capsys.readouterr().err
    )
