"""What the hub of `local_hub.py` answers to each request, in the words of the Hugging Face Hub."""

import base64
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml
from local_hub_storage import Entry, HubError, Repository, is_large


if TYPE_CHECKING:
    from local_hub import LocalHub


class Answer(NamedTuple):
    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = {}


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


def refusal(error: HubError) -> Answer:
    headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
    return as_json({"error": error.message}, error.status, headers)


class Request(NamedTuple):
    """What is asked: the named parts of its address, its query, and its body."""

    hub: "LocalHub"
    method: str
    role: str  # "write", "read", or empty without a token
    parts: dict[str, str]
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    @property
    def kind(self) -> str:
        return self.parts["kind"] or "models"

    def repository(self) -> Repository:
        """The one that the address names, if it is there for this token."""
        repository = self.hub.repositories.get((self.kind, self.parts["name"]))
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repository.private and not self.role:
            raise HubError(401, "Repository not found", "RepoNotFound")
        return repository

    @property
    def page(self) -> str:
        """Address of the repository for a reader."""
        return f"{self.hub.url}/{'' if self.kind == 'models' else self.kind + '/'}{self.parts['name']}"

    def meant(self) -> "Request":
        """The same with the repository that the body names, instead of the address."""
        body = self.json
        parts = {"kind": body.get("type", "model") + "s"}
        parts["name"] = f"{body.get('organization') or self.hub.user}/{body['name']}"
        return self._replace(parts=parts)

    def allow(self, role: str) -> None:
        if not self.role:
            raise HubError(401, "Invalid username or password.")
        if role == "write" and self.role != "write":
            raise HubError(403, "This token may read, but not write")


def whoami(request: Request) -> Answer:
    request.allow("read")
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": request.role}}
    return as_json({"type": "user", "name": request.hub.user, "fullname": request.hub.user, "orgs": [], "auth": token})


def validate_card(request: Request) -> Answer:
    return as_json({"errors": [], "warnings": []})


def listed(request: Request) -> Answer:
    repositories = [name for kind, name in request.hub.repositories if kind == request.kind]
    found = (request._replace(parts=request.parts | {"name": name, "revision": ""}) for name in repositories)
    return as_json([described(one) for one in found if one.role or not one.repository.private])


def information(request: Request) -> Answer:
    return as_json(described(request))


def described(request: Request) -> dict:
    """What the Hub tells of a repository at a revision."""
    repository, name = request.repository(), request.parts["name"]
    sha = repository.resolve(request.parts["revision"] or "main")
    commit = repository.commits[sha]
    card = commit.files.get("README.md")
    header = re.match(r"---\n(.*?)\n---", card.content.decode(), re.DOTALL) if card else None
    data = (yaml.safe_load(header[1]) if header else None) or {}
    about = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    about |= {key: data.get(key) for key in ("pipeline_tag", "library_name")}
    about |= {"id": name, "author": name.split("/")[0], "sha": sha, "lastModified": commit.date}
    about |= {"tags": data.get("tags") or [], "cardData": data}
    return about | {"siblings": [sibling(*item, "blobs" in request.query) for item in sorted(commit.files.items())]}


def sibling(path: str, entry: Entry, in_full: bool) -> dict:
    if not in_full:
        return {"rfilename": path}
    large = {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}}
    return {"rfilename": path, "size": entry.size, "blobId": entry.oid} | (large if entry.sha256 else {})


def references(request: Request) -> Answer:
    repository = request.repository()

    def points(names: dict[str, str], prefix: str) -> list[dict]:
        return [{"name": n, "ref": prefix + n, "targetCommit": c} for n, c in names.items()]

    branches = {n: c for n, c in repository.branches.items() if not n.startswith("refs/pr/")}
    requests = {n: c for n, c in repository.branches.items() if n.startswith("refs/pr/")}
    found = {"branches": points(branches, "refs/heads/"), "tags": points(repository.tags, "refs/tags/")}
    return as_json(found | {"converts": [], "pullRequests": points(requests, "")})


def folders(paths: Iterable[str]) -> set[str]:
    return {str(folder) for path in paths for folder in Path(path).parents if folder.name}


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


