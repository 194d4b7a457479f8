"""The JSON interface of serve.py, and the files of its page."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import swagger_ui_bundle
from fastapi import Body, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanocolbert.cli import InputError, os_message, say
from nanocolbert.server.guard import FAILED, Guard
from nanocolbert.server.worker import Job, Overload, Worker

QUERY, WHERE, AMONG = 2_000, 1_000, 10_000  # characters, characters, ids
HIGHLIGHTED = 100  # passages at a time
TEXTS, TEXT, PID = 1_000, 100_000, 500  # texts of a change, characters of each, and of an id
CHANGES = ("/add", "/upsert", "/delete")
DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nanoColBERT: interface</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="icon.svg"><link rel="stylesheet" href="swagger-ui.css"></head>
<body><div id="docs"></div><script src="swagger-ui-bundle.js"></script><script src="docs.js"></script></body></html>
"""

Pid = Annotated[str, Field(min_length=1, max_length=PID)]


@dataclass
class Settings:
    """What serve.py's flags say."""

    page: Path  # folder of index.html and what belongs to it
    index: str = "index"  # names, for /health
    model: str = "model"
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    token: str | None = None  # None: the index is not to be changed
    max_k: int = 1_000
    max_body: int = 1_000_000


# -------------------------------------------------------------------------------------------- what is sent and answered


class Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Explain(Sent):
    query: str = Field(max_length=QUERY)
    pid: Pid


class Highlight(Sent):
    query: str = Field(max_length=QUERY)
    pids: list[Pid] = Field(max_length=HIGHLIGHTED)


class Delete(Sent):
    ids: list[Pid] = Field(min_length=1, max_length=AMONG)


class Add(Sent):
    ids: list[Pid] = Field(min_length=1, max_length=TEXTS)
    texts: list[Annotated[str, Field(max_length=TEXT)]] = Field(min_length=1, max_length=TEXTS)
    metadata: list[dict[str, Any] | None] | None = Field(None, max_length=TEXTS, description="an object a passage")


class Found(BaseModel):
    pid: str
    score: float
    text: str | None
    metadata: dict[str, Any] | None
    pieces: list[dict] | None = Field(None, description="with explain: the text in pieces, what matched each")


class Answer(BaseModel):
    hits: list[Found]
    ms: dict[str, float] = Field(description="milliseconds: wait, encode, search, explain")
    version: int = Field(description="of the index")


class Changed(BaseModel):
    changed: int
    passages: int
    version: int


class Health(BaseModel):
    passages: int
    version: int
    index: str
    model: str
    fields: list[str]
    uptime: float
    searches: int
    batches: int
    waiting: int
    writable: bool
    max_k: int


def search_model(max_k: int) -> type[BaseModel]:
    """What a search may say, with the limits of this server."""
    return create_model(
        "Search",
        __base__=Sent,
        q=(str, Field(max_length=QUERY, description="the query")),
        k=(int, Field(10, ge=1, le=max_k)),
        quality=(Literal["fast", "default", "best"], "default"),
        among=(list[Pid] | None, Field(None, max_length=AMONG, description="search these passages only")),
        where=(
            str | None,
            Field(None, max_length=WHERE, description="SQL over metadata: year >= 2020"),
        ),
        by_document=(bool, Field(False, description="the best passage of each document")),
        explain=(bool, Field(False, description="add what each passage matched")),
    )


# --------------------------------------------------------------------------------------------------------------- app


@dataclass
class Workers:
    """The threads of a server: what one takes long for does not keep the others."""

    searches: Worker
    filtered: Worker  # searches with `where`, which may take seconds
    explanations: Worker  # where no vectors are kept, passages are embedded once more
    changes: Worker

    def close(self, seconds: float) -> None:
        for worker in vars(self).values():
            worker.close(seconds)


def make_app(searcher, workers: Workers, settings: Settings) -> Guard:
    """The ASGI app of an open Searcher."""
    app = FastAPI(title="nanoColBERT", version="1", docs_url=None, redoc_url=None)
    app.openapi_version = "3.0.3"  # what the bundled page can show
    add_errors(app, [str(folder) for folder in getattr(searcher, "folders", [])])
    add_searches(app, searcher, workers, settings)
    add_health(app, searcher, workers.searches, settings)
    add_changes(app, searcher, workers.changes)
    add_files(app, settings.page)
    return Guard(app, settings.hosts, settings.max_body, CHANGES, settings.token)


def add_errors(app: FastAPI, folders: list[str]) -> None:
    """Every error is {"error": one line}, without where the indexes lie, which is nobody's business."""

    def answer(status: int, line: str, headers=None) -> JSONResponse:
        return JSONResponse({"error": " ".join(line.split())}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
        where = ".".join(map(str, first["loc"][1:])) or "the body"
        return answer(422, f"{where}: {first['msg'].removeprefix('Value error, ')}")

    @app.exception_handler(InputError)
    async def mistaken(_, error: InputError):
        line = str(error).removeprefix(f"{', '.join(folders)}: ")
        for folder in folders:  # as words of their own
            line = re.sub(rf"(?<!\S){re.escape(folder)}(?=[\s,:/]|$)", "the index", line)
        return answer(422, line)

    @app.exception_handler(OSError)
    async def refused_by_the_system(_, error: OSError):
        say(os_message(error))
        return answer(500, f"the system refuses: {error.strerror or type(error).__name__}")

    @app.exception_handler(Overload)
    async def overloaded(*_):
        return answer(503, "too many requests are waiting: try again in a second", {"Retry-After": "1"})

    @app.exception_handler(Exception)  # the guard hears of it too
    async def failed(*_):
        return answer(500, FAILED)

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: StarletteHTTPException):
        told = {404: f"{request.url.path}: nothing is here; /docs shows what there is", 405: "not by this method"}
        return answer(error.status_code, told.get(error.status_code, error.detail), error.headers)


