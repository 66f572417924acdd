"""Routes of the page's server. Numbers by image go as little-endian binary, images by their number only.

GET  /                         the page; its files: static/NAME
GET  api/facts                 title, count, columns
GET  api/state                 which maps are ready
GET  api/map/KIND/COLUMN       fp32 [N, 2]
GET  api/column/I              uint16 [N] or fp32 [N]
GET  api/image/I, api/large/I  WebP
GET  api/neighbors/I           {column: [[index, similarity], ...]}
GET  api/find?text=            indices of the images with this text in their names
POST api/names                 uint32 indices -> names
POST api/search                an image file -> as neighbors
POST api/export                uint32 indices -> CSV that --data reads
"""

from __future__ import annotations

import csv
import io
import os
from importlib.resources import files

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from upstep_fast.data.loading.skipped_images import csv_cell
from upstep_fast.errors import BadImage, UpstepError, first_line, printable
from upstep_fast.explorer.gallery import Gallery
from upstep_fast.explorer.guard import Guard

NEIGHBORS = 24
MAX_UPLOAD = 64 << 20  # bytes of a query image
MAX_NAMES = 2000  # of one answer
MAX_FOUND = 10_000
ASSETS = {
    "index.html": "text/html",
    "icon.svg": "image/svg+xml",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "colors.js": "text/javascript",
    "images.js": "text/javascript",
    "points_cpu.js": "text/javascript",
    "points_gl.js": "text/javascript",
    "scatter.js": "text/javascript",
    "grid.js": "text/javascript",
}