def tree(request: Request) -> Answer:
    files, inside = request.repository().files(request.parts["revision"]), request.parts["folder"]
    found = [entry.described(path) for path, entry in sorted(files.items())]
    found += [folder_entry(path) for path in sorted(folders(files))]
    if inside:
        found = [entry for entry in found if entry["path"].startswith(f"{inside}/")]
        if not found:
            raise HubError(404, f"{inside} does not exist", "EntryNotFound")
    if "recursive" not in request.query:
        found = [entry for entry in found if str(Path(entry["path"]).parent) == (inside or ".")]
    return as_json(found)


def some_paths(request: Request) -> Answer:
    files = request.repository().files(request.parts["revision"])
    paths = parse_qs(request.body.decode()).get("paths", [])
    found = [files[path].described(path) for path in paths if path in files]
    return as_json(found + [folder_entry(path) for path in paths if path in folders(files)])


def history(request: Request) -> Answer:
    repository = request.repository()
    name, found = repository.resolve(request.parts["revision"]), []
    while name:
        commit = repository.commits[name]
        about = {"title": commit.title, "message": "", "date": commit.date, "authors": [{"user": request.hub.user}]}
        found.append({"id": name} | about)
        name = commit.parent
    return as_json(found)


def xet_access(request: Request) -> Answer:
    request.repository()  # raises where there is none
    address = request.hub.large_files.address
    expires = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return as_json({"casUrl": address, "accessToken": "xet", "exp": expires}, 200, headers)


def download(request: Request) -> Answer:
    """A file at a revision; `Handler` cuts out the part that is asked for."""
    repository, path = request.repository(), request.parts["path"]
    commit = repository.resolve(request.parts["revision"])
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    entry = repository.commits[commit].files.get(path)
    if entry is None:
        answer = refusal(HubError(404, "Entry not found", "EntryNotFound"))
        return answer._replace(headers=answer.headers | {"X-Repo-Commit": commit})
    headers |= {"ETag": f'"{entry.sha256 or entry.oid}"'}
    if not entry.sha256:
        return Answer(200, entry.content, headers)
    headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
    if entry.xet_hash:
        refresh = f"{request.hub.url}/api/{request.kind}/{request.parts['name']}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": entry.xet_hash, "X-Xet-Refresh-Route": refresh}
    if request.method == "HEAD":
        return Answer(200, b"", headers | {"Content-Length": str(entry.size)})
    return Answer(200, request.hub.large_files.path(entry), headers)


def create(request: Request) -> Answer:
    meant, body = request.meant(), request.json
    name = meant.parts["name"]
    if (meant.kind, name) in request.hub.repositories:
        return as_json({"error": "You already created this repository", "url": meant.page}, 409)
    private = body.get("visibility") == "private" or bool(body.get("private"))
    request.hub.repositories[meant.kind, name] = Repository(private=private)
    return as_json({"url": meant.page, "name": name})


def delete(request: Request) -> Answer:
    meant = request.meant()
    meant.repository()  # raises where there is none
    del request.hub.repositories[meant.kind, meant.parts["name"]]
    return as_json({})


def change_settings(request: Request) -> Answer:
    request.repository().private = request.json.get("visibility") == "private"
    return as_json({})


def create_branch(request: Request) -> Answer:
    repository, name = request.repository(), request.parts["branch"]
    if name in repository.branches:
        raise HubError(409, f"Reference already exists: {name}")
    repository.branches[name] = repository.resolve(request.json.get("startingPoint") or "main")
    return as_json({})


def delete_branch(request: Request) -> Answer:
    if request.repository().branches.pop(request.parts["branch"], None) is None:
        raise HubError(404, "Reference not found", "RevisionNotFound")
    return as_json({})


def create_tag(request: Request) -> Answer:
    repository, name = request.repository(), request.json["tag"]
    if name in repository.tags:
        raise HubError(409, f"Tag reference exists already: {name}")
    repository.tags[name] = repository.resolve(request.parts["revision"])
    return as_json({})


def delete_tag(request: Request) -> Answer:
    if request.repository().tags.pop(request.parts["tag"], None) is None:
        raise HubError(404, "Reference not found", "RevisionNotFound")
    return as_json({})


def announce(request: Request) -> Answer:
    """How each file of a commit has to be uploaded."""
    there, found = request.repository().files(request.parts["revision"]), []
    for file in request.json["files"]:
        path, entry = file["path"], there.get(file["path"])
        mode = "lfs" if is_large(path, file["size"]) else "regular"
        oid = None if entry is None else entry.sha256 or entry.oid
        found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": found})


