"""The web application: access control, the files of runs and datasets, and Gradio."""

import json
import mimetypes
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse

from app import accounts, gradio_compat
from app.actions import dataset_folders, dataset_images
from app.jobs import device, previews, queue, runs
from app.jobs.ray_jobs import RayJobs
from app.page.html_view import STATIC
from app.security import Guard
from trainer.errors import TrainerError
from trainer.runs import cache_limits, run_folder

SERVED = {
    ".webp": "image/webp",
    ".png": "image/png",
    ".safetensors": "application/octet-stream",
    ".txt": "text/plain; charset=utf-8",
}
MAX_UPLOAD = "512mb"
RUN_FILES = r"samples/[^/\\]+\.(webp|png)|[^/\\]+\.safetensors|report\.txt"
"""The files of a run that are served: samples, adapters and the report of a failure."""


def create_app(
    passwords: Mapping[str, str] | None = None, separate: bool = False, ray: str = ""
) -> FastAPI:
    """Returns the whole application, ready for uvicorn.

    `passwords` are by name. `separate` gives each person separate folders. `ray` is the address of
    a Ray cluster that trains the runs instead of this machine.
    """
    outputs = run_folder.outputs_folder()
    uploads = outputs / "cache" / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    gradio_compat.configure(uploads)
    cache_limits.clean_uploads()
    cache_limits.prune()
    # The registry of Windows may map .js to text/plain, which `nosniff` then refuses.
    mimetypes.add_type("text/javascript", ".js")
    # Imported late: `configure` must run first.
    import gradio as gr

    from app.layout import build
    from app.page.theme import make_theme

    device.trains_elsewhere = bool(ray)
    engine = previews.PreviewEngine()
    launcher = queue.Launcher(
        RayJobs(ray)
        if ray
        else queue.LocalExecutor(before_start=lambda: engine.end() if device.has_cuda() else None)
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        launcher.start()
        yield
        launcher.end()
        engine.end()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if separate:
        accounts.separate()
    app.add_middleware(Guard, passwords=passwords, disk=outputs, separate=separate)
    _add_script_route(app)
    _add_file_routes(app)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        build(engine, "Ray cluster" if ray else device.describe()),
        path="/",
        theme=make_theme(),
        css_paths=[STATIC / "style.css"],
        favicon_path=str(STATIC / "icon.svg"),
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        show_error=False,
        ssr_mode=False,
        pwa=False,
    )
    return mounted


def _add_script_route(app: FastAPI) -> None:
    """Adds the route of our scripts. Their address contains a version, so browsers keep them."""
    forever = {"cache-control": "public, max-age=31536000, immutable"}

    @app.get(gradio_compat.SCRIPT_ROUTE + "{version}/gradio.js")
    def selectors(version: str) -> Response:
        text = f"export const SELECTORS = {json.dumps(dict(gradio_compat.SELECTORS))};\n"
        return Response(text, media_type="text/javascript", headers=forever)

    @app.get(gradio_compat.SCRIPT_ROUTE + "{version}/{name:path}")
    def script(version: str, name: str) -> Response:
        if name not in _scripts():
            return not_found()
        return FileResponse(STATIC / name, media_type="text/javascript", headers=forever)


@cache
def _scripts() -> frozenset[str]:
    return frozenset(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.js"))


def _add_file_routes(app: FastAPI) -> None:
    """Adds the routes that serve files by id. Missing and forbidden files give the same answer."""

    @app.get("/thumb/{dataset}/{key}")
    def thumb(dataset: str, key: str, large: bool = False) -> Response:
        try:
            side = dataset_images.LARGE if large else dataset_images.THUMBNAIL
            headers = {"cache-control": "private, max-age=31536000"}
            return FileResponse(
                dataset_images.thumbnail(dataset, key, side),
                media_type="image/webp",
                headers=headers,
            )
        except TrainerError:
            return not_found()

    @app.get("/mask/{dataset}/{key}")
    def mask(dataset: str, key: str) -> Response:
        try:
            return FileResponse(
                dataset_images.mask_image(dataset, key),
                media_type="image/png",
                headers={"cache-control": "no-store"},
            )
        except TrainerError:
            return not_found()

    @app.get("/datasetfile/{name}.zip")
    def datasetfile(name: str) -> Response:
        try:
            pieces = dataset_folders.export(name)
        except TrainerError:
            return not_found()
        disposition = f"attachment; filename*=UTF-8''{quote(name)}.zip"
        return StreamingResponse(
            pieces, media_type="application/zip", headers={"content-disposition": disposition}
        )

    @app.get("/runfile/{run}/{name:path}")
    def runfile(run: str, name: str) -> Response:
        try:
            folder = runs.resolve(run)
        except TrainerError:
            return not_found()
        path = folder / name
        is_link = os.path.islink(path) or os.path.islink(path.parent)
        if not re.fullmatch(RUN_FILES, name) or is_link or not os.path.isfile(path):
            return not_found()
        return _file(path, attachment=path.suffix in (".safetensors", ".txt"))

    @app.get("/previewfile/{key}.png")
    def previewfile(key: str) -> Response:
        path = previews.folder() / f"{key}.png"
        if not re.fullmatch("[0-9a-f]{32}", key) or not path.is_file():
            return not_found()
        return _file(path)


def not_found() -> Response:
    """Returns the answer for a file that is missing or not served."""
    return PlainTextResponse("Not found", 404)


def _file(path: Path, attachment: bool = False) -> Response:
    return FileResponse(
        path,
        media_type=SERVED[path.suffix],
        filename=path.name if attachment else None,
        headers={"cache-control": "private, max-age=3600"},
    )
