"""A Hugging Face Hub on the loopback interface: the routes that downloads and uploads use, and everything that can go
wrong on them.

    with HubServer() as hub:
        hub.add('org/name', {'model.safetensors': data})
        hub.fault('resolve', status=503, times=2)

Files of LFS_SUFFIXES are redirected to another origin with a SHA-256 ETag, as on the real Hub; the others are served
in place with the object id git gives them.
"""
import base64
import contextlib
import hashlib
import itertools
import json
import math
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import unquote

LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.ckpt', '.tar')
TOKEN = 'hf_loopback'
RESOLVE = re.compile(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)')
CHUNK = 1 << 20


@dataclass
class Repo:
    commits: Dict[str, Dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    refs: Dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    gated: bool = False
    private: bool = False


@dataclass
class Fault:
    """What happens to requests whose 'METHOD path' contains `part`, the next `times` of them."""
    part: str
    times: float
    status: Optional[int] = None  # answer with this
    keep: Optional[float] = None  # send this share of the announced body, then hang up
    body: Optional[Callable[[bytes], bytes]] = None  # send another body, with its own length
    pause: float = 0.  # seconds between two chunks of the body, or after a received one
    chunk: int = CHUNK


class HubServer:
    """The server; `requests` lists what was asked as 'METHOD path'.

    `headers` has the headers that came with each, names in lower case.
    """

    def __init__(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.blobs: Dict[str, bytes] = {}
        self.requests: List[str] = []
        self.headers: List[Dict[str, str]] = []
        self.faults: List[Fault] = []
        self.etag: Optional[str] = None  # in place of the hash
        self.sent = threading.Event()  # set after the first chunk of a paused body, or when a paused one has come
        self.connections: List[socket.socket] = []
        self._serial = itertools.count()
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.files_url = f'http://localhost:{self.port}/files'  # another origin than `url`

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self._server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:  # kept alive, they would go on being served
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo_id: str, files: Dict[str, bytes], revision: str = 'main', **flags: bool) -> str:
        """Commit files on top of a revision, a new one starts empty; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo())
        for flag, value in flags.items():
            setattr(repo, flag, value)
        commit = hashlib.sha1(f'{repo_id} {next(self._serial)}'.encode()).hexdigest()
        repo.commits[commit] = {**repo.commits.get(repo.refs.get(revision, ''), {}), **files}
        repo.refs[revision] = commit
        self.blobs.update((hashlib.sha256(data).hexdigest(), data) for data in files.values())
        return commit

    def fault(self, part: str, times: float = math.inf, **what: Any) -> None:
        self.faults.append(Fault(part, times, **what))

    def asked(self, part: str = '') -> List[str]:
        return [request for request in self.requests if part in request]

    def serve(self, monkeypatch: Any, cache: Any) -> 'HubServer':
        """Point huggingface_hub, in this process, at this server and at a cache folder; its back-off takes no time."""
        from huggingface_hub import constants, hf_api

        for name, value in {
            'ENDPOINT': self.url,
            'HUGGINGFACE_CO_URL_TEMPLATE': f'{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}',
            'HF_HUB_CACHE': str(cache),
            'HF_HUB_OFFLINE': False,
            'HF_HUB_DISABLE_XET': True,  # uploads would go to a service of its own
            'HF_TOKEN_PATH': str(cache / 'token'),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, 'endpoint', self.url)  # behind the functions that timm 1.0.20 calls
        for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr('time.sleep', lambda seconds: None)
        return self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and body are two writes, which it delays by 40 ms

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        self.hub.connections.append(self.connection)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            super().handle()

    def send(self, status: int, body: bytes = b'', fault: Optional[Fault] = None, **headers: Any) -> None:
        keep = len(body) if fault is None or fault.keep is None else int(len(body) * fault.keep)
        self.send_response(status)
        for name, value in {'Content_Length': len(body), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'HEAD':
            return
        view = memoryview(body)[:keep]
        step = fault.chunk if fault is not None else CHUNK
        for start in range(0, len(view), step):
            self.wfile.write(view[start:start + step])
            if fault is not None and fault.pause:
                self.wfile.flush()
                self.hub.sent.set()
                threading.Event().wait(fault.pause)  # not time.sleep, which tests of the client's back-off replace
        if keep < len(body):
            self.close_connection = True

    def error(self, status: int, code: str, **headers: Any) -> None:
        self.send(status, X_Error_Code=code, X_Error_Message=code, **headers)

    def answer(self) -> None:
        hub, path = self.hub, unquote(self.path.partition('?')[0])
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if path.startswith('/api/') and self.command == 'GET':
            return self.error(404, 'NotFound')  # housekeeping of the client, which it does when it sees fit
        hub.requests.append(f'{self.command} {path}')
        hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = next((f for f in hub.faults if f.part in hub.requests[-1] and f.times > 0), None)
        if fault is not None:
            fault.times -= 1
            if fault.status is not None:
                return self.send(fault.status)
        if self.command in ('POST', 'PUT'):
            if fault is not None and fault.pause:
                hub.sent.set()
                threading.Event().wait(fault.pause)
            return self.store(path, body)
        if path.startswith('/files/'):
            return self.content(hub.blobs[path.rpartition('/')[2]], fault)
        match = RESOLVE.fullmatch(self.path.partition('?')[0])  # a revision holds quoted slashes
        return self.resolve(*map(unquote, match.groups()), fault) if match else self.error(404, 'RepoNotFound')

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def content(self, data: bytes, fault: Optional[Fault], **headers: Any) -> None:
        if fault is not None and fault.body is not None and self.command == 'GET':
            data = fault.body(data)
        self.send(200, data, fault, **headers)

    # -- downloads

    def resolve(self, repo_id: str, revision: str, path: str, fault: Optional[Fault]) -> None:
        repo = self.hub.repos.get(repo_id)
        trusted = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        if repo is None or (repo.private and not trusted):
            return self.error(401, 'RepoNotFound')
        if repo.gated and not trusted:
            return self.error(401, 'GatedRepo')
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            # a repository without a commit of ours still has the one it was created with
            return self.error(404, 'EntryNotFound' if revision == 'main' else 'RevisionNotFound')
        data = repo.commits[commit].get(path)
        if data is None:
            return self.error(404, 'EntryNotFound', X_Repo_Commit=commit)
        sha = hashlib.sha256(data).hexdigest()
        if path.endswith(LFS_SUFFIXES):
            return self.send(
                302, X_Repo_Commit=commit, X_Linked_Etag=f'"{self.hub.etag or sha}"', X_Linked_Size=len(data),
                Location=f'{self.hub.files_url}/{sha}')
        oid = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        return self.content(data, fault, X_Repo_Commit=commit, ETag=f'"{self.hub.etag or oid}"')

    # -- uploads

    def store(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path.startswith('/upload/'):
            sha = path.rpartition('/')[2]
            good = hashlib.sha256(body).hexdigest() == sha
            if good:
                hub.blobs[sha] = body
            return self.send(200 if good else 422)
        if path.endswith('/commit/main'):
            repo_id = path.removeprefix('/api/models/').removesuffix('/commit/main')
            commit = hub.add(repo_id, dict(self.committed(body)))
            return self.reply(commitOid=commit, commitUrl=f'{hub.url}/{repo_id}/commit/{commit}', hookOutput='')
        asked = json.loads(body)
        if path == '/api/repos/create':
            repo_id = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
            hub.repos.setdefault(repo_id, Repo())
            return self.reply(url=f'{hub.url}/{repo_id}')
        if path.endswith('/preupload/main'):
            mode = {True: 'lfs', False: 'regular'}
            return self.reply(files=[
                dict(path=f['path'], uploadMode=mode[f['path'].endswith(LFS_SUFFIXES)], shouldIgnore=False)
                for f in asked['files']])
        if path.endswith('/info/lfs/objects/batch'):
            return self.reply(transfer='basic', objects=[
                dict(oid=o['oid'], size=o['size'], actions=dict(upload=dict(href=f'{hub.url}/upload/{o["oid"]}')))
                for o in asked['objects']])
        return self.reply()  # validate-yaml

    def committed(self, body: bytes) -> List[Tuple[str, bytes]]:
        lines = [json.loads(line) for line in body.splitlines()]
        files = [(v['value']['path'], base64.b64decode(v['value']['content'])) for v in lines if v['key'] == 'file']
        return files + [(v['value']['path'], self.hub.blobs[v['value']['oid']]) for v in lines if v['key'] == 'lfsFile']

    def reply(self, **values: Any) -> None:
        self.send(200, json.dumps(values).encode(), Content_Type='application/json')