def announce_large(request: Request) -> Answer:
    """Where each large file has to be uploaded; nowhere if it is there."""
    request.repository()  # raises where there is none
    found = []
    for file in request.json["objects"]:
        upload = {"upload": {"href": f"{request.hub.url}/_lfs/{file['oid']}", "header": {}}}
        found.append(file if file["oid"] in request.hub.large_files else file | {"actions": upload})
    return as_json({"transfer": "basic", "objects": found})


def upload_large(request: Request) -> Answer:
    request.hub.large_files.write(request.parts["sha256"], request.body)
    return Answer()


def commit(request: Request) -> Answer:
    hub, repository, branch = request.hub, request.repository(), request.parts["revision"]
    first, *operations = (json.loads(line) for line in request.body.splitlines() if line.strip())
    if branch not in repository.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    parent = repository.branches[branch]
    late = hub.busy > 0
    hub.busy -= late
    if late or not parent.startswith(first["value"].get("parentCommit") or ""):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.files(parent))
    for operation in operations:
        apply(operation["key"], operation["value"], files, hub)
    discussion = None
    if "create_pr" in request.query:
        repository.pull_requests += 1
        branch = f"refs/pr/{repository.pull_requests}"
        discussion = f"{request.page}/discussions/{repository.pull_requests}"
    name = repository.add(branch, files, first["value"]["summary"], parent)
    about = {"commitOid": name, "commitUrl": f"{request.page}/commit/{name}", "pullRequestUrl": discussion}
    return as_json({"success": True, "hookOutput": ""} | about)


def apply(operation: str, value: dict, files: dict[str, Entry], hub: "LocalHub") -> None:
    """Do one operation of a commit to the files."""
    path = value["path"]
    match operation:
        case "file":
            files[path] = Entry.regular(base64.b64decode(value["content"]))
        case "lfsFile":
            files[path] = hub.large_files.entry(value["oid"], value["size"])
        case "deletedFile" if path in files:
            del files[path]
        case "deletedFolder" if any(name.startswith(path) for name in files):
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        case _:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")


REPOSITORY = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
READS = {
    r"GET /api/whoami-v2": whoami,
    r"POST /api/validate-yaml": validate_card,
    r"GET /api/(?P<kind>models|datasets|spaces)": listed,
    rf"GET {REPOSITORY}(?:/revision/(?P<revision>[^/]+))?": information,
    rf"GET {REPOSITORY}/refs": references,
    rf"GET {REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?": tree,
    rf"POST {REPOSITORY}/paths-info/(?P<revision>[^/]+)": some_paths,
    rf"GET {REPOSITORY}/commits/(?P<revision>[^/]+)": history,
    rf"GET {REPOSITORY}/xet-read-token/.+": xet_access,
    rf"GET {PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": download,
    r"PUT /_lfs/(?P<sha256>[0-9a-f]{64})": upload_large,  # whose address was given to one who may write
}
WRITES = {
    r"POST /api/repos/create": create,
    r"DELETE /api/repos/delete": delete,
    rf"PUT {REPOSITORY}/settings": change_settings,
    rf"POST {REPOSITORY}/branch/(?P<branch>[^/]+)": create_branch,
    rf"DELETE {REPOSITORY}/branch/(?P<branch>[^/]+)": delete_branch,
    rf"POST {REPOSITORY}/tag/(?P<revision>[^/]+)": create_tag,
    rf"DELETE {REPOSITORY}/tag/(?P<tag>[^/]+)": delete_tag,
    rf"POST {REPOSITORY}/preupload/(?P<revision>[^/]+)": announce,
    rf"POST {PAGE}\.git/info/lfs/objects/batch": announce_large,
    rf"GET {REPOSITORY}/xet-write-token/.+": xet_access,
    rf"POST {REPOSITORY}/commit/(?P<revision>[^/]+)": commit,
}


def route(line: str) -> tuple[Callable[[Request], Answer], str, dict[str, str]]:
    """What answers to "METHOD /path", the role it needs, and the named parts of the path."""
    for role, routes in (("read", READS), ("write", WRITES)):
        for pattern, function in routes.items():
            # in an address that is still quoted, a revision such as refs%2Fpr%2F1 is one part
            if match := re.fullmatch(pattern, line):
                return function, role, {name: unquote(part or "") for name, part in match.groupdict().items()}
    raise HubError(404, f"Nothing answers to {line}")
