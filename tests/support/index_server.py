"""A package index on loopback, for tests: the simple JSON form, a wheel for each version, its metadata beside it.

    with IndexServer({"torch": ("2.11.0", ["sympy>=1.13.3"])}) as index:
        ... index.url ...
        assert index.asked == ["/simple/torch/", ...]

Packages named in `bare` have no metadata beside their wheel, so it has to be read out of it, by ranges.
"""

import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

JSON = "application/vnd.pypi.simple.v1+json"


class IndexServer:
    """`url` is its address, `asked` every path that it was asked for, in order."""

    def __init__(self, packages, bare=()):
        self.packages, self.bare, self.asked = packages, bare, []
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.index = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}/simple"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def answer(self, path):
        """(content type, content) of a path, None where there is nothing."""
        page = re.fullmatch(r"/simple/([^/]+)/", path)
        if page and page[1] in self.packages:
            names = [self.file_name(page[1], system) for system in ("win_amd64", "any")]
            files = [{"filename": name, "url": f"../../files/{page[1]}/{name}"} for name in names]
            return JSON, json.dumps({"name": page[1], "files": files}).encode()
        file = re.fullmatch(r"/files/([^/]+)/[^/]+-any\.whl(\.metadata)?", path)
        if file and not (file[2] and file[1] in self.bare):
            return "application/octet-stream", self.metadata(file[1]) if file[2] else self.wheel(file[1])
        return None

    def file_name(self, name, system):
        return f"{name.replace('-', '_')}-{self.packages[name][0]}-py3-none-{system}.whl"

    def metadata(self, name):
        version, required = self.packages[name]
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        return (head + "".join(f"Requires-Dist: {one}\n" for one in required)).encode()

    def wheel(self, name):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            folder = f"{name.replace('-', '_')}-{self.packages[name][0]}.dist-info"
            archive.writestr(f"{folder}/METADATA", self.metadata(name))
            archive.writestr("code.py", b"#" * 200_000)
        return whole.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self):
        self.server.index.asked.append(self.path)
        kind, content = self.server.index.answer(self.path) or ("text/plain", None)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response(404 if content is None else 206 if wanted else 200)
        content = content or b""
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, format, *args):
        """Silent; `IndexServer.asked` is the log."""