def rounded(ms: dict[str, float]) -> dict[str, float]:
    return {step: round(value, 2) for step, value in ms.items()}


def pieces_of(explanation) -> list[dict]:
    return [piece.to_dict() for piece in explanation.pieces()]


async def result_of(worker: Worker, job: Job):
    return await asyncio.wrap_future(worker.submit(job))


def add_searches(app: FastAPI, searcher, workers: Workers, settings: Settings) -> None:
    Search = search_model(settings.max_k)

    async def explained(query: str, pids: list[str], tell: Callable, ms: dict) -> list:
        job = Job(call=lambda: list(map(tell, searcher.explain(query, pids))))
        found = await result_of(workers.explanations, job)
        ms["explain"] = 1000 * (time.perf_counter() - job.since)
        return found

    async def search(asked: Search) -> JSONResponse:
        """The k best passages for a query, the best first."""
        if asked.explain and asked.k > HIGHLIGHTED:
            raise InputError(f"k: {asked.k} passages: {HIGHLIGHTED} at most are explained at a time")
        keep = ("k", "quality", "among", "where", "by_document")
        values = asked.model_dump()
        job = Job(asked.q, {name: values[name] for name in keep if values[name] not in (None, False)})
        hits = await result_of(workers.filtered if asked.where else workers.searches, job)
        hits = [hit._asdict() for hit in hits]
        if asked.explain and hits:
            try:
                found = await explained(asked.q, [hit["pid"] for hit in hits], pieces_of, job.ms)
                hits = [hit | {"pieces": pieces} for hit, pieces in zip(hits, found, strict=True)]
            except InputError:  # one has been deleted since it was found, or the index keeps no texts
                pass
        return JSONResponse({"hits": hits, "ms": rounded(job.ms), "version": searcher.version})

    @app.get("/search", response_model=Answer, tags=["search"])
    async def search_by_address(asked: Annotated[Search, Query()]):
        return await search(asked)

    @app.post("/search", response_model=Answer, tags=["search"])
    async def search_by_body(asked: Annotated[Search, Body()]):
        return await search(asked)

    @app.post("/explain", response_model=dict, tags=["search"])
    async def explain(asked: Explain):
        """Why a passage scores as it does: tokens of both, each query token's match, all similarities."""
        ms = {}
        (found,) = await explained(asked.query, [asked.pid], lambda found: found.to_dict(), ms)
        return JSONResponse({"pid": asked.pid, **found, "ms": rounded(ms)})

    @app.post("/highlight", response_model=dict, tags=["search"])
    async def highlight(asked: Highlight):
        """The texts of some passages in pieces, each with what of the query matched it."""
        ms = {}
        pieces = await explained(asked.query, asked.pids, pieces_of, ms) if asked.pids else []
        return JSONResponse({"pieces": dict(zip(asked.pids, pieces, strict=True)), "ms": rounded(ms)})


def add_health(app: FastAPI, searcher, searches: Worker, settings: Settings) -> None:
    started = time.monotonic()

    @app.get("/health", response_model=Health, tags=["server"])
    async def health():
        return JSONResponse(
            {
                "passages": len(searcher),
                "version": searcher.version,
                "index": settings.index,
                "model": settings.model,
                "fields": searcher.fields,
                "uptime": round(time.monotonic() - started, 1),
                **{name: getattr(searches, name) for name in ("searches", "batches", "waiting")},
                "writable": settings.token is not None,
                "max_k": settings.max_k,
            }
        )


def add_changes(app: FastAPI, searcher, worker: Worker) -> None:
    """Changes; that they are permitted has been seen to by the guard."""
    changes = {
        "dependencies": [Depends(HTTPBearer(auto_error=False))],
        "response_model": Changed,
        "tags": ["changes"],
    }  # for /docs

    async def change(call: Callable, *arguments) -> JSONResponse:
        done = result_of(worker, Job(call=lambda: call(*arguments)))
        changed = await asyncio.shield(done)  # it is made even if who asked for it has gone
        return JSONResponse({"changed": changed, "passages": len(searcher), "version": searcher.version})

    def check(asked: Add) -> None:
        for name in ("texts", "metadata"):
            given = getattr(asked, name)
            if given is not None and len(given) != len(asked.ids):
                raise InputError(f"{len(asked.ids)} ids, but {len(given)} {name}: give one for each")

    @app.post("/add", **changes)
    async def add(asked: Add):
        """Add passages that are not there."""
        check(asked)
        return await change(searcher.add, asked.ids, asked.texts, asked.metadata)

    @app.post("/upsert", **changes)
    async def upsert(asked: Add):
        """Add passages, in place of those that are there by these ids."""
        check(asked)
        return await change(searcher.upsert, asked.ids, asked.texts, asked.metadata)

    @app.post("/delete", **changes)
    async def delete(asked: Delete):
        """Delete passages."""
        return await change(searcher.delete, asked.ids)


def add_files(app: FastAPI, page: Path) -> None:
    """The page, and the one that shows the interface; nothing is fetched from elsewhere."""
    bundle = Path(swagger_ui_bundle.swagger_ui_path)
    files = {f"/{name}": page / name for name in ("style.css", "app.js", "docs.js", "icon.svg")}
    files |= {f"/{name}": bundle / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")}
    for address, path in {"/": page / "index.html", **files}.items():
        app.add_route(address, sender(path), include_in_schema=False)

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return HTMLResponse(DOCS)


def sender(path: Path) -> Callable:
    """What answers with a file, which the browser is to ask for again."""

    async def send(_: Request) -> FileResponse:
        return FileResponse(path, headers={"cache-control": "no-cache"})

    return send