def make_app(gallery: Gallery, token: str, port: int, framed: bool = False) -> Guard:
    """Return the ASGI app of the page at http://127.0.0.1:port/token/. framed: other pages may show it."""
    assets = {name: files("upstep_fast.explorer").joinpath("assets", name).read_bytes() for name in ASSETS}
    routes = _Routes(gallery, assets)
    api = [
        Route("/facts", routes.facts),
        Route("/state", routes.state),
        Route("/map/{kind}/{column}", routes.map),
        Route("/column/{i}", routes.column),
        Route("/image/{i}", routes.image),
        Route("/large/{i}", routes.large),
        Route("/neighbors/{i}", routes.neighbors),
        Route("/lists", routes.lists),
        Route("/find", routes.find),
        Route("/names", routes.names, methods=["POST"]),
        Route("/search", routes.search, methods=["POST"]),
        Route("/export", routes.export, methods=["POST"]),
    ]
    pages = [Route("/", routes.page), Route("/static/{name}", routes.static), Mount("/api", routes=api)]
    app = Starlette(routes=[Mount(f"/{token}", routes=pages)], exception_handlers={HTTPException: _refused})
    return Guard(app, token, port, framed)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class _Routes:
    """The answers for one gallery. Functions without `async` run in threads."""

    def __init__(self, gallery: Gallery, assets: dict[str, bytes]):
        self.gallery, self.assets = gallery, assets

    def page(self, request: Request) -> Response:
        return Response(self.assets["index.html"], media_type="text/html")

    def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.assets:
            raise HTTPException(404, "no such file")
        return Response(self.assets[name], media_type=ASSETS[name])

    def facts(self, request: Request) -> Response:
        columns = [
            {"name": printable(column.name, 100), "categories": column.categories, "isNumber": column.is_number}
            for column in self.gallery.columns
        ]
        facts = {"title": printable(self.gallery.title, 200), "count": len(self.gallery), "columns": columns}
        facts |= {"hasFiles": self.gallery.has_files, "maxUpload": MAX_UPLOAD}
        return JSONResponse(
            facts | {"sides": list(self.gallery.x), "dims": [x.shape[1] for x in self.gallery.x.values()]}
        )

    def state(self, request: Request) -> Response:
        maps = self.gallery.maps
        return JSONResponse({"ready": [list(key) for key in list(maps.ready)], "message": printable(maps.state, 300)})

    def map(self, request: Request) -> Response:
        key = request.path_params["kind"], request.path_params["column"]
        if key not in self.gallery.maps.ready:
            raise HTTPException(404, "no such map")
        return _binary(self.gallery.maps.ready[key])

    def column(self, request: Request) -> Response:
        return _binary(self.gallery.columns[_index(request, len(self.gallery.columns))].values)

    def image(self, request: Request) -> Response:
        return self._picture(request, large=False)

    def large(self, request: Request) -> Response:
        return self._picture(request, large=True)

    def _picture(self, request: Request, large: bool) -> Response:
        try:
            data = self.gallery.thumbnail(_index(request, len(self.gallery)), large)
        except (BadImage, OSError, KeyError, MemoryError, UpstepError) as error:
            raise HTTPException(404, printable(f"no picture: {first_line(error)}")) from error
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})

    def neighbors(self, request: Request) -> Response:
        return JSONResponse(self.gallery.neighbors_of(_index(request, len(self.gallery)), NEIGHBORS))

    def lists(self, request: Request) -> Response:
        return JSONResponse(self.gallery.lists.get())

    def find(self, request: Request) -> Response:
        text = request.query_params.get("text", "")[:500].lower()
        found = [i for i, name in enumerate(self.gallery.names) if text in name.lower()] if text else []
        return JSONResponse({"count": len(found), "indices": found[:MAX_FOUND]})

    async def names(self, request: Request) -> Response:
        indices = await self._indices(request, MAX_NAMES)
        return JSONResponse([printable(self.gallery.names[i], 4096) for i in indices])

    async def search(self, request: Request) -> Response:
        data = await _body(request, MAX_UPLOAD)
        try:
            return JSONResponse(await run_in_threadpool(self.gallery.search, data, NEIGHBORS))
        except (BadImage, OSError, MemoryError, UpstepError) as error:
            raise HTTPException(422, printable(f"the image cannot be used: {first_line(error)}")) from error

    async def export(self, request: Request) -> Response:
        indices = await self._indices(request, len(self.gallery))
        headers = {"Content-Disposition": 'attachment; filename="selection.csv"'}
        return Response(await run_in_threadpool(self._csv, indices), media_type="text/csv", headers=headers)

    def _csv(self, indices: list[int]) -> bytes:
        """Return path and the columns that color, as UTF-8 with the bytes of paths as they are."""
        text, columns = io.StringIO(newline=""), self.gallery.columns
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", *(csv_cell(column.name) for column in columns)])
        for i in indices:
            writer.writerow([self.gallery.path(i), *(csv_cell(column.text(i)) for column in columns)])
        return os.fsencode(text.getvalue()) if os.name != "nt" else text.getvalue().encode()

    async def _indices(self, request: Request, most: int) -> list[int]:
        data = await _body(request, 4 * most)
        if len(data) % 4:
            raise HTTPException(400, "give indices of 4 bytes")
        indices = np.frombuffer(data, "<u4")
        if len(indices) and int(indices.max()) >= len(self.gallery):
            raise HTTPException(400, f"there are {len(self.gallery)} images")
        return indices.tolist()


def _index(request: Request, count: int) -> int:
    """Return the number in the path. Raises HTTPException."""
    text = request.path_params["i"]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < count):
        raise HTTPException(404, f"no such number, there are {count}")
    return int(text)


def _binary(values: np.ndarray) -> Response:
    return Response(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes())


async def _body(request: Request, most: int) -> bytes:
    """Return the request's body. Raises HTTPException before more than `most` bytes are held."""
    data, too_long = bytearray(), HTTPException(413, f"more than {most} bytes")
    if int(request.headers.get("content-length", 0)) > most:  # h11 has checked that it is a number
        raise too_long
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                raise too_long
    except ClientDisconnect as error:  # a closed tab: nobody reads the answer
        raise HTTPException(400, "the body ended early") from error
    return bytes(data)
